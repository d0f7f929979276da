"""Exactly once and the same bytes: messages, ids, usage, deadlines, keys."""

import asyncio
import json
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import restate
from pydantic import BaseModel
from pydantic_ai import Agent, RunContext
from pydantic_ai.exceptions import RunTimedOut
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from restate.exceptions import RetryableError

import durable
from durable.server import RestateServer
from tests.live.hosting import after, agent_service, hosted

pytestmark = pytest.mark.live


async def test_messages_are_the_same_bytes_on_every_replay(server: RestateServer) -> None:
    """Timestamps and generated ids come from the journal, so state made of them does not mismatch."""

    class Number(BaseModel):
        value: int

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        made = sum(isinstance(message, ModelResponse) for message in messages)
        [output] = info.output_tools
        if made == 0:
            return ModelResponse(parts=[ToolCallPart("look"), ToolCallPart("look")])
        if made == 1:
            return ModelResponse(
                parts=[TextPart("no call: PydanticAI asks again, with a random id")]
            )
        return ModelResponse(parts=[ToolCallPart(output.name, {"value": made})])

    agent = Agent(
        FunctionModel(respond),
        name="bytes",
        output_type=Number,
        system_prompt="Count.",
        capabilities=[durable.RestateDurability()],
    )
    memory = restate.VirtualObject("Memory")
    seen: defaultdict[str, set[str]] = defaultdict(set)

    @agent.tool_plain
    def look() -> str:
        return "seen"

    @memory.handler()
    async def turn(ctx: restate.ObjectContext) -> int:
        result = await agent.run("go")
        seen["first"].add(result.all_messages_json().decode())
        ctx.set("messages", result.all_messages_json().decode())
        await ctx.run_typed("between", between)
        again = await agent.run("and again", message_history=result.all_messages())
        seen["second"].add(again.all_messages_json().decode())
        ctx.set("messages", again.all_messages_json().decode())
        await ctx.run_typed("after", between)
        return again.output.value

    async def between() -> None:
        pass

    async with hosted(server, memory) as ingress:
        started = datetime.now(UTC)
        await ingress.call("Memory/me/turn")
        assert await ingress.retries("Memory") == 0
    assert {len(variants) for variants in seen.values()} == {1}
    for message in json.loads(seen["second"].pop()):
        for item in [message, *message["parts"]]:
            if "timestamp" in item:
                age = datetime.fromisoformat(item["timestamp"]) - started
                assert -1 < age.total_seconds() < 20


