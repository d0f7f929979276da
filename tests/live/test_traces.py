"""One trace of a run, as a collector receives it from workers that are killed and runs that are replayed."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from durable._collector import Collector, Span
from durable._process import free_ports
from durable.server import RestateServer
from durable.worker import Worker
from tests.live.hosting import Ingress
from tests.live.providers import Answer, provider
from tests.live.test_approvals import answer, end, pending, start

pytestmark = pytest.mark.live

APP = "tests.live.traced_app:app"


@dataclass
class Traced:
    """Workers that send their spans to one collector."""

    ingress: Ingress
    collector: Collector
    folder: Path
    port: int
    """Of the workers, one after the other: an invocation stays with an address."""

    @asynccontextmanager
    async def registered(self, service: str = "worker", **env: str) -> AsyncGenerator[Worker]:
        """Run a worker that the server knows, and that names itself `service` in its spans."""
        env = {
            "TRACED_COLLECTOR": self.collector.url,
            "TRACED_FOLDER": str(self.folder),
            "TRACED_SERVICE": service,
            **env,
        }
        async with Worker(APP, port=self.port, env=env, log_file=self.folder / "log") as worker:
            await self.ingress.server.register(worker.url)
            yield worker

    async def begun(self) -> str:
        """Wait until a tool says that it has begun, and return what it says."""
        async with asyncio.timeout(20):
            while not (self.folder / "begun").exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.02)
        return (self.folder / "begun").read_text()

    def go(self) -> None:
        """Let the tool `hold` go on."""
        (self.folder / "go").touch()

    def spans(self, invocation: str | None = None) -> list[Span]:
        """Return the spans, by default all, in one trace and each only once."""
        spans = self.collector.spans()
        if invocation is not None:
            [trace] = {it.trace_id for it in spans if _invocation(it) == invocation}
            spans = [it for it in spans if it.trace_id == trace]
        assert len({it.trace_id for it in spans}) == 1, tree(spans)
        assert Counter(it.span_id for it in spans).most_common(1)[0][1] == 1, tree(spans)
        return spans

    def run(self, name: str, invocation: str | None = None) -> str:
        """Return the tree of the spans, which has one span of a run of the agent; each run has its tokens."""
        spans = self.spans(invocation)
        runs = [it for it in spans if it.name.startswith("invoke_agent ")]
        assert [it.name for it in runs].count(f"invoke_agent {name}") == 1
        for run in runs:
            requests = [it for it in spans if it.parent_id == run.span_id and "chat" in it.name]
            for tokens in ("input_tokens", "output_tokens"):
                spent = sum(it.attributes[f"gen_ai.usage.{tokens}"] for it in requests)
                assert run.attributes[f"gen_ai.aggregated_usage.{tokens}"] == spent > 0
        assert all(it.start <= it.end for it in spans)
        assert all(it.error is None for it in spans if not it.name.startswith("failed try"))
        return tree(spans)


def _invocation(span: Span) -> Any:
    return span.attributes.get("restate.invocation.id")


def tree(spans: Iterable[Span]) -> str:
    """Write names of spans as a tree; what began at the same time is in the order of the names."""
    spans = list(spans)
    children: defaultdict[str | None, list[Span]] = defaultdict(list)
    known = {it.span_id for it in spans}
    for it in sorted(spans, key=lambda it: (it.start, it.name)):
        children[it.parent_id if it.parent_id in known else None].append(it)

    def lines(parent: str | None, depth: int) -> Iterable[str]:
        for it in children[parent]:
            yield "  " * depth + it.name
            yield from lines(it.span_id, depth + 1)

    return "\n".join(lines(None, 0))


@pytest.fixture
async def http() -> AsyncGenerator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=60, trust_env=False) as http:
        yield http


@pytest.fixture
def tracing(
    tmp_path: Path, http: httpx2.AsyncClient
) -> Iterable[Callable[[RestateServer], Traced]]:
    """Makes what a test needs beside a server."""
    with Collector(tmp_path / "spans.jsonl") as collector:
        [port] = free_ports(1)
        yield lambda server: Traced(Ingress(server, http), collector, tmp_path, port)


@pytest.fixture
def traced(tracing: Callable[[RestateServer], Traced], server: RestateServer) -> Traced:
    """What a test needs beside the server of all tests."""
    return tracing(server)


def expected(text: str) -> str:
    """Take the tree as it is written in this file."""
    return "\n".join(line for line in text.splitlines() if line.strip())


async def test_a_plain_run(traced: Traced) -> None:
    async with traced.registered():
        assert await traced.ingress.call("Traced/plain") == "work=worked"
    assert traced.run("plain") == expected("""\
Traced/plain
  invoke_agent plain
    chat model
    execute_tool work
      inside work
    chat model
""")


async def test_parallel_tools(traced: Traced) -> None:
    """Two step tools, and a context tool that sleeps, beside each other."""
    async with traced.registered():
        assert "rest=rested" in await traced.ingress.call("Traced/parallel")
    assert traced.run("parallel") == expected("""\
Traced/parallel
  invoke_agent parallel
    chat model
    execute_tool rest
      resting
      sleep
    execute_tool work
      inside work
    execute_tool work
      inside work
    chat model
""")
    [sleep] = [it for it in traced.spans() if it.name == "sleep"]
    assert sleep.end - sleep.start >= 200_000_000


async def test_a_nested_agent(traced: Traced) -> None:
    """The inner run lies under the tool that made it."""
    async with traced.registered():
        await traced.ingress.call("Traced/nested")
    assert traced.run("nested") == expected("""\
