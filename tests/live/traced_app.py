"""An application whose spans go to the collector at `TRACED_COLLECTOR`; tests kill its workers.

Each span is sent when it is emitted, so a kill loses none, unless `TRACED_PROCESSORS` says otherwise.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import logfire
import restate
from openai import AsyncOpenAI
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

import durable
from tests.live.scripted import call, script

COLLECTOR = os.environ["TRACED_COLLECTOR"]
exporter = OTLPSpanExporter(f"{COLLECTOR}/v1/traces")
reader = InMemoryMetricReader()


class Raising(SpanProcessor):
    """A processor with a mistake in it.

    Not for spans that a tool opens itself: there OpenTelemetry lets it out, with or without Restate.
    """

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Raise."""
        if span.instrumentation_scope and span.instrumentation_scope.name != "logfire":
            raise ValueError("a mistake in on_start")

    def on_end(self, span: ReadableSpan) -> None:
        """Raise."""
        if span.instrumentation_scope and span.instrumentation_scope.name != "logfire":
            raise ValueError("a mistake in on_end")


class RaisingExporter(SpanExporter):
    """An exporter with a mistake in it."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Raise."""
        raise ValueError("a mistake in export")


PROCESSORS: dict[str, Callable[[], list[SpanProcessor]]] = {
    "simple": lambda: [SimpleSpanProcessor(exporter)],
    "batch": lambda: [BatchSpanProcessor(exporter)],  # OTEL_BSP_SCHEDULE_DELAY
    "raising": lambda: [
        SimpleSpanProcessor(exporter),
        SimpleSpanProcessor(RaisingExporter()),
        Raising(),
    ],
    "logfire": lambda: [],
}
"""How spans get to the collector; `logfire` sends them as to Logfire, with a token; `none` makes none, and with
`opentelemetry` there is no Logfire."""

