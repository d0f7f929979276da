"""What tools need, and where they come from: arguments, dependencies, toolsets of all kinds."""

import sqlite3
import threading
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
import restate
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.capabilities import NativeTool, SetToolMetadata
from pydantic_ai.messages import (
    ModelMessage,
    ModelResponse,
    TextPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.native_tools import WebSearchTool
from pydantic_ai.tools import (
    Tool,
    ToolDefinition,
)
from pydantic_ai.toolsets import FunctionToolset

import durable
from durable.server import RestateServer
from tests.live.hosting import agent_service, hosted
from tests.live.scripted import call, done, script

pytestmark = pytest.mark.live


# What tools need


async def test_validators_of_arguments_are_steps_of_their_own(server: RestateServer) -> None:
    """`args_validator` may look things up: it is called once, before the tool, in its own step."""
    model = script([call("book", "1", seat=0)], [call("book", "2", seat=4)])

    async def validate(ctx: RunContext, seat: int) -> None:
        done[f"validate {seat}"] += 1
        if seat == 0:
            raise ModelRetry("seats start at one")

    async def book(seat: int) -> str:
        done[f"book {seat}"] += 1
        return f"seat {seat}"

    agent = Agent(
        model,
        name="validating",
        tools=[Tool(book, args_validator=validate)],
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("Validating", agent)

    async with hosted(server, service) as ingress:
        assert await ingress.call("Validating/run") == "book=seat 4"
        toolset = "validating__function_toolset__<agent>"
        assert await ingress.steps("Validating") == [
            "validating__model.request",
            f"{toolset}.validate_args",
            "validating__model.request",
            f"{toolset}.validate_args",
            f"{toolset}.call_tool:book",
            "validating__model.request",
            "after",
        ]
    assert done == {"model": 3, "validate 0": 1, "validate 4": 1, "book 4": 1}


@dataclass
class Deps:
    """What nobody could serialise."""

    lock: Any
    database: sqlite3.Connection


async def test_dependencies_need_not_be_serialisable(server: RestateServer) -> None:
    """A lock and a database connection reach sync, async, dynamic and context tools as they are."""
    model = script([call("read"), call("read_sync"), call("later"), call("in_handler")])
    agent = Agent(model, name="deps", deps_type=Deps, capabilities=[durable.RestateDurability()])
    service = restate.Service("Live")
    database = sqlite3.connect(":memory:", check_same_thread=False)
    deps = Deps(lock=threading.Lock(), database=database)

    def value(ctx: RunContext[Deps]) -> int:
        assert ctx.deps is deps
        with ctx.deps.lock:
            return ctx.deps.database.execute("SELECT 42").fetchone()[0]

    @agent.tool
    async def read(ctx: RunContext[Deps]) -> int:
        return value(ctx)

    @agent.tool
    def read_sync(ctx: RunContext[Deps]) -> int:
        return value(ctx)

    @agent.toolset(id="later")
    def toolset(ctx: RunContext[Deps]) -> FunctionToolset[Deps]:
        async def later(ctx: RunContext[Deps]) -> int:
            return value(ctx)

        return FunctionToolset([later])

    @agent.tool(metadata={"restate": False})
    async def in_handler(ctx: RunContext[Deps]) -> int:
        return value(ctx)

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go", deps=deps)).output

    try:
        async with hosted(server, service) as ingress:
            assert (
                await ingress.call("Live/run") == "read=42; read_sync=42; later=42; in_handler=42"
            )
    finally:
        database.close()


async def test_a_tool_sees_the_whole_run_context(server: RestateServer) -> None:
    """Nothing is left out: messages, prompt, model, usage, ids, metadata and the retry count."""
    model = script([call("look", "1")], [call("look", "2")])
    agent = Agent(model, name="context", capabilities=[durable.RestateDurability()])
    service = restate.Service("FullContext")
    seen: list[Any] = []

    @agent.tool(retries=2)
    async def look(ctx: RunContext) -> str:
        seen.append(
            (
                ctx.prompt,
                len(ctx.messages),
                ctx.model is model,
                ctx.usage.requests,
                ctx.tool_call_id,
                ctx.tool_name,
                ctx.retry,
                ctx.max_retries,
                ctx.metadata,
                ctx.run_step,
                ctx.agent is agent,
            )
        )
        if len(seen) == 1:
            raise ModelRetry("once more")
        return "seen"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go", metadata={"order": 1})).output

    async with hosted(server, service) as ingress:
        assert await ingress.call("FullContext/run") == "look=seen"
    assert seen == [
        ("go", 2, True, 1, "1", "look", 0, 2, {"order": 1}, 1, True),
        ("go", 4, True, 2, "2", "look", 1, 2, {"order": 1}, 2, True),
    ]


# Toolsets


async def test_options_for_tools_of_others(server: RestateServer) -> None:
    """`SetToolMetadata` gives options to tools one did not write, as `metadata=` does."""
    fast = timedelta(milliseconds=10)

    async def flaky() -> str:
        done["flaky"] += 1
        raise RuntimeError("down")

    async def inline() -> str:
        return durable.restate_context().request().id

    agent = Agent(
        script([call("inline")], [call("flaky")]),
        name="others",
        toolsets=[FunctionToolset([flaky, inline], id="theirs")],
        capabilities=[
            SetToolMetadata(tools=["inline"], restate=False),
            SetToolMetadata(
                tools=["flaky"], restate={"max_attempts": 3, "initial_retry_interval": fast}
            ),
            durable.RestateDurability(),
        ],
    )
    async with hosted(server, agent_service("Others", agent)) as ingress:
        response = await ingress.post("Others/run")
        assert response.status_code == 500
        assert "down" in response.json()["message"]
        assert await ingress.steps("Others") == [
            "others__model.request",
            "others__model.request",
            "others__function_toolset__theirs.call_tool:flaky",
        ]
    assert done == {"model": 2, "flaky": 3}


async def test_wrapped_toolsets_are_journaled(server: RestateServer) -> None:
    """Prefixed, renamed, filtered, prepared: the steps carry the tools' own names and ids."""

    async def look() -> str:
        done["look"] += 1
        return "seen"

    async def hidden() -> str:
        done["hidden"] += 1
        return "never"

    async def old() -> str:
        done["old"] += 1
        return "renamed"

    async def described(ctx: RunContext, definitions: list[ToolDefinition]) -> list[ToolDefinition]:
        return [replace(definition, description="prepared") for definition in definitions]

    offered: list[set[str]] = []
    scripted = script([call("my_look"), call("new"), call("approved")])

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        offered.append({f"{it.name}: {it.description}" for it in info.function_tools})
        assert scripted.function is not None
        response = scripted.function(messages, info)
        assert isinstance(response, ModelResponse)
        return response

    async def approved() -> str:
        return "yes"

    def never(ctx: RunContext, definition: ToolDefinition, args: dict[str, Any]) -> bool:
        return False

    visible = (
        FunctionToolset([look, hidden], id="inner")
        .filtered(lambda ctx, definition: definition.name != "hidden")
        .prepared(described)
        .prefixed("my")
    )
    renamed = FunctionToolset([old], id="old").renamed({"new": "old"})
    free = FunctionToolset([approved], id="free").approval_required(never)
    agent = Agent(
        FunctionModel(respond),
        name="wrapped",
        toolsets=[visible, renamed, free],
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("Wrapped", agent)

    async with hosted(server, service) as ingress:
        assert await ingress.call("Wrapped/run") == "my_look=seen; new=renamed; approved=yes"
        assert await ingress.steps("Wrapped") == [
            "wrapped__model.request",
            "wrapped__function_toolset__inner.call_tool:look",
            "wrapped__function_toolset__old.call_tool:old",
            "wrapped__function_toolset__free.call_tool:approved",
            "wrapped__model.request",
            "after",
        ]
    assert offered[0] == {"my_look: prepared", "new: None", "approved: None"}
    assert done == {"model": 2, "look": 1, "old": 1}


async def test_tools_prepare_their_definitions(server: RestateServer) -> None:
    """`prepare` hides a tool or changes its description, from what the run has come to."""
    offered: list[list[str]] = []
    scripted = script([call("open_door")], [call("enter")])

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        offered.append([f"{it.name}: {it.description}" for it in info.function_tools])
        assert scripted.function is not None
        response = scripted.function(messages, info)
        assert isinstance(response, ModelResponse)
        return response

    async def only_when_open(ctx: RunContext, definition: ToolDefinition) -> ToolDefinition | None:
        if ctx.run_step == 1:
            return None
        return replace(definition, description=f"step {ctx.run_step}")

    agent = Agent(FunctionModel(respond), name="p", capabilities=[durable.RestateDurability()])
    service = agent_service("Preparing", agent)

    @agent.tool_plain(description="the way in")
    async def open_door() -> str:
        return "open"

    @agent.tool_plain(prepare=only_when_open)
    async def enter() -> str:
        return "inside"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Preparing/run") == "enter=inside"
    assert offered == [
        ["open_door: the way in"],
        ["open_door: the way in", "enter: step 2"],
        ["open_door: the way in", "enter: step 3"],
    ]


async def test_native_tools_reach_the_provider(server: RestateServer) -> None:
    """Web search and the like are the provider's own tools: they stay in the request."""
    sent: list[Any] = []

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        parameters = info.model_request_parameters
        assert parameters is not None
        sent.append(list(parameters.native_tools))
        return ModelResponse(parts=[TextPart("found")])

    agent = Agent(
        FunctionModel(respond),
        name="native",
        capabilities=[
            NativeTool(WebSearchTool(max_uses=2)),
            durable.RestateDurability(),
        ],
    )
    service = agent_service("Native", agent)

    async with hosted(server, service) as ingress:
        assert await ingress.call("Native/run") == "found"
    assert sent == [[WebSearchTool(max_uses=2)]]


async def test_dynamic_toolsets_raise_as_others_do(server: RestateServer) -> None:
    """Retries, approvals and validators of arguments work in a toolset made in the run, too."""
    agent = Agent(
        script([call("pick", "1", n=0)], [call("pick", "2", n=-1)], [call("pick", "3", n=3)]),
        name="dynamic",
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("DynamicRaising", agent)

    async def validate(ctx: RunContext, n: int) -> None:
        done[f"validate {n}"] += 1
        if n < 0:
            raise ModelRetry("negative")

    async def pick(n: int) -> str:
        done[f"pick {n}"] += 1
        if n == 0:
            raise ModelRetry("zero")
        return f"picked {n}"

    @agent.toolset(id="made")
    def toolset(ctx: RunContext) -> FunctionToolset:
        return FunctionToolset([Tool(pick, args_validator=validate, max_retries=3)])

    async with hosted(server, service) as ingress:
        assert await ingress.call("DynamicRaising/run") == "pick=picked 3"
        assert "dynamic__dynamic_toolset__made.validate_args" in await ingress.steps(
            "DynamicRaising"
        )
    once = {"validate 0": 1, "validate -1": 1, "validate 3": 1, "pick 0": 1, "pick 3": 1}
    assert done == {"model": 4, **once}