Traced/nested
  invoke_agent nested
    chat model
    execute_tool delegate
      invoke_agent inner
        chat inner model
        execute_tool work
          inside work
        chat inner model
    chat model
""")


BETWEEN = """\
Traced/between
  invoke_agent between
    chat model
    execute_tool work
      inside work
    chat model
    execute_tool wait
      awakeable
    chat model
    execute_tool work
      inside work
    chat model
"""


async def test_the_worker_is_killed_between_steps(traced: Traced) -> None:
    """What the first process did is not told again by the second, and what it could not tell is."""
    async with traced.registered("first") as worker:
        run = asyncio.create_task(traced.ingress.call("Traced/between"))
        awakeable = await traced.begun()
        worker.kill()
        before = tree(traced.spans())
    async with traced.registered("second"):
        await traced.ingress.post(f"restate/awakeables/{awakeable}/resolve", "go")
        await run
    assert traced.run("between") == expected(BETWEEN)
    assert "inside work" in before
    assert {it.service for it in traced.spans()} == {"first", "second"}


async def test_the_worker_is_killed_during_a_tool(traced: Traced) -> None:
    """The tool that was cut runs again: what was open in it is gone, what had ended beside it is there once."""
    async with traced.registered("first") as worker:
        run = asyncio.create_task(traced.ingress.call("Traced/held"))
        await traced.begun()
        completed = (
            "SELECT id FROM sys_journal WHERE entry_type = 'Notification: Run' AND id IN "
            "(SELECT id FROM sys_invocation WHERE target_handler_name = 'held' AND status != 'completed')"
        )
        await traced.ingress.until(completed, lambda rows: len(rows) == 2)
        worker.kill()
    traced.go()
    async with traced.registered("second"):
        await run
    assert traced.run("held") == expected("""\
Traced/held
  invoke_agent held
    chat model
    execute_tool hold
      inside hold
    execute_tool work
      inside work
    chat model
    execute_tool work
      inside work
    chat model
""")
    assert {it.service for it in traced.spans()} == {"first", "second"}


@pytest.mark.parametrize("always_replay", [False, True])
async def test_worker_and_server_are_killed_while_a_person_decides(
    tracing: Callable[[RestateServer], Traced], *, always_replay: bool
) -> None:
    """The wait is one span, as long as the person took."""
    async with RestateServer(always_replay=always_replay) as server:
        traced = tracing(server)
        async with traced.registered("first") as worker:
            invocation = await start(traced.ingress, "Traced/approval")
            told = f"SELECT id FROM sys_journal WHERE entry_type = 'Notification: Run' AND id = '{invocation}'"
            await traced.ingress.until(told, lambda rows: len(rows) == 2)
            worker.kill()
        await server.restart()
        asked = time.time_ns()
        async with traced.registered("second"):
            [call] = await pending(traced.ingress, invocation)
            await answer(traced.ingress, invocation, call=call.id, decision="approve")
            assert await end(traced.ingress, invocation) == "refund=refunded"
            answered = time.time_ns()
    assert traced.run("approval", invocation) == expected("""\
Traced/approval
  invoke_agent approval
    chat model
    wait for a person: refund
    execute_tool refund
      inside refund
    chat model
""")
    [wait] = [it for it in traced.spans(invocation) if it.name == "wait for a person: refund"]
    assert wait.start < asked < wait.end < answered
    assert wait.error is None


async def test_a_run_over_two_workers(traced: Traced, http: httpx2.AsyncClient) -> None:
    """A delegate in another process lies under the call."""
    async with (
        traced.registered("caller"),
        Worker(
            "tests.live.traced_app:delegated_app",
            env={"TRACED_COLLECTOR": traced.collector.url, "TRACED_SERVICE": "delegate"},
            log_file=traced.folder / "log",
        ) as delegate,
    ):
        await traced.ingress.server.register(delegate.url)
        await traced.ingress.call("Traced/delegating")
    assert traced.run("delegating") == expected("""\
Traced/delegating
  invoke_agent delegating
    chat model
    execute_tool inner
      call Delegated/delegate
        Delegated/delegate
          invoke_agent inner
            chat inner model
            execute_tool work
              inside work
            chat inner model
    chat model
""")
    [run] = [it for it in traced.spans() if it.name == "invoke_agent inner"]
    assert run.service == "delegate"


async def test_failed_tries(traced: Traced) -> None:
    """A 500 and a 429 that asks for a pause are spans with their errors, and the run is none."""
    answers = [Answer(status=500), Answer(status=429, headers={"retry-after": "1"}), Answer("done")]
    with provider(answers) as api:
        async with traced.registered(**api.env, OPENAI_API_KEY="key"):
            assert await traced.ingress.call("Traced/failing") == "done"
    assert traced.run("failing") == expected("""\
Traced/failing
  invoke_agent failing
    chat scripted
      failed try: failing__model.request
      failed try: failing__model.request
""")
    tries = [it for it in traced.spans() if it.name.startswith("failed try")]
    assert [it.error for it in tries] == [
        "ModelServerError: model `scripted` answered 500 (scripted_code)",
        "ModelRateLimitError: model `scripted` answered 429 (scripted_code)",
    ]
    assert [it.events[0].attributes["exception.type"] for it in tries] == [
        "ModelServerError",
        "ModelRateLimitError",
    ]
