"""Other ways to run an agent in a handler: streams, iteration, event handlers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import restate
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import (
    ProcessEventStream,
)
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.run import AgentRunResultEvent

import durable
from durable.server import RestateServer
from tests.live.hosting import PATIENCE, after, agent_service, hosted
from tests.live.scripted import call, done, script

pytestmark = pytest.mark.live


async def test_run_stream_events(server: RestateServer) -> None:
    """The events of a run can be iterated in handler code; model and tools are called once."""
    agent = Agent(
        script([call("look")]), name="streaming", capabilities=[durable.RestateDurability()]
    )
    service = restate.Service("StreamEvents")
    seen: list[list[str]] = []

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen it all"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        kinds: list[str] = []
        output = ""
        async with agent.run_stream_events("go") as events:
            async for event in events:
                kinds.append(event.event_kind)
                if isinstance(event, AgentRunResultEvent):
                    output = event.result.output
        await ctx.run_typed("after", after)
        seen.append(kinds)
        return output.strip()

    async with hosted(server, service) as ingress:
        assert await ingress.call("StreamEvents/run") == "look=seen it all"
        assert await ingress.steps("StreamEvents") == [
            "streaming__model.request_stream",
            "streaming__function_toolset__<agent>.call_tool:look",
            "streaming__model.request_stream",
            "after",
        ]
    assert done == {"model": 2, "look": 1}
    kinds = seen[-1]
    assert kinds.count("function_tool_call") == kinds.count("function_tool_result") == 1
    assert kinds[-1] == "agent_run_result"


async def test_run_stream(server: RestateServer) -> None:
    """`run_stream` answers from the step's result: the text is there, the model is asked once."""
    agent = Agent(
        script([call("look")]), name="streamed", capabilities=[durable.RestateDurability()]
    )
    service = restate.Service("Stream")

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen it all"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        async with agent.run_stream("go") as result:
            texts = [text async for text in result.stream_text(debounce_by=None)]
            output = await result.get_output()
        await ctx.run_typed("after", after)
        return [texts[-1].strip(), output.strip()]

    async with hosted(server, service) as ingress:
        assert await ingress.call("Stream/run") == ["look=seen it all"] * 2
        assert (await ingress.steps("Stream")).count("streamed__model.request_stream") == 2
    assert done == {"model": 2, "look": 1}


async def test_iter(server: RestateServer) -> None:
    """`agent.iter()` is as durable as `run`: the same steps, ids and bytes on every replay."""
    agent = Agent(
        script([call("look")]), name="iterated", capabilities=[durable.RestateDurability()]
    )
    service = restate.Service("Iter")
    seen: set[str] = set()

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        nodes: list[str] = []
        async with agent.iter("go") as agent_run:
            async for node in agent_run:
                nodes.append(type(node).__name__)
                await ctx.run_typed("between", after)
        assert agent_run.result is not None
        await ctx.run_typed("after", after)
        seen.add(agent_run.result.all_messages_json().decode())
        return [*nodes, agent_run.result.output]

    async with hosted(server, service) as ingress:
        nodes = ["UserPromptNode", *["ModelRequestNode", "CallToolsNode"] * 2, "End"]
        assert await ingress.call("Iter/run") == [*nodes, "look=seen"]
        assert [step for step in await ingress.steps("Iter") if step != "between"] == [
            "iterated__model.request",
            "iterated__function_toolset__<agent>.call_tool:look",
            "iterated__model.request",
            "after",
        ]
        assert await ingress.retries("Iter") == 0
    assert done == {"model": 2, "look": 1}
    assert len(seen) == 1


async def test_streams_left_early(server: RestateServer) -> None:
    """Leaving a stream ends its run, and the handler goes on the same way on every replay."""
    agent = Agent(script([call("look")]), name="early", capabilities=[durable.RestateDurability()])
    service = restate.Service("Early")

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen it all"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        seen: list[str] = []
        async with agent.run_stream_events("go") as events:
            async for event in events:
                if event.event_kind == "function_tool_result":
                    seen.append(event.event_kind)
                    break
        await ctx.run_typed("between", after)
        async with agent.run_stream("go") as result:
            async for text in result.stream_text(debounce_by=None):
                seen.append(text.strip())
                break
        await ctx.run_typed("after", after)
        return seen

    async with hosted(server, service) as ingress:
        kind, text = await ingress.call("Early/run")
        assert kind == "function_tool_result"
        assert "look=seen it all".startswith(text)
        assert await ingress.retries("Early") == 0
    assert done == {"model": 3, "look": 2}


async def test_events_come_while_the_model_answers(server: RestateServer) -> None:
    """The handler given to `RestateDurability` is live: here the model waits until it was called."""
    first_word = asyncio.Event()
    events: list[str] = []

    async def handle(ctx: RunContext, stream: Any) -> None:
        async for event in stream:
            events.append(event.event_kind)
            if event.event_kind == "part_start":
                first_word.set()

    async def answer(messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[str]:
        yield "first "
        async with asyncio.timeout(PATIENCE):
            await first_word.wait()
        yield "second"

    agent = Agent(
        FunctionModel(stream_function=answer),
        name="live",
        capabilities=[durable.RestateDurability(event_stream_handler=handle)],
    )
    async with hosted(server, agent_service("LiveEvents", agent)) as ingress:
        assert await ingress.call("LiveEvents/run") == "first second"
    assert events.count("part_start") == events.count("part_end") == 1


@pytest.mark.parametrize("given", ["to the run", "to the agent"])
async def test_event_handlers_in_handler_code(server: RestateServer, given: str) -> None:
    """Such a handler sees the same events again on replay; what it does in a step happens once."""
    attempts: list[list[str]] = []
    published: list[str] = []

    @durable.step
    async def publish(kind: str) -> int:
        published.append(kind)
        return len(published)

    async def handle(ctx: RunContext, events: Any) -> None:
        async for event in events:
            attempts[-1].append(event.event_kind)
            await publish(event.event_kind)

    capabilities = [ProcessEventStream(handle)] if given == "to the agent" else []
    agent = Agent(
        script([call("look")]),
        name="handled",
        capabilities=[*capabilities, durable.RestateDurability[object]()],
    )
    name = f"Handled{given.title().replace(' ', '')}"
    service = restate.Service(name)

    @agent.tool_plain
    async def look() -> str:
        return "seen"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        attempts.append([])
        per_run = handle if given == "to the run" else None
        output = (await agent.run("go", event_stream_handler=per_run)).output
        await ctx.run_typed("after", after)
        return output.strip()

    async with hosted(server, service) as ingress:
        assert await ingress.call(f"{name}/run") == "look=seen"
        assert await ingress.retries(name) == 0
    assert done == {"model": 2}
    assert published == attempts[-1]
    assert published.count("function_tool_call") == published.count("function_tool_result") == 1
    assert published.count("final_result") == 1


async def test_run_sync_in_a_handler(server: RestateServer) -> None:
    """`run_sync` cannot wait in a handler: it is refused at once, with the line to write instead."""
    agent = Agent(TestModel(), name="sync", capabilities=[durable.RestateDurability()])
    service = restate.Service("RunSync")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return agent.run_sync("go").output

    async with hosted(server, service) as ingress:
        response = await ingress.post("RunSync/run")
        assert response.status_code == 500
        assert "Handler code used" in response.json()["message"]
        assert "await agent.run" in response.json()["message"]
        assert await ingress.retries("RunSync") == 0
