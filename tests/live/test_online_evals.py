"""Online evals: sampled alike on every replay, evaluated once and after the run, whatever happens in between."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import logfire
import pytest
import restate
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.exceptions import UsageLimitExceeded
from pydantic_ai.models.test import TestModel
from pydantic_ai.usage import UsageLimits
from pydantic_evals.evaluators import Evaluator, EvaluatorContext, HasMatchingSpan, LLMJudge
from pydantic_evals.online import (
    OnlineEvalConfig,
    OnlineEvaluator,
    SamplingContext,
    SinkPayload,
    wait_for_evaluations,
)

import durable
from durable.evals import OnlineEvaluation
from durable.server import RestateServer
from durable.worker import Worker
from tests.live.hosting import PATIENCE, Ingress, after, hosted, http_client
from tests.live.providers import Answer, provider
from tests.live.scripted import call, done, script

pytestmark = pytest.mark.live

Context = EvaluatorContext[Any, Any, Any]
EVALUATIONS = (
    "SELECT id, completion_result FROM sys_invocation WHERE invoked_by_target = 'Runner/run'"
)


class Weather(BaseModel):
    """What the agent answers."""

    place: str
    tags: set[str]


@dataclass
class Seen(Evaluator[Any, Any, Any]):
    """Keeps what it is given."""

    contexts: list[Context] = field(default_factory=list[Context])

    def evaluate(self, ctx: Context) -> bool:
        self.contexts.append(ctx)
        return True


def evaluating(*evaluators: Any, **config: Any) -> OnlineEvaluation[Any]:
    return OnlineEvaluation(evaluators=evaluators, config=OnlineEvalConfig(**config))


def evaluated(evaluation: OnlineEvaluation[Any], model: Any = None, **options: Any) -> Any:
    """Return an agent whose runs are evaluated."""
    capabilities = [durable.RestateDurability(), evaluation]
    return Agent(model or script(), name="poet", capabilities=capabilities, **options)


@asynccontextmanager
async def serving(
    server: RestateServer, agent: Agent[Any, Any], *services: Any, **options: Any
) -> AsyncGenerator[Ingress]:
    """Host the agent as `Runner/run`, with a step behind the run: always-replay mode replays the run there."""
    service = restate.Service("Runner")

    @service.handler()
    async def run(ctx: restate.Context, prompt: str) -> str:
        try:
            output = (await agent.run(prompt, **options)).output
        except UsageLimitExceeded:
            await ctx.run_typed("after", after)
            raise
        await ctx.run_typed("after", after)
        return str(output)

    async with hosted(server, service, *services) as ingress:
        yield ingress


async def report(ingress: Ingress) -> dict[str, Any]:
    """Wait for the evaluation of the last run, the only one, and return what Restate's UI shows of it."""
    run = await ingress.invocation("Runner")
    sql = f"{EVALUATIONS} AND invoked_by_id = '{run['id']}' AND status = 'completed'"
    await ingress.until(sql, lambda rows: len(rows) == 1)
    [row] = await ingress.server.query(sql)
    assert row["completion_result"] == "success"
    [output] = await ingress.server.query(
        f"SELECT entry_json FROM sys_journal WHERE id = '{row['id']}' AND entry_type = 'Command: Output'"
    )
    success = json.loads(output["entry_json"])["Command"]["Output"]["result"]["Success"]
    return json.loads(bytes(success))


def values(found: dict[str, Any]) -> dict[str, Any]:
    return {it["name"]: it["value"] for it in found["results"]}


