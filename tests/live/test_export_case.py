"""`durable export-case`: a real run becomes a case of a dataset, or the command says why it cannot."""

import asyncio
import shutil
from collections.abc import AsyncGenerator
from datetime import timedelta
from pathlib import Path
from typing import Any

import logfire
import pytest
import restate
from pydantic_evals import Dataset
from restate.serde import BytesSerde

import durable
from agents.models import DEFAULT_MODEL
from durable.__main__ import main
from durable.client import Client, Handle
from durable.server import RestateServer
from evals.experiment import LocalRunner, run_pattern
from evals.loading import DATASETS, load
from evals.reference import ReferenceModel, exchanges_of
from services.routing import RoutingRequest, routing, run
from tests.live.hosting import hosted

pytestmark = pytest.mark.live

things = restate.Service("Things")
shelf = restate.VirtualObject("Shelf")


@shelf.handler()
async def put(ctx: restate.ObjectContext, input: str) -> str:
    return input


@things.handler()
async def echo(ctx: restate.Context, input: Any) -> Any:
    return input


@things.handler(name="bytes", input_serde=BytesSerde(), output_serde=BytesSerde())
async def echo_bytes(ctx: restate.Context, input: bytes) -> bytes:
    return input


@things.handler()
async def fail(ctx: restate.Context) -> None:
    raise restate.TerminalError("sold out", 410)


@things.handler()
async def wait(ctx: restate.Context) -> None:
    await ctx.sleep(timedelta(hours=1))


@pytest.fixture
async def client(server: RestateServer, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Client]:
    monkeypatch.setenv("RESTATE_ADMIN_URL", server.admin_url)
    async with (
        hosted(server, things, shelf, routing),
        Client(server.ingress_url, admin_url=server.admin_url) as client,
    ):
        yield client


async def ended(client: Client, handler: Any, *input: Any) -> Handle[Any]:
    handle = await client.send(handler, *input)
    await client.attach(handle)
    return handle


async def export(*arguments: object) -> int:
    return await asyncio.to_thread(main, ["export-case", *map(str, arguments)])


async def test_a_run_of_a_pattern(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appended to the pattern's dataset it is a case like the others, and the suite runs it."""
    logfire.configure(send_to_logfire=False, console=False, distributed_tracing=True)
    durable.configure_logfire()
    cases = load("routing").dataset.cases
    model = ReferenceModel(exchanges_of("routing", cases))
    monkeypatch.setattr(DEFAULT_MODEL, "wrapped", model)
    request: RoutingRequest = cases[0].inputs
    handle = await ended(client, run, request)
    file = tmp_path / "routing.yaml"
    shutil.copy(DATASETS / "routing.yaml", file)
    assert await export(handle, "--to", file, "--name", "seen-live") == 0

    assert file.read_text().startswith((DATASETS / "routing.yaml").read_text())  # comments stay
    loaded = load("routing", directory=tmp_path)
    *before, case = loaded.dataset.cases
    assert [it.name for it in before] == [it.name for it in cases]
    assert (case.name, case.inputs) == ("seen-live", request)
    assert case.expected_output == await client.output(Handle(str(handle), run))
    loaded.dataset.cases = [case]
    report = await run_pattern("routing", loaded, LocalRunner(), experiment="exported")
    assert report.results[0].passed


async def test_any_handler(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values come back as they were, from what is printed and from files."""
    values: list[Any] = [
        {"text": "ü\u2028\n: - # 'x'\t", "nested": {"1": [1e16, 1.5, None, True]}},
        "a\u2028b\u2029c\x85d",
        "no",
        "2020-01-01",
        7,
    ]
    file = tmp_path / "new.yaml"
    for value in values:
        handle = await ended(client, echo, value)
        assert await export(handle, "--to", file) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"# Things/echo, {handle}, ")
        [case] = Dataset[Any, Any, Any].from_text(f"cases:\n{printed}", default_name="x").cases
        assert (case.inputs, case.expected_output) == (value, value)
    cases = Dataset[Any, Any, Any].from_file(file).cases
    assert [(it.inputs, it.expected_output) for it in cases] == [(it, it) for it in values]
    nothing = await ended(client, echo)
    assert await export(nothing) == 0
    assert "inputs: null\n" in capsys.readouterr().out


async def test_a_key_with_line_breaks(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    """It adds nothing to the dataset, and no command lets the terminal obey it."""
    handle = await client.send(put, "x", key="a\n- name: spy\x1b[31m")
    await client.attach(handle)
    assert await export(handle) == 0
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(r"# Shelf/a\n- name: spy\u001b[31m/put, ")
    for arguments in (["runs", "--limit", "1"], ["watch", str(handle)]):
        assert await asyncio.to_thread(main, arguments) == 0
        shown = capsys.readouterr().out
        assert r"spy\x1b[31m/put" in shown
        assert "\x1b[31m" not in shown


async def test_runs_that_make_no_case(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    failed, waits = await client.send(fail), await client.send(wait)
    with pytest.raises(Exception, match="sold out"):
        await client.attach(failed)
    binary = Handle[Any](str(await ended(client, echo_bytes, b"\xff\x00")))
    unknown = "inv_18jYkUAxwZWm2Wk5xVuX0a1G0B2kZJqh2R"
    for handle, fault in (
        (failed, f"{failed} has no output: it failed ([410] sold out)."),
        (waits, f"{waits} has not ended yet: it is "),
        (binary, f"{binary} makes no case: its input is no JSON (2 bytes)"),
        (unknown, f"There is no invocation {unknown}"),
        ("routing", "'routing' is not the id of an invocation"),
    ):
        assert await export(handle) == 1
        assert f"error: {fault}" in capsys.readouterr().err
    await client.cancel(waits)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "cases:\n- name: taken\n  inputs: 1\n",
            "has a case 'taken' already: give another `--name`",
        ),
        ("cases: []\nevaluators: []\n", "a case is appended to the list `cases`"),
        ("cases:\n- name: a\n  inputs: 1\nevaluators: []\n", "has to be the last of the file"),
        ("- 1\n", "is no dataset of pydantic-evals"),
        ("cases: [\n", "is no YAML"),
    ],
)
async def test_files_that_take_no_case(
    client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, fault: str
) -> None:
    """They are left as they are."""
    file = tmp_path / "dataset.yaml"
    file.write_text(text)
    assert await export(await ended(client, echo, 1), "--to", file, "--name", "taken") == 1
    assert fault in capsys.readouterr().err
    assert file.read_text() == text


async def test_indented_cases(client: Client, tmp_path: Path) -> None:
    file = tmp_path / "dataset.yaml"
    file.write_text("name: x\ncases:  # of yesterday\n\n  # the first\n  - name: a\n    inputs: 1")
    assert await export(await ended(client, echo, {"b": 2}), "--to", file, "--name", "b") == 0
    assert [it.inputs for it in Dataset[Any, Any, Any].from_file(file).cases] == [1, {"b": 2}]
    assert await export(await ended(client, echo, 1), "--to", tmp_path) == 1
