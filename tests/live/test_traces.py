"""One trace of a run, as a collector receives it from workers that are killed and runs that are replayed."""

import asyncio
import socket
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from durable._collector import Collector, Span, latest
from durable._process import free_ports
from durable.server import RestateServer
from durable.worker import Worker
from tests.live.hosting import PATIENCE, Ingress, http_client
from tests.live.providers import Answer, provider
from tests.live.test_approvals import answer, end, pending, start

pytestmark = pytest.mark.live

APP = "tests.live.traced_app:app"


@dataclass
class Traced:
    """Workers that send their spans to one collector."""

    ingress: Ingress
    always_replay: bool
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
        async with Worker(APP, port=self.port, env=env, log_file=self.log) as worker:
            await self.ingress.server.register(worker.url)
            yield worker

    @property
    def servers_spans(self) -> dict[str, str]:
        """Settings of restate-server that send its spans to the collector."""
        return {
            "RESTATE_TRACING_ENDPOINT": self.collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    @property
    def log(self) -> Path:
        """What the workers wrote."""
        return self.folder / "log"

    async def begun(self) -> str:
        """Wait until a tool says that it has begun, and return what it says."""
        async with asyncio.timeout(PATIENCE):
            while not (self.folder / "begun").exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.02)
        return (self.folder / "begun").read_text()

    async def waits(self) -> str:
        """Wait until the only run under way waits for an awakeable, no step with it, and return its name."""
        awakeable = await self.begun()
        steps = (
            "SELECT entry_type FROM sys_journal WHERE entry_type IN ('Command: Run', 'Notification: Run') "
            "AND id IN (SELECT id FROM sys_invocation WHERE status != 'completed')"
        )
        await self.ingress.until(
            steps, lambda rows: len(set(Counter(it["entry_type"] for it in rows).values())) == 1
        )
        return awakeable

    async def until(self, fact: Callable[[list[Span]], bool]) -> list[Span]:
        """Wait until `fact` holds for what was collected: not every exporter sends at once."""
        async with asyncio.timeout(PATIENCE):
            while not fact(spans := self.collector.spans()):  # noqa: ASYNC110 - another process sends
                await asyncio.sleep(0.05)
        return spans

    def go(self) -> None:
        """Let the tool `hold` go on."""
        (self.folder / "go").touch()

    def spans(self, invocation: str | None = None) -> list[Span]:
        """Return the spans, by default all, in one trace and each only once."""
        spans = [it for it in self.collector.spans() if not it.pending]
        if invocation is not None:
            [trace] = {it.trace_id for it in spans if _invocation(it) == invocation}
            spans = [it for it in spans if it.trace_id == trace]
        assert len({it.trace_id for it in spans}) == 1, tree(spans)
        assert Counter(it.span_id for it in spans).most_common(1)[0][1] == 1, tree(spans)
        return spans

    async def told_by_journal(self, handler: str) -> str:
        """Return the names of steps, and what the server tells of failures, of all runs of a handler."""
        server = self.ingress.server
        runs = f"SELECT id FROM sys_invocation WHERE target_handler_name = '{handler}'"
        entries = await server.query(f"SELECT * FROM sys_journal WHERE id IN ({runs})")
        failures = [it for it in entries if '"Failure"' in it["entry_json"] or "Command" in it]
        ends = await server.query(f"SELECT * FROM sys_invocation WHERE id IN ({runs})")
        assert entries
        assert ends
        return (
            f"{failures} {[it.get('name') for it in entries]} {ends} {server.log_file.read_text()}"
        )

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
    async with http_client() as http:
        yield http


@pytest.fixture
def tracing(
    tmp_path: Path, http: httpx2.AsyncClient
) -> Iterable[Callable[[RestateServer], Traced]]:
    """Makes what a test needs beside a server."""
    with Collector(tmp_path / "spans.jsonl") as collector:
        [port] = free_ports(1)
        yield lambda server: Traced(
            Ingress(server, http), server._always_replay, collector, tmp_path, port
        )


@pytest.fixture
def traced(tracing: Callable[[RestateServer], Traced], server: RestateServer) -> Traced:
    """What a test needs beside the server of all tests."""
    return tracing(server)


def expected(text: str) -> str:
    """Take the tree as it is written in this file."""
    return "\n".join(line for line in text.splitlines() if line.strip())


PLAIN = """\
Traced/plain
  invoke_agent plain
    chat model
    execute_tool work
      inside work
    chat model
"""


