"""An application whose steps leave a trace on disk, served by workers that tests kill."""

import asyncio
import os
import random

import restate
from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel

import durable

ROUNDS = (("t0", "t1", "t2", "t3"), ("t4", "t5", "t6", "t7"))
"""The tools that the model calls at once, round after round."""

STEPS = 3 + sum(map(len, ROUNDS))
"""Model requests and tool calls of one run."""


def trace(event: str, run_id: str | None, step: str) -> None:
    """Append a line that survives a kill: `{pid} {invocation} {step} {event}`."""
    invocation = (run_id or "").split(":")[0]
    line = f"{os.getpid()} {invocation} {step} {event}\n".encode()
    file = os.open(os.environ["CRASH_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)


async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Call the tools of the next round, then say what all of them returned."""
    round_ = sum(isinstance(message, ModelResponse) for message in messages)
    step = f"model.request.{round_}"
    trace("begin", messages[-1].run_id, step)
    await asyncio.sleep(random.random() * 0.05)
    trace("end", messages[-1].run_id, step)
    if round_ < len(ROUNDS):
        calls = [ToolCallPart(name, tool_call_id=f"call-{name}") for name in ROUNDS[round_]]
        return ModelResponse(parts=list(calls))
    returned = [
        part.content
        for message in messages
        for part in message.parts
        if part.part_kind == "tool-return"
    ]
    return ModelResponse(parts=[TextPart(" ".join(map(str, returned)))])


agent = Agent(FunctionModel(respond), name="crash", capabilities=[durable.RestateDurability()])


def _tool(name: str) -> None:
    @agent.tool(name=name)
    async def tool(ctx: RunContext) -> str:
        trace("begin", ctx.run_id, name)
        await asyncio.sleep(random.random() * 0.05)
        trace("end", ctx.run_id, name)
        return name


for names in ROUNDS:
    for name in names:
        _tool(name)

service = restate.Service("Crash")


@service.handler()
async def run(ctx: restate.Context) -> str:
    """Run the agent once."""
    return (await agent.run("go")).output


payer = Agent(TestModel(), name="payer", capabilities=[durable.RestateDurability()])


@payer.tool(metadata={"restate": {"at_most_once": True}})
async def pay(ctx: RunContext) -> str:
    """Pay, and be killed before saying so."""
    trace("begin", ctx.run_id, "pay")
    await asyncio.sleep(float(os.environ.get("CRASH_PAY_SECONDS", "0")))
    trace("end", ctx.run_id, "pay")
    return "paid"


@service.handler()
async def pay_once(ctx: restate.Context) -> str:
    """Run the agent that pays."""
    return (await payer.run("go")).output


app = durable.app([service])
