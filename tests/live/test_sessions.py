"""Sessions on the real server: turns in order, reading while a turn runs, kills, expiry, and how much is written."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.capabilities import ProcessHistory
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import (
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelResponse,
    TextPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from restate.entry_codec import JournalValueCodec

import durable
from durable.server import RestateServer
from durable.worker import Worker
from tests.live.hosting import PATIENCE, Ingress, hosted, http_client, serving
from tests.live.scripted import call, done

pytestmark = pytest.mark.live


@pytest.fixture
def key() -> str:
    """A session that no other test has."""
    return uuid4().hex


def prompts(messages: Sequence[ModelMessage]) -> list[str]:
    """What the user said."""
    parts = [part for message in messages for part in message.parts]
    return [str(part.content) for part in parts if isinstance(part, UserPromptPart)]


class Gate:
    """Holds answers back."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        """Set while an answer waits."""
        self.open = asyncio.Event()

    async def pass_(self) -> None:
        """Wait until it is open."""
        self.reached.set()
        await self.open.wait()
        self.reached.clear()


def chatting(gate: Gate | None = None) -> Agent[None, str]:
    """An agent that calls a tool, waits at the gate, and answers with all that it was told."""

    async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        said = prompts(messages)
        done["model"] += 1
        if said[-1] == "fail":
            raise ModelHTTPError(status_code=400, model_name="scripted")
        if not isinstance(messages[-1].parts[-1], ToolReturnPart):
            return ModelResponse(parts=[call("look", f"{len(said)}")])
        if gate is not None:
            await gate.pass_()
        return ModelResponse(parts=[TextPart(" ".join(said))])

    agent = Agent(FunctionModel(respond), name="chat", capabilities=[durable.RestateDurability()])

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    return agent


def answering(text: str, *capabilities: Any) -> Agent[None, str]:
    """An agent that always gives the same answer."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[TextPart(text)])

    return Agent(
        FunctionModel(respond),
        name="chat",
        capabilities=[durable.RestateDurability(), *capabilities],
    )


async def history(ingress: Ingress, key: str) -> list[ModelMessage]:
    """Return the messages of a session."""
    return ModelMessagesTypeAdapter.validate_python(await ingress.call(f"chat/{key}/history"))


async def running(ingress: Ingress, key: str) -> str:
    """Return the invocation of the turn that runs."""
    [row] = await ingress.server.query(
        f"SELECT id FROM sys_invocation WHERE target_service_key = '{key}' AND "
        "target_handler_name = 'message' AND status != 'completed'"
    )
    return row["id"]


async def test_turns_with_memory(server: RestateServer, key: str) -> None:
    """The agent sees the turns before; each request and tool is done once, in each mode."""
    async with hosted(server, durable.agent_session(chatting())) as ingress:
        assert await ingress.call(f"chat/{key}/history") == []
        assert (await ingress.call(f"chat/{key}/status"))["turns"] == 0
        for said, answer in [("one", "one"), ("two", "one two"), ("three", "one two three")]:
            assert await ingress.call(f"chat/{key}/message", {"prompt": said}) == answer
        messages = await history(ingress, key)
        assert prompts(messages) == ["one", "two", "three"]
        assert {message.conversation_id for message in messages} == {key}
        assert len({message.run_id for message in messages}) == 3
        status = await ingress.call(f"chat/{key}/status")
        assert (status["status"], status["turns"]) == ("idle", 3)
        assert (status["usage"]["requests"], status["usage"]["tool_calls"]) == (6, 3)
        another = await ingress.call(f"chat/{key}-2/message", {"prompt": "hello"})
        assert another == "hello"
    assert done == {"model": 8, "look": 4}


async def test_two_callers_at_once(server: RestateServer, key: str) -> None:
    """One turn after the other: the second sees the first."""
    gate = Gate()
    async with hosted(server, durable.agent_session(chatting(gate))) as ingress:
        path = f"chat/{key}/message"
        answers = [asyncio.create_task(ingress.call(path, {"prompt": it})) for it in "abc"]
        await ingress.until(
            f"SELECT id FROM sys_invocation WHERE target_service_key = '{key}'",
            lambda rows: len(rows) == 3,
        )
        gate.open.set()
        order = sorted(await asyncio.gather(*answers), key=len)
        assert [len(it.split()) for it in order] == [1, 2, 3]
        assert prompts(await history(ingress, key)) == order[-1].split()
        assert order[-1].startswith(order[1])
    assert done == {"model": 6, "look": 3}


