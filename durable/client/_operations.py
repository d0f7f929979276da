"""Everything that the clients do, once, without I/O: exchanges with the server and what they make of the answers."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Final, Generic, Literal, TypedDict, TypeVar, cast

import httpx2
from pydantic import JsonValue, TypeAdapter
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelMessage, UserContent
from pydantic_core import from_json, to_json
from restate import VirtualObject

from durable import _agent_run
from durable._agent_run import Answer, Approve, Deny, PendingCall, SteeringMessage, Supply
from durable._agent_session import SessionMessage
from durable._sessions import SessionStatus
from durable._tracing import trace_headers
from durable.client._errors import (
    ClientError,
    Conflict,
    NotFound,
    NotReady,
    RejectedInput,
    RunFailed,
)
from durable.client._exchange import Exchange, Request, exchange
from durable.client._invocations import Handle, Invocation, Payloads, Step
from durable.client._server import Server
from durable.client._targets import Target, read_json, target, typed

OutputT = TypeVar("OutputT")

_BRIEF = 30.0
"""Seconds for what needs no run to end."""

_NOT_FOUND, _CONFLICT = 404, 409
_TIME = TypeAdapter(datetime)
_COLUMNS = [it.validation_alias or name for name, it in Invocation.model_fields.items()]
# restate-server 1.7 answers `scheduled_start_at` only beside `scheduled_at`
_INVOCATIONS = f"SELECT {', '.join(map(str, _COLUMNS))}, scheduled_at FROM sys_invocation"


class _Derived(Enum):
    """An idempotency key that is a hash of the handler, the key and the input."""

    DERIVED = "derived"


DERIVED: Final = _Derived.DERIVED


IdempotencyKey = str | Literal[_Derived.DERIVED]


class TurnOptions(TypedDict, total=False):
    """Options of a message in a session."""

    idempotency_key: IdempotencyKey | None
    """Calls of a handler with the same key are one invocation, and get its result; `DERIVED` makes one of the input
    as it is sent: where that has no fixed order, as with sets and dicts, give a key of your own."""

    timeout: timedelta | None
    """How long to wait for the output. The run goes on without the caller."""


class CallOptions(TurnOptions, total=False):
    """Options of a call."""

    key: str | None
    """The key of the virtual object, or of the workflow."""


class SendOptions(TypedDict, total=False):
    """Options of a call that nobody waits for."""

    key: str | None
    """The key of the virtual object, or of the workflow."""

    idempotency_key: IdempotencyKey | None
    """Calls of a handler with the same key are one invocation; `DERIVED` makes one of the input, as in a call."""

    delay: timedelta
    """When it begins, from now."""


@dataclass(frozen=True)
class Operations:
    """What can be asked of a server."""

    server: Server

    # handlers

    def call(
        self, handler: Callable[..., Any] | str | Target[Any], input: Any, **options: Any
    ) -> Exchange[Any]:
        """Call a handler and wait for its output."""
        it = target(handler)
        request = self._request(it, input, **options)
        try:
            answer = yield from self._patiently(request, **options)
        except RunFailed as error:
            if not (it.once and error.status == _CONFLICT and error.invocation_id):
                raise
            # that key has its run, which may have ended with this status too
            answer = yield from self._attached(error.invocation_id, **options)
        return it.decode(answer.content)

    def send(
        self,
        handler: Callable[..., Any] | str,
        input: Any,
        *,
        delay: timedelta = timedelta(0),
        **options: Any,
    ) -> Exchange[Handle[Any]]:
        """Call a handler and return at once."""
        if delay < timedelta(0):
            raise RejectedInput(f"`delay` must not be negative, got {delay!r}.")
        request = self._request(target(handler), input, **options)
        milliseconds = delay // timedelta(milliseconds=1)
        request = replace(
            request,
            path=(*request.path, "send"),
            params={"delay": f"{milliseconds}ms"} if milliseconds else {},
        )
        answer = yield from self._briefly(request)
        function = None if isinstance(handler, str) else handler
        return Handle(answer.json()["invocationId"], function)

    def _request(
        self,
        it: Target[Any],
        input: Any,
        *,
        key: str | None = None,
        idempotency_key: IdempotencyKey | None = None,
        **_: Any,
    ) -> Request:
        path, body = it.path(key), it.encode(input)
        if idempotency_key is DERIVED:
            idempotency_key = hashlib.sha256(to_json(path) + body).hexdigest()
        headers = trace_headers()
        if body:
            headers["content-type"] = it.content_type
        if idempotency_key is not None:
            if not (
                idempotency_key.isascii()
                and idempotency_key.isprintable()
                and idempotency_key.strip()
            ):
                raise RejectedInput(
                    f"The idempotency key {idempotency_key!r} cannot be sent: it must be printable ASCII."
                )
            headers["idempotency-key"] = idempotency_key
        return Request(
            method="POST",
            path=path,
            body=body,
            headers=headers,
            repeatable=it.once or idempotency_key is not None,
        )

    # results

    def attach(self, handle: Handle[OutputT], **options: Any) -> Exchange[OutputT]:
        """Wait until a run ends, and return its output."""
        answer = yield from self._attached(handle.invocation_id, **options)
        return _decoded(handle, answer)

    def output(self, handle: Handle[OutputT]) -> Exchange[OutputT]:
        """Return the output of a run that has ended."""
        answer = yield from self._briefly(_result(handle.invocation_id, "output"))
        return _decoded(handle, answer)

    def _attached(self, invocation_id: str, **options: Any) -> Exchange[httpx2.Response]:
        try:
            return (yield from self._patiently(_result(invocation_id, "attach"), **options))
        except RunFailed as error:
            if error.status != _NOT_FOUND:
                raise
            # an invocation that is not there, or one that ended with this status: only `output` tells
            return (yield from self._briefly(_result(invocation_id, "output")))

    # the life of an invocation

    def status(self, handle: Handle[Any]) -> Exchange[Invocation]:
        """Return how an invocation is."""
        rows = yield from self.query(f"{_INVOCATIONS} WHERE id = '{handle}'")
        if not rows:
            raise NotFound(f"There is no invocation {handle}, or the server has forgotten it.")
        return Invocation.model_validate(rows[0])

    def invocations(
        self, *, service: str | None, status: str | None, limit: int
    ) -> Exchange[list[Invocation]]:
        """Return invocations, the latest first."""
        if limit < 1:
            raise RejectedInput(f"`limit` must be positive, got {limit}.")
        wanted = {"target_service_name": service, "status": status}
        conditions = [f"{name} = {_quoted(it)}" for name, it in wanted.items() if it is not None]
        where = f"WHERE {' AND '.join(conditions)} " if conditions else ""
        rows = yield from self.query(
            f"{_INVOCATIONS} {where}ORDER BY created_at DESC LIMIT {limit:d}"
        )
        return [Invocation.model_validate(row) for row in rows]

    def change(
        self, handle: Handle[Any], change: Literal["cancel", "kill", "resume"]
    ) -> Exchange[None]:
        """Cancel, kill or resume an invocation."""
        yield from self._briefly(
            Request(method="PATCH", path=_invocation(handle, change), admin=True)
        )

    def steps(self, handle: Handle[Any]) -> Exchange[list[Step]]:
        """Return the steps of a run."""
        journal = JournalReader(self, handle)
        yield from journal.read()
        return sorted(journal.steps.values(), key=lambda step: step.index)

    def payloads(self, handle: Handle[Any]) -> Exchange[Payloads]:
        """Return what a run was given and what it returned."""
        invocation = yield from self.status(handle)
        if invocation.status != "completed":
            raise NotReady(f"{handle} has not ended yet: it is {invocation.status}.")
        if invocation.failure is not None:
            raise Conflict(f"{handle} has no output: it failed ({invocation.failure}).")
        rows = yield from self.query(
            f"SELECT entry_json FROM sys_journal WHERE id = '{handle}' "
            "AND entry_type IN ('Command: Input', 'Command: Output') ORDER BY index"
        )
        if len(rows) < 2:
            raise NotFound(f"The journal of {handle} is gone: the server keeps it for a time.")
        given, returned = (from_json(row["entry_json"])["Command"] for row in rows)
        output = returned["Output"]["result"]["Success"]
        return Payloads(bytes(given["Input"]["payload"]), bytes(output))

    def restart_from(self, handle: Handle[OutputT], step: Step | str) -> Exchange[Handle[OutputT]]:
        """Begin a new run with what a completed one had before `step`."""
        steps = yield from self.steps(handle)
        name, index = (step, None) if isinstance(step, str) else (step.name, step.index)
        found = [it for it in steps if it.name == name and index in {None, it.index}]
        if len(found) != 1:
            names = ", ".join(f"{it.index}: {it.name}" for it in steps) or "none"
            raise RejectedInput(
                f"{handle} has {'no' if not found else 'more than one'} step {name!r}. Its steps, of which "
                f"`restart_from` takes one from `client.steps`: {names}."
            )
        answer = yield from self._briefly(
            Request(
                method="PATCH",
                path=_invocation(handle, "restart-as-new"),
                admin=True,
                params={"from": str(found[0].index - 1)},
                repeatable=False,
            )
        )
        return Handle(answer.json()["new_invocation_id"], handler=handle.handler)

    # waiting for others

    def resolve_awakeable(self, id: str, value: JsonValue) -> Exchange[None]:
        """Give an awakeable its value."""
        yield from self._briefly(
            Request(
                method="POST",
                path=("restate", "awakeables", id, "resolve"),
                body=to_json(value),
                headers={"content-type": "application/json"},
            )
        )

    def reject_awakeable(self, id: str, reason: str) -> Exchange[None]:
        """Fail whoever waits for an awakeable."""
        yield from self._briefly(
            Request(
                method="POST",
                path=("restate", "awakeables", id, "reject"),
                body=reason.encode(),
                headers={"content-type": "text/plain"},
            )
        )

    def pending(self, handle: Handle[Any]) -> Exchange[list[PendingCall]]:
        """Return the calls of a run that wait for an answer."""
        return (yield from self._agent_run(_agent_run.pending, handle, None))

    def answer(self, handle: Handle[Any], decision: Approve | Deny | Supply) -> Exchange[None]:
        """Answer a call of a run."""
        yield from self._agent_run(_agent_run.answer, handle, Answer(decision))

    def steer(
        self, handle: Handle[Any], message: SteeringMessage | str | list[UserContent]
    ) -> Exchange[None]:
        """Give a run a message."""
        if not isinstance(message, SteeringMessage):
            message = SteeringMessage(content=message)
        yield from self._agent_run(_agent_run.steer, handle, message)

    def stop(self, handle: Handle[Any]) -> Exchange[None]:
        """Stop a run."""
        yield from self._agent_run(_agent_run.stop, handle, None)

    def _agent_run(
        self, handler: Callable[..., Any], handle: Handle[Any], input: Any
    ) -> Exchange[Any]:
        try:
            return (yield from self.call(handler, input, key=handle.invocation_id))
        except RunFailed as error:  # of the handler of `AgentRun`, which says it about `handle`
            kinds: dict[int | None, type[ClientError]] = {_NOT_FOUND: NotFound, _CONFLICT: Conflict}
            if error.status in kinds:
                raise kinds[error.status](error.message, status=error.status) from None
            raise

    # sending

    def query(self, sql: str) -> Exchange[list[dict[str, Any]]]:
        """Return the rows of a query to the server's tables."""
        answer = yield from self._briefly(
            Request(
                method="POST",
                path=("query",),
                admin=True,
                body=to_json({"query": sql}),
                headers={"content-type": "application/json", "accept": "application/json"},
            )
        )
        return cast("list[dict[str, Any]]", answer.json()["rows"])

    def _patiently(
        self, request: Request, *, timeout: timedelta | None = None, **_: Any
    ) -> Exchange[httpx2.Response]:
        timeout = self.server.timeout if timeout is None else timeout
        seconds = None if timeout is None else timeout.total_seconds()
        return exchange(request, seconds=seconds, retries=self.server.retries)

    def _briefly(self, request: Request) -> Exchange[httpx2.Response]:
        if request.admin and self.server.admin_url is None:
            raise UserError(
                "That is asked of Restate's admin API, whose address the client does not know: "
                "`Client(..., admin_url='http://localhost:9070')`."
            )
        seconds = _BRIEF if self.server.timeout is None else self.server.timeout.total_seconds()
        return exchange(request, seconds=seconds, retries=self.server.retries)


