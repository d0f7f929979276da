"""Several runs in a handler: beside each other, in each other, one after the other."""

import asyncio
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import restate
from pydantic_ai import Agent, CancellationToken, RunContext
from pydantic_ai.capabilities import LocalWorkspace
from pydantic_ai.exceptions import (
    UsageLimitExceeded,
)
from pydantic_ai.messages import (
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelResponse,
    TextPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import UsageLimits
from pydantic_ai.workspaces import LocalWorkspaceBackend

import durable
from durable.server import RestateServer
from tests.live.hosting import after, hosted
from tests.live.scripted import call, done, script

pytestmark = pytest.mark.live


# Beside and in each other


@pytest.mark.parametrize("way", ["gather", "TaskGroup"])
async def test_parallel_runs_get_their_own_answers(server: RestateServer, way: str) -> None:
    """One agent, eight runs at once, the last to be asked answers first: nobody's is swapped."""

    async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        part = messages[0].parts[0]
        assert isinstance(part, UserPromptPart)
        done["model"] += 1
        if len(messages) == 1:
            await asyncio.sleep(0.2 - int(str(part.content)) * 0.02)
            return ModelResponse(parts=[call("look", str(part.content), at=part.content)])
        [returned] = messages[-1].parts
        assert isinstance(returned, ToolReturnPart)
        return ModelResponse(parts=[TextPart(f"{part.content}: {returned.content}")])

    agent = Agent(FunctionModel(respond), name="crowd", capabilities=[durable.RestateDurability()])
    service = restate.Service(f"Crowd{way}")

    @agent.tool_plain
    async def look(at: str) -> str:
        done["look"] += 1
        return f"seen {at}"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        prompts = [str(number) for number in range(8)]
        if way == "gather":
            results = await asyncio.gather(*map(agent.run, prompts))
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(agent.run(prompt)) for prompt in prompts]
            results = [task.result() for task in tasks]
        await ctx.run_typed("after", after)
        return [result.output for result in results]

    async with hosted(server, service) as ingress:
        expected = [f"{number}: seen {number}" for number in range(8)]
        assert await ingress.call(f"Crowd{way}/run") == expected
        assert await ingress.retries(f"Crowd{way}") == 0
    assert done == {"model": 16, "look": 8}


