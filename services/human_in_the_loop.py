"""Human-in-the-loop service: `POST /HumanInTheLoopService/{session}/run_with_promise`.

Task → writer → draft → person → PASS
         ↑                 ↓
         └─ NEEDS_IMPROVEMENT, with a comment

It is a virtual object whose key is a session: the writer remembers its drafts and what was said about them, over
all runs. `run` is one turn of it, without waiting for anybody. While `run_with_promise` waits, which may be for
weeks, no worker holds it; `status` shows what it waits with, and `feedback` answers.

An answer must not be lost, and a question has only one. `feedback` cannot store that it answers, as the run has
the session's state to itself; so whoever closes a question claims it before, be it an answer or the end of the
time, from the object whose key is the question. And an answer has arrived when the run has signed for it.
"""

import asyncio
import os
import shlex
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal
from urllib.parse import quote

import restate
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from restate import ObjectContext, ObjectSharedContext, TerminalError
from restate.serde import BytesSerde, PydanticJsonSerde, Serde

import durable
from agents.human_in_the_loop import Draft, revision_prompt, writer

EXAMPLE_TASK = (
    "Write a note to all colleagues: the canteen is closed next week because its kitchen is rebuilt, and a "
    "food truck stands in the yard from 11:30 to 13:30."
)

INGRESS_URL = os.environ.get("RESTATE_INGRESS_URL", "http://localhost:8080")
"""Where reviewers reach Restate: part of the command that they are shown."""

MAX_TEXT = 4000
"""Characters in a task and in a comment."""

QUESTION, ROUNDS, ROUND = "question", "rounds", "round:"

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_TEXT)]
Verdict = Literal["PASS", "NEEDS_IMPROVEMENT"]

human_in_the_loop = restate.VirtualObject(
    "HumanInTheLoopService",
    description="Writes drafts until a person passes one. The key is the session.",
)


class HumanInTheLoopRequest(BaseModel):
    """What is to be written, and how long the reviewer has."""

    model_config = ConfigDict(extra="forbid")

    task: Text = EXAMPLE_TASK
    time_limit: Annotated[timedelta, Field(gt=timedelta(0), le=timedelta(days=365))] | None = Field(
        default=None,
        description="For each answer, in seconds or as an ISO 8601 duration; null to wait for ever.",
    )
    default_outcome: Literal["passed", "rejected"] = Field(
        default="rejected", description="What becomes of the draft when the time is up."
    )


class Round(BaseModel):
    """What was asked for, and the draft that came of it."""

    number: int
    request: str = Field(
        description="The task, a message, or the reviewer's comment on the draft before."
    )
    draft: Draft


class HumanInTheLoopResponse(BaseModel):
    """How it ended, and the whole way there."""

    outcome: Literal["passed", "rejected"]
    decided_by: Literal["reviewer", "time_limit"]
    draft: Draft
    rounds: list[Round]


class HumanInTheLoopMessage(BaseModel):
    """A task, or what to change in the last draft."""

    model_config = ConfigDict(extra="forbid")

    message: Text = EXAMPLE_TASK


class Feedback(BaseModel):
    """A reviewer's judgement of a draft."""

    model_config = ConfigDict(extra="forbid")

    verdict: Verdict
    comment: Annotated[str, StringConstraints(strip_whitespace=True, max_length=MAX_TEXT)] = Field(
        default="", description="What to change; needed unless the draft passes."
    )

    @model_validator(mode="after")
    def _says_what_to_change(self) -> "Feedback":
        if self.verdict == "NEEDS_IMPROVEMENT" and not self.comment:
            raise ValueError("say in `comment` what to change")
        return self


EXAMPLE_REVIEWS = [
    Feedback(verdict="NEEDS_IMPROVEMENT", comment="Say first what changes, and thank the team."),
    Feedback(verdict="PASS"),
]


