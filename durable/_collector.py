"""A collector of spans on this machine: takes them over OTLP, keeps them in a file, gives them back.

One port on loopback takes what OpenTelemetry's and Logfire's exporters send (OTLP/HTTP with protobuf) and what
restate-server sends (OTLP/gRPC). Each span becomes one line of JSON.

    with Collector(Path("spans.jsonl")) as collector:
        ...  # OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, RESTATE_TRACING_ENDPOINT=collector.url
        spans = collector.spans()
"""

import asyncio
import gzip
import os
import socket
import threading
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from google.protobuf.message import DecodeError
from hypercorn.asyncio import serve  # pyright: ignore[reportUnknownVariableType]
from hypercorn.config import Config
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from durable._process import HOST

MAX_FILE_SIZE = 64 * 1024 * 1024
"""How many bytes of spans are kept: a file that has grown larger is put aside, in the place of the one before it."""

_HTTP = "/v1/traces"
_GRPC = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_NOT_KEPT = ("/v1/metrics", "/v1/logs")
"""What exporters that were given one endpoint for everything send too."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened at one moment of a span."""

    name: str
    time: int
    """In nanoseconds since the epoch."""

    attributes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Span:
    """A span that was collected."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    kind: str
    """As OpenTelemetry names it: `INTERNAL`, `SERVER`, `CLIENT`, ..."""

    start: int
    end: int
    """In nanoseconds since the epoch, as `start`."""

    error: str | None
    """What the span's status says about its failure, `None` when it did not fail."""

    service: str
    """Which program sent it: the resource's `service.name`."""

    scope: str
    """What made it: the name of the instrumentation."""

    attributes: dict[str, Any]
    events: list[Event]

    pending: bool
    """Whether it only tells that the span has begun: Logfire sends such a span before the span itself."""


_SPAN = TypeAdapter(Span)


