"""MCP servers in a handler: one session per run, none for a replay, and no trace left behind."""

import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import restate
from fastmcp import Client
from fastmcp.client.transports import StdioTransport
from pydantic_ai import Agent, RunContext
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.mcp import MCPToolset
from pydantic_ai.messages import (
    BinaryContent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolReturnPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.toolsets import AbstractToolset, DynamicToolset
from restate.exceptions import RetryableError

import durable
from durable.server import RestateServer
from tests.live.hosting import PATIENCE, after, agent_service, hosted, serving
from tests.live.mcp_server import HTTPApp, Trace
from tests.live.scripted import call, done, script

pytestmark = pytest.mark.live

Transport = Callable[[], Any]


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    """What happens to the servers of a test."""
    return Trace(tmp_path / "trace")


@pytest.fixture(params=["http", "http-legacy"])
async def client(request: pytest.FixtureRequest, trace: Trace) -> AsyncGenerator[Client[Any]]:
    """A client for the server over HTTP, in the protocol of today and in the one with sessions."""
    async with serving(HTTPApp(trace)) as url:
        mode = "legacy" if "legacy" in request.param else "auto"
        yield Client(f"{url}/mcp", mode=mode, init_timeout=PATIENCE)


def stdio(trace: Trace) -> StdioTransport:
    """How to start the server as a process that ends with its session."""
    arguments = ["-m", "tests.live.mcp_server", str(trace.path)]
    root = Path(__file__).parents[2]
    return StdioTransport(
        sys.executable, arguments, cwd=str(root), env=dict(os.environ), keep_alive=False
    )


@pytest.fixture(autouse=True)
async def _nothing_left(trace: Trace) -> AsyncGenerator[None]:
    """After each test its servers' processes are gone, and no task of the test runs on."""
    before = tasks()
    yield
    deadline = monotonic() + PATIENCE
    while left := {*running(trace), *(tasks() - before)}:
        assert monotonic() < deadline, left
        await asyncio.sleep(0.02)


def tasks() -> set[asyncio.Task[Any]]:
    """All tasks but those of the test runner, and of the library that serves the MCP server."""
    others = ("TestRunner", "sse_starlette")
    return {task for task in asyncio.all_tasks() if not any(it in repr(task) for it in others)}


def running(trace: Trace) -> Iterator[int]:
    """The servers over stdio that still run."""
    for pid in trace.pids():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        yield pid


async def until_closed(trace: Trace) -> None:
    """Wait until each session that was opened is closed; the new protocol over HTTP has none."""
    await until(lambda: trace.events()["connect"] == trace.events()["disconnect"])


async def until(happened: Callable[[], bool]) -> None:
    """Wait until something has happened."""
    async with asyncio.timeout(PATIENCE):
        while not happened():  # noqa: ASYNC110 - other processes do it
            await asyncio.sleep(0.02)


async def test_one_session_per_run(
    server: RestateServer, client: Client[Any], trace: Trace, request: pytest.FixtureRequest
) -> None:
    """Listing, instructions and calls are steps, in one session; a replay needs none."""
    model = script(
        [call("add", "1", a=1, b=2), call("add", "2", a=3, b=4)], [call("add", "3", a=5, b=6)]
    )
    agent = Agent(
        model,
        name="mcp",
        toolsets=[MCPToolset(client, id="tools", include_instructions=True)],
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Mcp")
    crash_once = RetryableError("crash", retry_after=timedelta(milliseconds=10))
    instructions: list[str | None] = []

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        result = await agent.run("go")
        await ctx.run_typed("after", after)
        done["finished"] += 1
        first = result.all_messages()[0]
        assert isinstance(first, ModelRequest)
        instructions.append(first.instructions)
        if done["finished"] == 1:
            done["connects"] = trace.events()["connect"]
            raise crash_once
        return result.output

    async with hosted(server, service) as ingress:
        assert await ingress.call("Mcp/run") == "add=11"
        steps = await ingress.steps("Mcp")
    prefix = "mcp__mcp_server__tools"
    assert Counter(steps) == {
        f"{prefix}.get_tools": 1,
        f"{prefix}.get_instructions": steps.count(f"{prefix}.get_instructions"),
        f"{prefix}.call_tool": 3,
        "mcp__model.request": 3,
        "after": 1,
    }
    assert instructions == ["Be exact.", "Be exact."]
    events = trace.events()
    assert events["call add"] == 3
    assert done["model"] == 3
    # the crash came after all steps: the attempt that replayed them did not connect
    assert events["connect"] == done["connects"]
    if "always-replay" in request.node.name:
        assert events["connect"] <= sum(step.startswith(prefix) for step in steps)
    else:
        assert events["connect"] == 1
    if request.node.callspec.params["client"] != "http":
        await until_closed(trace)


@pytest.mark.parametrize("client", ["http-legacy"], indirect=True)
async def test_errors_of_tools_are_the_models(
    server: RestateServer, client: Client[Any], trace: Trace
) -> None:
    """A tool's error is an answer that asks for another call; the run's end closes the session."""
    model = script(
        [call("divide", "1", a=1, b=0), call("add", a=1, b=1)], [call("divide", "2", a=1, b=4)]
    )
    agent = Agent(
        model,
        name="wrong",
        toolsets=[MCPToolset(client, id="tools", max_retries=1)],
        capabilities=[durable.RestateDurability()],
    )
    strict = Agent(
        script([call("divide", a=1, b=0)]),
        name="strict",
        toolsets=[MCPToolset(client, id="tools", max_retries=0)],
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("McpErrors")

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        result = await agent.run("go")
        with pytest.raises(UnexpectedModelBehavior, match="exceeded max retries"):
            await strict.run("go")
        await ctx.run_typed("after", after)
        returned = [
            part
            for message in result.all_messages()
            for part in message.parts
            if isinstance(part, ToolReturnPart)
        ]
        return [f"{part.tool_name} {part.outcome} {part.content}" for part in returned]

    async with hosted(server, service) as ingress:
        failed, added, divided = await ingress.call("McpErrors/run")
        assert failed.startswith("divide retried")
        assert "b must not be zero" in failed
        assert (added, divided) == ("add success 2", "divide success 0.25")
        assert await ingress.retries("McpErrors") == 0
    assert trace.events()["call divide"] == 3
    assert trace.events()["call add"] == 1
    await until_closed(trace)


async def test_images_stay_images(server: RestateServer, trace: Trace) -> None:
    """An image that an MCP tool returns reaches the model as an image, after a replay too."""
    seen: list[Any] = []

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if len(messages) == 1:
            return ModelResponse(parts=[call("picture")])
        [part] = messages[-1].parts
        assert isinstance(part, ToolReturnPart)
        seen.append([(type(file), file.data) for file in part.files if file.kind == "binary"])
        return ModelResponse(parts=[TextPart("nice")])

    async with serving(HTTPApp(trace)) as url:
        agent = Agent(
            FunctionModel(respond),
            name="images",
            toolsets=[MCPToolset(f"{url}/mcp", id="tools")],
            capabilities=[durable.RestateDurability()],
        )
        service = agent_service("McpImages", agent)

        async with hosted(server, service) as ingress:
            assert await ingress.call("McpImages/run") == "nice"
    [[(kind, data)]] = seen
    assert issubclass(kind, BinaryContent)
    assert data.startswith(b"\x89PNG")


async def test_connecting_is_retried(server: RestateServer, trace: Trace) -> None:
    """A server that is not there yet is infrastructure: the step is tried again, not the model."""
    fast = restate.RunOptions[Any](
        max_attempts=5, initial_retry_interval=timedelta(milliseconds=20)
    )
    async with serving(HTTPApp(trace, refuse=2)) as url:
        agent = Agent(
            script([call("add", a=1, b=2)]),
            name="late",
            toolsets=[MCPToolset(f"{url}/mcp", id="tools")],
            capabilities=[durable.RestateDurability(mcp_run_options=fast)],
        )
        service = agent_service("McpLate", agent)

        async with hosted(server, service) as ingress:
            assert await ingress.call("McpLate/run") == "add=3"
    assert trace.events()["call add"] == 1
    assert done["model"] == 2


async def test_a_session_ends_with_its_attempt(
    server: RestateServer, trace: Trace, request: pytest.FixtureRequest
) -> None:
    """While a handler is suspended no server runs for it; later steps open a new session."""
    agent = Agent(
        script([call("wait")], [call("add", a=3, b=4)]),
        name="waiting",
        toolsets=[MCPToolset(Client(stdio(trace), init_timeout=PATIENCE), id="tools")],
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("McpWaiting", agent)
    waiting: asyncio.Future[str] = asyncio.Future()

    @agent.tool_plain(metadata={"restate": False})
    async def wait() -> str:
        ctx = durable.restate_context()
        awakeable, answer = ctx.awakeable(type_hint=str)

        async def notify() -> None:
            waiting.set_result(awakeable)

        await ctx.run_typed("notify", notify)
        return await answer

    async with hosted(server, service) as ingress:
        answer = asyncio.create_task(ingress.call("McpWaiting/run"))
        awakeable = await waiting
        if "always-replay" in request.node.name:
            await until_closed(trace)
        await ingress.post(f"restate/awakeables/{awakeable}/resolve", "go on")
        assert await answer == "add=7"
    events = trace.events()
    assert events["call add"] == 1
    assert events["connect"] == (2 if "always-replay" in request.node.name else 1)
    await until_closed(trace)


async def test_cancelling_ends_the_session(
    server: RestateServer, trace: Trace, request: pytest.FixtureRequest
) -> None:
    """A cancelled invocation leaves neither the call nor the server behind."""
    if "always-replay" in request.node.name:
        # the server has closed its side, so the worker learns of it only when the call has ended
        hang_for = "short"
    else:
        hang_for = "hang"
    agent = Agent(
        script([call(hang_for)]),
        name="cancelled",
        toolsets=[MCPToolset(Client(stdio(trace), init_timeout=PATIENCE), id="tools")],
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("McpCancelled", agent)

    @agent.tool_plain
    async def short() -> str:
        trace.add("call hang")
        await asyncio.sleep(0.5)
        return "over"

    async with hosted(server, service) as ingress:
        answer = asyncio.create_task(ingress.post("McpCancelled/run"))
        await until(lambda: trace.events()["call hang"] > 0)
        await ingress.cancel("McpCancelled")
        assert (await answer).status_code == 409
    await until_closed(trace)


async def test_dynamic_toolsets_hold_one_session(
    server: RestateServer, client: Client[Any], trace: Trace, request: pytest.FixtureRequest
) -> None:
    """`DynamicToolset(per_run_step=False)` makes an MCP toolset: one session per run."""

    def make(ctx: RunContext) -> AbstractToolset[Any]:
        return MCPToolset(client, id="inner")

    agent = Agent(
        script(
            [call("add", "1", a=1, b=2)], [call("divide", a=1, b=0)], [call("add", "2", a=3, b=4)]
        ),
        name="made",
        toolsets=[DynamicToolset(make, per_run_step=False, id="made")],
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("McpMade", agent)

    async with hosted(server, service) as ingress:
        assert await ingress.call("McpMade/run") == "add=7"
        steps = await ingress.steps("McpMade")
    prefix = "made__dynamic_toolset__made"
    assert [step for step in steps if "call_tool" in step] == [
        f"{prefix}.call_tool:add",
        f"{prefix}.call_tool:divide",
        f"{prefix}.call_tool:add",
    ]
    events = trace.events()
    assert events["call add"] == 2
    assert events["call divide"] == 1
    toolset_steps = [step for step in steps if step.startswith(prefix)]
    assert events["connect"] <= (len(toolset_steps) if "always-replay" in request.node.name else 1)


async def test_runs_beside_each_other_share_the_server(
    server: RestateServer, client: Client[Any], trace: Trace
) -> None:
    """Two runs in one handler, and their sessions' ends, do not disturb each other."""
    toolset = MCPToolset[object](client, id="tools")
    agents = [
        Agent(
            script(*([call("add", str(turn), a=number, b=1)] for turn in range(turns))),
            name=f"beside-{number}",
            toolsets=[toolset],
            capabilities=[durable.RestateDurability()],
        )
        for number, turns in ((10, 1), (20, 3))
    ]
    service = restate.Service("McpBeside")

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        results = await asyncio.gather(*(agent.run("go") for agent in agents))
        return [result.output for result in results]

    async with hosted(server, service) as ingress:
        assert await ingress.call("McpBeside/run") == ["add=11", "add=21"]
    assert trace.events()["call add"] == 4


async def test_servers_given_at_run_time(server: RestateServer, trace: Trace) -> None:
    """A toolset passed to `run` is journaled too, and connects as the user of the run."""
    service = restate.Service("McpGiven")
    agent = Agent(
        script([call("add", a=1, b=2)]),
        name="given",
        deps_type=str,
        capabilities=[durable.RestateDurability()],
    )
    async with serving(HTTPApp(trace)) as url:

        def as_user(ctx: RunContext[str]) -> dict[str, str]:
            return {"x-user": ctx.deps}

        @service.handler()
        async def run(ctx: restate.Context, user: str) -> str:
            tools = MCPToolset[str](f"{url}/mcp", id="given", headers=as_user)
            output = (await agent.run("go", deps=user, toolsets=[tools])).output
            await ctx.run_typed("after", after)
            return output

        async with hosted(server, service) as ingress:
            answers = await asyncio.gather(
                *(ingress.call("McpGiven/run", user) for user in ("ann", "bob"))
            )
            assert answers == ["add=3", "add=3"]
            steps = await ingress.steps("McpGiven")
    assert "given__mcp_server__given.call_tool" in steps
    events = trace.events()
    assert events["call add"] == 2
    assert {event for event in events if event.startswith("user")} == {"user ann", "user bob"}