async def test_a_delegate_in_a_tool_counts_once(server: RestateServer) -> None:
    """What a plain agent inside a step used is journaled with the step, also for parallel delegates."""
    delegate = Agent(TestModel(), name="delegate", capabilities=[durable.RestateDurability()])
    agent = Agent(
        TestModel(call_tools=["ask", "ask_too"]),
        name="usage",
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Usage")
    seen: list[int] = []

    @agent.tool
    async def ask(ctx: RunContext) -> str:
        return (await delegate.run("go", usage=ctx.usage)).output

    @agent.tool
    async def ask_too(ctx: RunContext) -> str:
        return (await delegate.run("go", usage=ctx.usage)).output

    @service.handler()
    async def run(ctx: restate.Context) -> int:
        result = await agent.run("go")
        await ctx.run_typed("after", lambda: None)
        seen.append(result.usage.requests)
        return result.usage.requests

    async with hosted(server, service) as ingress:
        assert await ingress.call("Usage/run") == 4
    assert set(seen) == {4}


async def test_a_timeout_counts_from_the_first_attempt(server: RestateServer) -> None:
    """The deadline is measured on the journaled clock, so replays come to the same end."""
    agent = Agent(TestModel(), name="slow", capabilities=[durable.RestateDurability()])
    service = restate.Service("Deadline")

    @agent.tool_plain
    async def slow() -> str:
        await asyncio.sleep(5)
        return "too late"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        try:
            return (await agent.run("go", timeout=0.5)).output
        except RunTimedOut:
            await ctx.run_typed("after", lambda: None)
            return "timed out"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Deadline/run") == "timed out"


async def test_the_deadline_is_the_same_in_every_attempt(server: RestateServer) -> None:
    """Attempts that are each shorter than the limit come to its end together."""
    agent = Agent(TestModel(), name="attempts", capabilities=[durable.RestateDurability()])
    service = restate.Service("Attempts")
    tries: list[None] = []

    @agent.tool_plain
    async def later() -> str:
        tries.append(None)
        if len(tries) < 4:
            raise RetryableError("not yet", retry_after=timedelta(seconds=0.5))
        return "in time"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        try:
            return (await agent.run("go", timeout=1.2)).output
        except RunTimedOut:
            await ctx.run_typed("after", after)
            return "timed out"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Attempts/run") == "timed out"
    assert 1 < len(tries) < 4


async def test_test_models_can_be_put_in(server: RestateServer) -> None:
    """`agent.override(model=TestModel())` is honoured in a handler: no real model is called."""

    def never(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        raise AssertionError("the real model was called")

    agent = Agent(FunctionModel(never), name="real", capabilities=[durable.RestateDurability()])
    service = restate.Service("Override")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        with agent.override(model=TestModel(custom_output_text="from the test")):
            first = (await agent.run("go")).output
        second = (await agent.run("go", model=TestModel(custom_output_text="given"))).output
        return f"{first}, {second}"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Override/run") == "from the test, given"


async def test_keys_are_stable_and_unique(server: RestateServer) -> None:
    """A call that is tried again has the same key; no other call has it."""
    keys: defaultdict[str, list[str]] = defaultdict(list)
    agent = Agent(TestModel(), name="pay", capabilities=[durable.RestateDurability()])
    service = agent_service("Pay", agent)

    @agent.tool
    async def pay(ctx: RunContext) -> str:
        keys["pay"].append(durable.idempotency_key(ctx))
        if len(keys["pay"]) == 1:
            raise RuntimeError("the connection was lost after the payment")
        return "paid"

    @agent.tool
    async def mail(ctx: RunContext) -> str:
        keys["mail"].append(durable.idempotency_key(ctx))
        return "sent"

    async with hosted(server, service) as ingress:
        await ingress.call("Pay/run")
    assert len(keys["pay"]) == 2
    assert len(set(keys["pay"])) == 1
    assert keys["pay"][0] != keys["mail"][0]


async def test_at_most_once_tools_run_once(server: RestateServer) -> None:
    """Also when each wait is a suspension; a failing one is not repeated but reported to the model."""
    done: Counter[str] = Counter()
    agent = Agent(TestModel(), name="once", capabilities=[durable.RestateDurability()])
    service = agent_service("Once", agent)

    @agent.tool_plain(metadata={"restate": {"at_most_once": True}})
    async def fire() -> str:
        done["fire"] += 1
        return "fired"

    @agent.tool_plain(metadata={"restate": {"at_most_once": True}})
    async def misfire() -> str:
        done["misfire"] += 1
        raise RuntimeError("jammed")

    async with hosted(server, service) as ingress:
        output = await ingress.call("Once/run")
        assert "fired" in output
        assert "failed and is not repeated. RuntimeError: jammed" in output
        assert "once__function_toolset__<agent>.call_tool:fire.declared" in await ingress.steps(
            "Once"
        )
    assert done == {"fire": 1, "misfire": 1}


async def test_an_at_most_once_tool_whose_time_is_up(server: RestateServer) -> None:
    """The model is told at once that the call was given up, and not that a worker was lost."""
    began: list[None] = []
    agent = Agent(TestModel(), name="late", capabilities=[durable.RestateDurability()])
    service = agent_service("Late", agent)

    @agent.tool_plain(metadata={"restate": {"at_most_once": True, "timeout": 0.1}})
    async def fire() -> None:
        began.append(None)
        await asyncio.sleep(10)

    async with hosted(server, service) as ingress:
        output = await ingress.call("Late/run")
        assert "given up after 0.1 seconds, so its outcome is unknown" in output
        assert await ingress.retries("Late") == 0
    assert len(began) == 1


async def test_tool_options(server: RestateServer) -> None:
    """A time limit and a name for one tool."""
    agent = Agent(TestModel(), name="opts", capabilities=[durable.RestateDurability()])
    service = agent_service("Options", agent)
    tries: list[Any] = []

    @agent.tool_plain(metadata={"restate": {"timeout": 0.1, "name": "v2", "max_attempts": 2}})
    async def hangs_once() -> str:
        tries.append(None)
        if len(tries) == 1:
            await asyncio.sleep(10)
        return "ok"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Options/run") == '{"hangs_once":"ok"}'
        assert "opts__function_toolset__<agent>.call_tool:v2" in await ingress.steps("Options")
    assert len(tries) == 2


async def test_two_agents_of_one_name_are_refused(server: RestateServer) -> None:
    """Their steps could not be told apart."""
    agents = [
        Agent(TestModel(), name="twin", capabilities=[durable.RestateDurability()])
        for _ in range(2)
    ]
    service = restate.Service("Twins")

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        return [(await agent.run("go")).output for agent in agents]

    async with hosted(server, service) as ingress:
        response = await ingress.post("Twins/run")
        assert response.status_code == 500
        assert "Two agents named 'twin'" in response.json()["message"]
