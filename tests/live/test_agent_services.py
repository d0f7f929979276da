"""Agents as services: typed handlers, and tools of other agents."""

import asyncio
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
import restate
from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, RunContext
from pydantic_ai.exceptions import UsageLimitExceeded
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.usage import UsageLimits

import durable
from durable.server import RestateServer
from tests.live.hosting import PATIENCE, after, hosted
from tests.live.scripted import call, calls, done, script

pytestmark = pytest.mark.live


class Question(BaseModel):
    """What to find out."""

    topic: str
    words: int = 10


class Finding(BaseModel):
    """What was found out."""

    summary: str


def researcher(model: Any = None) -> Agent[None, Finding]:
    """An agent with an output type."""
    return Agent(
        model or TestModel(custom_output_args={"summary": "it rains"}),
        name="researcher",
        description="Finds things out.",
        output_type=Finding,
        capabilities=[durable.RestateDurability()],
    )


def editor(model: FunctionModel, *services: Any) -> Agent[None, str]:
    """An agent with others as tools."""
    return Agent(
        model,
        name="editor",
        toolsets=[durable.AgentToolset(services)],
        capabilities=[durable.RestateDurability()],
    )


async def test_an_agent_in_one_line(server: RestateServer) -> None:
    """Typed input and output, with their schemas; a wrong request is a 400."""
    service = durable.agent_service(researcher(), input_type=Question)
    async with hosted(server, service) as ingress:
        assert await ingress.call("researcher/run", {"topic": "rain"}) == {"summary": "it rains"}
        wrong = await ingress.post("researcher/run", {"topic": 5})
        assert wrong.status_code == 400
        assert "`topic`: Input should be a valid string" in wrong.json()["message"]
        [described] = [it for it in await server.services() if it["name"] == "researcher"]
        run = next(it for it in described["handlers"] if it["name"] == "run")
        assert run["input_json_schema"]["properties"].keys() == {"topic", "words"}
        assert run["output_json_schema"]["properties"].keys() == {"summary"}
        private = await ingress.post("researcher/delegate", {})
        assert private.is_client_error


async def test_a_prompt_is_the_default_input(server: RestateServer) -> None:
    """Text in, text out."""
    agent = Agent(
        TestModel(custom_output_text="a haiku"),
        name="poet",
        capabilities=[durable.RestateDurability()],
    )
    async with hosted(server, durable.agent_service(agent, name="Poetry")) as ingress:
        assert await ingress.call("Poetry/run", "spring") == "a haiku"


async def test_prompts_that_say_nothing_or_too_much(server: RestateServer) -> None:
    """They are refused at once; no model is asked."""
    agent = Agent(script(), name="poet", capabilities=[durable.RestateDurability()])
    async with hosted(server, durable.agent_service(agent, name="Silence")) as ingress:
        for prompt, status, message in [
            ("", 400, "the prompt is empty"),
            (" \n", 400, "the prompt is empty"),
            ("a" * (8 * 2**20 + 1), 413, "at most 8388608 characters"),
        ]:
            refused = await ingress.post("Silence/run", prompt)
            assert refused.status_code == status
            assert message in refused.json()["message"]
    assert done == {}


async def test_strict_types_of_delegates(server: RestateServer) -> None:
    """What a model says is JSON: where that has no type of its own, as dates have none, text is what fits."""

    class Day(BaseModel):
        model_config = ConfigDict(strict=True)

        day: date

    forecaster = Agent(
        TestModel(custom_output_text="rain"),
        name="forecaster",
        capabilities=[durable.RestateDurability()],
    )
    forecast = durable.agent_service(forecaster, input_type=Day)
    model = script([call("forecaster", day="2026-12-01")])
    boss = durable.agent_service(editor(model, forecast), name="StrictBoss")
    async with hosted(server, forecast, boss) as ingress:
        assert await ingress.call("StrictBoss/run", "go") == "forecaster=rain"
    assert done == {"model": 2}


