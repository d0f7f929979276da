"""The eval suite over the ingress: what ran is read from journals, and a suite that is killed goes on."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import logfire
import pytest
from opentelemetry import trace
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import TextPart
from pydantic_evals.evaluators import Evaluator
from pydantic_evals.otel import SpanTree

import durable
from agents.models import DEFAULT_MODEL
from durable.server import RestateServer
from durable.testing import Collector
from evals.activity import model_requests, tool_calls
from evals.experiment import Context, LocalRunner, run_pattern
from evals.ingress import CHECKOUT, IngressRunner
from evals.ingress import hosted as worker_of_the_suite
from evals.loading import load
from evals.patterns import EVAL_PATTERNS
from evals.reference import ReferenceModel, exchanges_of
from evals.report import PatternReport, Report
from services.chaining import call_chaining
from services.evaluator_optimizer import evaluator_optimizer
from services.human_in_the_loop import human_in_the_loop
from services.orchestrator_workers import orchestrator_workers
from services.parallelization import parallelization
from services.routing import routing
from tests.live.hosting import hosted
from tests.live.providers import Answer, provider

pytestmark = pytest.mark.live

SERVICES = (
    *(call_chaining, routing, parallelization, orchestrator_workers),
    *(evaluator_optimizer, human_in_the_loop),
)


@pytest.fixture(autouse=True)
def _instrumented(monkeypatch: pytest.MonkeyPatch) -> None:
    logfire.configure(send_to_logfire=False, console=False, distributed_tracing=True)
    durable.configure_logfire()
    monkeypatch.setattr(DEFAULT_MODEL, "wrapped", DEFAULT_MODEL.wrapped)


@asynccontextmanager
async def running(server: RestateServer, experiment: str) -> AsyncGenerator[IngressRunner]:
    async with hosted(server, *SERVICES):
        yield IngressRunner(
            experiment=experiment, ingress_url=server.ingress_url, admin_url=server.admin_url
        )


class Noted:
    """Notes what the spans say of each run that another runner observes."""

    def __init__(self, runner: LocalRunner | IngressRunner) -> None:
        self._runner = runner
        self.run = runner.run
        self.actions: dict[str, Counter[str]] = {}
        self.arguments: dict[str, list[Any]] = {}

    async def observe(self, pattern: str, context: Context, *, run: str) -> Context:
        context = await self._runner.observe(pattern, context, run=run)
        calls = tool_calls(context.span_tree)
        actions = [*model_requests(context.span_tree), *calls]
        self.actions[run] = Counter(it.name for it in actions)
        self.arguments[run] = sorted(json.dumps(json.loads(it.asked)) for it in calls)
        return context


@pytest.mark.parametrize("name", EVAL_PATTERNS)
async def test_journals_say_what_spans_say(server: RestateServer, name: str) -> None:
    """The perfect model passes over the ingress, too, and the same agents and tools ran."""
    loaded = load(name)
    loaded.dataset.cases = loaded.dataset.cases[:4]
    DEFAULT_MODEL.wrapped = ReferenceModel(exchanges_of(name, loaded.dataset.cases))
    local = Noted(LocalRunner())
    await run_pattern(name, loaded, local, experiment="local")
    async with running(server, f"said-{name}") as runner:
        remote = Noted(runner)
        report = await run_pattern(name, loaded, remote, experiment="ingress")
    assert [fault for result in report.results for fault in result.faults.items()] == []
    assert all(result.passed and result.requests and result.seconds for result in report.results)
    assert remote.actions == local.actions
    assert remote.arguments == local.arguments


async def test_what_is_finished_is_not_executed_again(server: RestateServer) -> None:
    loaded = load("parallelization")  # a workflow: the run's key stands for the idempotency key
    loaded.dataset.cases = loaded.dataset.cases[:2]
    model = ReferenceModel(exchanges_of("parallelization", loaded.dataset.cases))
    DEFAULT_MODEL.wrapped = model
    async with running(server, "twice") as runner:
        first = await run_pattern("parallelization", loaded, runner, experiment="twice")
        DEFAULT_MODEL.wrapped = ReferenceModel([])  # knows nothing: whoever asks it fails
        again = await run_pattern("parallelization", loaded, runner, experiment="twice")
    assert again == first


async def test_a_run_that_fails_for_good_is_counted(server: RestateServer) -> None:
    """A model that makes plans of one task: the caller's error is the result, and the suite goes on."""
    loaded = load("orchestrator-workers")
    two, five = loaded.dataset.cases[:2]
    loaded.dataset.cases = [two, five]
    assert two.metadata is not None
    two.metadata.reference.plan.tasks.pop()
    two.metadata.reference.works.pop()
    DEFAULT_MODEL.wrapped = ReferenceModel(exchanges_of("orchestrator-workers", [two, five]))
    async with running(server, "terminal") as runner:
        report = await run_pattern("orchestrator-workers", loaded, runner, experiment="terminal")
    [failed], [passed] = report.cases.values()
    assert "502" in str(failed.error)
    assert "this one has 1" in str(failed.error)
    assert passed.passed


