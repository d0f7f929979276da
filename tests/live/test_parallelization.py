"""`ParallelizationService` on the real server; the worker killed between any two steps."""

import asyncio
from uuid import uuid4

import httpx2
import pytest
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from agents.parallelization import Action, Analysis, Estimate, analyst, estimator
from durable.server import RestateServer
from services.client import PATTERNS, call
from services.parallelization import (
    EXAMPLE_INPUTS,
    ParallelizationRequest,
    ParallelizationResponse,
    RunToolsRequest,
    parallelization,
)
from tests.live.hosting import PATIENCE, hosted
from tests.live.kills import killed_runs
from tests.typed_model import JSON_SCHEMA_MODE, Answer, TypedModel

pytestmark = pytest.mark.live

SERVICE = "ParallelizationService"
INPUTS = ["one", "two", "three", "four", "five"]
REQUEST = {"prompt": "Analyse.", "inputs": INPUTS}


def analyse(prompt: str) -> Analysis:
    """Analyse the input of a prompt."""
    text = prompt.rpartition("\n")[2][:50]
    return Analysis(
        impacts=[f"impact on {text}"],
        actions=[Action(action=f"help {text}", priority="high")],
        conclusion=f"about {text}",
    )


def done(text: str) -> dict[str, object]:
    """The result of one input as JSON."""
    return {"status": "done", "input": text, "analysis": analyse(text).model_dump()}


@pytest.fixture
def key() -> str:
    """A key that no other run has."""
    return uuid4().hex


async def test_the_example_runs_once_per_key(server: RestateServer, key: str) -> None:
    """`{}` analyses four groups; a second call is refused, the outcome stays there for everybody."""
    model = TypedModel(analyse)
    with analyst.override(model=model):
        async with hosted(server, parallelization) as ingress:
            answer = await ingress.call(f"{SERVICE}/{key}/run", {})
            assert answer == {"results": [done(text) for text in EXAMPLE_INPUTS]}
            assert len(await ingress.steps(SERVICE)) == 4
            again = await ingress.post(f"{SERVICE}/{key}/run", {})
            assert again.status_code == 409
            kept = f"{server.ingress_url}/restate/workflow/{SERVICE}/{key}/attach"
            assert (await ingress.http.get(kept)).json() == answer
            progress = await ingress.call(f"{SERVICE}/{key}/progress")
            assert progress == {"statuses": ["done"] * 4}
    assert len(model.asked) == 4


async def test_the_client_gets_one_outcome_per_key(server: RestateServer, key: str) -> None:
    """Two calls at once, one later and one with another key: two runs."""
    model = TypedModel(analyse)
    pattern = PATTERNS["parallelization"]
    with analyst.override(model=model):
        async with hosted(server, parallelization):
            with httpx2.Client(
                base_url=server.ingress_url, timeout=PATIENCE, trust_env=False
            ) as client:

                async def run(idempotency_key: str | None) -> ParallelizationResponse:
                    return await asyncio.to_thread(
                        *(call, client, pattern, ParallelizationRequest()),
                        idempotency_key=idempotency_key,
                    )

                both = await asyncio.gather(run(f"{key}/1"), run(f"{key}/1"))
                assert both[0] == both[1] == await run(f"{key}/1") == await run(None)
    assert len(model.asked) == 8


async def test_progress_while_it_runs(
    server: RestateServer, key: str, request: pytest.FixtureRequest
) -> None:
    """Each input that is done is seen as done while others are still open."""
    waiting = {"two", "five"}
    if "always-replay" in request.node.name:
        # that server has closed its side: the run learns of results when all steps have ended
        waiting = set(INPUTS)
    release = asyncio.Event()

    async def some_wait(prompt: str) -> Answer:
        if prompt.rpartition("\n")[2] in waiting:
            await release.wait()
        return analyse(prompt)

    with analyst.override(model=TypedModel(some_wait)):
        async with hosted(server, parallelization) as ingress:
            before = await ingress.post(f"{SERVICE}/{key}/progress")
            assert before.status_code == 404
            assert f"POST /{SERVICE}/{key}/run" in before.json()["message"]

            running = asyncio.create_task(ingress.call(f"{SERVICE}/{key}/run", REQUEST))
            await ingress.until(
                f"SELECT value_utf8 FROM state WHERE service_key = '{key}'",
                lambda rows: [row["value_utf8"].count("open") for row in rows] == [len(waiting)],
            )
            progress = await ingress.call(f"{SERVICE}/{key}/progress")
            assert progress == {
                "statuses": ["open" if text in waiting else "done" for text in INPUTS]
            }
            release.set()
            assert await running == {"results": [done(text) for text in INPUTS]}
            progress = await ingress.call(f"{SERVICE}/{key}/progress")
            assert progress == {"statuses": ["done"] * 5}