class Collector:
    """Collects spans as long as its `with` block lasts.

    Args:
        file: Where the spans are appended.
    """

    url: str
    """What exporters and restate-server take as their endpoint."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Self:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._append(b"\n")  # behind what a collector that was killed has begun to write
        listening = socket.create_server((HOST, 0))
        self.url = f"http://{HOST}:{listening.getsockname()[1]}"
        self._stop = threading.Event()
        # a thread, because exporters may block the event loop of whoever collects
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(listening)), name="collector", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def spans(self) -> list[Span]:
        """Return what was collected, in the order of arrival."""
        return list(read_spans(self.file))

    async def _serve(self, listening: socket.socket) -> None:
        config = Config()
        config.bind = [f"fd://{listening.detach()}"]
        config.loglevel = "CRITICAL"
        config.graceful_timeout = 0.1  # exporters keep their connections
        await serve(
            self._answer, config, shutdown_trigger=lambda: asyncio.to_thread(self._stop.wait)
        )

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, as an ASGI application."""
        if scope["type"] != "http":
            return
        body = b""
        more = True
        while more:
            event = await receive()
            body += event.get("body", b"")
            more = event.get("more_body", False)
        if scope["path"] == _GRPC:
            await self._answer_grpc(body, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        status, content = self._take(scope["path"], headers, body)
        kind = b"application/x-protobuf" if status == 200 else b"text/plain"
        length = str(len(content)).encode()
        answer = [(b"content-type", kind), (b"content-length", length)]
        await send({"type": "http.response.start", "status": status, "headers": answer})
        await send({"type": "http.response.body", "body": content})

    def _take(self, path: str, headers: dict[bytes, bytes], body: bytes) -> tuple[int, bytes]:
        if path in _NOT_KEPT:
            return 200, b""
        if path != _HTTP:
            return 404, f"There is nothing at {path}: spans go to {_HTTP}.".encode()
        if headers.get(b"content-type") != b"application/x-protobuf":
            return (
                415,
                b"Spans are taken as protobuf: OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf.",
            )
        try:
            self._store(_read_request(body, headers.get(b"content-encoding", b"").decode()))
        except DecodeError as error:
            return 400, f"The request could not be read: {error}".encode()
        except OSError as error:
            return 503, f"The spans could not be stored: {error}".encode()
        return 200, _accepted()

    async def _answer_grpc(self, body: bytes, send: Any) -> None:
        """Answer a call of gRPC: a message is preceded by a flag for compression and its length."""
        status, message = b"0", b""
        try:
            self._store(_read_request(body[5:], "gzip" if body[:1] == b"\1" else ""))
        except DecodeError as error:
            status, message = b"3", str(error).encode()  # INVALID_ARGUMENT
        except OSError as error:
            status, message = b"14", str(error).encode()  # UNAVAILABLE
        content = _accepted()
        trailers = [(b"grpc-status", status), (b"grpc-message", message)]
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"application/grpc")],
                "trailers": True,
            }
        )
        frame = b"\0" + len(content).to_bytes(4, "big") + content
        await send({"type": "http.response.body", "body": frame})
        await send({"type": "http.response.trailers", "headers": trailers})

    def _store(self, request: ExportTraceServiceRequest) -> None:
        lines = b"".join(to_json(span) + b"\n" for span in _spans(request))
        if self.file.exists() and self.file.stat().st_size > MAX_FILE_SIZE:
            self.file.replace(_before(self.file))
        self._append(lines)

    def _append(self, lines: bytes) -> None:
        # prompts and answers are for nobody else on this machine
        with open(self.file, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(lines)


def read_spans(file: Path) -> Iterator[Span]:
    """Return the spans that a collector has put into `file`, in the order of arrival."""
    for lines in _parts(file):
        yield from _read(lines)


def _read(lines: Iterable[bytes]) -> Iterator[Span]:
    for line in lines:
        with suppress(ValidationError):  # cut off when its collector was killed
            yield _SPAN.validate_json(line)


def _parts(file: Path) -> Iterator[list[bytes]]:
    for part in (_before(file), file):
        with suppress(FileNotFoundError):
            *lines, _unfinished = part.read_bytes().split(b"\n")
            yield lines


def spans_of(file: Path, attribute: str, value: str) -> list[Span]:
    """Return the spans of the traces in which a span has `attribute` with `value`."""
    lines = [line for part in _parts(file) for line in part]
    sought = to_json(value)
    found = _read(line for line in lines if sought in line)
    traces = {to_json(it.trace_id) for it in found if it.attributes.get(attribute) == value}
    # of all that is in the file, only those are read as spans
    return list(_read(line for line in lines if any(it in line for it in traces)))


def latest(spans: Iterable[Span]) -> list[Span]:
    """Return each span once: as it ended, or as it began when it has not ended."""
    by_id: dict[str, Span] = {}
    for span in spans:
        if not span.pending or span.span_id not in by_id:
            by_id[span.span_id] = span
    return list(by_id.values())


def _before(file: Path) -> Path:
    return file.with_suffix(f".before{file.suffix}")


def _accepted() -> bytes:
    return ExportTraceServiceResponse().SerializeToString()


def _read_request(body: bytes, encoding: str) -> ExportTraceServiceRequest:
    decompress = {"gzip": gzip.decompress, "deflate": zlib.decompress}.get(encoding, bytes)
    try:
        return ExportTraceServiceRequest.FromString(decompress(body))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DecodeError(str(error)) from error


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        service = str(_attributes(resource.resource.attributes).get("service.name", ""))
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield _span(span, service=service, scope=scope.scope.name)


def _span(span: ProtoSpan, *, service: str, scope: str) -> Span:
    failed = span.status.code == Status.STATUS_CODE_ERROR
    attributes = _attributes(span.attributes)
    span_id, parent_id = span.span_id.hex(), span.parent_span_id.hex()
    pending = attributes.get("logfire.span_type") == "pending_span"
    if pending:  # it lies under the span that it is for
        span_id, parent_id = parent_id, str(attributes.get("logfire.pending_parent_id", ""))
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span_id,
        parent_id=parent_id if parent_id.strip("0") else None,
        name=span.name,
        kind=_KINDS.get(span.kind, "UNSPECIFIED"),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        error=span.status.message if failed else None,
        service=service,
        scope=scope,
        attributes=attributes,
        events=[
            Event(
                name=event.name,
                time=event.time_unix_nano,
                attributes=_attributes(event.attributes),
            )
            for event in span.events
        ],
        pending=pending,
    )


_KINDS = {number: name.removeprefix("SPAN_KIND_") for name, number in ProtoSpan.SpanKind.items()}


def _attributes(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    if kind == "bytes_value":
        return value.bytes_value.hex()
    return None if kind is None else getattr(value, kind)
