"""What a tool returns reaches the model as from a plain agent, or ends the run and says why."""

from datetime import timedelta
from typing import Any

import pytest
import restate
from pydantic_ai import Agent
from pydantic_ai.messages import (
    ModelMessage,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel

import durable
from durable.server import RestateServer
from tests.live.hosting import hosted

pytestmark = pytest.mark.live


def echo(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Call the tool, then answer with what the model got of its result."""
    if len(messages) == 1:
        return ModelResponse(parts=[ToolCallPart("give", {}, tool_call_id="1")])
    [returned] = [part for part in messages[-1].parts if isinstance(part, ToolReturnPart)]
    return ModelResponse(parts=[TextPart(returned.model_response_str())])


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"text as bytes", {"nested": b"\xff"}])
async def test_bytes_reach_the_model_as_from_a_plain_agent(server: RestateServer, raw: Any) -> None:
    """PydanticAI writes them as base64; so does the journal."""

    def give() -> Any:
        return raw

    expected = (await Agent(FunctionModel(echo), tools=[give]).run("go")).output
    agent = Agent(
        FunctionModel(echo),
        name="bytes",
        tools=[give],
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("Bytes")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

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
    service = restate.Service("Surrogates")
    calls: list[None] = []

    @agent.tool_plain
    def tool() -> str:
        calls.append(None)
        return b"hunter2 \xff".decode(errors="surrogateescape")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

    async with hosted(server, service) as ingress:
        response = await ingress.post("Surrogates/run")
        assert response.status_code == 500
        assert "cannot be stored in the journal" in response.text
        assert "hunter2" not in response.text
    assert len(calls) == 1


async def test_a_blocking_run_says_what_to_call(server: RestateServer) -> None:
    """`run_sync` in a handler is refused with the line to write instead."""
    agent = Agent(TestModel(), name="sync", capabilities=[durable.RestateDurability()])
    service = restate.Service("RunSync")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return agent.run_sync("go").output

    async with hosted(server, service) as ingress:
        response = await ingress.post("RunSync/run")
        assert response.status_code == 500
        assert "await agent.run" in response.json()["message"]