async def test_evaluators_see_the_run(server: RestateServer) -> None:
    """Prompt, typed output (with a set, which is written in any order), usage, time and spans; once."""
    seen = Seen()
    evaluation = evaluating(
        seen,
        HasMatchingSpan(query={"name_equals": "execute_tool look"}),
        HasMatchingSpan(query={"name_equals": "execute_tool leap"}, evaluation_name="leapt"),
        metadata={"team": "north"},
    )
    answer = {"place": "Ulm", "tags": ["wet", "cold", "dark", "late"]}
    agent = evaluated(evaluation, TestModel(custom_output_args=answer), output_type=Weather)

    @agent.tool_plain
    def look() -> str:
        return "rain"

    async with serving(server, agent, evaluation.service, metadata={"user": "ada"}) as ingress:
        await ingress.call("Runner/run", "Ulm?")
        found = await report(ingress)
        steps = await ingress.steps("OnlineEvaluation")
        invocation = await ingress.invocation("Runner")
    [context] = seen.contexts
    assert context.inputs == "Ulm?"
    assert context.output == Weather(place="Ulm", tags={"wet", "cold", "dark", "late"})
    assert context.metadata == {"team": "north", "user": "ada"}
    assert context.metrics["requests"] == 2
    assert context.metrics["output_tokens"] > 0
    assert 0 < context.duration < 60
    assert (found["target"], found["run"]) == ("poet", f"{invocation['id']}:0")
    assert values(found) == {"Seen": True, "HasMatchingSpan": True, "leapt": False}
    assert sorted(steps) == [
        *("evaluate.report", "evaluate:HasMatchingSpan"),
        *("evaluate:Seen", "evaluate:leapt"),
    ]


async def test_a_share_of_the_runs(server: RestateServer) -> None:
    """Each replay decides alike; a run that is not sampled costs nothing."""
    seen = Seen()
    evaluation = evaluating(OnlineEvaluator(evaluator=seen, sample_rate=0.5))
    async with serving(server, evaluated(evaluation), evaluation.service) as ingress:
        await asyncio.gather(*[ingress.call("Runner/run", "go") for _ in range(24)])
        newest = "SELECT id FROM sys_invocation WHERE target = 'Runner/run' ORDER BY created_at DESC LIMIT 24"
        sampled = await server.query(
            f"SELECT id FROM sys_journal WHERE name = 'poet__online_evaluation' AND id IN ({newest})"
        )
        sent = f"{EVALUATIONS} AND status = 'completed' AND invoked_by_id IN ({newest})"
        await ingress.until(sent, lambda rows: len(rows) == len(sampled))
    assert 0 < len(sampled) < 24
    assert len(seen.contexts) == len(sampled)


async def test_rates_that_are_functions(server: RestateServer) -> None:
    """What they decide is journaled; one that raises is a warning, and no run fails for it."""
    seen = Seen()
    decisions = iter([True])

    def once(context: SamplingContext) -> bool:
        assert context.inputs == "go"
        return next(decisions)

    def broken(context: SamplingContext) -> bool:
        raise ValueError("no idea")

    evaluation = evaluating(
        OnlineEvaluator(evaluator=seen, sample_rate=once),
        OnlineEvaluator(
            evaluator=Seen(),
            sample_rate=broken,
            on_sampling_error=lambda error, _: done.update([str(error)]),
        ),
    )
    async with serving(server, evaluated(evaluation), evaluation.service) as ingress:
        await ingress.call("Runner/run", "go")
        assert values(await report(ingress)) == {"Seen": True}
        assert await ingress.call("Runner/run", "go") == "hello"  # `once` has no decision left
        sent = await ingress.entries("Runner", "OneWayCall")
    assert done["no idea"] == 2
    assert sent == []
    assert len(seen.contexts) == 1


async def test_a_judge_is_asked_once(server: RestateServer) -> None:
    """A provider that is down for a moment is asked again; its verdict is a step."""
    verdict = Answer('{"reason": "It rhymes.", "pass": true, "score": 1.0}')
    with provider([Answer(status=503), verdict]) as judge:
        evaluation = evaluating(LLMJudge(rubric="It rhymes.", model=judge.model()))
        async with serving(server, evaluated(evaluation), evaluation.service) as ingress:
            await ingress.call("Runner/run", "go")
            found = await report(ingress)
    assert values(found) == {"LLMJudge": True}
    assert found["results"][0]["reason"] == "It rhymes."
    assert len(judge.requests) == 2


