"""Agent runs from outside, while they are under way: steer them, answer what they ask, stop them.

All of it goes through the virtual object `AgentRun`, of which there is one per invocation: it numbers
messages, knows which calls wait for an answer, and refuses what fits none.

A message travels as a Restate signal to the run's invocation. Signals have names, and a name holds one
value, so messages are numbered: by the virtual object `AgentRun`, of which there is one per
invocation. The run looks into its inbox where its next operation is decided, before a model request and
before it would end. Whether a signal is there is a function of the journal, as is everything that
the driver delivers, so a replay finds the same messages in the same places. A run that nobody steers
pays nothing: waiting for a signal makes no journal entry.
"""

import json
import os
import re
import shlex
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, cast

import restate
from pydantic import BaseModel, Field, JsonValue, RootModel
from pydantic_ai.messages import UserContent
from restate import Context, ObjectContext, ObjectSharedContext, TerminalError
from restate.serde import BytesSerde, PydanticJsonSerde, Serde

from durable._json_schema import validator
from durable._names import AGENT_RUN, steering_signal


class SteeringMessage(BaseModel):
    """What a person, or another agent, says to a run that is under way."""

    content: str | list[UserContent]
    """The user's words, or content parts as in a user prompt."""

    priority: Literal["asap", "when_idle"] = "asap"
    """Before the next model request, or only when the run would otherwise end."""


class PendingCall(BaseModel):
    """A tool call that waits for a person, or for another system."""

    id: str
    """Names the call in answers."""

    invocation_id: str
    """The invocation whose run waits: the key of `AgentRun`."""

    agent: str
    """Name of the agent."""

    kind: Literal["approval", "question", "external"]
    """Whether it waits for an approval, an answer to a question, or another result from outside."""

    tool_name: str
    tool_call_id: str

    args: dict[str, Any]
    """The arguments that the model chose."""

    parameters: dict[str, Any] = {}
    """The JSON schema of the arguments."""

    metadata: dict[str, Any] = {}
    """What the tool told with `ApprovalRequired` or `CallDeferred`."""

    asked_at: datetime
    expires_at: datetime | None = None
    """When the run stops waiting, or goes to the next reviewer."""

    closed: str | None = None
    """Why the call does not wait any more."""

    def answer_command(self, *, ingress_url: str | None = None) -> str:
        """Return the curl command that approves the call, or supplies its result.

        Args:
            ingress_url: Where reviewers reach Restate, by default `RESTATE_INGRESS_URL` of the environment.
        """
        ingress_url = ingress_url or os.environ.get("RESTATE_INGRESS_URL", "http://localhost:8080")
        body = (
            {"decision": "approve"}
            if self.kind == "approval"
            else {"decision": "result", "result": "…"}
        )
        return shlex.join(
            [
                "curl",
                f"{ingress_url}/AgentRun/{self.invocation_id}/answer",
                "--json",
                json.dumps({"call": self.id, **body}, ensure_ascii=False),
            ]
        )


class _Decision(BaseModel):
    call: str
    """The `id` of the pending call."""

    answered_by: str | None = None
    """Who answered: PydanticAI reports it with the result. Not checked here."""


class Approve(_Decision):
    """The tool is called."""

    decision: Literal["approve"] = "approve"

    args: dict[str, Any] | None = None
    """Other arguments than the model's."""


class Deny(_Decision):
    """The tool is not called; the model is told why."""

    decision: Literal["deny"] = "deny"
    reason: str = "The tool call was denied."


class Supply(_Decision):
    """The tool is not called; this is its result."""

    decision: Literal["result"] = "result"
    result: JsonValue


class Answer(RootModel[Annotated[Approve | Deny | Supply, Field(discriminator="decision")]]):
    """The answer to a pending call."""


class Closing(BaseModel):
    """That a call waits no longer."""

    call: str
    why: str


class AnswerLetter(BaseModel):
    """An answer on its way to the run."""

    answer: Answer
    receipt: str
    """The awakeable that is resolved when the run has taken the answer."""


ANSWER: Serde[AnswerLetter] = PydanticJsonSerde(AnswerLetter)
_PENDING: Serde[PendingCall] = PydanticJsonSerde(PendingCall)
_CALL = "call:"

RETENTION = timedelta(days=7)
"""How long it is known that a call had its answer: until then a second answer is told so."""

