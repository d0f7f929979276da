"""What a tool raises or returns reaches the model as without Restate, and happens once."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
import restate
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.exceptions import (
    ApprovalRequired,
    CallDeferred,
    ToolFailed,
)
from pydantic_ai.messages import (
    BinaryContent,
    ImageUrl,
    ModelMessage,
    ModelResponse,
    TextPart,
    ToolReturn,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.tools import (
    DeferredToolRequests,
    DeferredToolResults,
    Tool,
    ToolApproved,
    ToolDenied,
)

import durable
from durable.server import RestateServer
from tests.live.hosting import PATIENCE, after, agent_service, hosted
from tests.live.scripted import call, done, script

pytestmark = pytest.mark.live

PIXEL = b"\x89PNG\r\n\x1a\n-not-utf8-\xff\xfe"


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
        assert await ingress.retries("Picky") == 0
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
        awakeable, requests = await asyncio.wait_for(asked, PATIENCE)
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


async def test_validation_errors_are_the_models_to_correct(server: RestateServer) -> None:
    """Wrong arguments, and a `ValidationError` inside the tool, are answers as without Restate."""
    model = script(
        [call("book", "1", seat="window")], [call("book", "2", seat=0)], [call("book", "3", seat=4)]
    )

    class Seat(BaseModel):
        number: int = Field(gt=0)

    async def book(seat: int) -> int:
        done[f"book {seat}"] += 1
        return Seat(number=seat).number

    def told(messages: list[ModelMessage]) -> list[str]:
        returned = [part for message in messages for part in message.parts]
        return [
            f"{part.tool_call_id} {part.outcome}: {part.content}"
            for part in returned
            if isinstance(part, ToolReturnPart)
        ]

    tools = [Tool(book, max_retries=2)]
    plain = told((await Agent(model, tools=tools).run("go")).all_messages())
    assert [it.split(":")[0] for it in plain] == ["1 retried", "2 retried", "3 success"]
    done.clear()
    agent = Agent(model, name="seats", tools=tools, capabilities=[durable.RestateDurability()])
    service = restate.Service("Seats")

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        result = await agent.run("go")
        await ctx.run_typed("after", after)
        return told(result.all_messages())

    async with hosted(server, service) as ingress:
        assert await ingress.call("Seats/run") == plain
        assert await ingress.retries("Seats") == 0
    assert done == {"model": 4, "book 0": 1, "book 4": 1}


async def test_a_cancelled_delegate_is_told_to_the_model(server: RestateServer) -> None:
    """An agent in a tool's step cancels its own run: the caller's run goes on and knows."""
    delegate = Agent(script([call("stop")]), name="delegate")
    agent = Agent(script([call("ask")]), name="asking", capabilities=[durable.RestateDurability()])

    @delegate.tool
    async def stop(ctx: RunContext) -> str:
        done["stop"] += 1
        ctx.cancel()
        return "stopped"

    @agent.tool_plain
    async def ask() -> str:
        return (await delegate.run("go")).output

    async with hosted(server, agent_service("Asking", agent)) as ingress:
        assert "The sub-agent run was cancelled" in await ingress.call("Asking/run")
        assert await ingress.retries("Asking") == 0
    assert done == {"model": 3, "stop": 1}


async def test_own_retries_of_one_tool(server: RestateServer) -> None:
    """`metadata={"restate": {"max_attempts": 2}}` ends the run after two tries, with that error."""
    agent = Agent(
        script([call("flaky")], [call("broken")]),
        name="retries",
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("Retries", agent)
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


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"text as bytes", {"nested": b"\xff"}])
async def test_bytes_reach_the_model_as_from_a_plain_agent(server: RestateServer, raw: Any) -> None:
    """PydanticAI writes them as base64; so does the journal."""

    def give() -> Any:
        return raw

    expected = (await Agent(script([call("give")]), tools=[give]).run("go")).output
    agent = Agent(
        script([call("give")]),
        name="bytes",
        tools=[give],
        capabilities=[durable.RestateDurability()],
    )
    service = agent_service("Bytes", agent)

    async with hosted(server, service) as ingress:
        assert await ingress.call("Bytes/run") == expected


async def test_text_that_is_no_unicode_ends_the_run(server: RestateServer) -> None:
    """An odd file name cannot be stored: the tool is not run again and again for it."""
    fast = restate.RunOptions[object](
        max_attempts=4, initial_retry_interval=timedelta(milliseconds=10)
    )
    agent = Agent(
        TestModel(),
        name="surrogates",
        capabilities=[durable.RestateDurability(tool_run_options=fast)],
    )
    service = agent_service("Surrogates", agent)
    calls: list[None] = []

    @agent.tool_plain
    def tool() -> str:
        calls.append(None)
        return b"hunter2 \xff".decode(errors="surrogateescape")

    async with hosted(server, service) as ingress:
        response = await ingress.post("Surrogates/run")
        assert response.status_code == 500
        assert "cannot be stored in the journal" in response.text
        assert "hunter2" not in response.text
    assert len(calls) == 1