async def test_dependencies_and_prompts(server: RestateServer) -> None:
    """Both are made from the input."""
    agent = Agent(
        TestModel(), name="greeter", deps_type=str, capabilities=[durable.RestateDurability()]
    )

    @agent.tool
    async def greet(ctx: RunContext[str]) -> str:
        return f"{ctx.deps}: {ctx.prompt}"

    service = durable.agent_service(
        agent,
        input_type=Question,
        prompt=lambda question: f"About {question.topic}",
        deps=lambda ctx, question: "x" * question.words,
    )
    async with hosted(server, service) as ingress:
        answer = await ingress.call("greeter/run", {"topic": "rain", "words": 3})
        assert answer == '{"greet":"xxx: About rain"}'


async def test_agents_as_tools(server: RestateServer) -> None:
    """Two delegates at once, each an invocation of its own; what they use counts for the caller."""
    research = durable.agent_service(researcher(), input_type=Question)
    model = script(
        [call("researcher", "1", topic="rain"), call("researcher", "2", topic="snow", words=2)]
    )
    agent = editor(model, research)
    service = restate.Service("Editor")

    @service.handler()
    async def run(ctx: restate.Context) -> dict[str, Any]:
        result = await agent.run("go")
        await ctx.run_typed("after", after)
        return {"output": result.output, "requests": result.usage.requests}

    async with hosted(server, research, service) as ingress:
        assert await ingress.call("Editor/run") == {
            "output": 'researcher={"summary":"it rains"}; researcher={"summary":"it rains"}',
            "requests": 2 + 2,
        }
        assert len(await ingress.entries("Editor", "Call")) == 2
    assert done == {"model": 2}


async def test_limits_hold_across_the_boundary(server: RestateServer) -> None:
    """The delegate runs under its caller's limits, and the caller gets PydanticAI's own exception."""
    research = durable.agent_service(researcher(calls("look")), input_type=Question)
    agent = editor(script([call("researcher", topic="rain")]), research)
    service = restate.Service("Limited")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        try:
            await agent.run("go", usage_limits=UsageLimits(request_limit=2))
        except UsageLimitExceeded as error:
            return str(error)
        return "no limit"

    async with hosted(server, research, service) as ingress:
        assert "request_limit of 2" in await ingress.call("Limited/run")


async def test_arguments_that_do_not_fit(server: RestateServer) -> None:
    """The model is asked again; nothing is called."""
    research = durable.agent_service(researcher(), input_type=Question)
    model = script([call("researcher", "1", topic=5)], [call("researcher", "2", topic="rain")])
    service = durable.agent_service(editor(model, research))
    async with hosted(server, research, service) as ingress:
        assert await ingress.call("editor/run", "go") == 'researcher={"summary":"it rains"}'
    assert done == {"model": 3}


async def test_cancelling_the_caller_cancels_the_delegate(server: RestateServer) -> None:
    """Nobody waits for a delegate any more, so it ends."""
    working = asyncio.Event()
    agent = Agent(script([call("work")]), name="worker", capabilities=[durable.RestateDurability()])

    @agent.tool_plain(metadata={"restate": False})
    async def work() -> str:
        working.set()
        await asyncio.sleep(3600)
        return "worked"

    work_service = durable.agent_service(agent, name="Delegate")
    boss = durable.agent_service(
        editor(script([call("worker", prompt="go")]), work_service), name="Boss"
    )
    async with hosted(server, work_service, boss) as ingress:
        calling = asyncio.create_task(ingress.post("Boss/run", "go"))
        await asyncio.wait_for(working.wait(), PATIENCE)
        await ingress.cancel("Boss")
        assert (await calling).status_code == 409
        await ingress.until(
            "SELECT id FROM sys_invocation WHERE target_service_name = 'Delegate' "
            "AND status != 'completed'",
            lambda rows: not rows,
        )


async def test_outside_a_handler() -> None:
    """Agents call each other in this process."""
    research = durable.agent_service(researcher(), input_type=Question)
    result = await editor(script([call("researcher", topic="rain")]), research).run("go")
    assert result.output == 'researcher={"summary":"it rains"}'
    assert result.usage.requests == 3


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (lambda: durable.agent_service(Agent(TestModel())), "it has no name.*it is not durable"),
        (
            lambda: durable.AgentToolset([durable.agent_service(researcher())] * 2),
            "Two agents make tools of one name",
        ),
    ],
)
def test_what_cannot_be_hosted(make: Callable[[], object], fault: str) -> None:
    """Says what is wrong when it is made."""
    with pytest.raises(Exception, match=fault):
        make()