PATIENCE = timedelta(seconds=5)
"""How long an answer waits for the run to take it; after that it lies ready, for a worker that is down."""


def _call(id: str) -> str:
    return f"{_CALL}{id}"


class _Letter(BaseModel):
    message: SteeringMessage
    receipt: str
    """The awakeable that is resolved when the run has taken the message."""


INVOCATION_ID = re.compile(r"inv_1[0-9A-Za-z]{33,}")
"""What Restate's ids of invocations look like."""

_NOT_FOUND = 404
_LETTER: Serde[_Letter] = PydanticJsonSerde(_Letter)


class Inbox:
    """The messages that came for the agent runs of one invocation."""

    def __init__(self, context: Context) -> None:
        """Open the inbox of the invocation whose handler received `context`."""
        self._context = context
        self._taken = 0
        self._next = self._listen()

    def _listen(self) -> restate.RestateDurableFuture[_Letter]:
        return self._context.signal(steering_signal(self._taken), serde=_LETTER)

    async def take(self) -> list[SteeringMessage]:
        """Return the messages that have come since the last time, in order, and sign for them."""
        messages: list[SteeringMessage] = []
        while cast(Any, self._next).is_completed():
            letter = await self._next
            self._context.resolve_awakeable(letter.receipt, None)
            messages.append(letter.message)
            self._taken += 1
            self._next = self._listen()
        return messages


agent_run = restate.VirtualObject(
    AGENT_RUN,
    # an id that no server made fails in the core of the SDK, on every try
    invocation_retry_policy=restate.InvocationRetryPolicy(max_attempts=10, on_max_attempts="kill"),
)
"""Talks to agent runs from outside; host it with `durable.app([..., durable.agent_run])`.

Its key is the invocation's id, which Restate returns for each call (`x-restate-id`, or `invocationId`
of a `/send`):

- `steer` gives a `SteeringMessage` to the invocation's run and returns when the run has taken it.
- `pending` returns the tool calls that wait for a person, `answer` answers one of them (`Approve`, `Deny`,
  `Supply`).
- `stop` cancels the invocation: the run ends with `RunCancelled`, which holds its messages.
"""


@agent_run.handler(kind="shared")
async def steer(ctx: ObjectSharedContext, message: SteeringMessage) -> None:
    """Give a message to the run, and return when the run has taken it.

    Raises:
        TerminalError: 409 when the run ended before it could take the message, 404 when there is no such
            invocation.
    """
    invocation = ctx.key()
    if not INVOCATION_ID.fullmatch(invocation):
        raise _no_such(invocation)
    receipt, taken = ctx.awakeable(type_hint=type(None))
    number = await ctx.object_call(count, key=invocation, arg=None)
    letter = _Letter(message=message, receipt=receipt)
    ctx.resolve_signal(invocation, steering_signal(number), letter, serde=_LETTER)
    if (error := await _ended_before(ctx, taken=taken)) is not None:
        if error.status_code == _NOT_FOUND:
            raise _no_such(invocation) from error
        raise TerminalError(
            f"The run of {invocation} ended before it could take the message: call the agent again, with "
            "the run's messages as `message_history`.",
            status_code=409,
        )


@agent_run.handler(ingress_private=True)
async def count(ctx: ObjectContext) -> int:
    """Return the number of the next message."""
    await _remember(ctx)
    number = await ctx.get("messages", type_hint=int) or 0
    ctx.set("messages", number + 1)
    return number


@agent_run.handler(ingress_private=True)
async def ask(ctx: ObjectContext, call: PendingCall) -> None:
    """Take note of a call that waits for an answer, or has gone to the next reviewer."""
    await _remember(ctx)
    known = await ctx.get(_call(call.id), serde=_PENDING)
    if known is None or known.closed is None:
        ctx.set(_call(call.id), call, serde=_PENDING)


@agent_run.handler(kind="shared")
async def pending(ctx: ObjectSharedContext) -> list[PendingCall]:
    """Return the calls that wait for an answer, those asked first at first."""
    keys = sorted(key for key in await ctx.state_keys() if key.startswith(_CALL))
    calls = [await ctx.get(key, serde=_PENDING) for key in keys]
    waiting = [call for call in calls if call is not None and call.closed is None]
    return sorted(waiting, key=lambda call: call.asked_at)