class Script:
    """A provider's model that answers like the references, and holds what comes after so many answers."""

    def __init__(self, *patterns: str, hold_after: int) -> None:
        self._answers: dict[tuple[str, str], str] = {}
        for name in patterns:
            for output, prompt, [[answer], *_] in exchanges_of(name, load(name).dataset.cases):
                assert isinstance(answer, TextPart)
                self._answers[output.__name__, prompt] = answer.content
        self._left = hold_after
        self._lock = threading.Lock()
        self._released = threading.Event()
        self.holding = threading.Event()
        self.asked: Counter[tuple[str, str]] = Counter()
        """All requests, by output type and prompt."""
        self.answered: Counter[tuple[str, str]] = Counter()
        """Those that were not held: a held one is cut by a kill, and its answer reaches nobody."""

    def release(self) -> None:
        self._left = sys.maxsize
        self.holding.clear()
        self._released.set()

    def hold(self, *, after: int) -> None:
        with self._lock:
            self._released.clear()
            self._left = after

    def __call__(self, request: dict[str, Any], number: int) -> Answer:
        name = request["response_format"]["json_schema"]["name"]
        [prompt] = [it["content"] for it in request["messages"] if it["role"] == "user"]
        with self._lock:
            self.asked[name, prompt] += 1
            held = self._left <= 0
            self._left -= 1
            if not held:
                self.answered[name, prompt] += 1
        if held:
            self.holding.set()
            self._released.wait(100)
        return Answer(self._answers[name, prompt])


