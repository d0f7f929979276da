"""An agent in a handler: each model request and tool call is one step, done once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
import restate
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.messages import (
    ModelMessage,
)
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.toolsets import FunctionToolset

import durable
from durable._wire import Kind, messages
from durable.server import RestateServer
from tests.live.hosting import PATIENCE, after, agent_service, hosted, http_client, serving
from tests.live.providers import Answer, provider
from tests.live.scripted import calls, done

pytestmark = pytest.mark.live


async def test_model_requests_and_tools_are_steps_done_once(server: RestateServer) -> None:
    """Names and order of the journal are stored data; every effect happens once in both modes."""
    agent = Agent(calls("look", "look"), name="one", capabilities=[durable.RestateDurability()])
    service = restate.Service("Steps")

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @service.handler()
    async def run(ctx: restate.Context, prompt: str) -> str:
        return (await agent.run(prompt)).output

    async with hosted(server, service) as ingress:
        assert await ingress.call("Steps/run", "go") == "look=seen; look=seen"
        assert await ingress.steps("Steps") == [
            "one__model.request",
            "one__function_toolset__<agent>.call_tool:look",
            "one__function_toolset__<agent>.call_tool:look",
            "one__model.request",
        ]
    assert done == {"model": 2, "look": 2}


async def test_ids_are_the_same_on_every_replay(server: RestateServer) -> None:
    """The run id is the invocation's; the conversation id and the start time follow from the journal."""
    agent = Agent(calls("look"), name="ids", capabilities=[durable.RestateDurability()])
    service = restate.Service("Ids")
    seen: list[tuple[str, str]] = []

    @agent.tool_plain
    async def look() -> str:
        return "seen"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        first = await agent.run("go", timeout=60)
        second = await agent.run("go")
        seen.append((first.run_id, second.run_id))
        return [ctx.request().id, first.run_id, second.run_id, *{first.conversation_id}]

    async with hosted(server, service) as ingress:
        invocation_id, first, second, _conversation = await ingress.call("Ids/run")
        assert [first, second] == [f"{invocation_id}:0", f"{invocation_id}:1"]
    assert len(set(seen)) == 1


async def test_an_agent_in_a_step_is_a_plain_agent(server: RestateServer) -> None:
    """`ctx.run` cannot be nested: a nested agent must not journal inside a tool's step."""
    inner = Agent(calls(), name="inner", capabilities=[durable.RestateDurability()])
    outer = Agent(calls("ask"), name="outer", capabilities=[durable.RestateDurability()])
    service = restate.Service("Nested")

    @outer.tool_plain
    async def ask() -> str:
        durability = durable.RestateDurability.from_agent(inner)
        assert durability is not None
        assert not durability.in_durable_context
        await inner.run("inside a step")
        return "asked"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        await ctx.run_typed("own step", in_own_step)
        return (await outer.run("go")).output

    async def in_own_step() -> str:
        return (await inner.run("inside the handler's own step")).output

    async with hosted(server, service) as ingress:
        assert await ingress.call("Nested/run") == "ask=asked"
        assert await ingress.steps("Nested") == [
            "own step",
            "outer__model.request",
            "outer__function_toolset__<agent>.call_tool:ask",
            "outer__model.request",
        ]
    assert done["model"] == 4


