"""The test's view of one invocation: run it, crash it, replay it, and read its journal."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from pydantic_ai.exceptions import UserError
from pydantic_core import from_json
from restate import TerminalError

from durable._sdk import Handler, handler_from_callable
from durable.testing._attempt import Attempt, JournalMismatch
from durable.testing._server import (
    InMemoryServer,
    Result,
    Stub,
    failure,
    success,
    terminal_error,
    to_body,
)
from durable.testing._wire import Kind, Message, packed

OutputT = TypeVar("OutputT")

_JOURNAL_MISMATCH = 570
_MOST_PLANNED_RETRIES = 10_000  # those of a step's own options, which Restate does not limit
_LAST_BUILT_IN_SIGNAL = 15

_NAMED_BY_ENTRY = frozenset({Kind.RUN, Kind.SLEEP})
_CALLS = frozenset({Kind.CALL, Kind.ONE_WAY_CALL})


class Suspended(Exception):
    """The invocation waits for something that only the test can give it."""

    def __init__(
        self, *, awakeables: list[str], promises: list[str], signals: list[str], other: list[str]
    ) -> None:
        """Describe what the invocation waits for."""
        self.awakeables = awakeables
        """Ids of the awakeables, for `resolve_awakeable`."""
        self.promises = promises
        """Names of the promises, for `resolve_promise`."""
        self.signals = signals
        """Names of the signals, for `resolve_signal`."""
        waits = [
            *(f"awakeable {name!r}: `resolve_awakeable`" for name in awakeables),
            *(f"promise {name!r}: `resolve_promise`" for name in promises),
            *(f"signal {name!r}: `resolve_signal`" for name in signals),
            *other,
        ]
        super().__init__(
            f"The invocation waits for {'; '.join(waits)}. Settle it, then call `run()` again."
        )


class StillFailing(Exception):
    """The invocation failed again and again without progress: Restate would pause it, or go on trying."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One operation of the handler, as the journal has it."""

    kind: str
    """As in Restate's `sys_journal`: `Run`, `Sleep`, `Call`, `OneWayCall`, `SetState`, `Signal`..."""

    name: str
    """Of a step or sleep, `{service}/{handler}` of a call, the key of state, a promise's name."""

    request: Any = None
    """What the handler passed: a call's request, the new value of state or of a promise."""

    value: Any = None
    """What the handler gets: JSON as Python values, or bytes."""

    failure: TerminalError | None = None
    """What the handler gets instead, if the operation failed for good."""

    done: bool = True
    """Whether the operation is completed."""