processors = os.environ.get("TRACED_PROCESSORS", "simple")
if processors == "opentelemetry":
    provider = TracerProvider(resource=Resource({"service.name": "worker"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    Agent.instrument_all()
elif processors != "none":
    logfire.configure(
        token="pylf_v1_local_canary" if processors == "logfire" else None,
        send_to_logfire=processors == "logfire",
        console=False,
        service_name=os.environ.get("TRACED_SERVICE", "worker"),
        additional_span_processors=PROCESSORS[processors](),
        metrics=logfire.MetricsOptions(additional_readers=[reader]),
        sampling=logfire.SamplingOptions(head=float(os.environ.get("TRACED_SAMPLED", "1"))),
        advanced=logfire.AdvancedOptions(base_url=COLLECTOR),
    )
    if "TRACED_HIDDEN" in os.environ:
        logfire.instrument_pydantic_ai(include_content=False)
    durable.configure_logfire()

service = restate.Service("Traced")


def agent(name: str, model: Model, *capabilities: Any, prompt: str = "go", **options: Any) -> Agent:
    """Make an agent, and a handler of its name that runs it."""
    it = Agent(
        model, name=name, capabilities=[durable.RestateDurability(), *capabilities], **options
    )

    async def run(ctx: restate.Context) -> str:
        return (await it.run(prompt)).output

    service.handler(name=name)(run)
    return it


plain = agent("plain", script([call("work")]))
parallel = agent("parallel", script([call("work", "1"), call("rest"), call("work", "2")]))
nested = agent("nested", script([call("delegate")]))
inner = Agent(
    script([call("work")], name="inner model"),
    name="inner",
    capabilities=[durable.RestateDurability()],
)
held = agent("held", script([call("work", "1"), call("hold")], [call("work", "2")]))
between = agent("between", script([call("work", "1")], [call("wait")], [call("work", "2")]))


async def _notify(pending: durable.PendingCall) -> None:
    """Tell nobody: the test looks itself."""


approval = agent("approval", script([call("refund")]), durable.Approvals(notify=_notify))


@approval.tool_plain(requires_approval=True)
async def refund() -> str:
    """Refund an order."""
    with logfire.span("inside refund"):
        return "refunded"


@plain.tool_plain
@parallel.tool_plain
@inner.tool_plain
@held.tool_plain
@between.tool_plain
async def work() -> str:
    """Work, with a span inside the step."""
    with logfire.span("inside work"):
        await asyncio.sleep(0.01)
    return "worked"


@parallel.tool_plain(metadata={"restate": False})
async def rest() -> str:
    """Rest in handler code."""
    logfire.info("resting")
    await asyncio.sleep(0.2)
    return "rested"


@nested.tool(metadata={"restate": False})
async def delegate(ctx: RunContext) -> str:
    """Run another agent in handler code."""
    return (await inner.run("dig", usage=ctx.usage)).output


@held.tool_plain
async def hold() -> str:
    """Begin, tell so, and go on when the file `go` is there."""
    folder = Path(os.environ["TRACED_FOLDER"])
    with logfire.span("inside hold"):
        (folder / "begun").touch()
        while not (folder / "go").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.02)
    return "held"


@between.tool_plain(metadata={"restate": False})
async def wait() -> str:
    """Wait in handler code for an awakeable, with no step under way."""
    ctx = durable.restate_context()
    name, resolved = ctx.awakeable(type_hint=str)

    async def tell() -> None:
        (Path(os.environ["TRACED_FOLDER"]) / "begun").write_text(name)

    await ctx.run_typed("tell", tell)
    return await resolved


@service.handler()
async def relay(ctx: restate.Context, handler: str) -> str:
    """Call other handlers as users of the SDK do, waiting for one and not for the other."""
    answer = await ctx.generic_call("Traced", handler, b"")
    ctx.generic_send("Traced", "metrics", b"")
    return json.loads(answer)


@service.handler()
async def pause(ctx: restate.Context) -> str:
    """Wait without an agent."""
    return await wait()


delegated = durable.agent_service(inner, name="Delegated")
delegating = agent(
    "delegating",
    script([call("inner", prompt="dig")]),
    toolsets=[durable.AgentToolset([delegated])],
)


secret = agent(
    "secret",
    script([call("leak", secret="canary-arguments")], [call("repeat")], [call("fail")]),
    prompt="canary-prompt",
    instructions="canary-instructions",
)
leaks: list[str] = []


@secret.tool_plain
async def leak(secret: str) -> str:
    """Fail once with what must not be told."""
    if not leaks:
        leaks.append(secret)
        raise RuntimeError("canary-exception")
    return "canary-result"


@secret.tool(retries=1)
async def repeat(ctx: RunContext) -> str:
    """Ask the model to try again."""
    if ctx.retry == 0:
        raise ModelRetry("canary-retry")
    return "canary-result"


@secret.tool_plain(metadata={"restate": {"max_attempts": 1}})
async def fail() -> str:
    """Fail for good."""
    raise RuntimeError("canary-failure")


@service.handler()
async def metrics(ctx: restate.Context) -> dict[str, float]:
    """Return what was counted: of histograms how many values, and their sum under `{name}.sum`."""
    found: Counter[str] = Counter()
    for resource in getattr(reader.get_metrics_data(), "resource_metrics", ()):
        for metric in (it for scope in resource.scope_metrics for it in scope.metrics):
            for point in metric.data.data_points:
                found[metric.name] += getattr(point, "count", None) or getattr(point, "value", 0)
                found[f"{metric.name}.sum"] += getattr(point, "sum", 0)
    return dict(found)


if "OPENAI_BASE_URL" in os.environ:
    client = AsyncOpenAI(max_retries=0)
    agent("failing", OpenAIChatModel("scripted", provider=OpenAIProvider(openai_client=client)))

app = durable.app([service, delegated, durable.agent_run])
delegated_app = durable.app([delegated])
"""What another worker may host instead."""
