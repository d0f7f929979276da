"""`OrchestratorWorkersService` on the real server; the worker killed between any two steps."""

import asyncio

import pytest
from pydantic import BaseModel
from pydantic_ai.exceptions import ModelHTTPError

from agents.orchestrator_workers import (
    Plan,
    Synthesis,
    Task,
    Work,
    orchestrator,
    synthesiser,
    worker,
)
from durable.server import RestateServer
from services.orchestrator_workers import orchestrator_workers
from tests.live.hosting import hosted
from tests.live.kills import killed_runs
from tests.typed_model import Answer, TypedModel

pytestmark = pytest.mark.live

SERVICE = "OrchestratorWorkersService"
STYLES = ["technical", "conversational", "poetic"]
WORKERS = (
    f"SELECT id, status, invoked_by_id FROM sys_invocation WHERE target_service_name = '{SERVICE}' "
    "AND target_handler_name = 'work' AND invoked_by_id = "
)


def output(name: str, prompt: str) -> BaseModel:
    """Plan one task per style, do a task by naming its style, join by naming what was delivered."""
    if name == "Plan":
        tasks = [Task(type=style, description=f"Be {style}.") for style in STYLES]
        return Plan(analysis="It takes three styles.", tasks=tasks)
    if name == "Work":
        [style] = [it for it in STYLES if f"Be {it}." in prompt]
        return Work(text=f"a {style} text")
    return Synthesis(text=", ".join(it for it in STYLES if f"a {it} text" in prompt))


def plan(prompt: str) -> Answer:
    """Plan as the orchestrator."""
    return output("Plan", prompt)


def work(prompt: str) -> Answer:
    """Deliver as a worker."""
    return output("Work", prompt)


def join(prompt: str) -> Answer:
    """Join as the synthesiser."""
    return output("Synthesis", prompt)


async def test_the_example(server: RestateServer) -> None:
    """`{}` has three workers write about the bottle at once, each in an invocation of its own."""
    writing: set[str] = set()
    together = asyncio.Event()

    async def work_together(prompt: str) -> Answer:
        writing.add(prompt)
        if len(writing) == len(STYLES):
            together.set()
        await together.wait()
        return work(prompt)

    model = TypedModel(work_together)
    with (
        orchestrator.override(model=TypedModel(plan)),
        worker.override(model=model),
        synthesiser.override(model=TypedModel(join)),
    ):
        async with hosted(server, orchestrator_workers) as ingress:
            response = await ingress.post(f"{SERVICE}/run", {})
            workers = await server.query(f"{WORKERS}'{response.headers['x-restate-id']}'")
    assert response.json() == {
        "analysis": "It takes three styles.",
        "works": [
            {
                "status": "done",
                "task": {"type": style, "description": f"Be {style}."},
                "text": f"a {style} text",
            }
            for style in STYLES
        ],
        "text": "technical, conversational, poetic",
    }
    assert len(workers) == 3
    assert all("bottle" in prompt for prompt in model.asked)


async def test_a_worker_that_fails(server: RestateServer) -> None:
    """Its failure is in its place, its invocation has failed, and the others are joined."""

    def one_rejected(prompt: str) -> Answer:
        if "Be conversational." in prompt:
            raise ModelHTTPError(status_code=400, model_name="scripted", body="canary")
        return work(prompt)

    with (
        orchestrator.override(model=TypedModel(plan)),
        worker.override(model=TypedModel(one_rejected)),
        synthesiser.override(model=TypedModel(join)),
    ):
        async with hosted(server, orchestrator_workers) as ingress:
            answer = await ingress.call(f"{SERVICE}/run", {})
    assert [it["status"] for it in answer["works"]] == ["done", "failed", "done"]
    assert "answered 400" in answer["works"][1]["error"]
    assert "canary" not in str(answer)
    assert answer["text"] == "technical, poetic"


async def test_failures_are_clear(server: RestateServer) -> None:
    """A plan that stays out of bounds, and requests that are too large or none: no retries."""
    endless = Plan(analysis="?", tasks=[Task(type="a", description="b")] * 50)
    with orchestrator.override(model=TypedModel(lambda _: endless)):
        async with hosted(server, orchestrator_workers) as ingress:
            for handler, body, status, says in [
                ("run", {}, 502, "A plan has 2 to 5 tasks, and this one has 50."),
                ("run", {"assignment": "a" * 4001}, 413, "at most 4000 characters"),
                ("work", {"assignment": "a" * 4001}, 413, "at most 4000 characters"),
                ("run", {"assignment": ""}, 400, "`assignment`"),
                ("work", {"task": {"type": "a"}}, 400, "`task.description`"),
            ]:
                response = await ingress.post(f"{SERVICE}/{handler}", body)
                assert response.status_code == status, response.text
                assert says in response.json()["message"]
                assert await ingress.retries(SERVICE) == 0


async def test_cancelling_a_run_cancels_its_workers(server: RestateServer) -> None:
    """409 for the caller, and no worker goes on."""
    asked: set[str] = set()
    all_asked = asyncio.Event()
    release = asyncio.Event()

    async def held(prompt: str) -> Answer:
        asked.add(prompt)
        if len(asked) == len(STYLES):
            all_asked.set()
        await release.wait()
        return work(prompt)

    with (
        orchestrator.override(model=TypedModel(plan)),
        worker.override(model=TypedModel(held)),
    ):
        async with hosted(server, orchestrator_workers) as ingress:
            # Only an invocation with a key can be attached to.
            sent = await ingress.post(f"{SERVICE}/run/send", {}, headers={"idempotency-key": "c"})
            run = sent.json()["invocationId"]
            await all_asked.wait()
            await ingress.http.patch(f"{server.admin_url}/invocations/{run}/cancel")
            release.set()  # a server that always replays tells of it when the steps have ended
            response = await ingress.http.get(
                f"{server.ingress_url}/restate/invocation/{run}/attach"
            )
            assert response.status_code == 409
            await ingress.until(
                f"{WORKERS}'{run}'",
                lambda rows: [row["status"] for row in rows] == ["completed"] * 3,
            )


async def test_a_kill_between_any_two_steps(server: RestateServer) -> None:
    """The plan stands, workers that are done are not asked again, and the text is the same."""
    runs = [it async for it in killed_runs(server, lambda _: f"{SERVICE}/run", {}, output, steps=5)]
    [whole] = [run.after for run in runs if not run.before]
    assert set(whole.values()) == {1}
    for run in runs:
        assert run.response["text"] == "technical, conversational, poetic"
        assert run.after == whole - run.before
