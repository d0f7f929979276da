"""What a tool may do to its run: nothing in a step, everything in handler code."""

import asyncio
from datetime import timedelta

import anyio
import pytest
import restate
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import HandleDeferredToolCalls
from pydantic_ai.exceptions import (
    RunCancelled,
    UserError,
)
from pydantic_ai.messages import (
    UserPromptPart,
)
from pydantic_ai.tools import (
    DeferredToolRequests,
    DeferredToolResults,
)

import durable
from durable.server import RestateServer
from tests.live.hosting import PATIENCE, after, agent_service, hosted
from tests.live.scripted import call, done, script

pytestmark = pytest.mark.live


@pytest.mark.parametrize("method", ["enqueue", "cancel"])
async def test_steps_cannot_steer_the_run(server: RestateServer, method: str) -> None:
    """`ctx.enqueue` and `ctx.cancel` would be lost on replay: in a step they say so, at once."""
    agent = Agent(script([call("steer")]), name="s", capabilities=[durable.RestateDurability()])
    service = agent_service(f"Steering{method.title()}", agent)

    @agent.tool
    async def steer(ctx: RunContext) -> str:
        done["steer"] += 1
        if method == "enqueue":
            ctx.enqueue("and another thing")
        else:
            ctx.cancel()
        return "steered"

    async with hosted(server, service) as ingress:
        response = await ingress.post(f"Steering{method.title()}/run")
        assert response.status_code == 500
        assert "is not supported inside a durable run step" in response.json()["message"]
        assert method in response.json()["message"]
        assert await ingress.retries(f"Steering{method.title()}") == 0
    assert done == {"model": 1, "steer": 1}


