"""What PydanticAI offers beside `run` works in a handler: journaled once, the same on replay."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import restate
from pydantic import BaseModel
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import (
    AbstractCapability,
    Hooks,
    LocalWorkspace,
    ProcessEventStream,
    ProcessHistory,
    ResolveModelId,
    durable_operation,
)
from pydantic_ai.exceptions import RunTimedOut, UsageLimitExceeded
from pydantic_ai.messages import (
    BinaryImage,
    FilePart,
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import Model, ModelRequestContext
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.output import NativeOutput, PromptedOutput, TextOutput, ToolOutput
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.run import AgentRunResultEvent
from pydantic_ai.usage import UsageLimits

import durable
from durable.server import RestateServer
from tests.live.hosting import hosted
from tests.live.providers import Answer, provider

pytestmark = pytest.mark.live

done: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _nothing_done() -> None:
    done.clear()


def call(name: str, id: str | None = None, **args: Any) -> ToolCallPart:
    """A tool call, whose id is the tool's name unless given."""
    return ToolCallPart(name, args, tool_call_id=id or name)


def script(*turns: Sequence[ToolCallPart], name: str = "model") -> FunctionModel:
    """A model that makes the calls of each turn, then answers with what the last ones returned."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        done[name] += 1
        return answer(messages, turns)

    async def stream(
        messages: list[ModelMessage], info: AgentInfo
    ) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        done[name] += 1
        for number, part in enumerate(answer(messages, turns).parts):
            if isinstance(part, ToolCallPart):
                arguments = part.args_as_json_str()
                yield {
                    number: DeltaToolCall(part.tool_name, arguments, tool_call_id=part.tool_call_id)
                }
            elif isinstance(part, TextPart):
                for word in part.content.split():
                    yield f"{word} "

    return FunctionModel(respond, stream_function=stream, model_name=name)


def answer(messages: list[ModelMessage], turns: Sequence[Sequence[ToolCallPart]]) -> ModelResponse:
    """What a scripted model answers, from the messages alone."""
    asked = max(
        number
        for number, message in enumerate(messages)
        if any(isinstance(part, UserPromptPart) for part in message.parts)
    )
    turn = sum(isinstance(message, ModelResponse) for message in messages[asked:])
    if turn < len(turns):
        return ModelResponse(parts=turns[turn])
    last = messages[-1]
    assert isinstance(last, ModelRequest)
    texts = [it.model_response_str() for it in last.parts if isinstance(it, ToolReturnPart)]
    return ModelResponse(parts=[TextPart("; ".join(texts) or "hello")])


async def after() -> None:
    """A last step, so that always-replay mode replays everything before it."""


# Other ways to run


async def test_run_stream_events(server: RestateServer) -> None:
    """The events of a run can be iterated in handler code; model and tools are called once."""
    agent = Agent(
        script([call("look")]), name="streaming", capabilities=[durable.RestateDurability()]
    )
    service = restate.Service("StreamEvents")
    seen: list[list[str]] = []

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen it all"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        kinds: list[str] = []
        output = ""
        async with agent.run_stream_events("go") as events:
            async for event in events:
                kinds.append(event.event_kind)
                if isinstance(event, AgentRunResultEvent):
                    output = event.result.output
        await ctx.run_typed("after", after)
        seen.append(kinds)
        return output.strip()

    async with hosted(server, service) as ingress:
        assert await ingress.call("StreamEvents/run") == "seen it all"
        assert await ingress.steps("StreamEvents") == [
            "streaming__model.request_stream",
            "streaming__function_toolset__<agent>.call_tool:look",
            "streaming__model.request_stream",
            "after",
        ]
    assert done == {"model": 2, "look": 1}
    kinds = seen[-1]
    assert kinds.count("function_tool_call") == kinds.count("function_tool_result") == 1
    assert kinds[-1] == "agent_run_result"


async def test_run_stream(server: RestateServer) -> None:
    """`run_stream` answers from the step's result: the text is there, the model is asked once."""
    agent = Agent(
        script([call("look")]), name="streamed", capabilities=[durable.RestateDurability()]
    )
    service = restate.Service("Stream")

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen it all"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        async with agent.run_stream("go") as result:
            texts = [text async for text in result.stream_text(debounce_by=None)]
            output = await result.get_output()
        await ctx.run_typed("after", after)
        return [texts[-1].strip(), output.strip()]

    async with hosted(server, service) as ingress:
        assert await ingress.call("Stream/run") == ["seen it all"] * 2
        assert (await ingress.steps("Stream")).count("streamed__model.request_stream") == 2
    assert done == {"model": 2, "look": 1}


