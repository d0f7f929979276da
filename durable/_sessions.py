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
from typing import Any, Literal, NamedTuple, cast

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
from durable._errors import gives_up
from durable._names import SESSION, SESSION_OPENED, session_summary, session_turn
from durable._operation_backend import run_step
from durable._options import StepOptions

AnyObjectContext = ObjectContext | ObjectSharedContext

MAX_SESSION_SIZE = 15 * 2**20
"""Bytes that the messages of a session may have. A compaction stores new ones beside those that it makes superfluous, and
restate-server pauses an invocation whose state exceeds its memory, 32 MiB by default."""


class SessionStatus(BaseModel):
    """What a session is doing, and how far it is."""

    status: Literal["idle", "running"] = "idle"
    """`running` also where the invocation of the last turn was killed by hand, until the next turn."""

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
    def keys(self) -> list[str]:
        """The keys of the messages, in order."""
        summary = [] if self.summary is None else [session_summary(self.summary)]
        return [*summary, *map(session_turn, range(self.first, self.status.turns))]


class _Part(NamedTuple):
    """The messages under one key, also as they are stored."""

    messages: list[ModelMessage]
    value: bytes


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
        parts: dict[str, _Part],
        when_idle: Callable[[datetime], None] | None,
    ) -> None:
        """Use `Session.open` instead."""
        self._ctx = ctx
        self._invocation = invocation
        self._record = record
        self._parts = parts
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
        parts = await _read(ctx, invocation, record.keys)
        for key in record.superfluous:
            ctx.clear(key)
        record.superfluous = []
        return cls(ctx, invocation, record, parts, when_idle)

    @staticmethod
    async def status(ctx: AnyObjectContext) -> SessionStatus:
        """Return what the session is doing; for shared handlers, while a turn runs too."""
        return (await ctx.get(SESSION, serde=_RECORD) or _Record()).status

    @staticmethod
    async def history(ctx: AnyObjectContext) -> list[ModelMessage]:
        """Return the messages of all turns that have succeeded; for shared handlers, while a turn runs too."""
        record = await ctx.get(SESSION, serde=_RECORD) or _Record()
        return _joined([MESSAGES.deserialize(await _get(ctx, key)) for key in record.keys])

    @property
    def messages(self) -> list[ModelMessage]:
        """The messages of the turns until now."""
        return _joined(part.messages for part in self._parts.values())

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
            TerminalError: 413 when the messages of the session would be too large.
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
            if gives_up(error):
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
        record, number = self._record, self._record.status.turns
        kept, summary = self._parts, dict[str, _Part]()
        if earlier != _normal(kept):
            kept = self._unchanged(earlier)
            if rest := earlier[: len(earlier) - len(_normal(kept))]:
                summary[session_summary(number)] = _part(rest)
        turn = {session_turn(number): _part(new)}
        parts = {**summary, **kept, **turn}
        _check_size(parts)
        for key, part in {**summary, **turn}.items():
            self._ctx.set(key, part.value, serde=_BYTES)
        if kept is not self._parts:
            record.superfluous += [key for key in self._parts if key not in kept]
            record.summary = number if summary else None
            record.first = number - len(kept)
        self._parts = parts
        record.status.turns += 1

    def _unchanged(self, earlier: list[ModelMessage]) -> dict[str, _Part]:
        """Return the latest turns that `earlier` still ends with."""
        turns = list(self._parts.items())[0 if self._record.summary is None else 1 :]
        for first in range(len(turns)):
            kept = dict(turns[first:])
            ending = _normal(kept)
            if earlier[-len(ending) :] == ending:
                return kept
        return {}

    def _end(self, usage: RunUsage) -> None:
        status = self._record.status
        status.status = "idle"
        status.usage += usage
        status.last_active = self._invocation.now
        self._ctx.set(SESSION, self._record, serde=_RECORD)
        if self._when_idle is not None and status.last_active is not None:
            self._when_idle(status.last_active)


async def _read(ctx: ObjectContext, invocation: Invocation, keys: list[str]) -> dict[str, _Part]:
    """Return what is stored under `keys`; it goes into the journal only if the server does not send it along."""
    sent = invocation.preloaded
    preloaded: Mapping[str, bytes] = {} if sent is None else sent.state()
    codec: JournalValueCodec | None = cast(Any, ctx).journal_codec

    async def missing() -> list[str]:
        return [key for key in keys if key not in preloaded]

    left_out = cast("list[str]", await run_step(SESSION_OPENED, missing, StepOptions()))
    parts: dict[str, _Part] = {}
    for key in keys:
        if key in left_out:
            value = await _get(ctx, key)
        elif key in preloaded:
            value = preloaded[key] if codec is None else await codec.decode(preloaded[key])
        else:
            raise RuntimeError(
                f"The server sent the state {key!r} along with an earlier attempt of this invocation and does not "
                "any more. Was `worker.invoker.eager-state-size-limit` lowered? Restate will try again."
            )
        parts[key] = _Part(MESSAGES.deserialize(value), value)
    return parts


async def _get(ctx: AnyObjectContext, key: str) -> bytes:
    value = await ctx.get(key, serde=_BYTES)
    if value is None:
        raise TerminalError(
            f"The session {ctx.key()!r} was cleared while it was read: {key!r} is gone.",
            status_code=409,
        )
    return value


def _joined(groups: Iterable[list[ModelMessage]]) -> list[ModelMessage]:
    return [message for group in groups for message in group]


def _part(messages: list[ModelMessage]) -> _Part:
    return _Part(messages, MESSAGES.serialize(messages))


def _normal(parts: Mapping[str, _Part]) -> list[ModelMessage]:
    """Return the messages as a run takes them: adjacent requests, of two turns, are merged."""
    messages = _joined(part.messages for part in parts.values())
    return repair_messages(messages, repair_last_response=False)


def _check_size(parts: Mapping[str, _Part]) -> None:
    size = sum(len(part.value) for part in parts.values())
    if size > MAX_SESSION_SIZE:
        raise TerminalError(
            f"With this turn the messages of the session would have {size} bytes, more than the {MAX_SESSION_SIZE} "
            "that can be stored. Pass URLs instead of large files, shorten the history with a history "
            "processor, or clear the session.",
            status_code=413,
        )


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
