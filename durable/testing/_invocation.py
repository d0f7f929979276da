"""The test's view of one invocation: run it, crash it, replay it, and read its journal."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeVar, cast

from pydantic_ai.exceptions import UserError

from durable._sdk import Handler, handler_from_callable
from durable._wire import Kind, Message, packed
from durable.testing._attempt import Attempt, JournalMismatch
from durable.testing._entries import Entry, line, name, read, stored
from durable.testing._server import (
    InMemoryServer,
    Result,
    Stub,
    failure,
    success,
    terminal_error,
    to_body,
)

OutputT = TypeVar("OutputT")

_JOURNAL_MISMATCH = 570
_MOST_PLANNED_RETRIES = 10_000  # those of a step's own options, which Restate does not limit
_LAST_BUILT_IN_SIGNAL = 15


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
                f"{entry.kind.label} {name(entry)!r}" for entry in waiting if entry not in promises
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
        return {name: read(value) for name, value in self._server.state.items()}

    @property
    def stored(self) -> list[Entry]:
        """The handler's operations with their results, in the order they were made."""
        return stored(self._server)

    @property
    def journal(self) -> list[str]:
        """All entries in order, completions too, as `sys_journal` shows them: `Command: Run step`."""
        return [line(entry) for entry in self._server.entries]

    def _is_eager(self, name: str) -> bool:
        """Whether the worker gets the state `name` in advance; empty stands for any other name."""
        preload = self._handler.state_preload
        if self._handler.enable_lazy_state or preload is False:
            return False
        return not isinstance(preload, list) or name in preload


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