class Question(BaseModel):
    """What a run waits with."""

    id: str
    """The awakeable; also the key under which the question is claimed."""

    invocation_id: str
    asked_at: datetime
    expires_at: datetime | None


class PendingReview(BaseModel):
    """A draft that waits for its judgement, and the commands that give it."""

    draft: Draft
    asked_at: datetime
    expires_at: datetime | None
    pass_command: str
    improve_command: str


class HumanInTheLoopStatus(BaseModel):
    """What a session is doing, and all that it has written."""

    status: Literal["idle", "writing", "waiting"]
    review: PendingReview | None = Field(description="While the status is `waiting`.")
    rounds: list[Round]


class _Answer(BaseModel):
    feedback: Feedback
    receipt: str
    """The awakeable that the run resolves when it has the answer."""


_ANSWER: Serde[_Answer] = PydanticJsonSerde(_Answer)


@human_in_the_loop.handler()
async def run_with_promise(
    ctx: ObjectContext, request: HumanInTheLoopRequest
) -> HumanInTheLoopResponse:
    """Write drafts until a person passes one, however long that person takes."""
    session = await durable.Session.open(ctx)
    rounds = [await _write(ctx, session, request.task)]
    while True:
        # 1. A person judges the draft; worker and server may be restarted meanwhile.
        feedback = await _ask(ctx, rounds[-1].draft, request.time_limit)

        # 2. Done, or the next draft, by a writer that remembers the others.
        if feedback is None or feedback.verdict == "PASS":
            return HumanInTheLoopResponse(
                outcome="passed" if feedback else request.default_outcome,
                decided_by="reviewer" if feedback else "time_limit",
                draft=rounds[-1].draft,
                rounds=rounds,
            )
        rounds.append(
            await _write(ctx, session, feedback.comment, revision_prompt(feedback.comment))
        )


@human_in_the_loop.handler()
async def run(ctx: ObjectContext, request: HumanInTheLoopMessage) -> Round:
    """Write a draft, or improve the last one: each call is a turn of the session."""
    return await _write(ctx, await durable.Session.open(ctx), request.message)


async def _write(
    ctx: ObjectContext, session: durable.Session, request: str, prompt: str | None = None
) -> Round:
    number = (await ctx.get(ROUNDS, type_hint=int) or 0) + 1
    draft = (await session.run(writer, prompt or request)).output
    written = Round(number=number, request=request, draft=draft)
    ctx.set(f"{ROUND}{number:06}", written)
    ctx.set(ROUNDS, number)
    return written


async def _ask(ctx: ObjectContext, draft: Draft, time_limit: timedelta | None) -> Feedback | None:
    """Show the draft to a reviewer and wait for the answer, `None` when the time is up."""
    id, answered = ctx.awakeable(serde=_ANSWER)
    now = datetime.fromtimestamp(await ctx.time(), UTC)
    question = Question(
        id=id,
        invocation_id=ctx.request().id,
        asked_at=now,
        expires_at=None if time_limit is None else now + time_limit,
    )
    ctx.set(QUESTION, question)
    try:
        await tell_reviewer(ctx.key(), draft)
        if time_limit is not None:
            first, _ = await restate.select(answered=answered, expired=ctx.sleep(time_limit))
            if first == "expired" and await ctx.object_call(claim, key=id, arg=None):
                ctx.clear(QUESTION)
                return None
        answer = await answered
    except (TerminalError, asyncio.CancelledError):
        ctx.clear(QUESTION)
        raise
    ctx.clear(QUESTION)
    ctx.resolve_awakeable(answer.receipt, None)
    return answer.feedback


@durable.step
def tell_reviewer(session: str, draft: Draft) -> str:
    """Print the draft and the commands that answer, and journal what was printed."""
    message = (
        f"Session {session!r} waits for your judgement of this draft:\n\n{draft.text}\n\n"
        f"Pass it with\n  {pass_command(session)}\nor have it improved with\n  {improve_command(session)}"
    )
    print(message, file=sys.stderr, flush=True)  # noqa: T201 - a real notifier would send it
    return message


