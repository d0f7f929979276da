"""`HumanInTheLoopService` on the real server: waiting through kills and restarts, time limits, answers that come twice."""

import asyncio
import shlex
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import pytest
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from agents.human_in_the_loop import Draft, writer
from durable.server import RestateServer
from durable.worker import Worker
from services.client import PATTERNS, call
from services.human_in_the_loop import EXAMPLE_REVIEWS, HumanInTheLoopRequest, human_in_the_loop
from tests.live.hosting import PATIENCE, Ingress, hosted, http_client
from tests.live.kills import CHECKOUT, HeldModel
from tests.live.providers import Answer, provider
from tests.live.scripted import done
from tests.typed_model import JSON_SCHEMA_MODE

pytestmark = pytest.mark.live

SERVICE = "HumanInTheLoopService"
PASS = {"verdict": "PASS"}
IMPROVE = {"verdict": "NEEDS_IMPROVEMENT", "comment": "Shorter."}


def draft(number: int) -> Draft:
    """What the writer writes in a round."""
    return Draft(plan=f"plan {number}", text=f"text {number}")


def prompts(messages: Sequence[ModelMessage]) -> list[str]:
    """What the writer was told."""
    parts = [part for message in messages for part in message.parts]
    return [str(part.content) for part in parts if isinstance(part, UserPromptPart)]


@pytest.fixture
def key() -> str:
    """A session that no other test has."""
    return uuid4().hex


@pytest.fixture(autouse=True)
def _writing() -> Generator[None]:
    """A writer that numbers its drafts by what it was told."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        done["model"] += 1
        return ModelResponse(parts=[TextPart(draft(len(prompts(messages))).model_dump_json())])

    with writer.override(model=FunctionModel(respond, profile=JSON_SCHEMA_MODE)):
        yield


async def start(ingress: Ingress, key: str, body: dict[str, Any]) -> str:
    """Start a run in the background and return the invocation's id."""
    sent = await ingress.post(
        f"{SERVICE}/{key}/run_with_promise/send", body, headers={"idempotency-key": uuid4().hex}
    )
    return sent.json()["invocationId"]


async def end(ingress: Ingress, invocation: str) -> httpx2.Response:
    """Wait for the end of a run."""
    url = f"{ingress.server.ingress_url}/restate/invocation/{invocation}/attach"
    return await ingress.http.get(url)


async def status(ingress: Ingress, key: str) -> dict[str, Any]:
    """Return what a session is doing."""
    return await ingress.call(f"{SERVICE}/{key}/status")


async def waiting(ingress: Ingress, key: str, round: int) -> dict[str, Any]:
    """Wait until the session waits with the draft of this round, and return its status."""
    async with asyncio.timeout(PATIENCE):
        while True:
            now = await status(ingress, key)
            if now["status"] == "waiting" and len(now["rounds"]) == round:
                return now
            await asyncio.sleep(0.05)


async def answer(ingress: Ingress, key: str, body: dict[str, Any]) -> httpx2.Response:
    """Answer the run that waits in a session."""
    return await ingress.post(f"{SERVICE}/{key}/feedback", body)


