"""One driver per invocation attempt: any number of tasks may wait for durable operations at once.

restate-sdk lets each awaited future poll for itself, and all of them read one queue: two tasks take
each other's wake-ups and hang. Here a task that waits registers what it waits for, and one driver
polls for all of them. It runs on the host event loop, as do the bodies of steps; handler code runs on
a loop of its own (`durable._loop`).

**Invariant: the driver delivers one completion, lets handler code run until every task waits again,
and only then asks for the next one, in the first execution as in every replay.**

Why that makes a handler deterministic, by induction over completions: handler code starts from the
invocation's input. Between two completions it is a function of what was delivered (the invariant of
`durable._loop`), so the operations it creates, their order, and the set it waits for are too. Given
that set, the shared core of the SDK takes completions from the journal in journal order until one of
the set is complete. The journal has one order, so the next completion is the same one in each
execution. Where a step's result comes from its body, it counts as complete only when the server has
stored it and sent it back, which is the order that replays see.

    handler code ── waits ──> driver ── do_progress ──> core of the SDK <── messages ── server
         ^                      │  └── executes steps on the host loop ──┘
         └── one completion ────┘
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from math import ceil
from typing import Any, TypeVar

from opentelemetry.trace import Span
from pydantic_ai.exceptions import UserError
from restate import TerminalError
from restate.exceptions import SdkInternalException, SuspendedException

from durable._errors import exceptions_only
from durable._loop import AttemptOver, HandlerLoop, sleeping
from durable._names import AGENT_RUN, TIMER
from durable._sdk import (
    AllCompletedUnresolvedFuture,
    DisconnectedException,
    DoProgressAnyCompleted,
    DoProgressCancelSignalReceived,
    DoProgressExecuteRun,
    DoProgressWaitExternalProgress,
    FirstCompletedUnresolvedFuture,
    SingleUnresolvedFuture,
    Suspended,
    UnresolvedFuture,
    VMException,
)
from durable._steps import Steps
from durable._telemetry import AttemptTelemetry
from durable._tracing import Target, sleeping_span, traced_handler, waiting

T = TypeVar("T")

logger = logging.getLogger(__name__)

_MISMATCH = "(570)"
"""In the core's message when handler code makes another operation than the journal holds."""


class InvocationCancelled(TerminalError):
    """The invocation was cancelled from outside: every task that waits gets it."""

    def __init__(self) -> None:
        """Create the error with the message and status that the SDK uses."""
        super().__init__("cancelled", status_code=409)


hold_back: ContextVar[Callable[[BaseException], None] | None] = ContextVar(
    "durable.hold_back", default=None
)
"""Takes the cancellation of code that waits, which then waits on; it may let the cancellation through."""