def pass_command(session: str) -> str:
    """Return the command that passes the draft which the session waits with."""
    return _answer_command(session, Feedback(verdict="PASS"))


def improve_command(session: str) -> str:
    """Return the command that asks for another draft; the comment is the reviewer's to write."""
    return _answer_command(
        session, Feedback(verdict="NEEDS_IMPROVEMENT", comment="Make it shorter.")
    )


def _answer_command(session: str, feedback: Feedback) -> str:
    url = f"{INGRESS_URL}/HumanInTheLoopService/{quote(session, safe='')}/feedback"
    return shlex.join(["curl", url, "--json", feedback.model_dump_json(exclude_defaults=True)])


@human_in_the_loop.handler(kind="shared", state_preload=False)
async def feedback(ctx: ObjectSharedContext, feedback: Feedback) -> None:
    """Answer the run that waits in this session, and return when it has the answer.

    Raises:
        TerminalError: 409 when no run waits, the question was closed meanwhile, or its run has ended.
    """
    question = await ctx.get(QUESTION, type_hint=Question)
    if question is None:
        raise _refusal(ctx.key(), "waits for no feedback")
    # 1. The first to close the question closes it.
    if not await ctx.object_call(claim, key=question.id, arg=None):
        raise _refusal(ctx.key(), "has this answer already, or the time for it is up")

    # 2. The run gets the answer and signs for it, unless it has ended, killed for instance.
    receipt, taken = ctx.awakeable(type_hint=type(None))
    answer = _Answer(feedback=feedback, receipt=receipt)
    ctx.resolve_awakeable(question.id, answer, serde=_ANSWER)
    ended = ctx.attach_invocation(question.invocation_id, serde=BytesSerde())
    try:
        first, _ = await restate.select(taken=taken, ended=ended)
    except TerminalError:  # how the run ended
        first = "ended"
    if first == "ended":
        raise _refusal(ctx.key(), "waits no more: its run has ended")


def _refusal(session: str, what: str) -> TerminalError:
    return TerminalError(
        f"The session {session!r} {what}. Nothing was changed; see "
        f"`GET /HumanInTheLoopService/{quote(session, safe='')}/status`.",
        status_code=409,
    )


@human_in_the_loop.handler(kind="shared", journal_retention=timedelta(0))
async def status(ctx: ObjectSharedContext) -> HumanInTheLoopStatus:
    """Say what the session is doing and has written, with the commands that answer while it waits."""
    keys = sorted(key for key in await ctx.state_keys() if key.startswith(ROUND))
    rounds = [it for key in keys if (it := await ctx.get(key, type_hint=Round)) is not None]
    question = await ctx.get(QUESTION, type_hint=Question)
    if question is None:
        writing = (await durable.Session.status(ctx)).status == "running"
        return HumanInTheLoopStatus(
            status="writing" if writing else "idle", review=None, rounds=rounds
        )
    review = PendingReview(
        draft=rounds[-1].draft,
        asked_at=question.asked_at,
        expires_at=question.expires_at,
        pass_command=pass_command(ctx.key()),
        improve_command=improve_command(ctx.key()),
    )
    return HumanInTheLoopStatus(status="waiting", review=review, rounds=rounds)


@human_in_the_loop.handler(ingress_private=True)
async def claim(ctx: ObjectContext) -> bool:
    """Say whether this is the first to close the question that is the key."""
    if await ctx.get("closed", type_hint=bool):
        return False
    ctx.set("closed", True)
    ctx.object_send(forget, key=ctx.key(), arg=None, send_delay=timedelta(days=1))
    return True


@human_in_the_loop.handler(ingress_private=True)
async def forget(ctx: ObjectContext) -> None:
    """Forget a question: who has seen it has long tried to close it."""
    ctx.clear_all()