class InMemoryInvocation(Generic[OutputT]):
    """One invocation of a handler, run without a server; see `durable.testing` for an example."""

    def __init__(
        self,
        handler: Callable[..., Awaitable[OutputT]],
        request: object = None,
        *,
        key: str = "",
        state: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
        calls: Mapping[Any, object] | None = None,
        crash_after: int | None = None,
        max_attempts: int = 70,
        seed: int = 0,
    ) -> None:
        """Prepare the invocation; nothing runs before `run`.

        Args:
            handler: A function decorated with `@service.handler()` or `@workflow.main()`.
            request: The body of the request: bytes are sent as they are, anything else as JSON.
            key: Of the virtual object or workflow.
            state: Of the virtual object or workflow, as JSON-compatible values.
            headers: Of the request.
            calls: What answers the calls to other handlers, by handler or `"{service}/{handler}"`: a
                value, or a function of the request (of key and request for objects and workflows),
                sync or async, that may raise `TerminalError`.
            crash_after: Kill the worker once, when so many steps are completed; `run` goes on from the
                journal, as Restate does.
            max_attempts: Give up after so many failed attempts without progress, those apart whose pace
                and number a step's own options say; Restate's default.
            seed: Give invocations of one handler different ids and random numbers.

        Raises:
            UserError: When `handler` is not a handler.
        """
        self._handler: Handler[Any, Any] = _handler(handler)
        self._crash_after = crash_after
        self._max_attempts = max_attempts
        self._server = InMemoryServer(
            target=_target(self._handler),
            key=key,
            body=to_body(request),
            headers=headers or {},
            state={name: to_body(value) for name, value in (state or {}).items()},
            eager_state=self._is_eager,
            stubs=dict(map(_stub, (calls or {}).items())),
            seed=seed,
        )
        self._invoked: list[str] = []
        self._executions: Counter[str] = Counter()

    # Running

    async def run(self) -> OutputT:
        """Run attempt after attempt until the handler ends, and return what the caller gets.

        Raises:
            TerminalError: The failure that the caller gets, with its status.
            Suspended: When the invocation waits for an awakeable, promise or signal.
            JournalMismatch: When an attempt does not do again what an earlier one did.
            StillFailing: When `max_attempts` attempts failed without progress.
        """
        while self._server.output is None:
            attempt = await self._attempt(crash_after=self._crash_after)
            if attempt.crashed:
                self._crash_after = None
                self._server.retry(0)
            else:
                self._judge(attempt)
        return self._result(self._server.output)

    async def run_until_crash(self, *, after: int) -> None:
        """Run until `after` steps are completed, counted from the start, then kill the worker.

        Nothing of the attempt goes on; `run` continues from the journal.

        Raises:
            AssertionError: When the handler ended before.
        """
        while self._server.output is None:
            attempt = await self._attempt(crash_after=after)
            if attempt.crashed:
                self._server.retry(0)
                return
            self._judge(attempt)
        raise AssertionError(
            f"The handler ended after {self._server.completed_steps} steps, before the crash after {after}."
        )

    async def replay(self) -> None:
        """Run the handler again on its whole journal, where it must do the same without any step.

        Raises:
            JournalMismatch: At the first difference: another operation, a step whose body runs, or
                another output.
        """
        attempt = await self._attempt(replaying=True)
        ending = attempt.ending
        if ending is None or ending.type == Kind.ERROR:
            raise JournalMismatch(
                ending.text(2) if ending is not None else "The replay ended without an outcome."
            ) from attempt.error
        if ending.type == Kind.SUSPENSION and self._server.output is not None:
            raise JournalMismatch(
                f"The first execution ended, but its replay does not: {self._suspended(ending)}"
            )

    async def _attempt(self, *, crash_after: int | None = None, replaying: bool = False) -> Attempt:
        attempt = Attempt(self._server, crash_after=crash_after, replaying=replaying)
        await attempt.run(self._handler)
        self._invoked = attempt.invoked
        self._executions.update(attempt.invoked)
        problem, self._server.problem = self._server.problem, None
        if problem is not None:
            raise problem
        return attempt

    def _judge(self, attempt: Attempt) -> None:
        """Decide after an attempt that did not crash whether there is another one."""
        ending = attempt.ending
        assert ending is not None, "The attempt ended without saying how."
        if ending.type == Kind.SUSPENSION:
            raise self._suspended(ending)
        if ending.type == Kind.END:
            return
        if ending.number(1) == _JOURNAL_MISMATCH:
            raise JournalMismatch(ending.text(2)) from attempt.error
        delay = ending.number(8) / 1000 if 8 in ending.fields else None
        self._server.retry(delay)
        limit = self._max_attempts if delay is None else _MOST_PLANNED_RETRIES
        if self._server.retries >= limit:
            raise StillFailing(
                f"The handler failed {limit} times without progress. The last failure: {ending.text(2)}"
            ) from attempt.error

    def _suspended(self, ending: Message) -> Suspended:
        commands = {entry.number(11): entry for entry in self._server.entries if entry.is_command}
        waiting = [commands[number] for number in packed(ending.fields.get(1, []))]
        promises = [entry for entry in waiting if entry.type == Kind.GET_PROMISE]
        return Suspended(
            awakeables=[
                self._server.awakeable_id(number)
                for number in packed(ending.fields.get(2, []))
                if number > _LAST_BUILT_IN_SIGNAL
            ],
            promises=[entry.text(1) for entry in promises],
            signals=[name.decode() for name in ending.fields.get(3, []) if isinstance(name, bytes)],
            other=[
                f"{entry.kind.label} {_name(entry)!r}" for entry in waiting if entry not in promises
            ],
        )

    def _result(self, output: Message) -> OutputT:
        for error in output.nested(15):
            raise terminal_error(error)
        (value,) = output.nested(14)
        serde = self._handler.handler_io.output_serde
        return cast(OutputT, serde.deserialize(value.data(1) or b""))

    # What the test does to it from outside

    def resolve_awakeable(self, awakeable_id: str, value: object = None) -> None:
        """Complete an awakeable; its id is in `Suspended.awakeables`, or where the handler sent it."""
        self._server.signal(self._awakeable(awakeable_id), success(to_body(value)))

    def reject_awakeable(self, awakeable_id: str, message: str, *, status_code: int = 500) -> None:
        """Fail an awakeable: the handler gets a `TerminalError`."""
        self._server.signal(self._awakeable(awakeable_id), failure(message, status_code))

    def resolve_promise(self, name: str, value: object = None) -> None:
        """Complete a promise of the workflow."""
        self._settle_promise(name, success(to_body(value)))

    def reject_promise(self, name: str, message: str, *, status_code: int = 500) -> None:
        """Fail a promise of the workflow: the handler gets a `TerminalError`."""
        self._settle_promise(name, failure(message, status_code))

    def resolve_signal(self, name: str, value: object = None) -> None:
        """Send a named signal."""
        self._server.signal(name, success(to_body(value)))

    def reject_signal(self, name: str, message: str, *, status_code: int = 500) -> None:
        """Send a named signal as a failure: the handler gets a `TerminalError`."""
        self._server.signal(name, failure(message, status_code))

    def cancel(self) -> None:
        """Cancel the invocation; `run` then lets the handler clean up."""
        self._server.cancel()

    def _awakeable(self, awakeable_id: str) -> int:
        number = self._server.awakeable_signal(awakeable_id)
        if number is None:
            raise UserError(f"{awakeable_id!r} is not an awakeable of this invocation.")
        return number

    def _settle_promise(self, name: str, result: Result) -> None:
        if not self._server.settle_promise(name, result):
            raise UserError(f"The promise {name!r} is already completed.")

    # What the test reads

    @property
    def id(self) -> str:
        """The invocation's id, `ctx.request().id`."""
        return self._server.debug_id

    @property
    def invoked(self) -> list[str]:
        """Names of the steps whose body began in the last attempt, in order."""
        return list(self._invoked)

    @property
    def executions(self) -> Counter[str]:
        """How often the body of the steps of each name began, over all attempts."""
        return Counter(self._executions)

    @property
    def state(self) -> dict[str, Any]:
        """The state of the virtual object or workflow."""
        return {name: _value(value) for name, value in self._server.state.items()}

    @property
    def stored(self) -> list[Entry]:
        """The handler's operations with their results, in the order they were made."""
        results = self._server.results()
        return [
            self._entry(entry, results)
            for entry in self._server.entries
            if (entry.is_command or entry.type == Kind.SIGNAL)
            and entry.type not in {Kind.INPUT, Kind.OUTPUT}
        ]

    @property
    def journal(self) -> list[str]:
        """All entries in order, completions too, as `sys_journal` shows them: `Command: Run step`."""
        return [
            f"{'Command' if entry.is_command else 'Notification'}: {entry.kind.label} "
            f"{entry.text(12) if entry.is_command else ''}".rstrip()
            for entry in self._server.entries
        ]

    def _entry(self, entry: Message, results: Mapping[int, Message]) -> Entry:
        if entry.type == Kind.SIGNAL:
            name = entry.text(3) or self._server.awakeable_id(entry.number(2))
            return Entry(kind=entry.kind.label, name=name, **_outcome(entry))
        completion = entry.number(11) or (entry.number(10) if entry.kind in _CALLS else 0)
        result = results.get(completion) if completion else entry
        return Entry(
            kind=entry.kind.label,
            name=_name(entry),
            request=_request(entry),
            done=result is not None,
            **({} if result is None or result is entry else _outcome(result)),
        )

    def _is_eager(self, name: str) -> bool:
        """Whether the worker gets the state `name` in advance; empty stands for any other name."""
        preload = self._handler.state_preload
        if self._handler.enable_lazy_state or preload is False:
            return False
        return not isinstance(preload, list) or name in preload