async def test_nested_agents_in_context_tools(server: RestateServer) -> None:
    """A delegate in a context tool is durable itself, and its usage counts once, also at once."""
    inner = Agent(
        script([call("look")], name="inner"),
        name="inner",
        capabilities=[durable.RestateDurability()],
    )
    outer = Agent(
        script([call("ask", "1"), call("ask", "2")]),
        name="outer",
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Delegating")
    totals: set[tuple[int, int]] = set()

    @inner.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @outer.tool(metadata={"restate": False})
    async def ask(ctx: RunContext) -> str:
        return (await inner.run("go", usage=ctx.usage)).output

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        result = await outer.run("go", usage_limits=UsageLimits(request_limit=6))
        await ctx.run_typed("after", after)
        totals.add((result.usage.requests, result.usage.tool_calls))
        return result.output

    async with hosted(server, service) as ingress:
        assert await ingress.call("Delegating/run") == "ask=look=seen; ask=look=seen"
        assert Counter(await ingress.steps("Delegating")) == {
            "outer__model.request": 2,
            "inner__model.request": 4,
            "inner__function_toolset__<agent>.call_tool:look": 2,
            "after": 1,
        }
    assert totals == {(6, 4)}
    assert done == {"model": 2, "inner": 4, "look": 2}


async def test_restates_own_combinators_beside_agents(server: RestateServer) -> None:
    """`restate.gather`, `select`, `as_completed` and `wait_completed` work while agents run."""
    agent = Agent(script([call("look")]), name="beside", capabilities=[durable.RestateDurability()])
    service = restate.Service("Combined")

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        await asyncio.sleep(0.05)
        return "seen"

    @service.handler()
    async def echo(ctx: restate.Context, text: str) -> str:
        return text

    async def slow() -> str:
        await asyncio.sleep(0.1)
        return "slow"

    async def combine(ctx: restate.Context) -> list[str]:
        called = ctx.service_call(echo, "called")
        sleeping = ctx.sleep(timedelta(milliseconds=30))
        await restate.gather(called, sleeping)
        seen = [await called]
        who, what = await restate.select(
            call=ctx.service_call(echo, "first"), never=ctx.sleep(timedelta(minutes=10))
        )
        seen += [who, str(what)]
        steps = [ctx.run_typed("slow", slow), ctx.service_call(echo, "quick")]
        async for future in restate.as_completed(*steps):
            seen.append(str(await future))
        completed, waiting = await restate.wait_completed(
            ctx.service_call(echo, "waited"), ctx.sleep(timedelta(minutes=10))
        )
        return [*seen, str(await completed[0]), str(len(waiting))]

    @service.handler()
    async def run(ctx: restate.Context) -> list[Any]:
        agents = [asyncio.create_task(agent.run(str(number))) for number in range(3)]
        combined = await combine(ctx)
        outputs = [(await task).output for task in agents]
        await ctx.run_typed("after", after)
        return [combined, outputs]

    async with hosted(server, service) as ingress:
        combined, outputs = await ingress.call("Combined/run")
        assert combined[:3] == ["called", "call", "first"]
        assert set(combined[3:5]) == {"slow", "quick"}
        assert combined[5:] == ["waited", "1"]
        assert outputs == ["look=seen"] * 3
    assert done == {"model": 6, "look": 3}


# One after the other


async def test_arguments_of_a_run(server: RestateServer, tmp_path: Path) -> None:
    """Ids, metadata, instructions, a workspace and a whole conversation can be given to a run."""
    agent = Agent(
        script([call("where")]),
        name="given",
        capabilities=[LocalWorkspace(tmp_path), durable.RestateDurability()],
    )
    service = restate.Service("Given")
    seen: set[str] = set()

    @agent.tool
    async def where(ctx: RunContext) -> str:
        done["where"] += 1
        assert ctx.workspace is not None
        return f"{(await ctx.workspace.run('pwd', shell=True)).stdout.strip()} {ctx.metadata}"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        first = await agent.run(
            "one",
            run_id="mine",
            conversation_id="talk",
            metadata={"order": 7},
            instructions="Be brief.",
            workspace=LocalWorkspaceBackend(tmp_path).ref,
        )
        second = await agent.run("two", conversation=first.conversation, workspace=first.workspace)
        await ctx.run_typed("after", after)
        seen.add(second.all_messages_json().decode())
        ids = [first.run_id, first.conversation_id, second.conversation_id]
        return [*ids, first.output, str(len(second.all_messages())), str(second.run_id != "mine")]

    async with hosted(server, service) as ingress:
        expected = [
            "mine",
            "talk",
            "talk",
            f"where={tmp_path} {{'order': 7}}",
            "6",
            "True",
        ]
        assert await ingress.call("Given/run") == expected
        assert await ingress.retries("Given") == 0
    assert done == {"model": 3, "where": 1}
    assert len(seen) == 1


async def test_a_cancellation_token_is_refused(server: RestateServer) -> None:
    """Another machine could not see it cancelled: the error says to cancel the invocation instead."""
    agent = Agent(script(), name="token", capabilities=[durable.RestateDurability()])
    service = restate.Service("Token")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go", cancellation_token=CancellationToken())).output

    async with hosted(server, service) as ingress:
        response = await ingress.post("Token/run")
        assert response.status_code == 500
        assert "Cancel the durable workflow" in response.json()["message"]
        assert await ingress.retries("Token") == 0
    assert done == {}


async def test_usage_limits_hold_over_replays(server: RestateServer) -> None:
    """A replay counts nothing twice: three requests pass a limit of three, and not one of two."""
    agent = Agent(
        script([call("look", "1")], [call("look", "2")]),
        name="counted",
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Counted")
    totals: set[tuple[int, int]] = set()

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        limits = UsageLimits(request_limit=3, tool_calls_limit=2)
        result = await agent.run("go", usage_limits=limits)
        await ctx.run_typed("between", after)
        totals.add((result.usage.requests, result.usage.tool_calls))
        with pytest.raises(UsageLimitExceeded, match="request_limit of 2"):
            await agent.run("go", usage_limits=UsageLimits(request_limit=2))
        with pytest.raises(UsageLimitExceeded, match="request_limit of 4"):
            await agent.run("go", usage=result.usage, usage_limits=UsageLimits(request_limit=4))
        await ctx.run_typed("after", after)
        return [result.output]

    async with hosted(server, service) as ingress:
        assert await ingress.call("Counted/run") == ["look=seen"]
    assert totals == {(3, 2)}
    assert done == {"model": 3 + 2 + 1, "look": 2 + 2 + 1}


async def test_history_in_the_state_of_an_object(server: RestateServer) -> None:
    """A conversation over several invocations of a virtual object, each replayed at will."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        done["model"] += 1
        prompts = [
            str(part.content)
            for message in messages
            for part in message.parts
            if isinstance(part, UserPromptPart)
        ]
        return ModelResponse(parts=[TextPart(" ".join(prompts))])

    agent = Agent(FunctionModel(respond), name="chat", capabilities=[durable.RestateDurability()])
    chat = restate.VirtualObject("Chat")

    @chat.handler()
    async def say(ctx: restate.ObjectContext, text: str) -> str:
        stored = await ctx.get("history", type_hint=str)
        history = ModelMessagesTypeAdapter.validate_json(stored) if stored else None
        result = await agent.run(text, message_history=history)
        ctx.set("history", result.all_messages_json().decode())
        await ctx.run_typed("after", after)
        return result.output

    @chat.handler(kind="shared")
    async def length(ctx: restate.ObjectSharedContext) -> int:
        stored = await ctx.get("history", type_hint=str)
        return len(ModelMessagesTypeAdapter.validate_json(stored or "[]"))

    async with hosted(server, chat) as ingress:
        for text, expected in (("one", "one"), ("two", "one two"), ("three", "one two three")):
            assert await ingress.call("Chat/me/say", text) == expected
            assert await ingress.retries("Chat") == 0
        assert await ingress.call("Chat/me/length") == 6
        assert await ingress.call("Chat/you/say", "alone") == "alone"
    assert done == {"model": 4}


async def test_a_workflow_waits_for_a_promise(server: RestateServer) -> None:
    """An agent before and after a workflow's promise, which another handler resolves."""
    agent = Agent(script(), name="flow", capabilities=[durable.RestateDurability()])
    workflow = restate.Workflow("Flow")
    waiting = asyncio.Event()

    @workflow.main()
    async def run(ctx: restate.WorkflowContext) -> list[str]:
        first = (await agent.run("before")).output

        async def notify() -> None:
            waiting.set()

        await ctx.run_typed("notify", notify)
        approved = await ctx.promise("approved", type_hint=str).value()
        return [first, approved, (await agent.run("after")).output]

    @workflow.handler()
    async def approve(ctx: restate.WorkflowSharedContext, text: str) -> None:
        await ctx.promise("approved", type_hint=str).resolve(text)

    async with hosted(server, workflow) as ingress:
        answered = asyncio.create_task(ingress.call("Flow/one/run"))
        await waiting.wait()
        assert (await ingress.post("Flow/one/approve", "yes")).status_code == 200
        assert await answered == ["hello", "yes", "hello"]
    assert done == {"model": 2}
