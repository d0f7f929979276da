"""Tools of all kinds in a handler: what they raise, return and need survives, and happens once."""

import asyncio
import sqlite3
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import anyio
import pytest
import restate
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.capabilities import HandleDeferredToolCalls, NativeTool
from pydantic_ai.exceptions import (
    ApprovalRequired,
    CallDeferred,
    RunCancelled,
    ToolFailed,
    UserError,
)
from pydantic_ai.messages import (
    BinaryContent,
    ImageUrl,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturn,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.native_tools import WebSearchTool
from pydantic_ai.tools import (
    DeferredToolRequests,
    DeferredToolResults,
    Tool,
    ToolApproved,
    ToolDefinition,
    ToolDenied,
)
from pydantic_ai.toolsets import FunctionToolset

import durable
from durable.server import RestateServer
from tests.live.hosting import hosted

pytestmark = pytest.mark.live

PIXEL = b"\x89PNG\r\n\x1a\n-not-utf8-\xff\xfe"

done: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _nothing_done() -> None:
    done.clear()


def call(name: str, id: str | None = None, **args: Any) -> ToolCallPart:
    """A tool call, whose id is the tool's name unless given."""
    return ToolCallPart(name, args, tool_call_id=id or name)


def script(*turns: Sequence[ToolCallPart]) -> FunctionModel:
    """A model that makes the calls of each turn, then answers with what the last ones returned."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        done["model"] += 1
        turn = sum(isinstance(message, ModelResponse) for message in messages)
        if turn < len(turns):
            return ModelResponse(parts=turns[turn])
        return ModelResponse(parts=[TextPart("; ".join(results(messages)))])

    return FunctionModel(respond)


def results(messages: list[ModelMessage]) -> list[str]:
    """What the last request tells the model about its calls."""
    last = messages[-1]
    assert isinstance(last, ModelRequest)
    return [
        f"{part.tool_name}={part.model_response_str()}"
        for part in last.parts
        if isinstance(part, ToolReturnPart)
    ]


async def after() -> None:
    """A last step, so that always-replay mode replays everything before it."""


# What tools raise


async def test_a_retry_asked_by_one_tool_leaves_the_others_alone(server: RestateServer) -> None:
    """`ModelRetry` of one of several parallel calls is that call's answer; the others run once."""
    model = script(
        [call("pick", "1", n=1), call("pick", "2", n=2), call("pick", "3", n=3)],
        [call("pick", "4", n=4)],
    )
    agent = Agent(model, name="picky", capabilities=[durable.RestateDurability()])
    service = restate.Service("Picky")

    @agent.tool_plain
    async def pick(n: int) -> str:
        done[f"pick {n}"] += 1
        if n == 2:
            raise ModelRetry("not two")
        await asyncio.sleep(0.1)
        return f"picked {n}"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        result = await agent.run("go")
        await ctx.run_typed("after", after)
        answered = [
            part
            for message in result.all_messages()
            for part in message.parts
            if isinstance(part, ToolReturnPart)
        ]
        return [f"{part.tool_call_id} {part.outcome}" for part in answered] + [result.output]

    async with hosted(server, service) as ingress:
        assert await ingress.call("Picky/run") == [
            "1 success",
            "2 retried",
            "3 success",
            "4 success",
            "pick=picked 4",
        ]
        assert (await ingress.invocation("Picky")).get("retry_count", 0) == 0
    assert done == {"model": 3, "pick 1": 1, "pick 2": 1, "pick 3": 1, "pick 4": 1}


async def test_deferred_calls_are_resumed_after_an_awakeable(server: RestateServer) -> None:
    """Approvals and external calls keep their metadata; the same handler waits and goes on."""
    model = script(
        [call("look"), call("pay", amount=1), call("refund", amount=2), call("ask"), call("drop")]
    )
    agent = Agent(
        model,
        name="deferring",
        output_type=[str, DeferredToolRequests],
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Deferring")
    asked: asyncio.Future[tuple[str, DeferredToolRequests]] = asyncio.Future()

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @agent.tool_plain(requires_approval=True)
    async def pay(amount: int) -> str:
        done["pay"] += 1
        return f"paid {amount}"

    @agent.tool
    async def refund(ctx: RunContext, amount: int) -> str:
        done["refund"] += 1
        if not ctx.tool_call_approved:
            raise ApprovalRequired(metadata={"limit": 1, "by": ["ann"]})
        return f"refunded {amount}, {ctx.tool_call_metadata}"

    @agent.tool_plain
    async def ask() -> str:
        done["ask"] += 1
        raise CallDeferred(metadata={"task": 7})

    @agent.tool_plain(requires_approval=True)
    async def drop() -> str:
        done["drop"] += 1
        return "dropped"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        first = await agent.run("go")
        requests = first.output
        assert isinstance(requests, DeferredToolRequests)
        awakeable, answer = ctx.awakeable(type_hint=dict[str, str])

        async def notify() -> None:
            done["notify"] += 1
            asked.set_result((awakeable, requests))

        await ctx.run_typed("notify", notify)
        answers = await answer
        given = DeferredToolResults(
            calls={"ask": answers["ask"]},
            approvals={
                "pay": True,
                "refund": ToolApproved(override_args={"amount": 5}),
                "drop": ToolDenied(answers["drop"]),
            },
            metadata={"refund": {"approved by": "ann"}},
        )
        history = first.all_messages()
        second = await agent.run(message_history=history, deferred_tool_results=given)
        await ctx.run_typed("after", after)
        assert isinstance(second.output, str)
        return second.output

    async with hosted(server, service) as ingress:
        answer = asyncio.create_task(ingress.call("Deferring/run"))
        awakeable, requests = await asyncio.wait_for(asked, 10)
        assert {part.tool_name for part in requests.approvals} == {"pay", "refund", "drop"}
        assert [part.tool_name for part in requests.calls] == ["ask"]
        assert requests.metadata == {"refund": {"limit": 1, "by": ["ann"]}, "ask": {"task": 7}}
        resolved = await ingress.post(
            f"restate/awakeables/{awakeable}/resolve", {"ask": "42", "drop": "too risky"}
        )
        assert resolved.status_code == 202
        assert set((await answer).split("; ")) >= {
            "pay=paid 1",
            "refund=refunded 5, {'approved by': 'ann'}",
            "ask=42",
            "drop=too risky",
        }
    # `refund` and `ask` were called to learn that they are deferred; `refund` then ran
    assert done == {"model": 2, "look": 1, "pay": 1, "refund": 2, "ask": 1, "notify": 1}


async def test_a_failed_tool_is_told_to_the_model(server: RestateServer) -> None:
    """`ToolFailed` is an answer like any other: no retry of the step, none by the model."""
    agent = Agent(
        script([call("fetch"), call("look")]),
        name="failing",
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Failing")

    @agent.tool_plain(retries=0)
    async def fetch() -> str:
        done["fetch"] += 1
        raise ToolFailed("it is gone")

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        result = await agent.run("go")
        await ctx.run_typed("after", after)
        returned = [
            part
            for message in result.all_messages()
            for part in message.parts
            if isinstance(part, ToolReturnPart)
        ]
        return [f"{part.tool_name}: {part.content} ({part.outcome})" for part in returned]

    async with hosted(server, service) as ingress:
        assert await ingress.call("Failing/run") == [
            "fetch: it is gone (failed)",
            "look: seen (success)",
        ]
    assert done == {"model": 2, "fetch": 1, "look": 1}


async def test_own_retries_of_one_tool(server: RestateServer) -> None:
    """`metadata={"restate": {"max_attempts": 2}}` ends the run after two tries, with that error."""
    agent = Agent(
        script([call("flaky")], [call("broken")]),
        name="retries",
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Retries")
    fast: dict[str, Any] = {"initial_retry_interval": timedelta(milliseconds=10)}

    @agent.tool_plain(metadata={"restate": {"max_attempts": 4, **fast}})
    async def flaky() -> str:
        done["flaky"] += 1
        if done["flaky"] < 4:
            raise RuntimeError("passing")
        return "ok"

    @agent.tool_plain(metadata={"restate": {"max_attempts": 2, **fast}})
    async def broken() -> str:
        done["broken"] += 1
        raise RuntimeError("for good")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

    async with hosted(server, service) as ingress:
        response = await ingress.post("Retries/run")
        assert response.status_code == 500
        assert "for good" in response.json()["message"]
    assert done == {"model": 2, "flaky": 4, "broken": 2}


# What tools return


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    at: datetime


class Parcel(BaseModel):
    weight: Decimal
    due: date
    content: bytes = b"\x00\xffraw"


NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
RETURNED: dict[str, Any] = {
    "dataclass": Point(1, NOON),
    "model": Parcel(weight=Decimal("1.50"), due=date(2026, 1, 2), content=b"plain"),
    "datetime": NOON,
    "timedelta": timedelta(minutes=90),
    "nothing": None,
    "number": 1.5,
    "list": [1, "two", None, {"three": Point(3, NOON)}],
    "tuple": (1, Colour.RED),
    "uuid": UUID(int=7),
    "kind": {"kind": "tool-return", "return_value": "a dict of the user's that looks like ours"},
    "image": BinaryContent(PIXEL, media_type="image/png"),
    "audio": BinaryContent(PIXEL, media_type="audio/wav", identifier="song"),
    "url": ImageUrl("https://example.com/a.png"),
    "mixed": ["before", BinaryContent(PIXEL, media_type="image/png"), "after"],
    "nested": {"image": BinaryContent(PIXEL, media_type="image/png"), "point": Point(2, NOON)},
    "rich": ToolReturn(
        return_value={"point": Point(4, NOON)},
        content=["Look at this:", BinaryContent(PIXEL, media_type="image/png")],
        metadata={"for": "the application", "when": "now"},
    ),
}


async def test_results_reach_the_model_as_without_restate(server: RestateServer) -> None:
    """Every type that PydanticAI takes; images stay images; metadata stays with the application."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if len(messages) == 1:
            return ModelResponse(parts=[call("give", name, what=name) for name in RETURNED])
        sent.append(as_sent(messages[-1]))
        if len(messages) == 3:  # once more, so that the first results have been replayed
            return ModelResponse(parts=[call("give", "again", what="rich")])
        return ModelResponse(parts=[TextPart("done")])

    async def give(what: str) -> Any:
        return RETURNED[what]

    sent: list[Any] = []
    plain = Agent(FunctionModel(respond), name="plain", tools=[give])
    without = [as_kept(message) for message in (await plain.run("go")).all_messages()]
    expected = list(sent)
    sent.clear()

    agent = Agent(
        FunctionModel(respond),
        name="rich",
        tools=[give],
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Rich")
    kept: list[Any] = []

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        result = await agent.run("go")
        await ctx.run_typed("after", after)
        kept.append([as_kept(message) for message in result.all_messages()])
        return result.output

    async with hosted(server, service) as ingress:
        assert await ingress.call("Rich/run") == "done"
    assert sent == expected
    assert kept[-1] == without


def as_sent(message: ModelMessage) -> Any:
    """What a model is told about its calls, and the files it is given."""
    told: list[Any] = []
    for part in message.parts:
        if isinstance(part, ToolReturnPart):
            text, files = part.model_response_str_and_user_content()
            told.append((part.tool_call_id, text, [as_file(file) for file in files]))
            told.append(part.model_response_object())
        elif isinstance(part, UserPromptPart):
            told.append([as_file(content) for content in part.content])
    return told


def as_file(content: Any) -> Any:
    """What of a file reaches a provider; `BinaryImage` is a `BinaryContent` that is an image."""
    if isinstance(content, BinaryContent):
        return (content.data, content.media_type, content.identifier)
    return content


def as_kept(message: ModelMessage) -> Any:
    """What the application finds in the messages beside that."""
    return [
        (part.tool_call_id, part.metadata, [as_file(file) for file in part.files])
        for part in message.parts
        if isinstance(part, ToolReturnPart)
    ]


# What tools need


async def test_validators_of_arguments_are_steps_of_their_own(server: RestateServer) -> None:
    """`args_validator` may look things up: it is called once, before the tool, in its own step."""
    model = script([call("book", "1", seat=0)], [call("book", "2", seat=4)])
    service = restate.Service("Validating")

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

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output

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


@pytest.mark.parametrize("method", ["enqueue", "cancel"])
async def test_steps_cannot_steer_the_run(server: RestateServer, method: str) -> None:
    """`ctx.enqueue` and `ctx.cancel` would be lost on replay: in a step they say so, at once."""
    agent = Agent(script([call("steer")]), name="s", capabilities=[durable.RestateDurability()])
    service = restate.Service(f"Steering{method.title()}")

    @agent.tool
    async def steer(ctx: RunContext) -> str:
        done["steer"] += 1
        if method == "enqueue":
            ctx.enqueue("and another thing")
        else:
            ctx.cancel()
        return "steered"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

    async with hosted(server, service) as ingress:
        response = await ingress.post(f"Steering{method.title()}/run")
        assert response.status_code == 500
        assert "is not supported inside a durable run step" in response.json()["message"]
        assert method in response.json()["message"]
        assert (await ingress.invocation(f"Steering{method.title()}")).get("retry_count", 0) == 0
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


async def test_context_tools_use_any_async_library(server: RestateServer) -> None:
    """anyio's task groups and scopes in handler code: their time is Restate's, on every replay."""
    agent = Agent(
        script([call("work", "1"), call("work", "2")]),
        name="anyio",
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Anyio")

    @agent.tool_plain(metadata={"restate": False}, timeout=5)
    async def work() -> str:
        ctx = durable.restate_context()
        seen: list[int] = []

        async def branch(number: int) -> None:
            await anyio.sleep(0.03 * (3 - number))
            seen.append(await ctx.run_typed("branch", lambda: number))

        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(branch, number)
        with anyio.move_on_after(0.05) as scope:
            await anyio.sleep(60)
        return f"{seen} {scope.cancelled_caught}"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output

    async with hosted(server, service) as ingress:
        expected = "work=[2, 1, 0] True; work=[2, 1, 0] True"
        assert await ingress.call("Anyio/run") == expected
        assert (await ingress.invocation("Anyio")).get("retry_count", 0) == 0
    assert done == {"model": 2}


async def test_time_limits_of_tools(server: RestateServer) -> None:
    """PydanticAI's own `timeout` of a tool asks the model again, in a step and in handler code."""
    agent = Agent(
        script([call("in_step"), call("in_handler")]),
        name="limited",
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("TimeLimits")

    @agent.tool_plain(timeout=0.05)
    async def in_step() -> str:
        done["in_step"] += 1
        await asyncio.sleep(30)
        return "too late"

    @agent.tool_plain(timeout=0.05, metadata={"restate": False})
    async def in_handler() -> str:
        await asyncio.sleep(30)
        return "too late"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output

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
        assert (await ingress.invocation("Stopping")).get("retry_count", 0) == 0
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
    service = restate.Service("Approved")

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @agent.tool_plain(requires_approval=True)
    async def pay() -> str:
        done["pay"] += 1
        return "paid"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output

    async with hosted(server, service) as ingress:
        answer = asyncio.create_task(ingress.call("Approved/run"))
        awakeable = await asyncio.wait_for(asked, 10)
        await ingress.post(f"restate/awakeables/{awakeable}/resolve", "yes")
        assert set((await answer).split("; ")) == {"look=seen", "pay=paid"}
    assert done == {"model": 2, "look": 1, "pay": 1}


# Toolsets


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
    service = restate.Service("Wrapped")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output

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
    service = restate.Service("Preparing")

    @agent.tool_plain(description="the way in")
    async def open_door() -> str:
        return "open"

    @agent.tool_plain(prepare=only_when_open)
    async def enter() -> str:
        return "inside"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

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
    service = restate.Service("Native")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

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
    service = restate.Service("DynamicRaising")

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

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output

    async with hosted(server, service) as ingress:
        assert await ingress.call("DynamicRaising/run") == "pick=picked 3"
        assert "dynamic__dynamic_toolset__made.validate_args" in await ingress.steps(
            "DynamicRaising"
        )
    once = {"validate 0": 1, "validate -1": 1, "validate 3": 1, "pick 0": 1, "pick 3": 1}
    assert done == {"model": 4, **once}