@dataclass
class Broken(Evaluator[Any, Any, Any]):
    def evaluate(self, ctx: Context) -> bool:
        done["broken"] += 1
        raise ValueError("a mistake")


async def test_evaluators_that_fail(server: RestateServer) -> None:
    """A mistake is not repeated, and is the evaluation's alone."""
    evaluation = evaluating(Broken(), Seen())
    async with serving(server, evaluated(evaluation), evaluation.service) as ingress:
        assert await ingress.call("Runner/run", "go") == "hello"
        found = await report(ingress)
    assert values(found) == {"Seen": True}
    [failure] = found["failures"]
    assert (failure["name"], failure["error_message"]) == ("Broken", "ValueError: a mistake")
    assert done["broken"] == 1


async def test_runs_that_fail(server: RestateServer) -> None:
    """For evaluators that want them; not the attempts before, which Restate repeats."""
    seen, other = Seen(), Seen()
    evaluation = evaluating(OnlineEvaluator(evaluator=seen, run_on_errors=True), other)
    agent = evaluated(evaluation, script([call("stumble")], [call("stumble", "2")]))

    @agent.tool_plain(metadata={"restate": False})
    async def stumble() -> str:
        done["stumble"] += 1
        if done["stumble"] == 1:
            raise RuntimeError("once")
        return "stood up"

    limits = UsageLimits(request_limit=2)
    async with serving(server, agent, evaluation.service, usage_limits=limits) as ingress:
        assert (await ingress.post("Runner/run", "go")).status_code == 429
        assert values(await report(ingress)) == {"Seen": True}
        evaluations = await server.query(EVALUATIONS)
    [context] = seen.contexts
    assert isinstance(context.output, UsageLimitExceeded)
    assert context.metrics["requests"] == 2
    assert other.contexts == []
    assert evaluations


