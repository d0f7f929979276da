"""One attempt of an invocation: the SDK's own worker, spoken to in memory.

Everything is the real thing but the connection: the SDK's state machine, its context, `durable.app`'s
wrapper and driver. This is the connection, seen from the worker.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, cast

from durable._app import hosted_handler
from durable._preloaded import Preloaded, attempt_preloaded
from durable._sdk import (
    DisconnectedException,
    DoProgressExecuteRun,
    Handler,
    VMWrapper,
    process_invocation_to_completion,
)
from durable._wire import CONTENT_TYPE, Kind, Message, messages
from durable.testing._server import InMemoryServer

_ENDINGS = frozenset({Kind.SUSPENSION, Kind.ERROR, Kind.END})
_SECONDS_TO_END = 5
"""How long a step that is cut off may take to end."""


class JournalMismatch(AssertionError):
    """The handler does not do again what it did before: it is not deterministic."""


class Attempt:
    """Runs a handler once, from the journal of a server."""

    def __init__(
        self, server: InMemoryServer, *, crash_after: int | None = None, replaying: bool = False
    ) -> None:
        """Create the attempt.

        Args:
            server: Has the journal.
            crash_after: End like a killed worker once so many steps are completed.
            replaying: Only go through the journal, and fail at whatever is not in it.
        """
        self.invoked: list[str] = []
        """Names of the steps whose body began."""
        self.ending: Message | None = None
        """What the worker said at the end."""
        self.crashed = False
        self.error: Exception | None = None
        """The latest exception that left a step or the handler."""
        self._server = server
        self._crash_after = crash_after
        self._replaying = replaying
        self._machine = _StateMachine([("content-type", CONTENT_TYPE)])
        self._events: deque[Any] = deque()
        self._arrived = asyncio.Event()
        self._closed = replaying
        self._steps: set[asyncio.Task[Any]] = set()

    async def run(self, handler: Handler[Any, Any]) -> None:
        """Run `handler` until the attempt ends, and everything of the attempt with it."""
        beginning = self._server.beginning()
        self._push(beginning)
        preloaded = Preloaded()
        preloaded.feed(beginning)
        attempt_preloaded.set(preloaded)
        self._server.attach(
            deliver=lambda message: self._push(message.to_bytes()), interrupt=self._disconnect
        )
        worker = asyncio.create_task(self._process(handler))
        try:
            await asyncio.wait([worker])
        finally:  # also when the test gives up waiting
            worker.cancel()
            self._server.attach()
            await asyncio.wait([worker, *self._steps], timeout=_SECONDS_TO_END)
        worker.result()

    async def _process(self, handler: Handler[Any, Any]) -> None:
        headers = {"content-type": CONTENT_TYPE}
        try:
            await process_invocation_to_completion(
                self._machine, self._observed(handler), headers, self, self._send
            )
        except DisconnectedException:
            pass  # a crash, or a problem that the server keeps

    def _observed(self, handler: Handler[Any, Any]) -> Handler[Any, Any]:
        """Host the handler as `durable.app` does, and watch its steps."""
        hosted = hosted_handler(handler)

        async def run(context: Any, *arguments: Any) -> Any:
            execute = context.create_run_coroutine

            async def observed(handle: int, action: Callable[[], Awaitable[Any]], *a: Any) -> None:
                self._begin(self._machine.step_names[handle])

                async def body() -> Any:
                    return await self._keep_error(action())

                await execute(handle, body, *a)

            context.create_run_coroutine = observed
            return await self._keep_error(cast(Any, hosted.fn)(context, *arguments))

        return replace(hosted, fn=run)

    def _begin(self, step: str) -> None:
        self.invoked.append(step)
        task = asyncio.current_task()
        assert task is not None
        self._steps.add(task)
        if self._replaying:
            self._server.problem = JournalMismatch(
                f"The replay executes the step {step!r}, of which the journal has no result."
            )
            self._disconnect()
            raise asyncio.CancelledError

    async def _keep_error(self, work: Awaitable[Any]) -> Any:
        try:
            return await work
        except Exception as error:
            self.error = error
            raise

    # What the worker sends

    async def _send(self, event: Any) -> None:
        for message in messages(event.get("body", b"")):
            if self.crashed or self._server.problem is not None:
                break
            try:
                self._accept(message)
            except Exception as error:  # noqa: BLE001 - raised where the test runs the invocation
                self._server.problem = error
        self._server.deliver_own_signals()
        if self.crashed or self._server.problem is not None:
            raise DisconnectedException

    def _accept(self, message: Message) -> None:
        if message.type in _ENDINGS:
            self.ending = message
        elif self._replaying:
            raise JournalMismatch(
                f"The replay goes on with {message.kind.label} {message.text(12) or message.text(1)!r}, "
                "where the first execution waited."
            )
        else:
            self._server.accept(message)
            if message.type == Kind.PROPOSE_RUN_COMPLETION:
                self.crashed = self._server.completed_steps == self._crash_after

    # What the worker receives: the interface of the SDK's `ReceiveChannel`

    async def __call__(self) -> Any:
        """Return the next message; called when nothing in the worker can go on without one."""
        while not self._events:
            if self._server.problem is not None:
                self._disconnect()
            elif self._machine.executing or self._server.is_calling:
                await self._pass_time()
            elif self._closed:
                self._disconnect()
            elif not self._server.fire_next_timer():
                self._closed = True
                self._push(b"")
        return self._events.popleft()

    async def enqueue_restate_event(self, event: Any) -> None:
        """Take what wakes the worker from inside, such as the end of a step."""
        self._events.append(event)
        self._arrived.set()

    async def block_until_http_input_closed(self) -> None:
        """Do not wait for the server to end the connection."""

    async def _pass_time(self) -> None:
        """Wait for steps and stubs, while time passes as it does outside."""
        self._arrived.clear()
        try:
            async with asyncio.timeout(self._server.seconds_to_next_timer()):
                await self._arrived.wait()
        except TimeoutError:
            self._server.fire_next_timer()

    def _push(self, body: bytes) -> None:
        self._events.append({"type": "http.request", "body": body, "more_body": not self._closed})
        self._arrived.set()

    def _disconnect(self) -> None:
        self._events.append({"type": "http.disconnect"})
        self._arrived.set()


class _StateMachine(VMWrapper):
    """The SDK's state machine; also knows which steps are being executed."""

    def __init__(self, headers: list[tuple[str, str]]) -> None:
        super().__init__(headers)
        self.step_names: dict[int, str] = {}
        self.executing: set[int] = set()
        """Steps that began and whose result has not been sent."""
        self._executed: set[int] = set()

    def sys_run(self, name: str) -> Any:
        run = super().sys_run(name)
        self.step_names[run.handle] = name
        return run

    def do_progress(self, unresolved_future: Any) -> Any:
        progress = super().do_progress(unresolved_future)
        if isinstance(progress, DoProgressExecuteRun):
            self.executing.add(progress.handle)
        return progress

    def take_output(self) -> bytes:
        self.executing -= self._executed
        self._executed.clear()
        return super().take_output()

    def propose_run_completion_success(self, handle: int, output: bytes) -> None:
        self._executed.add(handle)
        super().propose_run_completion_success(handle, output)

    def propose_run_completion_failure(self, handle: int, output: Any) -> None:
        self._executed.add(handle)
        super().propose_run_completion_failure(handle, output)

    def propose_run_completion_transient(self, handle: int, *args: Any, **kwargs: Any) -> None:
        self._executed.add(handle)
        super().propose_run_completion_transient(handle, *args, **kwargs)

    def propose_run_completion_transient_with_delay_override(
        self, handle: int, *args: Any, **kwargs: Any
    ) -> None:
        self._executed.add(handle)
        super().propose_run_completion_transient_with_delay_override(handle, *args, **kwargs)
