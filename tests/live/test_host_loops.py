"""Event loops other than asyncio's own can host invocations."""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import restate
import uvloop
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

import durable
from durable.server import RestateServer
from tests.live.hosting import PATIENCE, hosted

pytestmark = pytest.mark.live

ROUNDS, WIDTH, RUNS = 2, 4, 3


def eager() -> asyncio.AbstractEventLoop:
    """An asyncio loop whose tasks start at once, where Python has them."""
    loop = asyncio.new_event_loop()
    if sys.version_info >= (3, 12):
        loop.set_task_factory(asyncio.eager_task_factory)
    return loop


@pytest.mark.parametrize("host", [uvloop.new_event_loop, eager])
def test_agents_beside_each_other(
    server: RestateServer, host: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Several agents at once, each with rounds of parallel tools and sleeps, do everything once."""
    done: Counter[str] = Counter()

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        turn = sum(isinstance(message, ModelResponse) for message in messages)
        done["model"] += 1
        if turn == ROUNDS:
            return ModelResponse(parts=[TextPart("done")])
        calls = [
            ToolCallPart(tool, {}, tool_call_id=f"{turn}-{tool}-{number}")
            for number in range(WIDTH)
            for tool in ("work", "rest")
        ]
        return ModelResponse(parts=list(calls))

    agent = Agent(FunctionModel(respond), name="busy", capabilities=[durable.RestateDurability()])
    service = restate.Service("Busy")

    @agent.tool_plain
    async def work() -> str:
        done["work"] += 1
        await asyncio.sleep(0.01)
        return "worked"

    @agent.tool_plain(metadata={"restate": False})
    async def rest() -> str:
        async with asyncio.timeout(PATIENCE):
            await asyncio.sleep(0.01)
        return "rested"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        runs = await asyncio.gather(*[agent.run("go") for _ in range(RUNS)])
        return [run.output for run in runs]

    async def scenario() -> None:
        async with hosted(server, service) as ingress:
            assert await ingress.call("Busy/run") == ["done"] * RUNS

    with asyncio.Runner(loop_factory=host) as runner:
        runner.run(scenario())
    assert done == {"model": RUNS * (ROUNDS + 1), "work": RUNS * ROUNDS * WIDTH}
