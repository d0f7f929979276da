"""Runs are steered and stopped from outside, through `durable.agent_run`."""

import asyncio
from collections import Counter
from typing import Any
from uuid import uuid4

import pytest
import restate
from pydantic_ai import Agent
from pydantic_ai.exceptions import RunCancelled
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel

import durable
from durable.server import RestateServer
from tests.live.hosting import PATIENCE, Ingress, hosted

pytestmark = pytest.mark.live

requests: Counter[int] = Counter()
at_work = asyncio.Event()
go_on = asyncio.Event()
last = asyncio.Event()
"""Set when the run shall wait in its last model request."""


@pytest.fixture(autouse=True)
def _fresh() -> None:
    global at_work, go_on, last
    at_work, go_on, last = asyncio.Event(), asyncio.Event(), asyncio.Event()
    requests.clear()


def said(messages: list[ModelMessage]) -> list[str]:
    """What the user has said, each prompt with the number of responses that came before it."""
    words: list[str] = []
    responses = 0
    for message in messages:
        responses += isinstance(message, ModelResponse)
        if isinstance(message, ModelRequest):
            words += [
                f"{responses}: {part.content}"
                for part in message.parts
                if isinstance(part, UserPromptPart)
            ]
    return words


async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Work once, then tell what the user has said so far."""
    done = sum(isinstance(message, ModelResponse) for message in messages)
    requests[done] += 1
    if done == 0:
        return ModelResponse(parts=[ToolCallPart("work", {}, tool_call_id="work")])
    if last.is_set():
        last.clear()
        go_on.clear()
        at_work.set()
        await go_on.wait()
    return ModelResponse(parts=[TextPart("; ".join(said(messages)))])


def build() -> tuple[Agent[None, str], restate.Service]:
    agent = Agent(FunctionModel(respond), name="worker", capabilities=[durable.RestateDurability()])
    service = restate.Service("Worker")

    @agent.tool_plain
    async def work() -> str:
        at_work.set()
        await go_on.wait()
        return "worked"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("start")).output

    return agent, service


async def start(ingress: Ingress) -> str:
    """Start a run in the background, wait until its tool is at work, and return the invocation's id."""
    sent = (await ingress.post("Worker/run/send", headers={"idempotency-key": uuid4().hex})).json()
    await asyncio.wait_for(at_work.wait(), PATIENCE)
    return sent["invocationId"]


async def answer(ingress: Ingress, invocation: str) -> Any:
    """Wait for the end of the run that `start` started, and return its answer."""
    url = f"{ingress.server.ingress_url}/restate/invocation/{invocation}/attach"
    response = await ingress.http.get(url)
    assert response.status_code == 200, response.text
    return response.json()


async def steer(ingress: Ingress, invocation: str, **message: Any) -> int:
    """Send a message to a run, and return the status when the run has it."""
    return (await ingress.post(f"AgentRun/{invocation}/steer", message)).status_code


async def until_sent(ingress: Ingress, invocation: str, messages: int) -> None:
    """Wait until the server has so many messages for the run."""
    sql = (
        "SELECT count(*) AS n FROM sys_journal WHERE "
        f"id = '{invocation}' AND entry_type = 'Notification: Signal'"
    )
    await ingress.until(sql, lambda rows: rows[0]["n"] == messages)


async def test_messages_reach_the_next_request_in_order(server: RestateServer) -> None:
    """What comes while a tool is at work is in the request after it, and the senders are told so."""
    _, service = build()
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        senders: list[asyncio.Task[int]] = []
        for number, content in enumerate(["be brief", ["and ", "kind"]], 1):
            senders.append(asyncio.create_task(steer(ingress, invocation, content=content)))
            await until_sent(ingress, invocation, number)
        go_on.set()
        assert await answer(ingress, invocation) == "0: start; 1: be brief; 1: ['and ', 'kind']"
        assert await asyncio.gather(*senders) == [200, 200]
    assert requests == {0: 1, 1: 1}


async def test_messages_during_the_last_request(server: RestateServer) -> None:
    """A run that would end takes what has come meanwhile, and goes on; `when_idle` comes last."""
    _, service = build()
    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        at_work.clear()
        last.set()
        go_on.set()
        await asyncio.wait_for(at_work.wait(), PATIENCE)
        senders: list[asyncio.Task[int]] = []
        for number, (content, priority) in enumerate([("later", "when_idle"), ("now", "asap")], 1):
            message = steer(ingress, invocation, content=content, priority=priority)
            senders.append(asyncio.create_task(message))
            await until_sent(ingress, invocation, number)
        go_on.set()
        assert await answer(ingress, invocation) == "0: start; 2: now; 2: later"
        assert await asyncio.gather(*senders) == [200, 200]


async def test_a_message_for_a_run_that_has_ended(server: RestateServer) -> None:
    """The sender learns that nobody will read it."""
    _, service = build()
    async with hosted(server, service, durable.agent_run) as ingress:
        go_on.set()
        invocation = await start(ingress)
        await answer(ingress, invocation)
        late = await ingress.post(f"AgentRun/{invocation}/steer", {"content": "hello?"})
        assert late.status_code == 409, late.text
        assert "ended before it could take the message" in late.json()["message"]


async def test_a_message_for_no_run(server: RestateServer) -> None:
    """An id that names no invocation is a 404, and nobody waits."""
    async with hosted(server, durable.agent_run) as ingress:
        for unknown in ("inv_1gdJBtdVEcM942bjcDmb1c1khoaJe11Hbz", "nonsense"):
            answered = await ingress.post(f"AgentRun/{unknown}/steer", {"content": "hello?"})
            assert answered.status_code == 404, answered.text
            assert unknown in answered.json()["message"]


async def test_stop(server: RestateServer) -> None:
    """A stopped run ends with its messages, in its own handler."""
    agent = Agent(FunctionModel(respond), name="worker", capabilities=[durable.RestateDurability()])
    service = restate.Service("Worker")

    @agent.tool_plain(metadata={"restate": False})
    async def work() -> str:
        at_work.set()
        await asyncio.sleep(3600)
        return "worked"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        try:
            await agent.run("start")
        except restate.TerminalError as error:
            cancelled = RunCancelled.from_cancellation(error)
            assert cancelled is not None
            return said(cancelled.all_messages())
        return []

    async with hosted(server, service, durable.agent_run) as ingress:
        invocation = await start(ingress)
        assert (await ingress.post(f"AgentRun/{invocation}/stop")).status_code == 200
        assert await answer(ingress, invocation) == ["0: start"]