async def test_reading_while_a_turn_runs(server: RestateServer, key: str) -> None:
    """`status` names the turn's invocation, `history` has the turns before; `clear` waits for its end."""
    gate = Gate()
    gate.open.set()
    async with hosted(server, durable.agent_session(chatting(gate))) as ingress:
        await ingress.call(f"chat/{key}/message", {"prompt": "one"})
        gate.open.clear()
        turn = asyncio.create_task(ingress.call(f"chat/{key}/message", {"prompt": "two"}))
        await gate.reached.wait()
        status = await ingress.call(f"chat/{key}/status")
        assert (status["status"], status["turns"]) == ("running", 1)
        assert status["invocation_id"] == await running(ingress, key)
        assert prompts(await history(ingress, key)) == ["one"]
        clear = asyncio.create_task(ingress.post(f"chat/{key}/clear"))
        await ingress.until(
            f"SELECT id FROM sys_invocation WHERE target_service_key = '{key}' AND "
            "target_handler_name = 'clear'",
            lambda rows: len(rows) == 1,
        )
        gate.open.set()
        assert await turn == "one two"
        assert (await clear).status_code == 200
        assert await history(ingress, key) == []
        assert await ingress.call(f"chat/{key}/message", {"prompt": "three"}) == "three"


async def test_a_failed_turn(server: RestateServer, key: str) -> None:
    """The caller gets the error at once, and the session is as it was."""
    async with hosted(server, durable.agent_session(chatting())) as ingress:
        await ingress.call(f"chat/{key}/message", {"prompt": "one"})
        failed = await ingress.post(f"chat/{key}/message", {"prompt": "fail"})
        assert failed.status_code == 502
        assert "answered 400" in failed.json()["message"]
        assert await ingress.retries("chat") == 0
        status = await ingress.call(f"chat/{key}/status")
        assert (status["status"], status["turns"]) == ("idle", 1)
        assert prompts(await history(ingress, key)) == ["one"]
        assert await ingress.call(f"chat/{key}/message", {"prompt": "two"}) == "one two"


async def test_a_stopped_turn(server: RestateServer, key: str) -> None:
    """`durable.agent_run` stops the turn whose invocation `status` names; the session goes on."""
    gate = Gate()
    session = durable.agent_session(chatting(gate))
    async with hosted(server, session, durable.agent_run) as ingress:
        turn = asyncio.create_task(ingress.post(f"chat/{key}/message", {"prompt": "one"}))
        await gate.reached.wait()
        status = await ingress.call(f"chat/{key}/status")
        await ingress.post(f"AgentRun/{status['invocation_id']}/stop")
        await ingress.until(
            "SELECT id FROM sys_journal WHERE entry_type LIKE '%Signal%' AND "
            f"id = '{status['invocation_id']}'",
            lambda rows: len(rows) == 1,
        )
        gate.open.set()  # a server that always replays tells of it when the step has ended
        assert (await turn).status_code == 409
        status = await ingress.call(f"chat/{key}/status")
        assert (status["status"], status["turns"]) == ("idle", 0)
        assert await ingress.call(f"chat/{key}/message", {"prompt": "two"}) == "two"


async def test_bad_input(server: RestateServer, key: str) -> None:
    """It is refused with what is wrong and the limit, without a retry and without a trace."""
    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"prompt": " "}, 400, "the prompt is empty"),
        ({"prompt": []}, 400, "the prompt is empty"),
        ({"text": "hello"}, 400, "`prompt`: Field required"),
        ({"prompt": "a" * 1000}, 413, "more than the 1000 that a message may have"),
    ]
    async with hosted(server, durable.agent_session(chatting(), max_message_size=1000)) as ingress:
        for body, status, message in cases:
            response = await ingress.post(f"chat/{key}/message", body)
            assert response.status_code == status, response.text
            assert message in response.json()["message"]
            assert await ingress.retries("chat") == 0
        state = await server.query(f"SELECT key FROM state WHERE service_key = '{key}'")
        assert state == []
    assert done == {}