async def test_a_plain_run(traced: Traced) -> None:
    async with traced.registered():
        assert await traced.ingress.call("Traced/plain") == "work=worked"
    assert traced.run("plain") == expected(PLAIN)


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
        awakeable = await traced.waits()
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


DELEGATING = """\
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
"""


async def test_a_run_over_two_workers(traced: Traced, http: httpx2.AsyncClient) -> None:
    """A delegate in another process lies under the call."""
    async with (
        traced.registered("caller"),
        Worker(
            "tests.live.traced_app:delegated_app",
            env={"TRACED_COLLECTOR": traced.collector.url, "TRACED_SERVICE": "delegate"},
            log_file=traced.log,
        ) as delegate,
    ):
        await traced.ingress.server.register(delegate.url)
        await traced.ingress.call("Traced/delegating")
    assert traced.run("delegating") == expected(DELEGATING)
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
    assert [it.attributes["restate.retry_count"] for it in tries] == [0, 1]


async def test_a_killed_process_loses_what_its_exporter_has_not_sent(traced: Traced) -> None:
    """That is what OpenTelemetry promises: the tree has a hole then, but nothing twice, and the run is whole."""
    async with traced.registered(
        "first", TRACED_PROCESSORS="batch", OTEL_BSP_SCHEDULE_DELAY="3600000"
    ) as worker:
        run = asyncio.create_task(traced.ingress.call("Traced/between"))
        awakeable = await traced.waits()
        worker.kill()
    async with traced.registered("second", TRACED_PROCESSORS="batch", OTEL_BSP_SCHEDULE_DELAY="50"):
        await traced.ingress.post(f"restate/awakeables/{awakeable}/resolve", "go")
        await run
        await traced.until(lambda spans: any(it.name == "Traced/between" for it in spans))
    spans = traced.spans()
    assert tree(spans) == expected("""\
Traced/between
  invoke_agent between
    execute_tool wait
      awakeable
    chat model
    execute_tool work
      inside work
    chat model
""")
    [run_span] = [it for it in spans if it.name == "invoke_agent between"]
    lost = 51 + 52  # the first two requests'
    seen = sum(it.attributes.get("gen_ai.usage.input_tokens", 0) for it in spans)
    assert run_span.attributes["gen_ai.aggregated_usage.input_tokens"] == seen + lost


IN_PROGRESS = """\
Traced/between
  invoke_agent between
    chat model
    execute_tool work
      inside work
    chat model
    execute_tool wait
"""


async def test_pending_spans(traced: Traced) -> None:
    """With a token for Logfire, a run in progress is seen; each span is announced once, and ends once."""
    async with traced.registered(TRACED_PROCESSORS="logfire") as worker:
        run = asyncio.create_task(traced.ingress.call("Traced/between"))
        awakeable = await traced.waits()
        spans = await traced.until(
            lambda spans: any(it.name == "execute_tool wait" for it in spans)
        )
        assert tree(latest(spans)) == expected(IN_PROGRESS)
        worker.kill()
        await worker.start()
        await traced.ingress.post(f"restate/awakeables/{awakeable}/resolve", "go")
        await run
        spans = await traced.until(
            lambda spans: any(it.name == "Traced/between" and not it.pending for it in spans)
        )
    assert tree(latest(spans)) == expected(BETWEEN)
    twice = [
        it for it, times in Counter((it.span_id, it.pending) for it in spans).items() if times > 1
    ]
    assert not twice


async def test_a_run_that_dies_leaves_a_readable_tree(traced: Traced) -> None:
    """Killed by an operator: what had begun is there, and marked as not ended."""
    async with traced.registered(TRACED_PROCESSORS="logfire"):
        invocation = await start(traced.ingress, "Traced/between")
        await traced.begun()
        await traced.until(lambda spans: any(it.name == "execute_tool wait" for it in spans))
        url = f"{traced.ingress.server.admin_url}/invocations/{invocation}/kill"
        (await traced.ingress.http.patch(url)).raise_for_status()
    spans = latest(traced.collector.spans())
    assert tree(spans) == expected(IN_PROGRESS)
    assert [it.name for it in spans if it.pending] == [
        "Traced/between",
        "invoke_agent between",
        "execute_tool wait",
    ]