async def test_iter(server: RestateServer) -> None:
    """`agent.iter()` is as durable as `run`: the same steps, ids and bytes on every replay."""
    agent = Agent(
        script([call("look")]), name="iterated", capabilities=[durable.RestateDurability()]
    )
    service = restate.Service("Iter")
    seen: set[str] = set()

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        nodes: list[str] = []
        async with agent.iter("go") as agent_run:
            async for node in agent_run:
                nodes.append(type(node).__name__)
                await ctx.run_typed("between", after)
        assert agent_run.result is not None
        await ctx.run_typed("after", after)
        seen.add(agent_run.result.all_messages_json().decode())
        return [*nodes, agent_run.result.output]

    async with hosted(server, service) as ingress:
        nodes = ["UserPromptNode", *["ModelRequestNode", "CallToolsNode"] * 2, "End"]
        assert await ingress.call("Iter/run") == [*nodes, "seen"]
        assert [step for step in await ingress.steps("Iter") if step != "between"] == [
            "iterated__model.request",
            "iterated__function_toolset__<agent>.call_tool:look",
            "iterated__model.request",
            "after",
        ]
        assert (await ingress.invocation("Iter")).get("retry_count", 0) == 0
    assert done == {"model": 2, "look": 1}
    assert len(seen) == 1


async def test_streams_left_early(server: RestateServer) -> None:
    """Leaving a stream ends its run, and the handler goes on the same way on every replay."""
    agent = Agent(script([call("look")]), name="early", capabilities=[durable.RestateDurability()])
    service = restate.Service("Early")

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen it all"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        seen: list[str] = []
        async with agent.run_stream_events("go") as events:
            async for event in events:
                if event.event_kind == "function_tool_result":
                    seen.append(event.event_kind)
                    break
        await ctx.run_typed("between", after)
        async with agent.run_stream("go") as result:
            async for text in result.stream_text(debounce_by=None):
                seen.append(text.strip())
                break
        await ctx.run_typed("after", after)
        return seen

    async with hosted(server, service) as ingress:
        kind, text = await ingress.call("Early/run")
        assert kind == "function_tool_result"
        assert "seen it all".startswith(text)
        assert (await ingress.invocation("Early")).get("retry_count", 0) == 0
    assert done == {"model": 3, "look": 2}


@pytest.mark.parametrize("given", ["to the run", "to the agent"])
async def test_event_handlers_in_handler_code(server: RestateServer, given: str) -> None:
    """Such a handler sees the same events again on replay; what it does in a step happens once."""
    attempts: list[list[str]] = []
    published: list[str] = []

    @durable.step
    async def publish(kind: str) -> int:
        published.append(kind)
        return len(published)

    async def handle(ctx: RunContext, events: Any) -> None:
        async for event in events:
            attempts[-1].append(event.event_kind)
            await publish(event.event_kind)

    capabilities = [ProcessEventStream(handle)] if given == "to the agent" else []
    agent = Agent(
        script([call("look")]),
        name="handled",
        capabilities=[*capabilities, durable.RestateDurability[object]()],
    )
    name = f"Handled{given.title().replace(' ', '')}"
    service = restate.Service(name)

    @agent.tool_plain
    async def look() -> str:
        return "seen"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        attempts.append([])
        per_run = handle if given == "to the run" else None
        output = (await agent.run("go", event_stream_handler=per_run)).output
        await ctx.run_typed("after", after)
        return output.strip()

    async with hosted(server, service) as ingress:
        assert await ingress.call(f"{name}/run") == "seen"
        assert (await ingress.invocation(name)).get("retry_count", 0) == 0
    assert done == {"model": 2}
    assert published == attempts[-1]
    assert published.count("function_tool_call") == published.count("function_tool_result") == 1
    assert published.count("final_result") == 1


async def test_run_sync_in_a_handler(server: RestateServer) -> None:
    """`run_sync` cannot wait in a handler: it is refused at once, without a retry."""
    agent = Agent(TestModel(), name="sync", capabilities=[durable.RestateDurability()])
    service = restate.Service("RunSync")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return agent.run_sync("go").output

    async with hosted(server, service) as ingress:
        response = await ingress.post("RunSync/run")
        assert response.status_code == 500
        assert "Handler code used" in response.json()["message"]
        assert (await ingress.invocation("RunSync")).get("retry_count", 0) == 0


# Models


