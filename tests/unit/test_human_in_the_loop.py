"""Human in the loop: rounds until a draft passes, time limits, refusals, and a crash at every step."""

import json
import shlex
from collections.abc import Generator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from restate import TerminalError

from agents.human_in_the_loop import Draft, writer
from durable.testing import InMemoryInvocation, Suspended, check_every_crash
from services.human_in_the_loop import (
    EXAMPLE_TASK,
    MAX_TEXT,
    Feedback,
    HumanInTheLoopRequest,
    HumanInTheLoopResponse,
    claim,
    feedback,
    forget,
    improve_command,
    pass_command,
    run,
    run_with_promise,
    status,
)
from tests.typed_model import JSON_SCHEMA_MODE

REQUEST = {"task": "A note."}
PASS: dict[str, str] = {"verdict": "PASS"}
IMPROVE: dict[str, str] = {"verdict": "NEEDS_IMPROVEMENT", "comment": "Shorter."}
RECEIPT = "sign_1receipt"
QUESTION: dict[str, Any] = {
    "id": "sign_1question",
    "invocation_id": "inv_1",
    "asked_at": "2026-01-01T00:00:00Z",
    "expires_at": None,
}
OPEN = {claim: True}


def draft(number: int) -> Draft:
    """What the writer writes in a round."""
    return Draft(plan=f"plan {number}", text=f"text {number}")


def prompts(messages: Sequence[ModelMessage]) -> list[str]:
    """What the writer was told."""
    parts = [part for message in messages for part in message.parts]
    return [str(part.content) for part in parts if isinstance(part, UserPromptPart)]


class Writer(FunctionModel):
    """Numbers its drafts by what it was told."""

    def __init__(self) -> None:
        self.told: list[list[str]] = []
        """What it knew at each request."""

        def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
            self.told.append(prompts(messages))
            text = draft(len(self.told[-1])).model_dump_json()
            return ModelResponse(parts=[TextPart(text)])

        super().__init__(respond, profile=JSON_SCHEMA_MODE)


async def answered(
    invocation: InMemoryInvocation[HumanInTheLoopResponse], *answers: dict[str, str]
) -> HumanInTheLoopResponse:
    """Run `invocation`, and answer each time it waits."""
    for answer in answers:
        with pytest.raises(Suspended) as waiting:
            await invocation.run()
        [question] = waiting.value.awakeables
        assert invocation.state["question"]["id"] == question
        invocation.resolve_awakeable(question, {"feedback": answer, "receipt": RECEIPT})
    return await invocation.run()


@pytest.fixture
def model() -> Generator[Writer]:
    """The writer's model."""
    model = Writer()
    with writer.override(model=model):
        yield model


# Rounds


