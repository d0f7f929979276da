"""What is stored, and how much of it."""

import pytest
import restate
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

import durable
from durable.server import RestateServer
from tests.live.hosting import AT_MOST_TWICE, hosted
from tests.live.scripted import call, calls, done

pytestmark = pytest.mark.live


async def test_the_journal_holds_results_only(server: RestateServer) -> None:
    """A prompt and the tools' results go to the model in every turn; they are stored once."""
    turns = 6

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        turn = sum(isinstance(message, ModelResponse) for message in messages)
        done["model"] += 1
        if turn < turns:
            return ModelResponse(parts=[call("look", str(turn), turn=turn)])
        return ModelResponse(parts=[TextPart("finished")])

    agent = Agent(FunctionModel(respond), name="linear", capabilities=[durable.RestateDurability()])
    service = restate.Service("Linear")

    @agent.tool_plain
    async def look(turn: int) -> str:
        return f"<result-{turn}>"

    @service.handler()
    async def run(ctx: restate.Context, prompt: str) -> str:
        return (await agent.run(prompt, instructions="<instructions>")).output

    async with hosted(server, service) as ingress:
        assert await ingress.call("Linear/run", "<prompt>") == "finished"
        invocation = await ingress.invocation("Linear")
        rows = await server.query(f"SELECT raw FROM sys_journal WHERE id = '{invocation['id']}'")
    journal = b"".join(bytes.fromhex(row["raw"]) for row in rows).decode(errors="replace")
    assert journal.count("<prompt>") == 1
    assert journal.count("<instructions>") == 0
    assert [journal.count(f"<result-{turn}>") for turn in range(turns)] == [1] * turns
    assert done == {"model": turns + 1}


async def test_a_result_that_is_too_large(server: RestateServer) -> None:
    """Restate takes 32 MiB: more ends the run at once, with the step named."""
    agent = Agent(calls("load"), name="large", capabilities=[durable.RestateDurability()])
    service = restate.Service("Large", invocation_retry_policy=AT_MOST_TWICE)

    @agent.tool_plain
    async def load() -> str:
        done["load"] += 1
        return "x" * 40_000_000

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

    async with hosted(server, service) as ingress:
        response = await ingress.post("Large/run")
        assert response.status_code == 500
        assert "call_tool:load" in response.json()["message"]
        assert await ingress.retries("Large") == 0
    assert done == {"model": 1, "load": 1}
