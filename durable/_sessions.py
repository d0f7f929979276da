"""Conversations that live in the state of virtual objects.

Each turn is stored once, under a key of its own that is never written again, so what a turn writes does not
grow with the conversation. Nor do the messages of earlier turns go into the journal of a later one: they
come with the start of each attempt (`durable._preloaded`).

    session              how far the session is, and which keys hold its messages
    session.turn:0       the messages of a turn, in PydanticAI's JSON form
    session.turn:1       ...
    session.summary:9    what the compaction in turn 9 left of earlier turns

**Invariant: an invocation neither sets nor clears a key that it reads messages from, so all of its attempts read the
same.** A turn writes keys that were not there before, and what it made superfluous is cleared by the next
invocation.

Compaction is the agent's own affair: where its history processors, or a provider, have changed the messages before the
turn's, the latest turns that are as they were keep their keys, and what there is before them becomes the
summary.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Literal, cast

from pydantic import BaseModel, Field
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import (
    ModelMessage,
    ModelMessagesTypeAdapter,
    UserContent,
    repair_messages,
)
from pydantic_ai.output import OutputDataT
from pydantic_ai.run import AgentRunResult
from pydantic_ai.tools import AgentDepsT, DeferredToolRequests
from pydantic_ai.usage import RunUsage
from restate import ObjectContext, ObjectSharedContext, TerminalError
from restate.entry_codec import JournalValueCodec
from restate.serde import BytesSerde, PydanticJsonSerde, Serde

from durable._context import Invocation, current_invocation
from durable._errors import ends_invocation
from durable._names import SESSION, SESSION_OPENED, session_summary, session_turn
from durable._operation_backend import run_step
from durable._options import StepOptions

AnyObjectContext = ObjectContext | ObjectSharedContext

MAX_TURN_SIZE = 16 * 2**20
"""Bytes that the messages of one turn may have: Restate's own limit, for a value and for all that is sent along with
the start of an attempt, is 32 MiB."""


class SessionStatus(BaseModel):
    """What a session is doing, and how far it is."""

    status: Literal["idle", "running"] = "idle"

    invocation_id: str | None = None
    """The invocation of the turn that is running, or was the last: the key of `durable.agent_run`."""

    turns: int = 0
    """How many turns have succeeded."""

    usage: RunUsage = Field(default_factory=RunUsage)
    """What all turns have used, failed ones too."""

    last_active: datetime | None = None
    """When the last turn began, or ended."""


class _Record(BaseModel):
    status: SessionStatus = Field(default_factory=SessionStatus)
    first: int = 0
    """The first turn that has a key."""

    summary: int | None = None
    """The turn that left a summary of the turns before it."""

    superfluous: list[str] = []
    """Keys that the next invocation clears."""

    @property
    def turns(self) -> range:
        """The turns that have a key."""
        return range(self.first, self.status.turns)

    @property
    def summary_keys(self) -> list[str]:
        """The key of the summary, if there is one."""
        return [] if self.summary is None else [session_summary(self.summary)]


class MessagesSerde(Serde[list[ModelMessage]]):
    def serialize(self, obj: list[ModelMessage] | None) -> bytes:
        return ModelMessagesTypeAdapter.dump_json(obj or [])

    def deserialize(self, buf: bytes) -> list[ModelMessage]:
        return ModelMessagesTypeAdapter.validate_json(buf)


class _RecordSerde(PydanticJsonSerde[_Record]):
    def serialize(self, obj: _Record | None) -> bytes:
        # written twice per turn: without the many kinds of tokens that were not used
        return b"" if obj is None else obj.model_dump_json(exclude_defaults=True).encode()


_BYTES = BytesSerde()
MESSAGES = MessagesSerde()
_RECORD = _RecordSerde(_Record)


class Session:
    """The session of a virtual object's key, for exclusive handlers that do more than pass a message on.

    Example:
        ```python
        @editor.handler()
        async def revise(ctx: restate.ObjectContext, wish: str) -> str:
            session = await durable.Session.open(ctx)
            draft = (await session.run(writer, wish)).output
            return (await session.run(writer, f"Correct the spelling: {draft}")).output
        ```
    """

    def __init__(
        self,
        ctx: ObjectContext,
        invocation: Invocation,
        record: _Record,
        *,
        summary: list[ModelMessage],
        turns: dict[int, list[ModelMessage]],
        when_idle: Callable[[datetime], None] | None,
    ) -> None:
        """Use `Session.open` instead."""
        self._ctx = ctx
        self._invocation = invocation
        self._record = record
        self._summary = summary
        self._turns = turns
        self._when_idle = when_idle

    @classmethod
    async def open(
        cls, ctx: ObjectContext, *, when_idle: Callable[[datetime], None] | None = None
    ) -> "Session":
        """Open the session of the object's key; the first time it is empty.

        Args:
            ctx: The context of an exclusive handler.
            when_idle: Called after each turn, in handler code, with the session's new `last_active`.

        Raises:
            UserError: Outside a handler.
        """
        invocation = current_invocation()
        if invocation is None:
            raise UserError(
                "`Session.open` is for handlers of virtual objects: it was called outside."
            )
        record = await ctx.get(SESSION, serde=_RECORD) or _Record()
        turn_keys = list(map(session_turn, record.turns))
        values = await _read(ctx, invocation, [*record.summary_keys, *turn_keys])
        for key in record.superfluous:
            ctx.clear(key)
        record.superfluous = []
        return cls(
            ctx,
            invocation,
            record,
            summary=_joined(values[key] for key in record.summary_keys),
            turns={number: values[session_turn(number)] for number in record.turns},
            when_idle=when_idle,
        )

    @staticmethod
    async def status(ctx: AnyObjectContext) -> SessionStatus:
        """Return what the session is doing; for shared handlers, while a turn runs too."""
        return (await ctx.get(SESSION, serde=_RECORD) or _Record()).status

    @staticmethod
    async def history(ctx: AnyObjectContext) -> list[ModelMessage]:
        """Return the messages of all turns that have succeeded; for shared handlers, while a turn runs too."""
        record = await ctx.get(SESSION, serde=_RECORD) or _Record()
        keys = [*record.summary_keys, *map(session_turn, record.turns)]
        return _joined([await _get(ctx, key) for key in keys])

    @property
    def messages(self) -> list[ModelMessage]:
        """The messages of the turns until now."""
        return _joined([self._summary, *self._turns.values()])

    async def run(
        self,
        agent: AbstractAgent[AgentDepsT, OutputDataT],
        prompt: str | list[UserContent],
        *,
        deps: AgentDepsT = None,
    ) -> AgentRunResult[OutputDataT]:
        """Run `agent` on the session's messages and `prompt`, and store what it adds.

        A run that fails leaves the messages as they were: its prompt is not among them, and can be sent again.

        Args:
            agent: An agent with `RestateDurability`.
            prompt: The user's.
            deps: The agent's dependencies.

        Raises:
            TerminalError: 413 when the messages of this turn are too large to be stored.
            UserError: When the run ends with tool calls that wait for somebody.
            AgentRunError: When the run fails.
        """
        status = self._record.status
        status.status, status.invocation_id = "running", self._ctx.request().id
        status.last_active = self._invocation.now
        self._ctx.set(SESSION, self._record, serde=_RECORD)
        usage = RunUsage()
        try:
            result = await agent.run(
                prompt,
                message_history=self.messages,
                conversation_id=self._ctx.key(),
                usage=usage,
                deps=deps,
            )
            self._take(result)
        except (Exception, asyncio.CancelledError) as error:
            # what Restate will retry has not been a turn
            if isinstance(error, asyncio.CancelledError) or ends_invocation(error):
                self._end(usage)
            raise
        self._end(usage)
        return result

    def _take(self, result: AgentRunResult[Any]) -> None:
        """Store the messages of a turn, and what it has made of those before."""
        if isinstance(result.output, DeferredToolRequests):
            names = ", ".join(
                f"`{it.tool_name}`" for it in [*result.output.calls, *result.output.approvals]
            )
            raise UserError(
                f"The turn ended with tool calls that wait for somebody: {names}. Give the agent "
                "`durable.Approvals()`: it waits for them within the turn."
            )
        messages, new = result.all_messages(), result.new_messages()
        _stamp(messages, self.messages, result.run_id, self._record.status.last_active)
        earlier = messages[: len(messages) - len(new)]
        number, record = self._record.status.turns, self._record
        values = {session_turn(number): _stored(new)}
        kept, summary = self._turns, self._summary
        if earlier != _normal([summary, *kept.values()]):
            kept = _unchanged(kept, earlier)
            summary = earlier[: len(earlier) - len(_normal(kept.values()))]
            if summary:
                values[session_summary(number)] = _stored(summary)
            dropped = [session_turn(it) for it in self._turns if it not in kept]
            record.superfluous += [*record.summary_keys, *dropped]
            record.summary = number if summary else None
            record.first = min(kept, default=number)
        for key, value in values.items():
            self._ctx.set(key, value, serde=_BYTES)
        self._summary, self._turns = summary, {**kept, number: new}
        record.status.turns += 1

    def _end(self, usage: RunUsage) -> None:
        status = self._record.status
        status.status = "idle"
        status.usage += usage
        status.last_active = self._invocation.now
        self._ctx.set(SESSION, self._record, serde=_RECORD)
        if self._when_idle is not None and status.last_active is not None:
            self._when_idle(status.last_active)


async def _read(
    ctx: ObjectContext, invocation: Invocation, keys: list[str]
) -> dict[str, list[ModelMessage]]:
    """Return the messages under `keys`, which went into the journal only if the server did not send them along."""
    sent = invocation.preloaded
    preloaded: Mapping[str, bytes] = {} if sent is None else sent.state()
    codec: JournalValueCodec | None = cast(Any, ctx).journal_codec

    async def missing() -> list[str]:
        return [key for key in keys if key not in preloaded]

    got = cast("list[str]", await run_step(SESSION_OPENED, missing, StepOptions()))
    values = {key: await _get(ctx, key) for key in got}
    for key in keys:
        if key in values:
            continue
        if key not in preloaded:
            raise RuntimeError(
                f"The server sent the state {key!r} along with an earlier attempt of this invocation and does not "
                "any more. Was `worker.invoker.eager-state-size-limit` lowered? Restate will try again."
            )
        value = preloaded[key] if codec is None else await codec.decode(preloaded[key])
        values[key] = MESSAGES.deserialize(value)
    return values


async def _get(ctx: AnyObjectContext, key: str) -> list[ModelMessage]:
    messages = await ctx.get(key, serde=MESSAGES)
    if messages is None:
        raise TerminalError(
            f"The session {ctx.key()!r} was cleared while it was read: {key!r} is gone.",
            status_code=409,
        )
    return messages


def _joined(groups: Iterable[list[ModelMessage]]) -> list[ModelMessage]:
    return [message for group in groups for message in group]


def _normal(groups: Iterable[list[ModelMessage]]) -> list[ModelMessage]:
    """Return the messages as a run takes them: adjacent requests, of two turns, are merged."""
    return repair_messages(_joined(groups), repair_last_response=False)


def _stamp(
    messages: Iterable[ModelMessage],
    given: Iterable[ModelMessage],
    run_id: str,
    began: datetime | None,
) -> None:
    """Give what handler code has put among the messages the time when the turn began.

    The messages of the run itself have journaled times already. What history processors and dynamic system prompts make
    has the wall clock's, which is another one in each attempt.
    """
    known = {id(it) for message in given for it in (message, *message.parts)}
    for message in messages:
        for it in (message, *message.parts):
            made: datetime | None = getattr(it, "timestamp", None)
            if message.run_id != run_id and id(it) not in known and made and began and made > began:
                setattr(it, "timestamp", began)  # noqa: B010 - not every part has one


def _unchanged(
    turns: dict[int, list[ModelMessage]], messages: list[ModelMessage]
) -> dict[int, list[ModelMessage]]:
    """Return the latest of `turns` with which `messages` ends."""
    for first in turns:
        kept = {number: turn for number, turn in turns.items() if number >= first}
        ending = _normal(kept.values())
        if messages[-len(ending) :] == ending:
            return kept
    return {}


def _stored(messages: list[ModelMessage]) -> bytes:
    value = MESSAGES.serialize(messages)
    if len(value) > MAX_TURN_SIZE:
        raise TerminalError(
            f"The messages of this turn have {len(value)} bytes, more than the {MAX_TURN_SIZE} that are "
            "stored: pass URLs instead of large files, and let tools return less.",
            status_code=413,
        )
    return value