async def test_metrics_are_counted_once(traced: Traced) -> None:
    """Tokens, steps, failed tries, replays, and the time for which a run was suspended."""
    answers = [Answer(status=500), Answer("done")]
    with provider(answers) as api:
        async with traced.registered(**api.env, OPENAI_API_KEY="key"):
            run = asyncio.create_task(traced.ingress.call("Traced/between"))
            awakeable = await traced.waits()
            await traced.ingress.post(f"restate/awakeables/{awakeable}/resolve", "go")
            await run
            await traced.ingress.call("Traced/failing")
            counted = await traced.ingress.call("Traced/metrics")
    spent = Counter[str]()
    requests = [it for it in traced.collector.spans() if it.name.startswith("chat ")]
    for request in requests:
        spent.update({name: value for name, value in request.attributes.items() if "usage" in name})
    assert len(requests) == 5
    assert counted["gen_ai.client.token.usage"] == 2 * 5
    assert counted["gen_ai.client.token.usage.sum"] == spent.total()
    assert counted["durable.steps"] == 7
    assert counted["durable.failed_tries"] == 1
    suspended = counted.get("durable.suspended", 0)
    if traced.always_replay:
        assert 5 <= suspended <= counted["durable.replays"]
    else:
        assert (suspended, counted["durable.replays"]) == (0, 1)  # that of the failed try


async def test_without_logfire(traced: Traced) -> None:
    """OpenTelemetry's own SDK is enough."""
    async with traced.registered(TRACED_PROCESSORS="opentelemetry", LOGFIRE_IGNORE_NO_CONFIG="1"):
        await traced.ingress.call("Traced/plain")
    assert traced.run("plain") == expected(PLAIN.replace("      inside work\n", ""))


async def test_baggage_groups_runs(traced: Traced) -> None:
    """What a caller sends along is an attribute of the run's spans, also of those of runs that it calls."""
    async with traced.registered():
        await traced.ingress.call("Traced/delegating", headers={"baggage": "tenant=acme"})
    spans = traced.spans()
    assert {it.attributes.get("tenant") for it in spans} == {"acme"}
    conversations = {
        it.attributes["gen_ai.conversation.id"] for it in spans if it.name == "invoke_agent inner"
    }
    assert len(conversations) == 1


async def test_a_callers_trace_is_joined(traced: Traced) -> None:
    """A `traceparent` that is malformed, or none, makes the run a trace of its own."""
    theirs = "0af7651916cd43dd8448eb211c80319c"
    async with traced.registered():
        for header in (f"00-{theirs}-b7ad6b7169203331-01", f"00-{theirs}-b7ad6b71692", "", None):
            headers = {} if header is None else {"traceparent": header}
            await traced.ingress.call("Traced/plain", headers=headers)
    roots = [it for it in traced.collector.spans() if it.name == "Traced/plain"]
    assert [(it.trace_id == theirs, it.parent_id) for it in roots] == [
        (True, "b7ad6b7169203331"),
        (False, None),
        (False, None),
        (False, None),
    ]
    assert len({it.trace_id for it in traced.collector.spans()}) == 4


async def test_a_call_of_another_handler(traced: Traced) -> None:
    """Handlers that call each other with Restate's own means are in one trace too."""
    async with traced.registered():
        await traced.ingress.call("Traced/relay", "plain")
        await traced.until(lambda spans: any(it.name == "Traced/metrics" for it in spans))
    assert traced.run("plain") == expected("""\
Traced/relay
  call Traced/plain
    Traced/plain
      invoke_agent plain
        chat model
        execute_tool work
          inside work
        chat model
  send Traced/metrics
    Traced/metrics
""")


async def test_sampling(traced: Traced) -> None:
    """A trace is kept as a whole or not at all, also over calls."""
    async with traced.registered(TRACED_SAMPLED="0.5"):
        await asyncio.gather(*[traced.ingress.call("Traced/relay", "plain") for _ in range(20)])
    spans = [it for it in traced.collector.spans() if it.name != "Traced/metrics"]
    sizes = Counter(it.trace_id for it in spans)
    assert set(sizes.values()) == {9}
    assert 0 < len(sizes) < 20


async def test_tracing_is_switched_on_under_a_run(
    tracing: Callable[[RestateServer], Traced], tmp_path: Path
) -> None:
    """What is journaled does not depend on it: neither on the worker's traces nor on the server's."""
    data = tmp_path / "data"
    async with RestateServer(data_dir=data) as server:
        traced = tracing(server)
        async with traced.registered(TRACED_PROCESSORS="none") as worker:
            key = {"idempotency-key": "once"}
            sent = await traced.ingress.post("Traced/relay/send", "pause", headers=key)
            awakeable = await traced.waits()
            worker.kill()
    assert not traced.collector.spans()
    async with RestateServer(data_dir=data, env=traced.servers_spans) as server:
        traced = tracing(server)
        async with traced.registered():
            await traced.ingress.post(f"restate/awakeables/{awakeable}/resolve", "go")
            assert await end(traced.ingress, sent.json()["invocationId"]) == "go"
    assert "Traced/pause" in tree(traced.collector.spans())


