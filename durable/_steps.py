"""Executing the steps of an invocation attempt on the host loop.

Steps run beside each other. Two rules keep them from hurting each other and from costing more than
they must:

- A step whose failure Restate will retry ends the attempt, and with it the steps that still run: they
  would run again, side effects included. So it waits until they have ended and their results are on
  the way, and no new step begins meanwhile. (The core of the SDK may also decide that its retries are
  used up; then the attempt goes on, and so do the steps that were held back.)
- The start of a step is not sent at once but waits a few milliseconds for the step's end, so that both
  travel in one message. A longer step is visible in the journal while it runs.
"""

import asyncio
import inspect
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from typing import Any

from restate import TerminalError

from durable._context import step_scope
from durable._errors import exceptions_only, step_failure

Step = Callable[[], Coroutine[Any, Any, None]]

FLUSH_DELAY = 0.004
"""Seconds that the start of a step waits for the step's end."""

_LOOK_AGAIN: Any = {"type": "restate.run_completed", "data": None}
"""The event of the SDK that makes the driver look at what there is to do."""


class Steps(dict[int, Step]):
    """The steps of an attempt that wait to be executed, by handle: stands in for the SDK's dict."""

    def __init__(self, context: Any) -> None:
        """Take over the steps of the SDK's `context`. Call it on the host loop."""
        super().__init__()
        self._host = asyncio.get_running_loop()
        self._receive = context.receive
        self._tasks = context.tasks
        self._contexts: dict[int, Context] = {}
        self._executing = 0
        self._held: deque[tuple[Step, Context]] = deque()
        self._failing: dict[int, asyncio.Future[None]] = {}
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flush_due = False
        self._execute = context.create_run_coroutine
        context.create_run_coroutine = self._execute_beside_others
        context.run_coros_to_execute = self

    def __setitem__(self, handle: int, step: Step) -> None:
        """Remember the context variables of the code that created the step: its body sees them."""
        super().__setitem__(handle, step)
        self._contexts[handle] = copy_context()

    def begin(self, handle: int) -> None:
        """Start executing a step."""
        self._held.append((self.pop(handle), self._contexts.pop(handle)))
        self.begin_held()

    def begin_held(self) -> None:
        """Start executing the steps that were held back, unless a failure may still end the attempt."""
        while self._held and not self._failing:
            self._begin(*self._held.popleft())

    def _begin(self, step: Step, context: Context) -> None:
        if self._flush_timer is None:
            self._flush_timer = self._host.call_later(FLUSH_DELAY, self._flush_now)
        self._executing += 1
        self._tasks.add(self._host.create_task(self._run(step), context=context))

    def may_flush(self) -> bool:
        """Return whether to send now: no step has just started that may end within the flush delay."""
        if self._flush_timer is None:
            return True
        if self._executing and not self._flush_due:
            return False
        self._flush_timer.cancel()
        self._flush_timer, self._flush_due = None, False
        return True

    def _flush_now(self) -> None:
        # the timer decides, not the clock: however late it is, a step that needs one turn of the loop has ended
        self._flush_due = True
        self.wake_driver()

    async def _run(self, step: Step) -> None:
        try:
            with step_scope():
                await step()
        finally:
            self._executing -= 1
            self._release_failures()
            await self._receive.enqueue_restate_event(_LOOK_AGAIN)

    def wake_driver(self) -> None:
        """Make the driver look again at what there is to do."""
        self._host.create_task(self._receive.enqueue_restate_event(_LOOK_AGAIN))

    async def _execute_beside_others(
        self, handle: int, action: Callable[[], Any], *options: Any
    ) -> None:
        async def body() -> Any:
            try:
                with exceptions_only("The step"):
                    if inspect.iscoroutinefunction(action):
                        return await action()
                    call = partial(_in_thread, action)
                    return await self._host.run_in_executor(None, copy_context().run, call)
            except Exception as error:
                failure = step_failure(error)
                if not isinstance(failure, TerminalError):
                    self._failing[handle] = siblings_ended = self._host.create_future()
                    self._release_failures()
                    await siblings_ended
                if failure is error:
                    raise
                raise failure from failure.__cause__ or error

        try:
            await self._execute(handle, body, *options)
        finally:
            self._failing.pop(handle, None)  # the core has decided whether the attempt ends

    def _release_failures(self) -> None:
        if self._executing <= len(self._failing):
            for siblings_ended in self._failing.values():
                if not siblings_ended.done():
                    siblings_ended.set_result(None)


def _in_thread(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except StopIteration as error:  # cannot be raised into the future that waits for the thread
        raise RuntimeError("The step raised StopIteration.") from error