async def test_a_failure_stays_in_its_place(server: RestateServer, key: str) -> None:
    """The provider rejects one input for good: no retry of it, and the others have results."""

    def rejecting(prompt: str) -> Answer:
        if prompt.endswith("three"):
            raise ModelHTTPError(status_code=400, model_name="scripted", body="canary")
        return analyse(prompt)

    model = TypedModel(rejecting)
    with analyst.override(model=model):
        async with hosted(server, parallelization) as ingress:
            answer = await ingress.call(f"{SERVICE}/{key}/run", REQUEST)
            progress = await ingress.call(f"{SERVICE}/{key}/progress")
    failed = answer["results"].pop(2)
    assert answer["results"] == [done(text) for text in INPUTS if text != "three"]
    assert (failed["status"], failed["input"]) == ("failed", "three")
    assert "answered 400" in failed["error"]
    assert "canary" not in failed["error"]
    assert progress == {"statuses": ["done", "done", "failed", "done", "done"]}
    assert len(model.asked) == 5


async def test_bad_input_is_refused_at_once(server: RestateServer, key: str) -> None:
    """With the field and the limit, and without a retry or a model request."""
    cases: list[tuple[str, dict[str, object], int, str]] = [
        ("run", {"inputs": ["a"] * 51}, 413, "`inputs`: List should have at most 50 items"),
        (
            "run",
            {"inputs": ["a" * 4001]},
            413,
            "`inputs.0`: String should have at most 4000 characters",
        ),
        ("run", {"inputs": []}, 400, "`inputs`"),
        ("run", {"texts": []}, 400, "`texts`"),
        (
            "run_tools",
            {"question": "a" * 4001},
            413,
            "`question`: String should have at most 4000 characters",
        ),
        ("run_tools", {"question": ""}, 400, "`question`"),
    ]
    model = TypedModel(analyse)
    with analyst.override(model=model), estimator.override(model=model):
        async with hosted(server, parallelization) as ingress:
            for number, (handler, body, status, says) in enumerate(cases):
                response = await ingress.post(f"{SERVICE}/{key}-{number}/{handler}", body)
                assert response.status_code == status, response.text
                assert says in response.json()["message"]
                assert await ingress.retries(SERVICE) == 0
    assert model.asked == []


async def test_a_cancelled_run_is_cancelled(server: RestateServer, key: str) -> None:
    """409 for the caller, not a response full of failures."""
    asked = asyncio.Event()
    release = asyncio.Event()

    async def held(prompt: str) -> Answer:
        asked.set()
        await release.wait()
        return analyse(prompt)

    with analyst.override(model=TypedModel(held)):
        async with hosted(server, parallelization) as ingress:
            running = asyncio.create_task(ingress.post(f"{SERVICE}/{key}/run", REQUEST))
            await asked.wait()
            invocation = await ingress.invocation(SERVICE)
            await ingress.http.patch(f"{server.admin_url}/invocations/{invocation['id']}/cancel")
            release.set()  # a server that always replays tells of it when the steps have ended
            assert (await running).status_code == 409


async def test_tools_run_in_parallel(server: RestateServer, key: str) -> None:
    """All calls of a response are begun before the first of them has a result."""
    costs = {"materials": (1_200_000, 15), "labour": (800_000, 6), "energy": (150_000, 22)}

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if len(messages) > 1:
            answer = Estimate(answer="Raw materials weigh most.")
            return ModelResponse(parts=[TextPart(answer.model_dump_json())])
        return ModelResponse(
            parts=[
                ToolCallPart(
                    "apply_change",
                    {"item": item, "amount": amount, "percent": percent},
                    tool_call_id=item,
                )
                for item, (amount, percent) in costs.items()
            ]
        )

    pattern = PATTERNS["parallel-tools"]
    with estimator.override(model=FunctionModel(respond, profile=JSON_SCHEMA_MODE)):
        async with hosted(server, parallelization) as ingress:
            with httpx2.Client(
                base_url=server.ingress_url, timeout=PATIENCE, trust_env=False
            ) as client:
                response = await asyncio.to_thread(call, client, pattern, RunToolsRequest())
            newest = await ingress.invocation(SERVICE)
            rows = await server.query(
                f"SELECT entry_type FROM sys_journal WHERE id = '{newest['id']}' ORDER BY index"
            )
    assert response.answer == "Raw materials weigh most."
    assert {it.arguments["item"]: it.result for it in response.calls} == {
        "materials": 1_380_000,
        "labour": 848_000,
        "energy": 183_000,
    }
    kinds = [row["entry_type"] for row in rows if "Run" in row["entry_type"]]
    begun, ended = "Command: Run", "Notification: Run"
    assert kinds == [begun, ended, *[begun] * 3, *[ended] * 3, begun, ended]


async def test_a_kill_between_any_two_steps(server: RestateServer, key: str) -> None:
    """A crash after three of five inputs repeats two, and so on for each number of them."""

    def output(name: str, prompt: str) -> Analysis:
        return analyse(prompt)

    runs = killed_runs(
        server, lambda number: f"{SERVICE}/{key}-{number}/run", REQUEST, output, steps=5
    )
    repeated: list[int] = []
    async for run in runs:
        assert run.response == {"results": [done(text) for text in INPUTS]}
        assert not run.before & run.after
        assert set((run.before + run.after).values()) == {1}
        repeated.append(run.after.total())
    assert repeated == [5, 4, 3, 2, 1]