async def check_every_crash(
    handler: Callable[..., Awaitable[OutputT]],
    request: object = None,
    *,
    drive: Callable[[InMemoryInvocation[OutputT]], Awaitable[OutputT]] | None = None,
    **options: Any,
) -> OutputT:
    """Run `handler` undisturbed, then once per step with the worker killed after that step.

    Each time the output and the steps must be the same, no completed step may be executed again, and a
    replay of the whole journal must change nothing. Steps that a kill cuts off are executed again, as
    on the server, so count side effects only where steps do not run beside each other.

    Args:
        handler: See `InMemoryInvocation`.
        request: See `InMemoryInvocation`.
        drive: Runs one invocation to its end instead of `run`, for handlers that wait for something:
            resolves what `run` raises `Suspended` for and runs on.
        options: The other options of `InMemoryInvocation`, apart from `crash_after`.

    Returns:
        What the caller gets.

    Raises:
        AssertionError: At the first difference, `JournalMismatch` if it is one of operations.
        TerminalError: When the handler ends with it, without a crash and after each.
    """
    undisturbed = InMemoryInvocation(handler, request, **options)
    expected = await _outcome_of(drive, undisturbed)
    await undisturbed.replay()
    steps = _steps(undisturbed)
    for number in range(
        1, sum(entry.done for entry in undisturbed.stored if entry.kind == "Run") + 1
    ):
        crashed = InMemoryInvocation(handler, request, crash_after=number, **options)
        outcome = await _outcome_of(drive, crashed)
        if outcome != expected:
            raise AssertionError(
                f"With a crash after step {number} the handler ends with {outcome[1]!r}, without with "
                f"{expected[1]!r}."
            )
        if _steps(crashed) != steps:
            raise AssertionError(
                f"With a crash after step {number} the steps are {dict(_steps(crashed))}, without "
                f"{dict(steps)}."
            )
        await crashed.replay()
    return await undisturbed.run()