class JournalReader:
    """Reads the steps of a run as they come."""

    def __init__(self, operations: Operations, handle: Handle[Any]) -> None:
        self._operations = operations
        self._handle = handle
        self._next = 0
        self.ended = False
        """Whether there is nothing more to come."""
        self.steps: dict[int, Step] = {}
        """By what connects the two entries of a step."""

    def read(self) -> Exchange[list[Step]]:
        """Return the steps that have begun or ended since the last time."""
        # before the journal: what is in it when the run has ended, is all
        invocation = yield from self._operations.status(self._handle)
        rows = yield from self._operations.query(
            "SELECT index, name, entry_type, entry_lite_json, appended_at FROM sys_journal "
            f"WHERE id = '{self._handle}' AND index >= {self._next} "
            "AND entry_type IN ('Command: Run', 'Notification: Run') ORDER BY index"
        )
        changed: dict[int, Step] = {}
        for row in rows:
            self._next = row["index"] + 1
            id, step = self._step(row)
            self.steps[id] = changed[id] = step
        self.ended = invocation.status == "completed"
        return sorted(changed.values(), key=lambda step: step.index)

    def _step(self, row: Mapping[str, Any]) -> tuple[int, Step]:
        entry, at = from_json(row["entry_lite_json"]), _TIME.validate_python(row["appended_at"])
        if row["entry_type"] == "Command: Run":
            id = entry["Command"]["Run"]["completion_id"]
            return id, Step(row["index"], row.get("name", ""), "running", at)
        id = entry["Notification"]["id"]["CompletionId"]
        result = entry["Notification"]["result"]
        status = "completed" if result == "Success" else "failed"
        return id, replace(self.steps[id], status=status, ended_at=at)


class SessionTargets(Generic[OutputT]):
    """The handlers of a `durable.agent_session`."""

    def __init__(self, sessions: VirtualObject | str, output_type: type[OutputT]) -> None:
        name = sessions if isinstance(sessions, str) else sessions.name
        self.message: Target[OutputT] = typed(name, "message", SessionMessage, output_type)
        self.history: Target[list[ModelMessage]] = typed(name, "history", None, list[ModelMessage])
        self.status: Target[SessionStatus] = typed(name, "status", None, SessionStatus)
        self.clear: Target[None] = typed(name, "clear", None, None)


def _result(invocation_id: str, what: Literal["attach", "output"]) -> Request:
    return Request(method="GET", path=("restate", "invocation", invocation_id, what))


def _decoded(handle: Handle[OutputT], answer: httpx2.Response) -> OutputT:
    read = read_json if handle.handler is None else target(handle.handler).decode
    return read(answer.content)


def _invocation(handle: Handle[Any], what: str) -> tuple[str, ...]:
    return ("invocations", handle.invocation_id, what)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