async def test_typed_output(server: RestateServer, key: str) -> None:
    """The answer is the agent's output, with its schema for callers; turns end with a tool's result."""

    class Answer(BaseModel):
        text: str

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return ModelResponse(parts=[call("final_result", text=" ".join(prompts(messages)))])

    agent = Agent(
        FunctionModel(respond),
        name="chat",
        output_type=Answer,
        capabilities=[durable.RestateDurability()],
    )
    async with hosted(server, durable.agent_session(agent)) as ingress:
        for said, answer in [("one", "one"), ("two", "one two"), ("three", "one two three")]:
            said = {"prompt": said}
            assert await ingress.call(f"chat/{key}/message", said) == {"text": answer}
        state = await server.query(f"SELECT key FROM state WHERE service_key = '{key}'")
        assert {row["key"] for row in state} == {
            "session",
            *(f"session.turn:{number}" for number in range(3)),
        }
        described = await ingress.http.get(f"{server.admin_url}/services/chat/handlers/message")
        assert described.json()["output_json_schema"]["title"] == "Answer"
        assert described.json()["input_json_schema"]["title"] == "SessionMessage"


async def test_a_worker_killed_in_a_turn(tmp_path: Path, key: str) -> None:
    """The turn is in the history once, and what was complete is not asked again."""
    trace, hold = tmp_path / "trace", tmp_path / "trace.hold"
    async with (
        RestateServer() as server,
        Worker("tests.live.session_app:app", env={"CHAT_TRACE": str(trace)}) as worker,
        http_client() as http,
    ):
        ingress = Ingress(server, http)
        await server.register(worker.url)
        path = f"chat/{key}/message"
        assert await ingress.call(path, {"prompt": "one"}) == "answer 3"
        hold.touch()
        turn = asyncio.create_task(ingress.call(path, {"prompt": "two"}))
        async with asyncio.timeout(PATIENCE):
            while "model 7" not in trace.read_text():  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.05)
        for _ in range(2):
            worker.kill()
            await worker.start()
        assert prompts(await history(ingress, key)) == ["one"]
        assert (await ingress.call(f"chat/{key}/status"))["status"] == "running"
        hold.unlink()
        assert await turn == "answer 7"
        assert prompts(await history(ingress, key)) == ["one", "two"]
        assert await ingress.call(path, {"prompt": "three"}) == "answer 11"
        status = await ingress.call(f"chat/{key}/status")
        assert (status["turns"], status["usage"]["requests"]) == (3, 6)
    events = trace.read_text().split("\n")
    assert [events.count(f"model {number}") for number in (1, 3, 5, 9, 11)] == [1] * 5
    assert events.count("model 7") >= 2
    assert events.count("look") == 3


async def test_expiry(server: RestateServer, key: str) -> None:
    """A session that is idle is forgotten, by the call that its last turn made."""
    session = durable.agent_session(chatting(), expire_after=timedelta(seconds=1))
    async with hosted(server, session) as ingress:
        for said in ("one", "two"):
            await ingress.call(f"chat/{key}/message", {"prompt": said})
        expiries = (
            f"SELECT id, status FROM sys_invocation WHERE target_service_key = '{key}' AND "
            "target_handler_name = 'expire' ORDER BY created_at"
        )
        await ingress.until(
            expiries, lambda rows: [it["status"] for it in rows] == ["completed"] * 2
        )
        cleared = [
            await server.query(
                f"SELECT id FROM sys_journal WHERE id = '{row['id']}' AND "
                "entry_type = 'Command: ClearAllState'"
            )
            for row in await server.query(expiries)
        ]
        assert [len(rows) for rows in cleared] == [0, 1]
        assert await history(ingress, key) == []
        assert await ingress.call(f"chat/{key}/message", {"prompt": "three"}) == "three"


# How much is written