async def _outcome_of(
    drive: Callable[[InMemoryInvocation[OutputT]], Awaitable[OutputT]] | None,
    invocation: InMemoryInvocation[OutputT],
) -> tuple[type, object]:
    try:
        output = await (invocation.run() if drive is None else drive(invocation))
    except TerminalError as error:
        return TerminalError, (error.status_code, error.message)
    return type(output), output


def _steps(invocation: InMemoryInvocation[Any]) -> Counter[str]:
    return Counter(entry.name for entry in invocation.stored if entry.kind == "Run")


def _handler(handler: Callable[..., Any]) -> Handler[Any, Any]:
    try:
        return handler_from_callable(cast(Any, handler))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{handler!r} is not a handler: decorate it with `@service.handler()`."
        ) from error


def _target(handler: Handler[Any, Any]) -> str:
    return f"{handler.service_tag.name}/{handler.name}"


def _stub(call: tuple[Callable[..., Any] | str, object]) -> tuple[str, Stub]:
    callee, answer = call
    handler = None if isinstance(callee, str) else _handler(callee)
    name = callee if isinstance(callee, str) else _target(_handler(callee))
    return name, Stub(name, answer, handler)


def _name(entry: Message) -> str:
    if entry.kind in _CALLS:
        return f"{entry.text(1)}/{entry.text(2)}"
    return entry.text(12) if entry.kind in _NAMED_BY_ENTRY else entry.text(1)


def _request(entry: Message) -> Any:
    if entry.kind in _CALLS:
        return _value(entry.data(3) or b"")
    field = {Kind.SET_STATE: 3, Kind.COMPLETE_PROMISE: 2, Kind.COMPLETE_AWAKEABLE: 2}.get(
        entry.kind
    )
    nested = entry.nested(field) if field else []
    return _value(nested[-1].data(1) or b"") if nested else None


def _outcome(result: Message) -> dict[str, Any]:
    for error in result.nested(6):
        return {"failure": terminal_error(error)}
    for value in result.nested(5):
        return {"value": _value(value.data(1) or b"")}
    for keys in result.nested(17):
        return {"value": [key.decode() for key in keys.fields.get(1, []) if isinstance(key, bytes)]}
    return {"value": result.text(16) or None}


def _value(data: bytes) -> Any:
    if not data:
        return None
    try:
        return from_json(data)
    except ValueError:  # another serde than JSON
        return data
