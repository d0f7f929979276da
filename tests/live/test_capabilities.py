"""Capabilities beside `RestateDurability`: what they do outside happens once, in steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import restate
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import (
    AbstractCapability,
    Hooks,
    LocalWorkspace,
    ProcessHistory,
    durable_operation,
)
from pydantic_ai.exceptions import UsageLimitExceeded
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    UserPromptPart,
)
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.models.function import AgentInfo, FunctionModel

import durable
from durable.server import RestateServer
from tests.live.hosting import after, agent_service, hosted
from tests.live.scripted import call, done, script

pytestmark = pytest.mark.live


@dataclass
class Spending(AbstractCapability[Any]):
    """Books what a run costs, somewhere outside."""

    id: str | None = "spending"

    @durable_operation(name="book")
    async def book(self, ctx: RunContext[Any], amount: int) -> int:
        """Book an amount and return the new total."""
        done["book"] += amount
        return done["book"]

    async def before_model_request(
        self, ctx: RunContext[Any], request_context: ModelRequestContext
    ) -> ModelRequestContext:
        total = await self.book(ctx, 5)
        ctx.enqueue(f"total {total}")
        return request_context


async def test_operations_of_capabilities_are_steps(server: RestateServer) -> None:
    """What another capability declares with `@durable_operation` happens once, in its own step."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        done["model"] += 1
        part = messages[-1].parts[-1]
        assert isinstance(part, UserPromptPart)
        return ModelResponse(parts=[TextPart(str(part.content))])

    agent = Agent(
        FunctionModel(respond),
        name="spender",
        capabilities=[Spending(), durable.RestateDurability()],
    )
    service = restate.Service("Spender")

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        outputs = [(await agent.run("go")).output for _ in range(2)]
        await ctx.run_typed("after", after)
        return outputs

    async with hosted(server, service) as ingress:
        assert await ingress.call("Spender/run") == ["total 5", "total 10"]
        assert await ingress.steps("Spender") == [
            *["spender__capability__spending.book", "spender__model.request"] * 2,
            "after",
        ]
    assert done == {"model": 2, "book": 10}


memory = restate.VirtualObject("Memories")


@memory.handler()
async def remember(ctx: restate.ObjectContext, fact: str) -> None:
    """Keep a fact, and count the calls."""
    done["remember"] += 1
    ctx.set("facts", [*(await ctx.get("facts", type_hint=list[str]) or []), fact])


@memory.handler()
async def spend(ctx: restate.ObjectContext, amount: int) -> int:
    """Book an amount and return the new total."""
    total = (await ctx.get("spent", type_hint=int) or 0) + amount
    ctx.set("spent", total)
    return total


@memory.handler()
async def facts(ctx: restate.ObjectContext) -> list[str]:
    """Return what was kept."""
    return await ctx.get("facts", type_hint=list[str]) or []


class Remembering(AbstractCapability[str]):
    """A memory and a budget for each user, in a virtual object."""

    async def before_model_request(
        self, ctx: RunContext[str], request_context: ModelRequestContext
    ) -> ModelRequestContext:
        total = await durable.restate_context().object_call(spend, key=ctx.deps, arg=5)
        if total > 20:
            raise UsageLimitExceeded(f"{ctx.deps} has spent {total}")
        return request_context


async def test_memory_and_budget_in_a_virtual_object(server: RestateServer) -> None:
    """What a run learns is there for the next one, and what it spends is booked once."""
    agent = Agent(
        script([call("recall")], [call("keep", fact="likes tea")]),
        name="remembering",
        deps_type=str,
        capabilities=[Remembering(), durable.RestateDurability()],
    )
    service = restate.Service("Remembering")

    @agent.tool(metadata={"restate": False})
    async def recall(ctx: RunContext[str]) -> str:
        known = await durable.restate_context().object_call(facts, key=ctx.deps, arg=None)
        recalled.append(known)
        return str(known)

    @agent.tool(metadata={"restate": False})
    async def keep(ctx: RunContext[str], fact: str) -> str:
        await durable.restate_context().object_call(remember, key=ctx.deps, arg=fact)
        return "kept"

    @service.handler()
    async def run(ctx: restate.Context, user: str) -> str:
        recalled.clear()
        await agent.run("go", deps=user)
        await ctx.run_typed("after", after)
        return str(recalled[-1])

    recalled: list[list[str]] = []
    user = uuid4().hex
    async with hosted(server, service, memory) as ingress:
        assert await ingress.call("Remembering/run", user) == "[]"
        response = await ingress.post("Remembering/run", user)
        assert response.status_code == 429
        assert f"{user} has spent 25" in response.json()["message"]
        assert recalled[-1] == ["likes tea"]
    assert done == {"model": 4, "remember": 1}


