"""How often a failing step is tried, and what comes after that, is for the options to say."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import restate
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import AbstractCapability, durable_operation
from pydantic_ai.mcp import CallToolFunc, MCPToolset, ToolResult
from pydantic_ai.messages import ModelMessage
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel

import durable
from durable.server import RestateServer
from tests.live.hosting import PATIENCE, agent_service, hosted, serving
from tests.live.mcp_server import HTTPApp, Trace
from tests.live.scripted import calls, done

pytestmark = pytest.mark.live

FAST = restate.RunOptions[object](max_attempts=3, initial_retry_interval=timedelta(milliseconds=10))
PAUSED = "SELECT id FROM sys_invocation WHERE target_service_name = 'Pausing' AND status = 'paused'"


@dataclass(kw_only=True)
class Booking(AbstractCapability[Any]):
    """Books something with each request."""

    begin: Callable[[str], None]
    id: str | None = "booking"

    @durable_operation(name="book")
    async def book(self, ctx: RunContext[Any]) -> None:
        """Book."""
        self.begin("capability")

    async def before_model_request(
        self, ctx: RunContext[Any], request_context: ModelRequestContext
    ) -> ModelRequestContext:
        await self.book(ctx)
        return request_context


def agent_with_every_role(
    begin: Callable[[str], None], mcp_url: str, options: dict[str, Any]
) -> Agent[None, str]:
    """An agent with steps of each role, which call `begin` with its name."""

    async def handle(ctx: RunContext, events: Any) -> None:
        async for event in events:
            if event.event_kind == "function_tool_call":
                begin("event")

    async def process(
        ctx: RunContext[Any], call_tool: CallToolFunc, name: str, args: dict[str, Any]
    ) -> ToolResult:
        begin("mcp")
        return await call_tool(name, args)

    def look() -> str:
        begin("tool")
        return "seen"

    async def stream(
        messages: list[ModelMessage], info: AgentInfo
    ) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        begin("model")
        if len(messages) == 1:
            yield {0: DeltaToolCall("look", "{}", tool_call_id="1")}
        elif len(messages) == 3:
            yield {0: DeltaToolCall("add", '{"a": 1, "b": 2}', tool_call_id="2")}
        else:
            yield "finished"

    return Agent(
        FunctionModel(stream_function=stream),
        name="roles",
        tools=[look],
        toolsets=[MCPToolset(mcp_url, id="sums", process_tool_call=process)],
        capabilities=[
            Booking(begin=begin),
            durable.RestateDurability(event_stream_handler=handle, **options),
        ],
    )


@pytest.mark.parametrize("role", ["model", "tool", "mcp", "event", "capability", "none"])
async def test_each_role_has_its_own_retries(
    server: RestateServer, tmp_path: Path, role: str
) -> None:
    """Three tries for the role that fails, while the others' options allow one."""

    def begin(begun: str) -> None:
        if begun == role:
            done["tries"] += 1
            raise RuntimeError("always")

    options = {
        f"{it}_run_options": replace(FAST, max_attempts=3 if it == role else 1)
        for it in ("model", "tool", "mcp", "event", "capability")
    }
    async with serving(HTTPApp(Trace(tmp_path / "trace"))) as url:
        agent = agent_with_every_role(begin, f"{url}/mcp", options)
        async with hosted(server, agent_service("Roles", agent)) as ingress:
            response = await ingress.post("Roles/run")
    if role == "none":
        assert response.json() == "finished"
    else:
        assert response.status_code == 500
        assert "always" in response.json()["message"]
        assert done == {"tries": 3}


async def test_tries_are_counted_while_others_go_on(server: RestateServer) -> None:
    """The limit of a failing tool holds, although the tool beside it takes step after step."""
    agent = Agent(
        calls("fail", "walk"),
        name="counting",
        capabilities=[durable.RestateDurability(tool_run_options=FAST)],
    )

    @agent.tool_plain
    async def fail() -> str:
        done["fail"] += 1
        raise RuntimeError("always")

    @agent.tool_plain(metadata={"restate": False})
    async def walk() -> str:
        for _ in range(5):
            await durable.restate_context().run_typed("walk", lambda: None)
            await asyncio.sleep(0.02)
        return "walked"

    async with hosted(server, agent_service("Counting", agent)) as ingress:
        response = await ingress.post("Counting/run")
        assert response.status_code == 500
    assert done == {"model": 1, "fail": 3}


async def test_a_paused_run_goes_on_when_it_is_resumed(server: RestateServer) -> None:
    """Without limits of its own, a step leaves it to the service's policy: here the run is paused."""
    agent = Agent(
        calls("repair"),
        name="pausing",
        capabilities=[durable.RestateDurability(tool_run_options=restate.RunOptions())],
    )
    service = restate.Service(
        "Pausing",
        invocation_retry_policy=restate.InvocationRetryPolicy(
            initial_interval=timedelta(milliseconds=10), max_attempts=3, on_max_attempts="pause"
        ),
    )
    repaired = asyncio.Event()

    @agent.tool_plain
    async def repair() -> str:
        done["repair"] += 1
        if not repaired.is_set():
            raise RuntimeError("out of order")
        return "repaired"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

    async with hosted(server, service) as ingress:
        answer = asyncio.create_task(ingress.call("Pausing/run"))
        async with asyncio.timeout(PATIENCE):
            while not (paused := await server.query(PAUSED)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert done["repair"] > 1
        before = done["repair"]
        repaired.set()
        url = f"{server.admin_url}/invocations/{paused[0]['id']}/resume"
        assert (await ingress.http.patch(url)).is_success
        assert await answer == "repair=repaired"
    assert done == {"model": 2, "repair": before + 1}