async def test_rounds_until_a_draft_passes(
    model: Writer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each draft is shown to the reviewer once, and the writer remembers what was said."""
    invocation = InMemoryInvocation(run_with_promise, REQUEST, key="k")
    response = await answered(invocation, IMPROVE, IMPROVE, PASS)
    await invocation.replay()
    assert (response.outcome, response.decided_by) == ("passed", "reviewer")
    assert response.draft == draft(3)
    assert [(it.number, it.request, it.draft) for it in response.rounds] == [
        (1, "A note.", draft(1)),
        (2, "Shorter.", draft(2)),
        (3, "Shorter.", draft(3)),
    ]
    assert [len(told) for told in model.told] == [1, 2, 3]
    assert model.told[-1][1].endswith("improved:\nShorter.")
    shown = capsys.readouterr().err
    assert [shown.count(f"\n{draft(number).text}\n") for number in (1, 2, 3)] == [1, 1, 1]
    assert shown.count(pass_command("k")) == 3
    assert "question" not in invocation.state
    receipts = [it for it in invocation.stored if it.kind == "CompleteAwakeable"]
    assert [it.name for it in receipts] == [RECEIPT] * 3


async def test_a_crash_after_any_step(model: Writer) -> None:
    """The same response, and nothing is written, shown or asked again."""

    async def drive(
        invocation: InMemoryInvocation[HumanInTheLoopResponse],
    ) -> HumanInTheLoopResponse:
        return await answered(invocation, IMPROVE, PASS)

    response = await check_every_crash(run_with_promise, REQUEST, key="k", drive=drive)
    assert response.draft == draft(2)


async def test_turns(model: Writer) -> None:
    """Each call improves the last draft; a reviewed run goes on from there."""
    first = InMemoryInvocation(run, {"message": "A note."}, key="k", seed=1)
    assert (await first.run()).draft == draft(1)
    second = InMemoryInvocation(run, {"message": "Longer."}, key="k", state=first.state, seed=2)
    assert (await second.run()).number == 2
    await second.replay()
    third = InMemoryInvocation(run_with_promise, REQUEST, key="k", state=second.state, seed=3)
    assert (await answered(third, PASS)).draft == draft(3)
    assert model.told[-1] == ["A note.", "Longer.", "A note."]
    now = await InMemoryInvocation(status, key="k", state=third.state).run()
    assert (now.status, now.review) == ("idle", None)
    assert [(it.number, it.request) for it in now.rounds] == [
        *((1, "A note."), (2, "Longer."), (3, "A note."))
    ]


async def test_status_while_a_run_waits(model: Writer) -> None:
    """The draft, when it was asked, and the commands that answer."""
    invocation = InMemoryInvocation(run_with_promise, {"time_limit": 3600}, key="a b")
    await invocation.run_until_crash(after=4)  # steps: opened, written, timed, shown
    state = invocation.state
    now = await InMemoryInvocation(status, key="a b", state=state).run()
    assert now.status == "waiting"
    assert now.review is not None
    assert now.review.draft == draft(1)
    assert now.review.expires_at == now.review.asked_at + timedelta(hours=1)
    assert [it.request for it in now.rounds] == [EXAMPLE_TASK]
    for command, given in [
        (now.review.pass_command, PASS),
        (now.review.improve_command, {**IMPROVE, "comment": "Make it shorter."}),
    ]:
        curl, url, option, body = shlex.split(command)
        assert (curl, option) == ("curl", "--json")
        assert url == "http://localhost:8080/HumanInTheLoopService/a%20b/feedback"
        assert json.loads(body) == given


async def test_status_of_a_session_that_nobody_used() -> None:
    """It is idle and empty."""
    now = await InMemoryInvocation(status, key="k").run()
    assert (now.status, now.review, now.rounds) == ("idle", None, [])


# Time limits


@pytest.mark.parametrize("outcome", ["passed", "rejected"])
async def test_nobody_answers_in_time(model: Writer, outcome: str) -> None:
    """The outcome that was asked for, and the question is closed."""
    request = {**REQUEST, "time_limit": "P7D", "default_outcome": outcome}
    invocation = InMemoryInvocation(run_with_promise, request, key="k", calls=OPEN)
    response = await invocation.run()
    await invocation.replay()
    assert (response.outcome, response.decided_by) == (outcome, "time_limit")
    assert response.draft == draft(1)
    assert "question" not in invocation.state


async def test_an_answer_that_comes_as_the_time_ends(model: Writer) -> None:
    """Who has claimed the question first counts: the run waits for that answer."""
    request = {**REQUEST, "time_limit": 60}
    invocation = InMemoryInvocation(run_with_promise, request, key="k", calls={claim: False})
    response = await answered(invocation, PASS)
    assert (response.outcome, response.decided_by) == ("passed", "reviewer")


# Refusals


@pytest.mark.parametrize(
    ("state", "calls", "message"),
    [
        ({}, {}, "The session 'k' waits for no feedback. Nothing was changed; see `GET /Human"),
        ({"question": QUESTION}, {claim: False}, "has this answer already, or the time for it"),
    ],
)
async def test_answers_to_no_question(
    state: dict[str, Any], calls: dict[Any, Any], message: str
) -> None:
    """409, and nothing is sent to anybody."""
    late = InMemoryInvocation(feedback, PASS, key="k", state=state, calls=calls)
    with pytest.raises(TerminalError, match=message) as caught:
        await late.run()
    assert caught.value.status_code == 409
    assert not [it for it in late.stored if it.kind == "CompleteAwakeable"]


async def test_a_question_is_closed_once() -> None:
    """The second to claim it is told so; later it is forgotten."""
    first = InMemoryInvocation(claim, key=QUESTION["id"])
    assert await first.run() is True
    second = InMemoryInvocation(claim, key=QUESTION["id"], state=first.state)
    assert await second.run() is False
    forgotten = InMemoryInvocation(forget, key=QUESTION["id"], state=first.state)
    await forgotten.run()
    assert forgotten.state == {}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "Field required"),
        ({"verdict": "MAYBE"}, "'PASS' or 'NEEDS_IMPROVEMENT'"),
        ({"verdict": "NEEDS_IMPROVEMENT"}, "say in `comment` what to change"),
        ({"verdict": "NEEDS_IMPROVEMENT", "comment": " "}, "say in `comment` what to change"),
        ({"verdict": "PASS", "reason": "fine"}, "Extra inputs are not permitted"),
    ],
)
def test_malformed_feedback(body: dict[str, str], says: str) -> None:
    """`durable.app` turns this into a 400."""
    with pytest.raises(ValidationError, match=says):
        Feedback.model_validate(body)


@pytest.mark.parametrize(
    ("body", "status_code", "message"),
    [
        ({"task": " "}, 400, "`task`"),
        ({"task": "a" * (MAX_TEXT + 1)}, 413, "`task`: String should have at most 4000 characters"),
        ({"time_limit": 0}, 400, "`time_limit`"),
        ({"time_limit": "P2Y"}, 400, "`time_limit`"),
        ({"time_limit": 5, "default_outcome": "maybe"}, 400, "`default_outcome`"),
        ({"text": "A note."}, 400, "`text`"),
    ],
)
async def test_bad_requests(
    model: Writer, body: dict[str, Any], status_code: int, message: str
) -> None:
    """The field is named, before anything is written."""
    with pytest.raises(TerminalError, match=message) as caught:
        await InMemoryInvocation(run_with_promise, body, key="k").run()
    assert caught.value.status_code == status_code
    assert model.told == []


def test_the_example_request() -> None:
    """`{}` is a whole request, which waits for ever."""
    request = HumanInTheLoopRequest.model_validate_json("{}")
    assert (request.task, request.time_limit) == (EXAMPLE_TASK, None)
    assert "shorter" in improve_command("k")