@agent_run.handler()
async def answer(ctx: ObjectContext, answer: Answer) -> None:
    """Answer a call that waits, and return when the run has the answer, or will have it once a worker is there.

    Raises:
        TerminalError: 404 when no such call was asked, 409 when it has its answer or waits no longer, 400
            when the answer does not fit the call.
    """
    decision = answer.root
    call = await ctx.get(_call(decision.call), serde=_PENDING)
    if call is None:
        raise TerminalError(
            f"No call {decision.call!r} waits for an answer in {ctx.key()}. `pending` lists those that do.",
            status_code=_NOT_FOUND,
        )
    if call.closed is not None:
        raise TerminalError(
            f"The call of `{call.tool_name}` waits for no answer any more: it {call.closed}.",
            status_code=409,
        )
    if call.kind != "approval" and isinstance(decision, Approve):
        raise TerminalError(
            f"The call of `{call.tool_name}` waits for a result, so it cannot be approved. Supply one "
            'with `"decision": "result"`, or deny it.',
            status_code=400,
        )
    if isinstance(decision, Approve) and decision.args is not None:
        if problems := validator(call.parameters)(decision.args):
            raise TerminalError(
                f"The arguments do not fit `{call.tool_name}`: {'; '.join(problems)}. The call waits on.",
                status_code=400,
            )
    receipt, taken = ctx.awakeable(type_hint=type(None))
    ctx.resolve_awakeable(call.id, AnswerLetter(answer=answer, receipt=receipt), serde=ANSWER)
    _close(ctx, call, "was answered")
    later = ctx.sleep(PATIENCE)
    if (error := await _ended_before(ctx, taken=taken, later=later)) is not None:
        _close(ctx, call, "ended with its run")
        raise TerminalError(
            f"The call of `{call.tool_name}` waits no more: its run has ended.", status_code=409
        ) from error


@agent_run.handler(ingress_private=True)
async def close(ctx: ObjectContext, closing: Closing) -> bool:
    """Take note that a call waits no longer; return whether it has waited until now."""
    call = await ctx.get(_call(closing.call), serde=_PENDING)
    if call is None or call.closed is not None:
        return False
    _close(ctx, call, closing.why)
    return True


def _close(ctx: ObjectContext, call: PendingCall, why: str) -> None:
    ctx.set(_call(call.id), call.model_copy(update={"closed": why}), serde=_PENDING)


async def _ended_before(
    ctx: ObjectSharedContext | ObjectContext, **others: restate.RestateDurableFuture[None]
) -> TerminalError | None:
    """Wait until the invocation ends or one of `others` is there; return an error if it is the end."""
    ended = ctx.attach_invocation(ctx.key(), serde=BytesSerde())
    try:
        first, _ = await restate.select(ended=ended, **others)
    except TerminalError as error:  # how it ended, or that it cannot be found
        return error
    return TerminalError("ended", status_code=409) if first == "ended" else None


async def _remember(ctx: ObjectContext) -> None:
    """See to it that what is known about the invocation is forgotten some day."""
    if not await ctx.state_keys():
        ctx.object_send(forget, key=ctx.key(), arg=None, send_delay=RETENTION)


@agent_run.handler(ingress_private=True)
async def forget(ctx: ObjectContext) -> None:
    """Forget the invocation, unless a call still waits."""
    for key in await ctx.state_keys():
        call = await ctx.get(key, serde=_PENDING) if key.startswith(_CALL) else None
        if call is not None and call.closed is None:
            ctx.object_send(forget, key=ctx.key(), arg=None, send_delay=RETENTION)
            return
    ctx.clear_all()


@agent_run.handler(kind="shared")
async def stop(ctx: ObjectSharedContext) -> None:
    """Cancel the invocation: its run ends with the messages kept.

    Raises:
        TerminalError: 404 when the key is not the id of an invocation.
    """
    if not INVOCATION_ID.fullmatch(ctx.key()):
        raise _no_such(ctx.key())
    ctx.cancel_invocation(ctx.key())


def _no_such(invocation: str) -> TerminalError:
    return TerminalError(
        f"There is no invocation {invocation!r}. The key of `AgentRun` is the id that Restate returned when "
        "the agent was called.",
        status_code=_NOT_FOUND,
    )
