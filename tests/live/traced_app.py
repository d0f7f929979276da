"""An application whose spans go to the collector at `TRACED_COLLECTOR`; tests kill its workers.

Each span is sent when it ends, so a kill loses none, unless `TRACED_PROCESSOR=batch` says otherwise.
"""

import asyncio
import os
from pathlib import Path
from typing import Any

import logfire
import restate
from openai import AsyncOpenAI
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from pydantic_ai import Agent, RunContext
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

import durable
from tests.live.scripted import call, script

exporter = OTLPSpanExporter(f"{os.environ['TRACED_COLLECTOR']}/v1/traces")
processor = (
    BatchSpanProcessor(exporter, schedule_delay_millis=100)
    if os.environ.get("TRACED_PROCESSOR") == "batch"
    else SimpleSpanProcessor(exporter)
)
logfire.configure(
    send_to_logfire=False,
    console=False,
    service_name=os.environ.get("TRACED_SERVICE", "worker"),
    additional_span_processors=[processor],
)
durable.configure_logfire()

service = restate.Service("Traced")


def agent(name: str, model: Model, *capabilities: Any, **options: Any) -> Agent:
    """Make an agent, and a handler of its name that runs it."""
    it = Agent(
        model, name=name, capabilities=[durable.RestateDurability(), *capabilities], **options
    )

    async def run(ctx: restate.Context) -> str:
        return (await it.run("go")).output

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
    name, resolved = durable.restate_context().awakeable(type_hint=str)
    (Path(os.environ["TRACED_FOLDER"]) / "begun").write_text(name)
    return await resolved


delegated = durable.agent_service(inner, name="Delegated")
delegating = agent(
    "delegating",
    script([call("inner", prompt="dig")]),
    toolsets=[durable.AgentToolset([delegated])],
)

if "OPENAI_BASE_URL" in os.environ:
    client = AsyncOpenAI(max_retries=0)
    agent("failing", OpenAIChatModel("scripted", provider=OpenAIProvider(openai_client=client)))

app = durable.app([service, delegated, durable.agent_run])
delegated_app = durable.app([delegated])
"""What another worker may host instead."""
