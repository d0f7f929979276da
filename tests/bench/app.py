"""The subjects of the benchmark: one agent, hosted in several ways. `BENCH_SUBJECT` names the way."""

import asyncio
import functools
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import restate
import restate.ext.pydantic._serde as peer_serde
from pydantic import TypeAdapter
from pydantic_ai import Agent
from pydantic_ai.durable_exec import (
    JSON_CODEC,
    BaseDurabilityCapability,
    DurabilityEngineSpec,
    DurableOperationId,
    JournalCallableOperationBackend,
    RoleBasedOperationConfig,
)
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from restate.ext.pydantic import RestateAgent

import durable

wait = 0.0
"""Seconds that the no-op engine waits after each operation, as one that stores the result would."""


class NoOpBackend(JournalCallableOperationBackend[None]):
    """Runs each operation at once and stores nothing."""

    async def execute(
        self,
        *,
        operation_id: DurableOperationId,
        name: str,
        body: Callable[[], Awaitable[object]],
        cache_key: tuple[object, ...],
        config: None,
    ) -> object:
        """Run the body, and then wait as long as `wait` says."""
        result = await body()
        if wait:
            await asyncio.sleep(wait)
        return result


class NoOpDurability(BaseDurabilityCapability[None]):
    """PydanticAI's durability base with an engine that does nothing: what every engine pays."""

    engine_spec: ClassVar = DurabilityEngineSpec(
        engine_name="no-op",
        durable_unit_noun="unit",
        durable_container_noun="container",
        codec=JSON_CODEC,
        toolset_lifecycles={
            "function": "enter-never",
            "mcp": "enter-never",
            "dynamic": "enter-never",
        },
    )

    @property
    def in_durable_context(self) -> bool:
        """Always."""
        return True

    def get_durable_operation_backend(self) -> NoOpBackend:
        """Return the backend that does nothing."""
        config = RoleBasedOperationConfig[None](model=None, event=None, capability=None, tool=None)
        return NoOpBackend(agent_name="bench", config=config)


def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Call the tool `rounds` times, `width` calls at once; the prompt says `rounds width seconds`."""
    first: Any = messages[0].parts[0]
    rounds, width, seconds = str(first.content).split()
    done = sum(isinstance(message, ModelResponse) for message in messages)
    if done == int(rounds):
        return ModelResponse(parts=[TextPart("done")])
    calls = [
        ToolCallPart("work", {"seconds": float(seconds)}, tool_call_id=f"{done}-{number}")
        for number in range(int(width))
    ]
    return ModelResponse(parts=list(calls))


def build(*capabilities: Any) -> Agent[None, str]:
    """Build the agent that all subjects run."""
    agent = Agent(FunctionModel(respond), name="bench", capabilities=list(capabilities))

    @agent.tool_plain
    async def work(seconds: float) -> str:
        if seconds:
            await asyncio.sleep(seconds)
        return "worked"

    return agent


async def bare(ctx: restate.Context, prompt: str) -> str:
    """Run as many bare steps as the agent would, with results of the same size, in turn."""
    rounds, width, seconds = prompt.split()

    async def step() -> str:
        if float(seconds):
            await asyncio.sleep(float(seconds))
        return "worked" * 20

    for _ in range(int(rounds) * (1 + int(width)) + 1):
        await ctx.run_typed("step", step)
    return "done"


def subject(name: str) -> Any:
    """Return the ASGI application of one subject."""
    service = restate.Service("Bench")
    run: Callable[[str], Awaitable[Any]]
    if name == "peer (fixed)":
        # the one-line fix: the peer builds a `TypeAdapter` at each step
        setattr(peer_serde, "TypeAdapter", functools.cache(TypeAdapter))  # noqa: B010
    if name.startswith("peer"):
        run = RestateAgent(build(), auto_wrap_tools=True).run
    elif name.startswith("no-op base"):
        # between two steps a durable run waits for the server; code that goes on after a pause finds the
        # processor's caches cold, which costs CPU time without any work being done
        global wait
        wait = 0.004 if "waits" in name else 0.0
        run = build(NoOpDurability()).run
    elif name == "ours":
        run = build(durable.RestateDurability()).run
    else:
        run = build().run

    async def agent(ctx: restate.Context, prompt: str) -> str:
        if name == "bare ctx.run":
            return await bare(ctx, prompt)
        return (await run(prompt)).output

    async def cpu(ctx: restate.Context) -> float:
        return time.process_time()

    service.handler(name="run")(agent)
    service.handler(name="cpu")(cpu)
    host: Any = durable.app if name == "ours" else restate.app
    return host([service])


app = subject(os.environ.get("BENCH_SUBJECT", "ours"))
