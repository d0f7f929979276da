"""Steering and stopping a run from outside, while it is under way.

A message travels as a Restate signal to the run's invocation. Signals have names, and a name holds one
value, so messages are numbered: by the virtual object `AgentRun`, of which there is one per
invocation. The run looks into its inbox where its next operation is decided, before a model request and
before it would end. Whether a signal is there is a function of the journal, as is everything that
the driver delivers, so a replay finds the same messages in the same places. A run that nobody steers
pays nothing: waiting for a signal makes no journal entry.
"""

import re
from typing import Any, Literal, cast

import restate
from pydantic import BaseModel
from pydantic_ai.messages import UserContent
from restate import Context, ObjectContext, ObjectSharedContext, TerminalError
from restate.serde import BytesSerde, PydanticJsonSerde, Serde

from durable._names import steering_signal


class SteeringMessage(BaseModel):
    """What a person, or another agent, says to a run that is under way."""

    content: str | list[UserContent]
    """The user's words, or content parts as in a user prompt."""

    priority: Literal["asap", "when_idle"] = "asap"
    """Before the next model request, or only when the run would otherwise end."""


class _Letter(BaseModel):
    message: SteeringMessage
    receipt: str
    """The awakeable that is resolved when the run has taken the message."""


_INVOCATION_ID = re.compile(r"inv_1[0-9A-Za-z]{33,}")
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
    "AgentRun",
    # an id that no server made fails in the core of the SDK, on every try
    invocation_retry_policy=restate.InvocationRetryPolicy(max_attempts=10, on_max_attempts="kill"),
)
"""Steers and stops agent runs from outside; host it with `durable.app([..., durable.agent_run])`.

Its key is the invocation's id, which Restate returns for each call (`x-restate-id`, or `invocationId`
of a `/send`):

- `steer` gives a `SteeringMessage` to the invocation's run and returns when the run has taken it.
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
    if not _INVOCATION_ID.fullmatch(invocation):
        raise _no_such(invocation)
    receipt, taken = ctx.awakeable(type_hint=type(None))
    number = await ctx.object_call(count, key=invocation, arg=None)
    letter = _Letter(message=message, receipt=receipt)
    ctx.resolve_signal(invocation, steering_signal(number), letter, serde=_LETTER)
    ended = ctx.attach_invocation(invocation, serde=BytesSerde())
    try:
        first, _ = await restate.select(taken=taken, ended=ended)
    except TerminalError as error:  # how the invocation ended, or that it cannot be found
        if error.status_code == _NOT_FOUND:
            raise _no_such(invocation) from error
        first = "ended"
    if first == "ended":
        raise TerminalError(
            f"The run of {invocation} ended before it could take the message: call the agent again, with "
            "the run's messages as `message_history`.",
            status_code=409,
        )


@agent_run.handler(ingress_private=True)
async def count(ctx: ObjectContext) -> int:
    """Return the number of the next message."""
    number = await ctx.get("messages", type_hint=int) or 0
    ctx.set("messages", number + 1)
    return number


@agent_run.handler(kind="shared")
async def stop(ctx: ObjectSharedContext) -> None:
    """Cancel the invocation: its run ends with the messages kept.

    Raises:
        TerminalError: 404 when the key is not the id of an invocation.
    """
    if not _INVOCATION_ID.fullmatch(ctx.key()):
        raise _no_such(ctx.key())
    ctx.cancel_invocation(ctx.key())


def _no_such(invocation: str) -> TerminalError:
    return TerminalError(
        f"There is no invocation {invocation!r}. The key of `AgentRun` is the id that Restate returned when "
        "the agent was called.",
        status_code=_NOT_FOUND,
    )