async def test_models_by_key(server: RestateServer) -> None:
    """`models=` and `ResolveModelId` choose at run time; the step's name says which one it was."""

    def resolve(ctx: Any, model_id: str) -> Model | None:
        done["resolve"] += 1
        return cheap if model_id == "for-ann" else None

    strong, cheap = script(name="strong"), script(name="cheap")
    agent = Agent(
        script(),
        name="choosing",
        capabilities=[
            ResolveModelId(resolve),
            durable.RestateDurability(models={"strong": strong}),
        ],
    )
    service = restate.Service("Choosing")

    @service.handler()
    async def run(ctx: restate.Context) -> list[str | None]:
        results = [
            await agent.run("go"),
            await agent.run("go", model="strong"),
            await agent.run("go", model=strong),
            await agent.run("go", model="for-ann"),
        ]
        await ctx.run_typed("after", after)
        return [result.response.model_name for result in results]

    async with hosted(server, service) as ingress:
        assert await ingress.call("Choosing/run") == ["model", "strong", "strong", "cheap"]
        steps = await ingress.steps("Choosing")
    assert steps[:3] == [
        "choosing__model.request",
        "choosing__model.request.strong",
        "choosing__model.request.strong",
    ]
    assert steps[3].startswith("choosing__model.request.")
    assert (done["model"], done["strong"], done["cheap"]) == (1, 2, 1)


async def test_an_agent_whose_model_is_a_string(server: RestateServer) -> None:
    """The agent's own model may be a name that is looked up when it runs."""
    model = script()

    def resolve(ctx: Any, model_id: str) -> Model | None:
        return model if model_id == "ours:default" else None

    agent = Agent(
        "ours:default",
        name="named",
        defer_model_check=True,
        capabilities=[ResolveModelId(resolve), durable.RestateDurability()],
    )
    service = restate.Service("NamedModel")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

    async with hosted(server, service) as ingress:
        assert await ingress.call("NamedModel/run") == "hello"
        assert len(await ingress.steps("NamedModel")) == 1
    assert done == {"model": 1}


async def test_a_fallback_model_is_one_step(server: RestateServer) -> None:
    """One model fails, the other answers: both requests are made once, in one step."""
    with provider([Answer(status=500)]) as down, provider([Answer("from the other")]) as up:
        agent = Agent(
            FallbackModel(down.model(), up.model()),
            name="falling",
            capabilities=[durable.RestateDurability()],
        )
        service = restate.Service("Falling")

        @service.handler()
        async def run(ctx: restate.Context) -> str:
            output = (await agent.run("go")).output
            await ctx.run_typed("after", after)
            return output

        async with hosted(server, service) as ingress:
            assert await ingress.call("Falling/run") == "from the other"
            assert await ingress.steps("Falling") == ["falling__model.request", "after"]
        assert (len(down.times), len(up.times)) == (1, 1)


class Polled(FunctionModel):
    """A model that works in the background and is asked for its progress."""

    def continuation_delay(self, response: ModelResponse) -> float | None:
        return 0.05


async def test_background_responses_wait_durably(server: RestateServer) -> None:
    """Each poll of a suspended response is a step, and the waits between are Restate's timers."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        done["poll"] += 1
        last = messages[-1]
        number = 0
        if isinstance(last, ModelResponse):
            assert last.provider_details is not None
            number = last.provider_details["poll"] + 1
        return ModelResponse(
            parts=[TextPart(f"part {number}. ")],
            state="suspended" if number < 2 else "complete",
            provider_response_id="job",
            provider_details={"poll": number},
        )

    agent = Agent(Polled(respond), name="batch", capabilities=[durable.RestateDurability()])
    service = restate.Service("Background")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output

    async with hosted(server, service) as ingress:
        assert "part 2." in await ingress.call("Background/run")
        assert await ingress.steps("Background") == [*["batch__model.request"] * 3, "after"]
        invocation = await ingress.invocation("Background")
        sleeps = await server.query(
            f"SELECT name FROM sys_journal WHERE id = '{invocation['id']}' "
            "AND entry_type = 'Command: Sleep'"
        )
        assert len(sleeps) == 2
    assert done == {"poll": 3}


async def test_a_background_response_that_is_given_up_is_cancelled(server: RestateServer) -> None:
    """A run that ends while it waits cancels the provider's job: once, in a step of its own."""

    class Endless(Polled):
        async def cancel_suspended_response(self, response: ModelResponse) -> None:
            done[f"cancel {response.provider_response_id}"] += 1

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(
            parts=[TextPart("still busy")], state="suspended", provider_response_id="job"
        )

    agent = Agent(Endless(respond), name="endless", capabilities=[durable.RestateDurability()])
    service = restate.Service("Endless")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        with pytest.raises(RunTimedOut):
            await agent.run("go", timeout=0.3)
        await ctx.run_typed("after", after)
        return "timed out"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Endless/run") == "timed out"
        assert "endless__model.cancel_suspended_response" in await ingress.steps("Endless")
    assert done == {"cancel job": 1}


