"""The collector of spans: what it takes, and what it says when it cannot."""

import gzip
from collections.abc import Generator
from pathlib import Path

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from durable._collector import Collector

PROTOBUF = {"content-type": "application/x-protobuf"}


@pytest.fixture
def collector(tmp_path: Path) -> Generator[Collector]:
    with Collector(tmp_path / "spans.jsonl") as collector:
        yield collector


def send(collector: Collector, body: bytes, **headers: str) -> httpx2.Response:
    url = f"{collector.url}/v1/traces"
    return httpx2.post(url, content=body, headers=PROTOBUF | headers, trust_env=False, timeout=30)


def spans(*kinds: int) -> bytes:
    request = ExportTraceServiceRequest()
    scope = request.resource_spans.add().scope_spans.add()
    for kind in kinds:
        span = scope.spans.add(trace_id=b"t" * 16, span_id=b"s" * 8, name=f"of kind {kind}")
        span.kind = kind  # pyright: ignore[reportAttributeAccessIssue] - also one of a later version
    return request.SerializeToString()


def test_a_span_of_a_kind_that_is_not_known_yet(collector: Collector) -> None:
    assert send(collector, spans(3, 77)).status_code == 200
    assert [(it.name, it.kind) for it in collector.spans()] == [
        ("of kind 3", "CLIENT"),
        ("of kind 77", "UNSPECIFIED"),
    ]


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b"\xff\xff\xff", ""),
        (b"not compressed", "gzip"),
        (gzip.compress(spans(1))[:-9], "gzip"),
        (b"not compressed", "deflate"),
    ],
    ids=["no protobuf", "no gzip", "cut off", "no deflate"],
)
def test_what_cannot_be_read(collector: Collector, body: bytes, encoding: str) -> None:
    answer = send(collector, body, **{"content-encoding": encoding})
    assert answer.status_code == 400
    assert answer.text.startswith("The request could not be read")
    assert collector.spans() == []


def test_what_cannot_be_stored_may_be_sent_again(collector: Collector) -> None:
    collector.file.unlink()
    collector.file.mkdir()
    answer = send(collector, spans(1))
    assert answer.status_code == 503
    assert answer.text.startswith("The spans could not be stored")
    collector.file.rmdir()
    assert send(collector, spans(1)).status_code == 200
    assert [it.name for it in collector.spans()] == ["of kind 1"]