async def test_rounds_until_a_draft_passes(
    server: RestateServer, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status and history are there while it waits, with the commands; each draft is shown once."""
    async with hosted(server, human_in_the_loop) as ingress:
        run = await start(ingress, key, {"task": "A note."})
        now = await waiting(ingress, key, 1)
        assert now["review"]["draft"] == draft(1).model_dump()
        curl, url, option, body = shlex.split(now["review"]["pass_command"])
        assert (curl, option, body) == ("curl", "--json", '{"verdict":"PASS"}')
        assert url.endswith(f"/{SERVICE}/{key}/feedback")
        assert (await answer(ingress, key, IMPROVE)).status_code == 200
        now = await waiting(ingress, key, 2)
        assert [it["request"] for it in now["rounds"]] == ["A note.", "Shorter."]
        command = shlex.split(now["review"]["pass_command"])
        address = command[1].replace("http://localhost:8080", server.ingress_url)
        process = await asyncio.create_subprocess_exec(command[0], "-s", address, *command[2:])
        assert await process.wait() == 0
        response = (await end(ingress, run)).json()
        assert response["outcome"] == "passed"
        assert response["decided_by"] == "reviewer"
        assert [it["draft"] for it in response["rounds"]] == [
            draft(number).model_dump() for number in (1, 2)
        ]
        assert (await status(ingress, key))["status"] == "idle"
        journaled = await server.query(
            f"SELECT name FROM sys_journal WHERE id = '{run}' AND entry_type = 'Command: Run' "
            "ORDER BY index"
        )
        round_ = ["human-in-the-loop-writer__model.request", "timestamp", "step:tell_reviewer"]
        names = [row["name"].partition(".function")[0] for row in journaled]
        assert names == ["session.open", *round_, *round_]
    assert done == {"model": 2}
    assert capsys.readouterr().err.count("waits for your judgement") == 2


async def test_turns(server: RestateServer, key: str) -> None:
    """`run` does not wait, and a reviewed run remembers its drafts."""
    async with hosted(server, human_in_the_loop) as ingress:
        for number, message in enumerate(["A note.", "Longer."], start=1):
            turn = await ingress.call(f"{SERVICE}/{key}/run", {"message": message})
            assert turn == {
                "number": number,
                "request": message,
                "draft": draft(number).model_dump(),
            }
        run = await start(ingress, key, {"task": "Again."})
        await waiting(ingress, key, 3)
        assert (await answer(ingress, key, PASS)).status_code == 200
        assert (await end(ingress, run)).json()["draft"] == draft(3).model_dump()


async def test_answers_that_come_twice(server: RestateServer, key: str) -> None:
    """Of five at once the run gets one; the others, and a late one, are told so."""
    async with hosted(server, human_in_the_loop) as ingress:
        early = await answer(ingress, key, PASS)
        assert early.status_code == 409
        assert "waits for no feedback" in early.json()["message"]
        run = await start(ingress, key, {})
        await waiting(ingress, key, 1)
        given = [{**IMPROVE, "comment": f"comment {number}"} for number in range(5)]
        responses = await asyncio.gather(*(answer(ingress, key, it) for it in given))
        assert Counter(it.status_code for it in responses) == {200: 1, 409: 4}
        taken = next(n for n, it in enumerate(responses) if it.status_code == 200)
        now = await waiting(ingress, key, 2)
        assert now["rounds"][1]["request"] == f"comment {taken}"
        assert (await answer(ingress, key, PASS)).status_code == 200
        late = await answer(ingress, key, PASS)
        assert late.status_code == 409
        assert (await end(ingress, run)).json()["outcome"] == "passed"
    assert done == {"model": 2}


async def test_bad_input(server: RestateServer, key: str) -> None:
    """It is refused with the field, the run waits on, and nothing is tried again."""
    async with hosted(server, human_in_the_loop) as ingress:
        run = await start(ingress, key, {})
        await waiting(ingress, key, 1)
        cases: list[tuple[dict[str, Any], int, str]] = [
            ({}, 400, "`verdict`: Field required"),
            ({"verdict": "MAYBE"}, 400, "'PASS' or 'NEEDS_IMPROVEMENT'"),
            ({"verdict": "NEEDS_IMPROVEMENT"}, 400, "say in `comment` what to change"),
            ({**IMPROVE, "comment": "a" * 4001}, 413, "at most 4000 characters"),
        ]
        for body, code, message in cases:
            response = await answer(ingress, key, body)
            assert response.status_code == code, response.text
            assert message in response.json()["message"]
        assert (await status(ingress, key))["status"] == "waiting"
        assert (await answer(ingress, key, PASS)).status_code == 200
        assert (await end(ingress, run)).json()["outcome"] == "passed"
        bad = await ingress.post(f"{SERVICE}/{key}/run_with_promise", {"time_limit": -1})
        assert (bad.status_code, "`time_limit`" in bad.text) == (400, True)
        assert await ingress.retries(SERVICE) == 0


@pytest.mark.parametrize("outcome", ["passed", "rejected"])
async def test_time_limits(server: RestateServer, key: str, outcome: str) -> None:
    """When the time is up the run ends as was asked for, and a late answer is told so."""
    async with hosted(server, human_in_the_loop) as ingress:
        request = {"time_limit": 0.3, "default_outcome": outcome}
        response = (await end(ingress, await start(ingress, key, request))).json()
        assert (response["outcome"], response["decided_by"]) == (outcome, "time_limit")
        assert (await status(ingress, key))["status"] == "idle"
        late = await answer(ingress, key, PASS)
        assert late.status_code == 409
        run = await start(ingress, key, {**request, "time_limit": "PT1H"})
        now = await waiting(ingress, key, 2)
        assert now["review"]["expires_at"] is not None
        assert (await answer(ingress, key, PASS)).status_code == 200
        assert (await end(ingress, run)).json()["decided_by"] == "reviewer"


@pytest.mark.parametrize("how", ["cancel", "kill"])
async def test_a_run_that_is_given_up(server: RestateServer, key: str, how: str) -> None:
    """Its session takes no answer any more, and can be used again."""
    async with hosted(server, human_in_the_loop) as ingress:
        run = await start(ingress, key, {})
        await waiting(ingress, key, 1)
        await ingress.http.patch(f"{server.admin_url}/invocations/{run}/{how}")
        assert (await end(ingress, run)).status_code == 409
        lost = await answer(ingress, key, PASS)
        assert lost.status_code == 409
        says = "waits for no feedback" if how == "cancel" else "its run has ended"
        assert says in lost.json()["message"]
        run = await start(ingress, key, {})
        now = await waiting(ingress, key, 2)
        assert [it["number"] for it in now["rounds"]] == [1, 2]
        assert (await answer(ingress, key, PASS)).status_code == 200
        assert (await end(ingress, run)).json()["outcome"] == "passed"


async def test_the_client_plays_the_reviewer(server: RestateServer) -> None:
    """Its reviews lead to the response; the same key again gives the same response."""
    pattern = PATTERNS["human-in-the-loop"]
    key = uuid4().hex
    async with hosted(server, human_in_the_loop):
        with httpx2.Client(
            base_url=server.ingress_url, timeout=PATIENCE, trust_env=False
        ) as client:
            for _ in range(2):
                response = await asyncio.to_thread(
                    *(call, client, pattern, HumanInTheLoopRequest()), idempotency_key=key
                )
                assert response.outcome == "passed"
                assert [it.request for it in response.rounds[1:]] == [EXAMPLE_REVIEWS[0].comment]
    assert done == {"model": 2}


# Crashes


@asynccontextmanager
async def killable(model: Any, log: Path) -> AsyncGenerator[tuple[Ingress, Worker]]:
    """Serve `services:app` in a process of its own, on a server that can be restarted."""
    with provider(model) as api:
        async with (
            RestateServer() as server,
            Worker("services:app", cwd=CHECKOUT, env=api.env, log_file=log) as worker,
            http_client() as http,
        ):
            await server.register(worker.url)
            yield Ingress(server, http), worker


async def test_worker_and_server_are_killed_while_it_waits(tmp_path: Path, key: str) -> None:
    """Before each answer: the draft is not written or shown again, and the answer arrives."""
    asked: list[str] = []

    def write(request: dict[str, Any], number: int) -> Answer:
        asked.append(request["messages"][-1]["content"])
        return Answer(draft(number).model_dump_json())

    async with killable(write, tmp_path / "log") as (ingress, worker):
        run = await start(ingress, key, {"task": "A note."})
        for round, body in enumerate([IMPROVE, PASS], start=1):
            before = await waiting(ingress, key, round)
            await ingress.until(  # so that the draft was shown, and will not be again
                f"SELECT id FROM sys_journal WHERE id = '{run}' AND entry_type = 'Notification: Run'",
                lambda rows, steps=1 + 3 * round: len(rows) == steps,
            )
            worker.kill()
            await ingress.server.restart()
            await worker.start()
            assert await status(ingress, key) == before
            assert (await answer(ingress, key, body)).status_code == 200
        response = (await end(ingress, run)).json()
        assert response["draft"] == draft(2).model_dump()
        assert len(response["rounds"]) == 2
    assert len(asked) == 2
    assert asked[1].endswith("Shorter.")
    assert (tmp_path / "log").read_text().count("waits for your judgement") == 2


async def test_a_kill_before_each_draft(tmp_path: Path, key: str) -> None:
    """What was written, shown and answered before the kill is not done again."""

    def output(name: str, prompt: str) -> Draft:
        return draft(2 if "Shorter." in prompt else 1)

    model = HeldModel(output)
    async with killable(model, tmp_path / "log") as (ingress, worker):
        for completed in range(2):
            session = f"{key}-{completed}"
            model.hold(after=completed)
            run = await start(ingress, session, {"task": "A note."})
            if completed:
                await waiting(ingress, session, 1)
                assert (await answer(ingress, session, IMPROVE)).status_code == 200
            assert await asyncio.to_thread(model.holding.wait, 30)
            worker.kill()
            before = model.release()
            await worker.start()
            for round, body in [(1, IMPROVE), (2, PASS)][completed:]:
                await waiting(ingress, session, round)
                assert (await answer(ingress, session, body)).status_code == 200
            response = (await end(ingress, run)).json()
            assert [it["draft"]["text"] for it in response["rounds"]] == ["text 1", "text 2"]
            assert before.total() == completed
            assert set((before + model.answered).values()) == {1}
    assert (tmp_path / "log").read_text().count("waits for your judgement") == 4