async def test_what_cannot_be_stored(
    server: RestateServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Is not evaluated; the run is none the wiser."""
    evaluation = evaluating(Seen())
    agent = evaluated(evaluation)
    options = {"metadata": {"lock": asyncio.Lock()}}
    async with serving(server, agent, evaluation.service, **options) as ingress:
        assert await ingress.call("Runner/run", "go") == "hello"
        assert await ingress.entries("Runner", "OneWayCall") == []
    assert "A run of 'poet' is not evaluated" in caplog.text


async def test_a_service_that_is_not_hosted(server: RestateServer) -> None:
    async with serving(server, evaluated(evaluating(Seen()))) as ingress:
        answer = await ingress.post("Runner/run", "go")
    assert answer.status_code == 500
    assert "Add it: `durable.app([..., evaluation.service])`" in answer.text


async def test_sinks(server: RestateServer) -> None:
    """Each gets what is for it, in a step with retries."""
    payloads: list[SinkPayload] = []

    class Sink:
        async def submit(self, payload: SinkPayload) -> None:
            done["submit"] += 1
            if done["submit"] == 1:
                raise ConnectionError("not yet")
            payloads.append(payload)

    told: list[str] = []
    evaluation = evaluating(
        Seen(),
        OnlineEvaluator(
            evaluator=Broken(),
            sink=lambda results, failures, context: told.append(failures[0].name),
        ),
        default_sink=Sink(),
    )
    async with serving(server, evaluated(evaluation), evaluation.service) as ingress:
        await ingress.call("Runner/run", "go")
        await report(ingress)
    assert [it.name for payload in payloads for it in payload.results] == ["Seen"]
    assert told == ["Broken"]


def finished(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


async def test_telemetry(server: RestateServer) -> None:
    """Evaluators' spans and the events lie under the span of the run, once."""
    spans, events = InMemorySpanExporter(), InMemoryLogRecordExporter()
    logfire.configure(
        send_to_logfire=False,
        console=False,
        additional_span_processors=[SimpleSpanProcessor(spans)],
        advanced=logfire.AdvancedOptions(log_record_processors=[SimpleLogRecordProcessor(events)]),
        distributed_tracing=True,
    )
    durable.configure_logfire()
    evaluation = evaluating(Seen(), Broken())
    async with serving(server, evaluated(evaluation), evaluation.service) as ingress:
        await ingress.call("Runner/run", "go")
        await report(ingress)
    [run] = [span.context for span in finished(spans, "invoke_agent poet")]
    evaluators = finished(spans, "evaluator: {evaluator_name}")
    names = [(span.attributes or {})["evaluator_name"] for span in evaluators]
    assert sorted(map(str, names)) == ["Broken", "Seen"]
    assert run is not None
    for span in evaluators:
        assert span.parent is not None
        assert (span.parent.trace_id, span.parent.span_id) == (run.trace_id, run.span_id)
    records = [it.log_record for it in events.get_finished_logs()]
    told = [it for it in records if it.event_name == "gen_ai.evaluation.result"]
    assert [(it.attributes or {})["gen_ai.evaluation.name"] for it in told] == ["Seen", "Broken"]
    assert {(it.trace_id, it.span_id) for it in told} == {(run.trace_id, run.span_id)}


async def test_streams_and_delegates(server: RestateServer) -> None:
    """A streamed run is evaluated when it is over, and the agent in a tool of it by itself."""
    seen = Seen()
    evaluation = evaluating(seen)
    inner = Agent(script(), name="inner", capabilities=[durable.RestateDurability(), evaluation])
    agent = evaluated(evaluation, script([call("ask")]))

    @agent.tool_plain(metadata={"restate": False})
    async def ask() -> str:
        return (await inner.run("well?")).output

    service = restate.Service("Runner")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        async with agent.run_stream("go") as stream:
            output = await stream.get_output()
        await ctx.run_typed("after", after)
        return output

    async with hosted(server, service, evaluation.service) as ingress:
        output = await ingress.call("Runner/run")
        run_id = (await ingress.invocation("Runner"))["id"]
        completed = f"{EVALUATIONS} AND invoked_by_id = '{run_id}' AND status = 'completed'"
        await ingress.until(completed, lambda rows: len(rows) == 2)
    assert {it.inputs: it.output for it in seen.contexts} == {"go": output, "well?": "hello"}
    assert sorted(str(it.name) for it in seen.contexts) == [f"{run_id}:0", f"{run_id}:1"]


async def test_outside_a_handler() -> None:
    """There it is pydantic-evals' own."""
    seen = Seen()
    await evaluated(evaluating(seen)).run("go")
    await wait_for_evaluations()
    assert [it.output for it in seen.contexts] == ["hello"]


async def test_a_killed_worker(tmp_path: Path) -> None:
    """The run does not wait for its evaluators; after a kill only the one that was under way runs again."""
    trace = tmp_path / "trace"
    env = {"EVALUATED_FOLDER": str(tmp_path)}
    async with (
        RestateServer() as server,
        Worker("tests.live.evaluated_app:app", env=env, log_file=tmp_path / "log") as worker,
        http_client() as http,
    ):
        await server.register(worker.url)
        ingress = Ingress(server, http)
        assert await ingress.call("Evaluated/run") == "hello"  # while `Held` holds
        completions = (
            "SELECT id FROM sys_journal WHERE entry_type = 'Notification: Run' AND id IN "
            "(SELECT id FROM sys_invocation WHERE target = 'OnlineEvaluation/evaluate')"
        )
        await ingress.until(completions, lambda rows: len(rows) == 1)
        async with asyncio.timeout(PATIENCE):
            while "held begins" not in trace.read_text():  # noqa: ASYNC110 - another process writes
                await asyncio.sleep(0.02)
        worker.kill()
        (tmp_path / "go").touch()
        await worker.start()
        await ingress.until(
            "SELECT id FROM sys_invocation WHERE target = 'OnlineEvaluation/evaluate' "
            "AND completion_result = 'success'",
            lambda rows: len(rows) == 1,
        )
    assert Counter(trace.read_text().splitlines()) == {"quick": 1, "held begins": 2, "held ends": 1}