@pytest.mark.parametrize("always_replay", [False, True])
async def test_with_the_servers_spans(
    tracing: Callable[[RestateServer], Traced], tmp_path: Path, *, always_replay: bool
) -> None:
    """Restate's spans and ours are one trace: ours lie under the attempt that ended the run."""
    server = RestateServer(always_replay=always_replay)
    traced = tracing(server)
    server._env = traced.servers_spans
    async with server, traced.registered():
        await traced.ingress.call("Traced/delegating")
        ends = {"invocation-end Traced/delegating", "invocation-end Delegated/delegate"}
        await traced.until(lambda spans: ends <= {it.name for it in spans})
    spans = traced.spans()
    ours = [it for it in spans if it.service != "Restate"]
    assert tree(ours) == expected(DELEGATING)
    [run] = [it for it in ours if it.name == "Traced/delegating"]
    [*_, attempt] = [it for it in spans if it.name == "invocation-attempt Traced/delegating"]
    assert run.parent_id == attempt.span_id
    assert len(tree(spans).splitlines()) == len(spans)
    assert tree(spans).startswith(
        "ingress Traced/delegating\n  invocation-start Traced/delegating\n"
    )


async def test_mistakes_in_exporters(traced: Traced) -> None:
    """What a processor or an exporter raises is logged, by us once; the run and the other spans are fine."""
    async with traced.registered(TRACED_PROCESSORS="raising"):
        assert await traced.ingress.call("Traced/plain") == "work=worked"
    log = traced.log.read_text()
    assert log.count("Telemetry could not be emitted; this is logged once.") == 1
    assert "a mistake in export" in log
    assert traced.run("plain") == expected(PLAIN)


async def test_a_collector_that_does_not_answer(traced: Traced) -> None:
    """The run does not wait for it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = {"TRACED_COLLECTOR": url, "OTEL_BSP_SCHEDULE_DELAY": "10"}
        async with traced.registered(TRACED_PROCESSORS="batch", **env) as worker:
            assert await traced.ingress.call("Traced/plain") == "work=worked"
            silent.accept()[0].close()  # it was called
            worker.kill()


async def test_no_collector(traced: Traced) -> None:
    """Nobody listens."""
    [port] = free_ports(1)
    env = {"TRACED_COLLECTOR": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "10"}
    async with traced.registered(TRACED_PROCESSORS="batch", **env) as worker:
        assert await traced.ingress.call("Traced/plain") == "work=worked"
        worker.kill()


async def test_what_is_secret_stays_secret(traced: Traced) -> None:
    """Keys, headers and what the provider says are in no span, error text or step name."""
    answers = [
        Answer("canary-body", status=status, headers={"x-canary": "canary-header"})
        for status in (500, 401)
    ]
    with provider(answers) as api:
        async with traced.registered(**api.env, OPENAI_API_KEY="canary-key"):
            response = await traced.ingress.post(
                "Traced/failing", headers={"authorization": "canary-authorization"}
            )
    assert response.status_code == 502
    assert "canary" not in response.text
    assert "failed try: failing__model.request" in tree(traced.collector.spans())
    assert "canary" not in traced.collector.file.read_text()
    assert "canary" not in await traced.told_by_journal("failing")


async def test_content_that_must_not_be_recorded(traced: Traced) -> None:
    """With `include_content=False`, no text of a person, a model or a tool is in spans or error texts."""
    async with traced.registered(TRACED_HIDDEN="1"):
        response = await traced.ingress.post("Traced/secret")
    assert response.status_code == 500
    assert "canary" not in response.text
    assert tree(traced.collector.spans()) == expected("""\
Traced/secret
  invoke_agent secret
    chat model
    execute_tool leak
      failed try: secret__function_toolset__<agent>.call_tool:leak
    chat model
    execute_tool repeat
    chat model
    execute_tool fail
      failed try: secret__function_toolset__<agent>.call_tool:fail
""")
    assert "canary" not in traced.collector.file.read_text()
    assert "canary" not in await traced.told_by_journal("secret")