async def test_context_tools_steer_the_run(server: RestateServer) -> None:
    """In handler code `ctx.enqueue` works, and does the same on every replay."""
    agent = Agent(
        script([call("steer")], [call("look")]),
        name="steerable",
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Steerable")
    seen: set[str] = set()

    @agent.tool(metadata={"restate": False})
    async def steer(ctx: RunContext) -> str:
        ctx.enqueue("and another thing")
        return "steered"

    @agent.tool
    async def look(ctx: RunContext) -> str:
        done["look"] += 1
        return str(
            [
                part.content
                for message in ctx.messages
                for part in message.parts
                if isinstance(part, UserPromptPart)
            ]
        )

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        result = await agent.run("go")
        seen.add(result.all_messages_json().decode())
        await ctx.run_typed("after", after)
        return result.output

    async with hosted(server, service) as ingress:
        assert await ingress.call("Steerable/run") == "look=['go', 'and another thing']"
    assert len(seen) == 1
    assert done == {"model": 3, "look": 1}


async def test_context_tools_sync_and_async(server: RestateServer) -> None:
    """`metadata={"restate": False}`: no step of its own, in handler code with its context."""
    agent = Agent(
        script([call("sync"), call("asynchronous"), call("step")]),
        name="inline",
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Inline")

    @agent.tool_plain(metadata={"restate": False})
    def sync() -> str:
        return durable.restate_context().request().id

    @agent.tool_plain(metadata={"restate": False})
    async def asynchronous() -> str:
        ctx = durable.restate_context()
        await ctx.sleep(timedelta(milliseconds=20))
        return await ctx.run_typed("part", part)

    async def part() -> str:
        done["part"] += 1
        return "whole"

    @agent.tool_plain
    def step() -> str:
        with pytest.raises(UserError, match="inside a step"):
            durable.restate_context()
        return "refused"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output.replace(ctx.request().id, "id")

    async with hosted(server, service) as ingress:
        assert await ingress.call("Inline/run") == "sync=id; asynchronous=whole; step=refused"
        assert sorted(await ingress.steps("Inline")) == [
            "after",
            "inline__function_toolset__<agent>.call_tool:step",
            "inline__model.request",
            "inline__model.request",
            "part",
        ]
    assert done == {"model": 2, "part": 1}


async def test_context_tools_orchestrate(server: RestateServer) -> None:
    """A tool may sleep, call other services, wait for an answer and keep state, in any number at once."""
    agent = Agent(
        script([call("order", "1", item="tea"), call("order", "2", item="cups")]),
        name="shop",
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("Shop", agent)
    stock = restate.VirtualObject("Stock")

    @stock.handler()
    async def take(ctx: restate.ObjectContext) -> int:
        left = (await ctx.get("left", type_hint=int) or 3) - 1
        ctx.set("left", left)
        return left

    @stock.handler(kind="shared")
    async def confirm(ctx: restate.ObjectSharedContext, awakeable: str) -> None:
        done["confirm"] += 1
        ctx.resolve_awakeable(awakeable, f"confirmed {ctx.key()}")

    @agent.tool_plain(metadata={"restate": False})
    async def order(item: str) -> str:
        ctx = durable.restate_context()
        await ctx.sleep(timedelta(milliseconds=20))
        left = await ctx.object_call(take, key=f"{item} {ctx.request().id}", arg=None)
        awakeable, answer = ctx.awakeable(type_hint=str)
        ctx.object_send(confirm, key=item, arg=awakeable)
        return f"{await answer}, {left} left"

    async with hosted(server, service, stock) as ingress:
        assert await ingress.call("Shop/run") == (
            "order=confirmed tea, 2 left; order=confirmed cups, 2 left"
        )
        assert await ingress.retries("Shop") == 0
        assert len(await ingress.entries("Shop", "Sleep")) == 2
        assert len(await ingress.entries("Shop", "Call")) == 2
    assert done == {"model": 2, "confirm": 2}


async def test_context_tools_use_any_async_library(server: RestateServer) -> None:
    """anyio's task groups and scopes in handler code: their time is Restate's, on every replay."""
    agent = Agent(
        script([call("work", "1"), call("work", "2")]),
        name="anyio",
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("Anyio", agent)

    @agent.tool_plain(metadata={"restate": False}, timeout=5)
    async def work() -> str:
        ctx = durable.restate_context()
        seen: list[int] = []

        async def branch(number: int) -> None:
            await anyio.sleep(0.3 * (3 - number))
            seen.append(await ctx.run_typed("branch", lambda: number))

        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(branch, number)
        with anyio.move_on_after(0.05) as scope:
            await anyio.sleep(60)
        return f"{seen} {scope.cancelled_caught}"

    async with hosted(server, service) as ingress:
        expected = "work=[2, 1, 0] True; work=[2, 1, 0] True"
        assert await ingress.call("Anyio/run") == expected
        assert await ingress.retries("Anyio") == 0
    assert done == {"model": 2}


async def test_time_limits_of_tools(server: RestateServer) -> None:
    """PydanticAI's own `timeout` of a tool asks the model again, in a step and in handler code."""
    agent = Agent(
        script([call("in_step"), call("in_handler")]),
        name="limited",
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("TimeLimits", agent)

    @agent.tool_plain(timeout=0.05)
    async def in_step() -> str:
        done["in_step"] += 1
        await asyncio.sleep(30)
        return "too late"

    @agent.tool_plain(timeout=0.05, metadata={"restate": False})
    async def in_handler() -> str:
        await asyncio.sleep(30)
        return "too late"

    async with hosted(server, service) as ingress:
        output = await ingress.call("TimeLimits/run")
        assert output.count("Timed out after 0.05 seconds") == 2
    assert done == {"model": 2, "in_step": 1}


async def test_a_context_tool_cancels_the_run(server: RestateServer) -> None:
    """`ctx.cancel` in handler code ends the run: `RunCancelled`, or 409 for the caller."""
    agent = Agent(
        script([call("look")], [call("stop")]),
        name="stopping",
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Stopping")

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @agent.tool(metadata={"restate": False})
    async def stop(ctx: RunContext) -> str:
        ctx.cancel()
        return "stopped"

    @service.handler()
    async def caught(ctx: restate.Context) -> int:
        with pytest.raises(RunCancelled) as caught:
            await agent.run("go")
        await ctx.run_typed("after", after)
        return len(caught.value.all_messages())

    @service.handler()
    async def uncaught(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

    async with hosted(server, service) as ingress:
        assert await ingress.call("Stopping/caught") >= 4
        response = await ingress.post("Stopping/uncaught")
        assert response.status_code == 409
        assert await ingress.retries("Stopping") == 0
    assert done == {"model": 4, "look": 2}


async def test_approval_within_the_run(server: RestateServer) -> None:
    """`HandleDeferredToolCalls` may wait for an awakeable: the run goes on where it stopped."""
    asked: asyncio.Future[str] = asyncio.Future()

    async def approve(ctx: RunContext, requests: DeferredToolRequests) -> DeferredToolResults:
        awakeable, answer = durable.restate_context().awakeable(type_hint=str)

        async def notify() -> None:
            asked.set_result(awakeable)

        await durable.restate_context().run_typed("notify", notify)
        approved = await answer == "yes"
        return requests.build_results(
            approvals={request.tool_call_id: approved for request in requests.approvals}
        )

    agent = Agent(
        script([call("look"), call("pay")]),
        name="approved",
        capabilities=[HandleDeferredToolCalls(approve), durable.RestateDurability()],
    )
    service = agent_service("Approved", agent)

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @agent.tool_plain(requires_approval=True)
    async def pay() -> str:
        done["pay"] += 1
        return "paid"

    async with hosted(server, service) as ingress:
        answer = asyncio.create_task(ingress.call("Approved/run"))
        awakeable = await asyncio.wait_for(asked, PATIENCE)
        await ingress.post(f"restate/awakeables/{awakeable}/resolve", "yes")
        assert set((await answer).split("; ")) == {"look=seen", "pay=paid"}
    assert done == {"model": 2, "look": 1, "pay": 1}
