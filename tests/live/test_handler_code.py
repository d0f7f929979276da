"""Handler code: its time is Restate's, its end reaches everything in it, the outside is refused."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import httpx2
import pytest
import restate
from pydantic_ai import Agent
from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.usage import UsageLimits

import durable
from durable.server import RestateServer
from tests.live.hosting import (
    AT_MOST_TWICE,
    PATIENCE,
    Ingress,
    after,
    agent_service,
    hosted,
    http_client,
    serving,
)
from tests.live.scripted import calls, done

pytestmark = pytest.mark.live


async def test_sleeps_and_timeouts_are_durable(server: RestateServer) -> None:
    """asyncio's own timers in handler code are Restate's, in tasks of any number."""
    service = restate.Service("Timers")

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        seen: list[str] = []

        async def branch(tenths: int) -> None:
            await asyncio.sleep(tenths / 10)
            seen.append(await ctx.run_typed("step", lambda: f"{tenths}"))

        async with asyncio.TaskGroup() as group:
            for tenths in (3, 1, 2, 0):
                group.create_task(branch(tenths))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await ctx.sleep(timedelta(seconds=30))
        return seen

    async with hosted(server, service) as ingress:
        assert await ingress.call("Timers/run") == ["0", "1", "2", "3"]
        # the sleep of no seconds takes none; the one in the handler, and its timeout
        assert len(await ingress.entries("Timers", "Sleep")) == 3 + 2


@pytest.mark.parametrize(
    "outside",
    [
        pytest.param(lambda: asyncio.to_thread(int), id="thread"),
        pytest.param(lambda: asyncio.open_connection("127.0.0.1", 1), id="socket"),
        pytest.param(lambda: asyncio.create_subprocess_exec("true"), id="subprocess"),
        pytest.param(
            lambda: httpx2.AsyncClient(trust_env=False).get("http://127.0.0.1:1"),
            id="HTTP client",
        ),
    ],
)
async def test_the_outside_world_is_refused(
    server: RestateServer, outside: Callable[[], Awaitable[object]]
) -> None:
    """What would differ on replay ends the run where it is used, with what to write instead."""
    service = restate.Service("Outside", invocation_retry_policy=AT_MOST_TWICE)

    @service.handler()
    async def run(ctx: restate.Context) -> None:
        await outside()

    async with hosted(server, service) as ingress:
        response = await ingress.post("Outside/run")
        assert response.status_code == 500
        assert "inside a step" in response.json()["message"]
        assert await ingress.retries("Outside") == 0


@pytest.mark.parametrize(
    ("ending", "status"), [("usage limit", 429), ("terminal error", 418), ("cancellation", 409)]
)
async def test_a_failure_in_a_task_group_ends_the_run(
    server: RestateServer, ending: str, status: int
) -> None:
    """`TaskGroup` raises a group: what is hopeless in it ends the run as it would alone."""
    agent = Agent(calls("look"), name="group", capabilities=[durable.RestateDurability()])
    service = restate.Service("Group", invocation_retry_policy=AT_MOST_TWICE)
    waiting = asyncio.Event()

    @agent.tool_plain
    async def look() -> str:
        return "seen"

    async def notify() -> None:
        waiting.set()

    async def part(ctx: restate.Context) -> None:
        if ending == "usage limit":
            await agent.run("go", usage_limits=UsageLimits(request_limit=1))
        if ending == "terminal error":
            raise restate.TerminalError("no tea left", status_code=418)
        await ctx.run_typed("notify", notify)
        await ctx.awakeable()[1]

    @service.handler()
    async def run(ctx: restate.Context) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(part(ctx))

    async with hosted(server, service) as ingress:
        answer = asyncio.create_task(ingress.post("Group/run"))
        if ending == "cancellation":
            await asyncio.wait_for(waiting.wait(), PATIENCE)
            await ingress.cancel("Group")
        assert (await answer).status_code == status
        assert await ingress.retries("Group") == 0


@pytest.mark.parametrize("ending", ["answer", "failure", "cancellation"])
async def test_no_task_is_left_behind(server: RestateServer, ending: str) -> None:
    """However a handler ends, and in every attempt, all tasks in it end, also those not awaited."""
    agent = Agent(calls("look", "look"), name="tidy", capabilities=[durable.RestateDurability()])
    service = restate.Service("Tidy")
    tasks: list[asyncio.Task[Any]] = []
    waiting = asyncio.Event()

    @agent.tool_plain(metadata={"restate": False})
    async def look() -> str:
        tasks.append(current())
        await asyncio.sleep(0.01)
        return "seen"

    async def notify() -> None:
        waiting.set()

    async def forgotten(ctx: restate.Context) -> None:
        tasks.append(current())
        await ctx.awakeable()[1]

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        tasks.append(current())
        background = [asyncio.create_task(forgotten(ctx)) for _ in range(3)]
        output = (await agent.run("go")).output
        if ending == "failure":
            raise restate.TerminalError("over", status_code=418)
        if ending == "cancellation":
            await ctx.run_typed("notify", notify)
            await asyncio.gather(*background)
        return output

    async with hosted(server, service) as ingress:
        answer = asyncio.create_task(ingress.post("Tidy/run"))
        if ending == "cancellation":
            await asyncio.wait_for(waiting.wait(), PATIENCE)
            await ingress.cancel("Tidy")
        status = {"answer": 200, "failure": 418, "cancellation": 409}[ending]
        assert (await answer).status_code == status
    assert len(tasks) >= 6
    assert [task for task in tasks if not task.done()] == []


async def test_a_step_that_is_given_up_runs_to_its_end_once(server: RestateServer) -> None:
    """Nobody waits for it any more, but it is not cut off either: it would begin again on each replay."""
    service = restate.Service("GivenUp")

    async def slow() -> None:
        done["began"] += 1
        await asyncio.sleep(0.4)
        done["ended"] += 1

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await ctx.run_typed("slow", slow)
        await asyncio.sleep(0.6)
        await ctx.run_typed("after", after)
        return "over"

    async with hosted(server, service) as ingress:
        assert await ingress.call("GivenUp/run") == "over"
    assert done == {"began": 1, "ended": 1}


async def test_handler_code_does_not_catch_a_suspension(server: RestateServer) -> None:
    """`except Exception` around an agent, in handler code or in a tool, is for failures only."""
    inner = Agent(calls("look"), name="inner", capabilities=[durable.RestateDurability()])
    outer = Agent(calls("ask"), name="outer", capabilities=[durable.RestateDurability()])
    service = restate.Service("Suspended")
    caught: list[Exception] = []

    async def guarded(agent: Agent[None, str]) -> str:
        try:
            return (await agent.run("go")).output
        except Exception as error:
            caught.append(error)
            raise

    @inner.tool_plain(metadata={"restate": False})
    async def look() -> str:
        await asyncio.sleep(0.05)
        return "seen"

    @outer.tool_plain(metadata={"restate": False})
    async def ask() -> str:
        return await guarded(inner)

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return await guarded(outer)

    async with hosted(server, service) as ingress:
        assert await ingress.call("Suspended/run") == "ask=look=seen"
    assert caught == []


def current() -> asyncio.Task[Any]:
    """The task that this is called in."""
    task = asyncio.current_task()
    assert task is not None
    return task


@pytest.mark.parametrize(("in_flight", "messages"), [("tool", 3), ("model", 1)])
async def test_cancelling_ends_the_run_and_keeps_its_messages(
    server: RestateServer, request: pytest.FixtureRequest, in_flight: str, messages: int
) -> None:
    """A cancelled invocation stops the step in flight; the handler can save what there is."""

    async def respond(history: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[TextPart(await hang())])

    model = calls("hang") if in_flight == "tool" else FunctionModel(respond)
    agent = Agent(model, name="cancelled", capabilities=[durable.RestateDurability()])
    service = restate.Service("Cancelled")
    hanging = asyncio.Event()
    saved: list[int] = []

    @agent.tool_plain
    async def hang() -> str:
        hanging.set()
        try:
            await asyncio.sleep(3)
        except asyncio.CancelledError:
            done["stopped"] += 1
            raise
        return "never"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        try:
            return (await agent.run("go")).output
        except restate.TerminalError as error:
            cancelled = RunCancelled.from_cancellation(error)
            assert cancelled is not None
            saved.append(len(cancelled.all_messages()))
            raise

    async with hosted(server, service) as ingress:
        call = asyncio.create_task(ingress.post("Cancelled/run"))
        await hanging.wait()
        await ingress.cancel("Cancelled")
        response = await call
        assert response.status_code == 409
    assert saved[-1] == messages
    # a server that always replays has closed its side: the step learns of the cancellation after its end
    stopped = {} if "always-replay" in request.node.name else {"stopped": 1}
    assert done == {**({"model": 1} if in_flight == "tool" else {}), **stopped}


async def test_a_handler_elsewhere_is_refused_at_once(server: RestateServer) -> None:
    """With `restate.app` steps could not run in parallel: the error says which line to change."""
    agent = Agent(calls(), name="elsewhere", capabilities=[durable.RestateDurability()])
    service = agent_service("Elsewhere", agent)

    async with serving(restate.app([service])) as url, http_client() as http:
        await server.register(url)
        response = await Ingress(server, http).post("Elsewhere/run")
        assert response.status_code == 500
        assert "durable.app([...services])" in response.json()["message"]
    assert done["model"] == 0


async def test_a_step_cannot_use_its_handlers_context(server: RestateServer) -> None:
    """It is told so before anything is in the journal, where the next replay would not find it."""
    service = restate.Service("Nested", invocation_retry_policy=AT_MOST_TWICE)

    @service.handler()
    async def run(ctx: restate.Context, use: str) -> None:
        async def step() -> None:
            if use == "send":
                ctx.generic_send("Nested", "run", b'"none"')
            elif use == "sleep":
                await ctx.sleep(timedelta(milliseconds=1))

        def in_thread() -> None:
            ctx.generic_send("Nested", "run", b'"none"')

        await ctx.run_typed("step", in_thread if use == "thread" else step)
        await ctx.run_typed("after", after)

    async with hosted(server, service) as ingress:
        for use in ("send", "sleep", "thread"):
            response = await ingress.post("Nested/run", use)
            assert response.status_code == 500, response.text
            assert "used inside a step" in response.json()["message"]
            assert not await ingress.entries("Nested", "OneWayCall")
            assert not await ingress.entries("Nested", "Sleep")