async def test_a_context_tool_runs_in_handler_code(server: RestateServer) -> None:
    """With `metadata={"restate": False}` a tool uses the Restate context, and agents in it are durable."""
    inner = Agent(calls(), name="inner", capabilities=[durable.RestateDurability()])
    agent = Agent(
        calls("orchestrate", "orchestrate"),
        name="outer",
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("ContextTool", agent)

    @agent.tool_plain(metadata={"restate": False})
    async def orchestrate() -> str:
        ctx = durable.restate_context()
        await asyncio.sleep(0.05)
        await inner.run("go")
        return await ctx.run_typed("part", part)

    async def part() -> str:
        done["part"] += 1
        return "whole"

    async with hosted(server, service) as ingress:
        assert await ingress.call("ContextTool/run") == "orchestrate=whole; orchestrate=whole"
        steps = await ingress.steps("ContextTool")
        assert Counter(steps) == {
            "outer__model.request": 2,
            "inner__model.request": 2,
            "part": 2,
            "after": 1,
        }
    assert done == {"model": 4, "part": 2}


async def test_parallel_tools_run_in_parallel(server: RestateServer) -> None:
    """Eight tools meet at a barrier: that they all pass shows that all ran at the same time."""
    agent = Agent(calls(*["meet"] * 8), name="par", capabilities=[durable.RestateDurability()])
    service = agent_service("Parallel", agent)
    barrier = asyncio.Barrier(8)

    @agent.tool_plain
    async def meet() -> str:
        async with asyncio.timeout(PATIENCE):
            await barrier.wait()
        done["meet"] += 1
        return "met"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Parallel/run") == "; ".join(["meet=met"] * 8)
    assert done == {"model": 2, "meet": 8}


async def test_transparent_outside_a_handler() -> None:
    """In tests, notebooks and evals the agent is a plain agent, with no Restate in sight."""
    agent = Agent(calls("look"), name="plain", capabilities=[durable.RestateDurability()])

    @agent.tool_plain
    def look() -> str:
        return "seen"

    result = await agent.run("go")
    assert result.output == "look=seen"
    assert ":" not in result.run_id


async def test_sync_tools_run_in_threads(server: RestateServer) -> None:
    """A sync tool may block: it must not stop the worker."""
    agent = Agent(calls("block", "block"), name="sync", capabilities=[durable.RestateDurability()])
    service = agent_service("Sync", agent)

    @agent.tool_plain
    def block() -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return "ok"

    @agent.instructions
    def instructions() -> str:
        return "sync functions in handler code run inline"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Sync/run") == "block=ok; block=ok"


async def test_dynamic_toolsets_are_journaled(server: RestateServer) -> None:
    """What a dynamic toolset offers is decided in a step, and its tools are steps."""
    agent = Agent(calls("look"), name="dyn", capabilities=[durable.RestateDurability()])
    service = agent_service("Dynamic", agent)

    @agent.toolset(id="later")
    def toolset(ctx: RunContext) -> FunctionToolset:
        done["factory"] += 1

        async def look() -> str:
            done["look"] += 1
            return "seen"

        return FunctionToolset([look])

    async with hosted(server, service) as ingress:
        assert await ingress.call("Dynamic/run") == "look=seen"
        assert await ingress.steps("Dynamic") == [
            "dyn__dynamic_toolset__later.get_tools",
            "dyn__model.request",
            "dyn__dynamic_toolset__later.call_tool:look",
            "dyn__dynamic_toolset__later.get_tools",
            "dyn__model.request",
            "after",
        ]
    assert done["look"] == 1


async def test_events_are_handled_once(server: RestateServer) -> None:
    """The event stream handler sees each event once, not again on replay."""
    kinds: Counter[str] = Counter()

    async def handle(ctx: RunContext, events: Any) -> None:
        async for event in events:
            kinds[event.event_kind] += 1

    async def stream(
        messages: list[ModelMessage], info: AgentInfo
    ) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        done["model"] += 1
        if len(messages) == 1:
            yield {0: DeltaToolCall("look", "{}", tool_call_id="1")}
        else:
            yield "all "
            yield "done"

    agent = Agent(
        FunctionModel(stream_function=stream),
        name="events",
        capabilities=[durable.RestateDurability(event_stream_handler=handle)],
    )
    service = agent_service("Events", agent)

    @agent.tool_plain
    async def look() -> str:
        return "seen"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Events/run") == "all done"
    assert kinds["function_tool_call"] == 1
    assert kinds["function_tool_result"] == 1
    assert done["model"] == 2


async def test_toolsets_given_at_run_time_are_journaled(server: RestateServer) -> None:
    """A toolset passed to `run` is as durable as one the agent was built with; it needs an id."""
    agent = Agent(calls("look"), name="late", capabilities=[durable.RestateDurability()])
    service = restate.Service("RunTime")

    def look() -> str:
        done["look"] += 1
        return "seen"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        toolset = FunctionToolset([look], id="late")
        return (await agent.run("go", toolsets=[toolset])).output

    @service.handler()
    async def without_id(ctx: restate.Context) -> str:
        return (await agent.run("go", toolsets=[FunctionToolset([look])])).output

    async with hosted(server, service) as ingress:
        assert await ingress.call("RunTime/run") == "look=seen"
        assert (await ingress.steps("RunTime"))[1] == "late__function_toolset__late.call_tool:look"
        refused = await ingress.post("RunTime/without_id")
        assert refused.status_code == 500
        assert "unique `id`" in refused.json()["message"]
    assert done["look"] == 1


async def test_a_models_connections_are_kept(server: RestateServer) -> None:
    """Each attempt has its own loop, which must not cost the model its HTTP client each time."""
    with provider([Answer("hello")]) as api:
        own_client = OpenAIProvider(base_url=f"{api.url}/v1", api_key="key")
        model = OpenAIChatModel("scripted", provider=own_client)
        agent = Agent(model, name="kept", capabilities=[durable.RestateDurability()])
        service = restate.Service("Kept")
        clients: set[int] = set()
        private: Any = own_client

        @service.handler()
        async def run(ctx: restate.Context) -> str:
            output = (await agent.run("go")).output
            clients.add(id(private._own_http_client))
            return output

        async with hosted(server, service) as ingress:
            for _ in range(3):
                assert await ingress.call("Kept/run") == "hello"
        assert len(clients) == 1
        await private._own_http_client.aclose()


async def test_output_functions_are_called_once(server: RestateServer) -> None:
    """The function and the validators after it are one step; its result keeps its type."""

    class Sent(BaseModel):
        to: str

    def send(to: str) -> Sent:
        done["sent"] += 1
        if done["sent"] == 1:
            raise ModelRetry("not this one")
        return Sent(to=to)

    agent = Agent(
        TestModel(),
        name="outputs",
        output_type=send,
        retries=2,
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Outputs")

    @agent.output_validator
    async def validate(sent: Sent) -> Sent:
        done["validated"] += 1
        return sent

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        assert isinstance(output, Sent)
        await ctx.run_typed("after", lambda: None)
        return output.to

    async with hosted(server, service) as ingress:
        assert await ingress.call("Outputs/run") == "a"
        assert "outputs__output_function:send" in await ingress.steps("Outputs")
    assert done == {"sent": 2, "validated": 1}


async def test_a_function_of_yours_as_a_step(server: RestateServer) -> None:
    """`durable.step` makes a validator, a processor or an instruction run once, sync or async."""
    agent = Agent(TestModel(), name="own", capabilities=[durable.RestateDurability()])
    service = restate.Service("Own")

    @agent.output_validator
    @durable.step
    async def audit(ctx: RunContext, output: str) -> str:
        done["audit"] += 1
        if done["audit"] == 1:
            raise ModelRetry("once more")
        return f"audited {output}"

    @agent.instructions
    @durable.step
    def look_up() -> str:
        done["look_up"] += 1
        return "Be brief."

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", lambda: None)
        return output

    async with hosted(server, service) as ingress:
        assert (await ingress.call("Own/run")).startswith("audited success")
        assert (await ingress.steps("Own")).count("step:audit") == 2
    assert done == {"audit": 2, "look_up": 2}


async def test_a_long_step_is_visible_while_it_runs(server: RestateServer) -> None:
    """The journal shows what a run is doing; only steps of a few milliseconds appear with their end."""
    agent = Agent(calls("think"), name="visible", capabilities=[durable.RestateDurability()])
    service = agent_service("Visible", agent)
    seen: list[str] = []

    async with hosted(server, service) as ingress:

        @agent.tool_plain
        async def think() -> str:
            await asyncio.sleep(0.5)
            seen.extend(await ingress.steps("Visible"))
            return "thought"

        assert await ingress.call("Visible/run") == "think=thought"
    assert seen[-1] == "visible__function_toolset__<agent>.call_tool:think"


async def test_a_short_step_is_one_message(server: RestateServer) -> None:
    """Its start is not sent at once but with its end: one message to the server per step instead of two."""
    service = restate.Service("Short")
    sent: list[list[int]] = []

    @service.handler()
    async def run(ctx: restate.Context) -> None:
        for _ in range(5):
            await ctx.run_typed("short", after)

    app = durable.app([service])

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def noted(event: Any) -> None:
            if event.get("body") and "/invoke/" in scope["path"]:
                sent.append([message.type for message in messages(event["body"])])
            await send(event)

        await app(scope, receive, noted)

    async with serving(watched) as url, http_client() as http:
        await server.register(url)
        (await http.post(f"{server.ingress_url}/Short/run")).raise_for_status()
    # a suspension may be in the same message
    with_a_step = [types[:2] for types in sent if Kind.RUN in types]
    assert with_a_step == [[Kind.RUN, Kind.PROPOSE_RUN_COMPLETION]] * 5