async def test_images_as_output(server: RestateServer) -> None:
    """An image that the model makes is the run's output, byte for byte, after a replay too."""
    image = BinaryImage(b"\x89PNG\xff\xfe", media_type="image/png")

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        done["model"] += 1
        return ModelResponse(parts=[FilePart(image)])

    agent = Agent(
        FunctionModel(respond, profile=ModelProfile(supports_image_output=True)),
        name="painter",
        output_type=BinaryImage,
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Painter")

    @service.handler()
    async def run(ctx: restate.Context) -> bool:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output.data == image.data and output.media_type == image.media_type

    async with hosted(server, service) as ingress:
        assert await ingress.call("Painter/run")
    assert done == {"model": 1}


# Usage, history, outputs


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
        assert await ingress.call("Counted/run") == ["seen"]
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
            assert (await ingress.invocation("Chat")).get("retry_count", 0) == 0
        assert await ingress.call("Chat/me/length") == 6
        assert await ingress.call("Chat/you/say", "alone") == "alone"
    assert done == {"model": 4}


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


class Number(BaseModel):
    """What the model is asked for."""

    value: int


def shout(text: str) -> str:
    """Say it louder."""
    done["shout"] += 1
    return text.upper()


@pytest.mark.parametrize(
    ("output_type", "expected"),
    [
        (Number, "value=7"),
        (ToolOutput(Number, name="give"), "value=7"),
        (NativeOutput(Number), "value=7"),
        (PromptedOutput(Number), "value=7"),
        (TextOutput(shout), '{"VALUE": 7}'),
        (int, "7"),
    ],
    ids=["tool", "named tool", "native", "prompted", "text function", "int"],
)
async def test_output_types(server: RestateServer, output_type: Any, expected: str) -> None:
    """Each way to get a typed output gives that type, in the first execution and in a replay."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        done["model"] += 1
        if info.output_tools:
            [tool] = info.output_tools
            field = "response" if output_type is int else "value"
            return ModelResponse(parts=[ToolCallPart(tool.name, {field: 7})])
        return ModelResponse(parts=[TextPart('{"value": 7}')])

    agent = Agent(
        FunctionModel(respond),
        name="typed",
        output_type=output_type,
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Typed")
    seen: set[str] = set()

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        result = await agent.run("go")
        await ctx.run_typed("after", after)
        seen.add(f"{type(result.output).__name__} {result.output}")
        return str(result.output)

    async with hosted(server, service) as ingress:
        assert await ingress.call("Typed/run") == expected
    assert done["model"] == 1
    assert done["shout"] == isinstance(output_type, TextOutput)
    assert len(seen) == 1


# Many at once


@dataclass
class Delayed:
    """How long the model of a run takes."""

    seconds: float


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
        assert (await ingress.invocation(f"Crowd{way}")).get("retry_count", 0) == 0
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
        assert await ingress.call("Delegating/run") == "seen; seen"
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
        assert outputs == ["seen"] * 3
    assert done == {"model": 6, "look": 3}


# Capabilities


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


async def test_workspaces(server: RestateServer, tmp_path: Path) -> None:
    """What tools do to a workspace is journaled: in context tools call by call, once."""
    agent = Agent(
        script([call("in_step", "1"), call("in_handler", "2")], [call("read", "3")]),
        name="worker",
        capabilities=[LocalWorkspace(tmp_path), durable.RestateDurability()],
    )
    service = restate.Service("Workspace")

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

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output

    async with hosted(server, service) as ingress:
        assert await ingress.call("Workspace/run") == "handler step"
    assert sorted((tmp_path / "log").read_text().split()) == ["handler", "step"]


async def test_hooks(server: RestateServer) -> None:
    """Hooks run in handler code, on each replay again; what they do in a step happens once."""
    hooks = Hooks[object]()
    agent = Agent(
        script([call("look")]), name="hooked", capabilities=[hooks, durable.RestateDurability()]
    )
    service = restate.Service("Hooked")
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

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output

    async with hosted(server, service) as ingress:
        assert await ingress.call("Hooked/run") == "seen and hooked"
    assert logged == [
        "before run",
        *["before request", "after request"],
        *["before tool", "after tool"],
        *["before request", "after request"],
        "after run",
    ]
    assert done["model"] == 2
    assert done["hook"] >= 1