class Driver:
    """Runs the handler code of one invocation attempt and everything it waits for."""

    def __init__(self, context: Any) -> None:
        """Take over the waiting and the steps of `context`. Call it on the host loop.

        Args:
            context: The SDK's `ServerInvocationContext` of the attempt.
        """
        self._host = asyncio.get_running_loop()
        self._context = context
        invocation = context.invocation
        self._headers = dict(invocation.headers)
        self._telemetry = AttemptTelemetry(context.vm, invocation.invocation_id, self._headers)
        self._vm = context.vm = self._telemetry.commands
        self._loop = HandlerLoop(host=self._host, attempt=self, telemetry=self._telemetry)
        self._waiters: dict[asyncio.Future[None], UnresolvedFuture] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._sleeps: dict[int, Span] = {}
        self._cancelled = False
        self._failure: Exception | None = None
        self._flush = context.take_and_send_output
        self._steps = Steps(context)
        context.create_poll_or_cancel_coroutine = self._wait
        context.take_and_send_output = _nothing_to_send

    async def run(self, handler: Coroutine[Any, Any, T]) -> T:
        """Run `handler` on the handler loop until it ends, delivering completions one by one.

        Args:
            handler: The handler code; it inherits the caller's context variables.

        Raises:
            SuspendedException: When nothing can go on before the server sends more.
            SdkInternalException: When the attempt failed and Restate will retry it.
            DisconnectedException: When the server closed the connection.
            InvocationCancelled: When the invocation was cancelled and the handler did not catch it.
        """
        context = self._context
        invocation, service = context.invocation, context.handler.service_tag
        target = Target(
            invocation=invocation.invocation_id,
            service=service.name,
            handler=context.handler.name,
            key=invocation.key or None,
            shown=service.name != AGENT_RUN or not context.handler.ingress_private,
        )
        root = self._loop.create_task(
            traced_handler(
                handler,
                target,
                headers=self._headers,
                attempt_headers=context.attempt_headers,
            )
        )
        try:
            self._loop.run_ready()
            while not root.done():
                await self._deliver(root)
                self._loop.run_ready()
            self._telemetry.ended()
            if root.cancelled():
                raise (
                    InvocationCancelled()
                    if self._cancelled
                    else RuntimeError("The handler cancelled itself.")
                )
            with exceptions_only("The handler"):
                return root.result()
        except VMException as error:
            raise self._attempt_failed(error) from None
        finally:
            self._loop.close()

    def fail(self, error: Exception) -> None:
        """End the attempt with `error`."""
        self._failure = error
        self._steps.wake_driver()

    def start_timer(self, delay: float, handle: asyncio.TimerHandle) -> None:
        """Make the durable sleep behind a timer of the handler loop."""
        number = self._vm.sys_sleep(ceil(delay * 1000), TIMER)
        self._timers[number] = handle
        if sleeping(handle):
            self._sleeps[number] = sleeping_span(delay)

    async def _wait(self, unresolved: UnresolvedFuture) -> None:
        """Wait in handler code until `unresolved` completes: the SDK awaits this for every future."""
        if asyncio.get_running_loop() is not self._loop:
            raise UserError(
                "A durable operation was awaited inside a step (`ctx.run`). Steps cannot be nested: await it "
                'in handler code, in a tool with `metadata={"restate": False}` for instance.'
            )
        while True:
            if self._loop.is_closed():
                raise AttemptOver
            waiter = self._loop.create_future()
            self._waiters[waiter] = unresolved
            try:
                with waiting(self._telemetry.waiting_for(_handles(unresolved))):
                    return await waiter
            except (InvocationCancelled, asyncio.CancelledError) as cancellation:
                if (take := hold_back.get()) is None:
                    raise
                take(cancellation)
            finally:
                self._waiters.pop(waiter, None)

    async def _deliver(self, root: asyncio.Task[Any]) -> None:
        """Get the next completion from the SDK's core and hand it to whoever waits for it."""
        awaited = self._awaited()
        while self._failure is None:
            progress = self._vm.do_progress(awaited)
            if isinstance(progress, DoProgressExecuteRun):
                self._steps.begin(progress.handle)
            elif isinstance(progress, DoProgressWaitExternalProgress):
                self._steps.begin_held()
                await self._receive()
            elif isinstance(progress, DoProgressAnyCompleted):
                self._telemetry.delivered()
                return self._complete()
            elif isinstance(progress, DoProgressCancelSignalReceived):
                self._telemetry.delivered()
                return self._cancel(root)
            else:
                await self._flush()
                if isinstance(progress, Suspended):
                    raise SuspendedException
                raise self._attempt_failed(progress)
        raise self._failure

    def _attempt_failed(self, error: Exception) -> SdkInternalException:
        """Log why the SDK's core gave the attempt up; the server knows, and retries or pauses."""
        if _MISMATCH in str(error):
            logger.error(
                "The code of `%s` does not fit the journal of %s, which an earlier version of it (or code "
                "that is not deterministic) has written: %s\nRegister the earlier version as a deployment of "
                "its own to let such invocations finish there, or cancel or restart them as new. To find code "
                "that is not deterministic, run it with `RestateServer(always_replay=True)`.",
                self._context.handler.name,
                self._context.invocation.invocation_id,
                error,
            )
        else:
            reason = str(error).partition("\n")[0]
            logger.warning("The attempt failed, Restate will retry it: %s", reason)
        return SdkInternalException()

    def _awaited(self) -> UnresolvedFuture:
        """Combine what all tasks wait for."""
        for handle, timer in list(self._timers.items()):
            if timer.cancelled():
                self._forget_timer(handle)
        awaited = [*self._waiters.values(), *map(SingleUnresolvedFuture, self._timers)]
        if not awaited:
            raise UserError(
                "The handler waits, but for nothing durable: no step, call, timer, awakeable or promise. It "
                "would wait for ever. Await a durable operation, set the event it waits for, or move the "
                "thread it waits for into a step."
            )
        return awaited[0] if len(awaited) == 1 else FirstCompletedUnresolvedFuture(awaited)

    def _complete(self) -> None:
        self._telemetry.completed(self._vm.is_completed)
        for waiter, unresolved in list(self._waiters.items()):
            if self._is_complete(unresolved) and not waiter.done():
                waiter.set_result(None)
        for handle, timer in list(self._timers.items()):
            if self._vm.is_completed(handle):
                self._vm.take_notification(handle)
                self._forget_timer(handle)
                self._loop.fire(timer)

    def _forget_timer(self, handle: int) -> None:
        del self._timers[handle]
        if (span := self._sleeps.pop(handle, None)) is not None:
            span.end()

    def _is_complete(self, unresolved: UnresolvedFuture) -> bool:
        if isinstance(unresolved, SingleUnresolvedFuture):
            return self._vm.is_completed(unresolved.handle)
        all_or_any = all if isinstance(unresolved, AllCompletedUnresolvedFuture) else any
        return all_or_any(map(self._is_complete, unresolved.children))

    def _cancel(self, root: asyncio.Task[Any]) -> None:
        """Tell every task that waits for a durable operation or sleeps; with none, the handler as a whole."""
        self._cancelled = True
        sleepers = [future for timer in self._timers.values() for future in sleeping(timer)]
        waiting = [future for future in (*self._waiters, *sleepers) if not future.done()]
        for future in waiting:
            future.set_exception(InvocationCancelled())
        if not waiting:
            root.cancel()

    async def _receive(self) -> None:
        """Wait for a message of the server or the end of a step."""
        if self._steps.may_flush():
            await self._flush()
        event: Any = await self._context.receive()
        if event["type"] == "http.disconnect":
            raise DisconnectedException
        if event["type"] == "http.request":
            if event["body"]:
                self._vm.notify_input(event["body"])
            if not event.get("more_body", False):
                self._vm.notify_input_closed()


def _handles(unresolved: UnresolvedFuture) -> Iterator[int]:
    if isinstance(unresolved, SingleUnresolvedFuture):
        yield unresolved.handle
    else:
        for child in unresolved.children:
            yield from _handles(child)


async def _nothing_to_send() -> None:
    """Stand in for the SDK's flush where handler code would call it: the driver flushes."""