async def written(ingress: Ingress, key: str) -> list[int]:
    """The bytes in the journal of each turn of a session, in order."""
    rows = await ingress.server.query(
        "SELECT min(i.created_at) AS at, sum(length(encode(j.raw, 'hex'))) / 2 AS bytes "
        "FROM sys_invocation i JOIN sys_journal j ON i.id = j.id "
        f"WHERE i.target_service_key = '{key}' AND i.target_handler_name = 'message' "
        "GROUP BY i.id ORDER BY at"
    )
    return [row["bytes"] for row in rows]


async def test_a_turn_writes_as_much_as_any_other(server: RestateServer, key: str) -> None:
    """150 turns of about 1 KB: the last writes what the 20th does, and not the conversation."""
    async with hosted(server, durable.agent_session(answering("b" * 512))) as ingress:
        for _ in range(150):
            await ingress.call(f"chat/{key}/message", {"prompt": "a" * 512})
        sizes = await written(ingress, key)
        assert len(sizes) == 150
        assert sizes[149] <= sizes[19] * 1.02
        [state] = await server.query(
            "SELECT sum(length(encode(value, 'hex'))) / 2 AS bytes, count(*) AS keys FROM state "
            f"WHERE service_key = '{key}'"
        )
        assert state["keys"] == 151
        assert len(await history(ingress, key)) == 2 * 150
        assert sizes[149] < state["bytes"] / 10


async def test_a_large_file_is_written_once(server: RestateServer, key: str) -> None:
    """The turns after it neither store it again nor journal it, with a compaction in each of them too."""

    def last_turns(messages: list[ModelMessage]) -> list[ModelMessage]:
        starts = [n for n, it in enumerate(messages) if prompts([it])]
        return messages[starts[-4] :] if len(starts) > 4 else messages

    agent = answering("seen", ProcessHistory(last_turns))
    image = {"kind": "binary", "data": "A" * 1_000_000, "media_type": "image/png"}
    async with hosted(server, durable.agent_session(agent)) as ingress:
        for said in ("1", "2", ["3", image], "4", "5", "6"):
            await ingress.call(f"chat/{key}/message", {"prompt": said})
        sizes = await written(ingress, key)
    assert [size > 1_000_000 for size in sizes] == [False, False, True, False, False, False]


async def test_more_state_than_the_server_sends_along(key: str) -> None:
    """What is left out is read one by one: right all the same, but it goes into the journal."""
    small = {"RESTATE_WORKER__INVOKER__EAGER_STATE_SIZE_LIMIT": "4000B"}
    for always_replay in (False, True):
        async with (
            RestateServer(env=small, always_replay=always_replay) as server,
            hosted(server, durable.agent_session(chatting())) as ingress,
        ):
            said = [str(number) for number in range(6)]
            for number, prompt in enumerate(said):
                answer = await ingress.call(f"chat/{key}/message", {"prompt": prompt})
                assert answer == " ".join(said[: number + 1])
            entries = await ingress.entries("chat", "GetLazyState")
            assert 0 < len(entries) < 5
            assert prompts(await history(ingress, key)) == said


async def test_encrypted_sessions(server: RestateServer, key: str) -> None:
    """A codec for journal values encodes the messages in the state too."""

    class Reversed(JournalValueCodec):
        def encode(self, buf: bytes) -> bytes:
            return buf[::-1]

        async def decode(self, buf: bytes) -> bytes:
            return buf[::-1]

    app = durable.app([durable.agent_session(chatting())], journal_value_codec=Reversed())
    async with serving(app) as url, http_client() as http:
        await server.register(url)
        ingress = Ingress(server, http)
        for said, answer in [("one", "one"), ("two", "one two"), ("three", "one two three")]:
            content = f'{{"prompt": "{said}"}}'[::-1]
            response = await ingress.post(
                f"chat/{key}/message",
                content=content,
                headers={"content-type": "application/json"},
            )
            assert response.text == f'"{answer}"'[::-1]
        rows = await server.query(f"SELECT value_utf8 FROM state WHERE service_key = '{key}'")
        assert not any("prompt" in row["value_utf8"] for row in rows)