def suite(directory: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    arguments = ["routing", "chaining", "--via", "ingress", "--max-concurrency", "1"]
    files = ["--data", str(directory), "--experiment", "killed", "--report", str(directory / "out")]
    with (directory / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "evals", *arguments, *files],
            cwd=CHECKOUT,
            env={**os.environ, **env},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def children(pid: int, words: str) -> list[int]:
    """Return the processes started by `pid` that have these words in their command."""
    return [
        child
        for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        if words in Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
    ]


async def test_a_killed_suite_goes_on(tmp_path: Path) -> None:
    """Killed twice, first the worker alone, then runner, worker and server: nothing finished is asked again."""
    model = Script("routing", "chaining", hold_after=5)
    with provider(model) as api:
        first = suite(tmp_path, api.env)
        try:
            # 1. In the third case; the worker dies, the runner starts another one.
            assert await asyncio.to_thread(model.holding.wait, 60), output(tmp_path)
            [worker] = children(first.pid, "evals.worker:app")
            os.kill(worker, 9)
            assert model.answered.total() == 5
            model.release()
            model.hold(after=30 - model.asked.total())
            assert await asyncio.to_thread(model.holding.wait, 60), output(tmp_path)

            # 2. In the second dataset; the runner dies, and all that it started.
            assert (tmp_path / "experiments" / "killed.json").exists()
            assert model.answered.total() == 29  # all of routing, and 5 of chaining
        finally:
            first.kill()
            first.wait()
        model.release()
        second = suite(tmp_path, api.env)
        try:
            assert await asyncio.to_thread(second.wait, 120) == 0, output(tmp_path)
        finally:
            second.kill()
            second.wait()

    report = Report.model_validate_json((tmp_path / "out.json").read_bytes())
    requests = sum(it.requests for of in report.patterns.values() for it in of.results)
    assert requests == len(model.answered) == 46
    assert set(model.answered.values()) == {1}
    assert (model.asked - model.answered).total() == 2  # one was cut by each kill
    assert {it.passed for of in report.patterns.values() for it in of.results} == {True}


@dataclass
class Tree(Evaluator[Any, Any, Any]):
    """Finds what only spans show: which agent's run a request lies under, in the trace of the case."""

    trees: list[tuple[SpanTree, int]] = field(default_factory=list[tuple[SpanTree, int]])

    def evaluate(self, ctx: Context) -> bool:
        self.trees.append((ctx.span_tree, trace.get_current_span().get_span_context().trace_id))
        return ctx.span_tree.any(
            {
                "name_equals": "invoke_agent routing-classifier",
                "some_child_has": {"has_attributes": {"gen_ai.operation.name": "chat"}},
            }
        )


async def test_spans_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace of a case goes out, the services' spans come back; what is lost is made of the journal."""
    loaded = load("routing")
    loaded.dataset.cases = loaded.dataset.cases[:3]
    looking = Tree()
    loaded.dataset.evaluators = [*loaded.dataset.evaluators, looking]
    with provider(Script("routing", hold_after=sys.maxsize)) as api:
        for name, value in api.env.items():
            monkeypatch.setenv(name, value)
        async with worker_of_the_suite("spans", data_dir=tmp_path) as runner:
            report = await run_pattern("routing", loaded, runner, experiment="spans")
            assert {result.passed for result in report.results} == {True}
            assert {result.requests for result in report.results} == {2}
            for tree, trace_id in looking.trees:
                assert {node.trace_id for node in tree} == {trace_id}

            assert runner.collector is not None
            runner.collector.file.write_bytes(b"")
            again = await run_pattern("routing", loaded, runner, experiment="spans")
    assert {result.checks["Tree"] for result in again.results} == {False}
    assert {result.checks["Agents"] for result in again.results} == {True}
    assert {result.requests for result in again.results} == {2}


async def test_experiments_in_logfire(tmp_path: Path) -> None:
    """With a token the experiment, its cases and what the services did go there, as one trace."""
    files = ["--data", str(tmp_path), "--experiment", "seen", "--report", str(tmp_path / "out")]
    with (
        provider(Script("routing", hold_after=sys.maxsize)) as api,
        Collector(tmp_path / "logfire.jsonl") as in_place_of_logfire,
    ):
        env = {"LOGFIRE_TOKEN": "pylf_v1_local_canary", "LOGFIRE_BASE_URL": in_place_of_logfire.url}
        suite = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "evals", "routing", "--via", "ingress", *files),
            cwd=CHECKOUT,
            env={**os.environ, **api.env, **env},
        )
        assert await suite.wait() == 0
        spans = [span for span in in_place_of_logfire.spans() if not span.pending]
    [experiment] = [span for span in spans if span.name == "evaluate {name}"]
    assert (experiment.attributes["name"], experiment.attributes["task_name"]) == (
        "seen",
        "routing",
    )
    assert experiment.attributes["n_cases"] == 12
    trace = Counter(span.name for span in spans if span.trace_id == experiment.trace_id)
    assert trace["case: {case_name}"] == trace["invoke_agent routing-classifier"] == 12


def output(directory: Path) -> str:
    return (directory / "output.txt").read_text()


@pytest.mark.parametrize("name", ["routing", "human-in-the-loop"])
async def test_an_ingress_that_goes_down(server: RestateServer, name: str) -> None:
    """Cases that got no answer are no failures of the model: the runner knows."""
    loaded = load(name)
    loaded.dataset.cases = loaded.dataset.cases[:1]
    runner = IngressRunner(
        experiment="down", ingress_url="http://127.0.0.1:1", admin_url=server.admin_url
    )
    report: PatternReport = await run_pattern(name, loaded, runner, experiment="down")
    assert report.results[0].error is not None
    [reason] = runner.unreachable
    assert "No answer from the ingress" in reason


async def test_an_admin_api_that_goes_down(server: RestateServer) -> None:
    loaded = load("routing")
    loaded.dataset.cases = loaded.dataset.cases[:1]
    DEFAULT_MODEL.wrapped = ReferenceModel(exchanges_of("routing", loaded.dataset.cases))
    async with running(server, "no-admin") as runner:
        runner.admin_url = "http://127.0.0.1:1"
        await run_pattern("routing", loaded, runner, experiment="no-admin")
    [reason] = runner.unreachable
    assert "the admin API" in reason


async def test_services_that_are_not_there(server: RestateServer) -> None:
    """Said at once, and not as many failed cases."""
    async with running(server, "there") as runner:
        await runner.check(EVAL_PATTERNS)
    async with RestateServer() as empty:
        runner = IngressRunner(
            experiment="not", ingress_url=empty.ingress_url, admin_url=empty.admin_url
        )
        with pytest.raises(UserError, match="No `RoutingService` is registered at"):
            await runner.check(["routing"])
