"""`make demo` as a user runs it, and that it fails when what it shows does not hold."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from rich.console import Console

from services import demo
from services._proof import JournaledStep, Proof, account, journaled_steps
from services._proxy import ModelRequest
from tests.live.hosting import PATIENCE
from tests.live.providers import Answer, provider

pytestmark = pytest.mark.live

CHECKOUT = Path(demo.__file__).parent.parent
CONFIGURATION = ("OPENAI_", "ANTHROPIC_", "AGENTS_")

ROW = re.compile(
    r"^ *(\d) chaining-transformer__model\.request +(\d) +([a-z ]+?) +(\d) +(\d) *$", re.M
)


class Run:
    """The demo in a process, with an environment that tells every process it starts."""

    def __init__(self, directory: Path, env: Mapping[str, str]) -> None:
        self.mark = f"demo-{uuid4().hex}"
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self._output = directory / "output.txt"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(CONFIGURATION)}
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.demo"],
                cwd=CHECKOUT,
                env={**inherited, "DEMO_MARK": self.mark, "TMPDIR": str(self.temporary), **env},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def processes(self) -> list[str]:
        """Return the commands of this run that are there; only Linux tells."""
        found: list[str] = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark in (process / "environ").read_text(errors="replace"):
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


@contextmanager
def running(directory: Path, **env: str) -> Generator[Run]:
    run = Run(directory, env)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
    assert run.processes() == []
    assert list(run.temporary.iterdir()) == []


@pytest.mark.timeout(400)
def test_a_killed_run_finishes_without_repeating_a_step(tmp_path: Path) -> None:
    with running(tmp_path, AGENTS_MODEL="local") as run:
        assert run.process.wait(380) == 0, run.output
    shown, _, proof = run.output.partition("The proof")
    assert "RoutingResponse(" in shown
    assert "kill -9 of the worker" in shown
    assert "/ui/" in proof
    assert [row[:3] for row in ROW.findall(proof)][:2] == [
        ("1", "1", "completed"),
        ("2", "1", "completed"),
    ]
    rows = [(int(row[1]), row[2] == "completed", *map(int, row[3:])) for row in ROW.findall(proof)]
    assert len(rows) == 4, proof
    completed = sum(done for _, done, _, _ in rows)
    assert rows[:completed] == [(1, True, 1, 0)] * completed
    assert {(results, after) for results, _, _, after in rows[completed:]} == {(1, 1)}
    assert f"4 steps = {completed} before the kill + {4 - completed} after it" in proof
    assert proof.splitlines()[-1] == "Survived: no completed step ran again."


def test_ctrl_c_stops_everything(tmp_path: Path) -> None:
    with running(tmp_path, AGENTS_MODEL="local") as run:
        run.wait_for("chaining: CallChainingService")
        assert len(run.processes()) == (4 if sys.platform == "linux" else 0)
        run.process.send_signal(signal.SIGINT)
        assert run.process.wait(30) == 130
    assert "Traceback" not in run.output


def test_a_call_that_fails_ends_the_demo(tmp_path: Path) -> None:
    """What the server says is shown; the model is not the local one here."""
    with provider([Answer(status=401, text="no such key")]) as upstream:
        base_url = f"{upstream.url}/v1"
        with running(tmp_path, OPENAI_BASE_URL=base_url, OPENAI_API_KEY="canary-key") as run:
            assert run.process.wait(60) == 1
    assert "Failed: /CallChainingService/run answered" in run.output
    assert "answered 401" in run.output
    assert "log: .durable/demo/worker.log" in run.output
    assert "canary-key" not in run.output
    assert len(upstream.times) == 1


def test_the_exit_code_tells_when_the_proof_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Server:
        ui_url = "http://127.0.0.1:1/ui/"

    @asynccontextmanager
    async def stack(console: Console) -> AsyncGenerator[demo.Stack]:
        nothing: Any = None
        server: Any = Server()
        yield demo.Stack(console=console, proxy=nothing, server=server, worker=nothing)

    async def nothing(_: demo.Stack, name: str) -> None:
        pass

    async def crash(_: demo.Stack) -> Proof:
        return accounts(before="AAB", after="CD", at_kill=steps(2, 2))

    monkeypatch.setenv("NO_PROXY", "")  # what the demo changes is undone
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(demo, "LOGS", tmp_path)
    monkeypatch.setattr(demo, "_stack", stack)
    monkeypatch.setattr(demo, "_run_pattern", nothing)
    monkeypatch.setattr(demo, "_crash", crash)
    assert demo.main([]) == 1
    output = capsys.readouterr().out
    assert "step 1 (model.request) was requested 2 times before the restart" in output
    assert "Survived" not in output


def steps(completed: int, begun: int) -> list[JournaledStep]:
    return [
        JournaledStep(name="model.request", results=(f"result {n}",) if n < completed else ())
        for n in range(begun)
    ]


def requests(asked: str) -> list[ModelRequest]:
    """One request per letter, which is what it asks; a small letter is one that was cut."""
    return [
        ModelRequest(asked=it.upper(), delivered=it.isupper(), status=200 if it.isupper() else None)
        for it in asked
    ]


def accounts(
    *,
    before: str,
    after: str,
    at_kill: Sequence[JournaledStep],
    at_end: Sequence[JournaledStep] | None = None,
) -> Proof:
    return account(
        at_kill=at_kill,
        at_end=steps(4, 4) if at_end is None else at_end,
        before=requests(before),
        after=requests(after),
        expected=4,
    )


@pytest.mark.parametrize(
    ("before", "after", "at_kill", "counted"),
    [
        ("AB", "CD", steps(2, 2), "4 for the steps + 0 cut by the kill."),
        ("AB", "CD", steps(2, 3), "4 for the steps + 0 cut by the kill."),
        ("ABc", "CD", steps(2, 3), "4 for the steps + 1 cut by the kill."),
        (
            "ABC",
            "CD",
            steps(2, 3),
            "+ 0 cut by the kill + 1 answered but not yet journaled at the kill.",
        ),
        ("ABCd", "D", steps(3, 4), "4 for the steps + 1 cut by the kill."),
    ],
)
def test_accounts_that_hold(
    before: str, after: str, at_kill: list[JournaledStep], counted: str
) -> None:
    proof = accounts(before=before, after=after, at_kill=at_kill)
    assert proof.problems == []
    assert proof.summary().endswith(counted)


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("ABc", "ACD", "step 1 (model.request) was requested 1 times after the restart"),
        ("ABc", "BCD", "step 2 (model.request) was requested 1 times after the restart"),
        ("ABBc", "CD", "step 2 (model.request) was requested 2 times before the restart"),
        ("ABcc", "CD", "step 3 (model.request) was requested 2 times before the restart"),
        ("ABCd", "CD", "step 4 (model.request) was requested 1 times before the restart"),
        ("ABc", "CCD", "step 3 (model.request) was requested 2 times after the restart"),
        ("ABC", "D", "step 3 (model.request) was requested 0 times after the restart"),
        ("Abc", "CD", "step 2 (model.request) has a result, but the model's answer was not"),
        ("ABc", "CDE", "5 different model requests for 4 steps"),
        ("ABc", "C", "3 different model requests for 4 steps"),
    ],
)
def test_requests_that_do_not_fit_the_journal(before: str, after: str, problem: str) -> None:
    proof = accounts(before=before, after=after, at_kill=steps(2, 3))
    assert any(it.startswith(problem) for it in proof.problems), proof.problems


def test_a_journal_that_does_not_hold() -> None:
    twice = JournaledStep(name="model.request", results=("result 0", "result 0"))
    for at_kill, at_end, problem in (
        (steps(2, 2), [twice, *steps(4, 4)[1:]], "step 1 (model.request) has 2 results"),
        (steps(2, 2), steps(3, 4), "step 4 (model.request) has 0 results"),
        (steps(2, 2), steps(3, 3), "the journal has 3 steps instead of 4"),
        (steps(2, 2), steps(4, 4)[::-1], "the journal of the steps before the kill changed"),
        (steps(0, 1), steps(4, 4), "the kill was not in the middle: 0 steps"),
        (steps(4, 4), steps(4, 4), "the kill was not in the middle: 4 steps"),
    ):
        proof = accounts(before="AB", after="CD", at_kill=at_kill, at_end=at_end)
        assert any(it.startswith(problem) for it in proof.problems), proof.problems


def test_refused_requests_are_told_apart() -> None:
    refused = ModelRequest(asked="C", status=429, delivered=True)
    proof = account(
        at_kill=steps(2, 3),
        at_end=steps(4, 4),
        before=requests("AB"),
        after=[refused, *requests("CD")],
        expected=4,
    )
    assert proof.problems == []
    assert proof.summary().endswith("; 1 more were refused by the provider.")


def test_journal_rows() -> None:
    def command(number: int) -> dict[str, str]:
        entry = f'{{"Command":{{"Run":{{"completion_id":{number},"name":"step"}}}}}}'
        return {"entry_type": "Command: Run", "name": f"step {number}", "entry_lite_json": entry}

    def result(number: int) -> dict[str, str]:
        entry = f'{{"Notification":{{"id":{{"CompletionId":{number}}},"result":"Success"}}}}'
        return {"entry_type": "Notification: Run", "entry_lite_json": entry, "raw": f"r{number}"}

    rows = [{"entry_type": "Command: Input"}, command(1), command(2), result(2)]
    assert journaled_steps(rows) == [
        JournaledStep(name="step 1"),
        JournaledStep(name="step 2", results=("r2",)),
    ]
