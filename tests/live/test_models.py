"""Whatever the model and its output: each request is one step, made once."""

import asyncio
from typing import Any

import pytest
import restate
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.capabilities import (
    ResolveModelId,
)
from pydantic_ai.exceptions import RunTimedOut
from pydantic_ai.messages import (
    BinaryImage,
    FilePart,
    ModelMessage,
    ModelResponse,
    TextPart,
    ToolCallPart,
)
from pydantic_ai.models import Model, ModelResolutionContext
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.output import NativeOutput, PromptedOutput, TextOutput, ToolOutput
from pydantic_ai.profiles import ModelProfile

import durable
from durable.server import RestateServer
from tests.live.hosting import after, agent_service, hosted
from tests.live.providers import Answer, provider
from tests.live.scripted import done, script

pytestmark = pytest.mark.live


# Which model


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
    service = agent_service("NamedModel", agent)

    async with hosted(server, service) as ingress:
        assert await ingress.call("NamedModel/run") == "hello"
        assert len(await ingress.steps("NamedModel")) == 2
    assert done == {"model": 1}


async def test_a_model_for_each_user(server: RestateServer) -> None:
    """`ResolveModelId` is given the `deps` of the run: each user's requests go to their own model."""
    models = {user: script(name=user) for user in ("ann", "bob")}

    def resolve(ctx: ModelResolutionContext[str], model_id: str) -> Model | None:
        return models[ctx.deps] if model_id == "the-user's" else None

    agent = Agent(
        "the-user's",
        name="users",
        deps_type=str,
        defer_model_check=True,
        capabilities=[ResolveModelId(resolve), durable.RestateDurability()],
    )
    service = restate.Service("Users")

    @service.handler()
    async def run(ctx: restate.Context) -> list[str | None]:
        runs = [agent.run("go", deps=user) for user in ("ann", "bob", "bob")]
        results = await asyncio.gather(*runs)
        await ctx.run_typed("after", after)
        return [result.response.model_name for result in results]

    async with hosted(server, service) as ingress:
        assert await ingress.call("Users/run") == ["ann", "bob", "bob"]
    assert done == {"ann": 1, "bob": 2}


async def test_a_fallback_model_is_one_step(server: RestateServer) -> None:
    """One model fails, the other answers: both requests are made once, in one step."""
    with provider([Answer(status=500)]) as down, provider([Answer("from the other")]) as up:
        agent = Agent(
            FallbackModel(down.model(), up.model()),
            name="falling",
            capabilities=[durable.RestateDurability()],
        )
        service = agent_service("Falling", agent)

        async with hosted(server, service) as ingress:
            assert await ingress.call("Falling/run") == "from the other"
            assert await ingress.steps("Falling") == ["falling__model.request", "after"]
        assert (len(down.times), len(up.times)) == (1, 1)


# Responses that take long


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
    service = agent_service("Background", agent)

    async with hosted(server, service) as ingress:
        assert "part 2." in await ingress.call("Background/run")
        assert await ingress.steps("Background") == [*["batch__model.request"] * 3, "after"]
        assert len(await ingress.entries("Background", "Sleep")) == 2
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


# Outputs


@pytest.mark.parametrize("size", [10, 8_000_000], ids=["small", "large"])
async def test_images_as_output(server: RestateServer, size: int) -> None:
    """An image that the model makes is the run's output, byte for byte, after a replay too."""
    image = BinaryImage(b"\x89PNG\xff\xfe".ljust(size, b"\0"), media_type="image/png")

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