async def test_history_is_shortened_once(server: RestateServer) -> None:
    """A provider's compaction is a step; so is a summary that `durable.step` makes."""

    class Compacting(FunctionModel):
        async def compact_messages(
            self, request_context: ModelRequestContext, *, instructions: str | None = None
        ) -> ModelResponse:
            done["compact"] += 1
            return ModelResponse(parts=[TextPart(f"{len(request_context.messages)} message(s)")])

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        [part] = messages[0].parts
        assert isinstance(part, UserPromptPart)
        return ModelResponse(parts=[TextPart(str(part.content))])

    @durable.step
    async def summarise(text: str) -> str:
        done["summarise"] += 1
        return f"summary of {text}"

    async def shorten(messages: list[ModelMessage]) -> list[ModelMessage]:
        return [ModelRequest(parts=[UserPromptPart(await summarise(f"{len(messages)} messages"))])]

    hooks = Hooks[object]()
    compacting = Agent(
        Compacting(respond), name="compact", capabilities=[hooks, durable.RestateDurability()]
    )
    summarising = Agent(
        FunctionModel(respond),
        name="summarise",
        capabilities=[ProcessHistory(shorten), durable.RestateDurability()],
    )
    service = restate.Service("Shortened")

    @hooks.on.before_model_request
    async def compact(ctx: RunContext, request_context: ModelRequestContext) -> ModelRequestContext:
        response = await request_context.model.compact_messages(request_context)
        assert response.parts == [TextPart("1 message(s)")]
        return request_context

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        outputs = [(await agent.run("go")).output for agent in (compacting, summarising)]
        await ctx.run_typed("after", after)
        return outputs

    async with hosted(server, service) as ingress:
        assert await ingress.call("Shortened/run") == ["go", "summary of 1 messages"]
        assert await ingress.steps("Shortened") == [
            "compact__model.compact_messages",
            "compact__model.request",
            "step:summarise",
            "summarise__model.request",
            "after",
        ]
    assert done == {"compact": 1, "summarise": 1}


async def test_workspaces(server: RestateServer, tmp_path: Path) -> None:
    """What tools do to a workspace is journaled: in context tools call by call, once."""
    agent = Agent(
        script([call("in_step", "1"), call("in_handler", "2")], [call("read", "3")]),
        name="worker",
        capabilities=[LocalWorkspace(tmp_path), durable.RestateDurability()],
    )
    service = agent_service("Workspace", agent)

    async def append(ctx: RunContext, line: str) -> str:
        assert ctx.workspace is not None
        result = await ctx.workspace.run(f"echo {line} >> log", shell=True)
        return str(result.exit_code)

    @agent.tool
    async def in_step(ctx: RunContext) -> str:
        return await append(ctx, "step")

    @agent.tool(metadata={"restate": False})
    async def in_handler(ctx: RunContext) -> str:
        return await append(ctx, "handler")

    @agent.tool
    async def read(ctx: RunContext) -> str:
        assert ctx.workspace is not None
        return " ".join(sorted((await ctx.workspace.read_text("log")).split()))

    async with hosted(server, service) as ingress:
        assert await ingress.call("Workspace/run") == "read=handler step"
    assert sorted((tmp_path / "log").read_text().split()) == ["handler", "step"]


async def test_hooks(server: RestateServer) -> None:
    """Hooks run in handler code, on each replay again; what they do in a step happens once."""
    hooks = Hooks[object]()
    agent = Agent(
        script([call("look")]), name="hooked", capabilities=[hooks, durable.RestateDurability()]
    )
    service = agent_service("Hooked", agent)
    logged: list[str] = []

    @durable.step
    async def log(line: str) -> int:
        logged.append(line)
        return len(logged)

    @hooks.on.before_run
    async def before_run(ctx: RunContext) -> None:
        done["hook"] += 1
        await log("before run")

    @hooks.on.after_run
    async def after_run(ctx: RunContext, *, result: Any) -> Any:
        await log("after run")
        return result

    @hooks.on.before_model_request
    async def before(ctx: RunContext, request_context: ModelRequestContext) -> ModelRequestContext:
        await log("before request")
        return request_context

    @hooks.on.after_model_request
    async def after_request(
        ctx: RunContext, *, request_context: ModelRequestContext, response: ModelResponse
    ) -> ModelResponse:
        await log("after request")
        return response

    @hooks.on.before_tool_execute
    async def before_tool(ctx: RunContext, *, call: Any, tool_def: Any, args: Any) -> Any:
        await log("before tool")
        return args

    @hooks.on.after_tool_execute
    async def after_tool(
        ctx: RunContext, *, call: Any, tool_def: Any, args: Any, result: Any
    ) -> Any:
        await log("after tool")
        return f"{result} and hooked"

    @agent.tool_plain
    async def look() -> str:
        return "seen"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Hooked/run") == "look=seen and hooked"
    assert logged == [
        "before run",
        *["before request", "after request"],
        *["before tool", "after tool"],
        *["before request", "after request"],
        "after run",
    ]
    assert done["model"] == 2
    assert done["hook"] >= 1
