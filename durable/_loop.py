"""The event loop on which handler code runs: deterministic, without clocks, threads or sockets.

Restate's journal is positional: on replay the same operations must be created in the same order. On
an ordinary event loop the order in which tasks go on depends on timing, so two tasks of one handler
could swap places on replay. Handler code therefore runs on this loop, one per invocation attempt,
which is nothing but a first-in-first-out queue of callbacks.

**Invariant: between two completions that the driver delivers, the order in which callbacks run is a
function of the callbacks themselves.** The queue is first-in-first-out, nothing but handler code and
the driver puts anything into it, and there is no other source of events: the clock stands still
between completions, timers are durable sleeps, sets of tasks (asyncio cancels in their order) do not
depend on addresses, `asyncio.as_completed` starts coroutines in the order it was given them, and whatever would bring in the outside world (threads, sockets, signals) raises.
"Every task waits for a durable operation" is exactly "the queue is empty".

What stays with the author of handler code: sets of other objects, whose order depends on addresses or
on string hashes, must not decide about the order of operations.

The design is the one that Temporal's Python SDK uses for workflows.
"""

import asyncio
import logging
import sys
from asyncio import events
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any, NoReturn, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet

from pydantic_ai.exceptions import UserError

from durable._sdk import CancelScope, end_sleep, redeliver_cancellation
from durable._telemetry import AttemptTelemetry

T = TypeVar("T")

_CLOSE_ROUNDS = 10
"""How often a task that waits again while it ends is told so before it is given up."""

_REDELIVERIES = 10
"""How often anyio may deliver a scope's cancellation between two completions."""

logger = logging.getLogger(__name__)


class AttemptOver(KeyboardInterrupt):
    """Ends handler code whose attempt is over, wherever it waits.

    An interrupt, because that is how the code experiences it: PydanticAI ends a run without calling
    hooks, and task groups end without collecting. (`GeneratorExit` cannot be thrown into code that
    iterates over async generators.) It never leaves the loop.
    """


class _HandlerTask(asyncio.Task[T]):
    """A task whose place in a set does not depend on its address.

    `asyncio.TaskGroup` and anyio keep their tasks in sets and cancel them in the order of the set.
    """

    number = 0
    """Counts the tasks of a loop. Set when asyncio has registered the task in a set for the whole process: by
    address, because there the numbers of many loops would collide."""

    def __hash__(self) -> int:
        return self.number or object.__hash__(self)


class _InOrder(dict[CancelScope, None]):
    """A set of cancel scopes that is iterated in the order of insertion."""

    def add(self, scope: CancelScope) -> None:
        self[scope] = None

    def remove(self, scope: CancelScope) -> None:
        del self[scope]

    def discard(self, scope: CancelScope) -> None:
        self.pop(scope, None)


_init_scope = CancelScope.__init__


def _init_scope_in_order(self: CancelScope, *args: Any, **kwargs: Any) -> None:
    """Keep the child scopes of a scope in handler code in order: anyio cancels them one by one."""
    _init_scope(self, *args, **kwargs)
    if isinstance(events._get_running_loop(), HandlerLoop):
        cast(Any, self)._child_scopes = _InOrder()


CancelScope.__init__ = _init_scope_in_order


def sleeping(timer: asyncio.TimerHandle) -> list[asyncio.Future[Any]]:
    """Return the future that an `asyncio.sleep` behind `timer` waits for, or none for other timers."""
    if getattr(timer, "_callback", None) is not end_sleep:
        return []
    return [cast("tuple[asyncio.Future[Any], Any]", getattr(timer, "_args"))[0]]  # noqa: B009


_as_completed = asyncio.as_completed


def _as_completed_in_order(fs: Iterable[Any], *, timeout: float | None = None) -> Iterator[Any]:
    """Make the tasks in the order of `fs`: asyncio would make them in the order of a set of coroutines."""
    if isinstance(events._get_running_loop(), HandlerLoop):
        fs = [asyncio.ensure_future(future) for future in fs]
    return _as_completed(fs, timeout=timeout)


asyncio.as_completed = asyncio.tasks.as_completed = _as_completed_in_order


class Attempt(Protocol):
    """What the loop asks of the attempt that it runs handler code for."""

    def start_timer(self, delay: float, handle: asyncio.TimerHandle) -> None:
        """Have `handle` run `delay` seconds from now, also if this process ends meanwhile."""
        ...

    def fail(self, error: Exception) -> None:
        """End the attempt with `error`. Called on the host loop."""
        ...


class HandlerLoop(asyncio.AbstractEventLoop):
    """Runs the tasks of one invocation attempt inside callbacks of a host loop."""

    def __init__(
        self,
        *,
        host: asyncio.AbstractEventLoop,
        attempt: Attempt,
        telemetry: AttemptTelemetry | None = None,
    ) -> None:
        """Create the loop.

        Args:
            host: The ordinary event loop that steps and the driver run on.
            attempt: Makes the durable sleeps behind `call_later` and `call_at`.
            telemetry: Takes the spans and metrics of handler code.
        """
        self.telemetry = telemetry
        self._host = host
        self._debug = host.get_debug()  # asked for with each callback, task and future
        self._attempt = attempt
        self._ready: deque[asyncio.Handle] = deque()
        self._parked: list[asyncio.Handle] = []
        self._redeliveries: Counter[object] = Counter()
        self._now = 0.0
        self._closed = False
        self._created = 0
        self._tasks: WeakKeyDictionary[asyncio.Task[Any], None] = WeakKeyDictionary()  # in order
        self._asyncgens: WeakSet[AsyncGenerator[Any, Any]] = WeakSet()

    # Running

    def run_ready(self) -> None:
        """Run callbacks until every task waits for a durable operation. Call it on the host loop."""
        self._ready.extend(self._parked)
        self._parked.clear()
        self._redeliveries.clear()
        with self._entered():
            self._run_all()

    def fire(self, timer: asyncio.TimerHandle) -> None:
        """Queue `timer`, whose durable sleep is over, and set the clock to its time."""
        self._now = max(self._now, timer.when())
        self._ready.append(timer)

    def close(self) -> None:
        """End all tasks that have not ended: the attempt is over.

        It suspended, was cut off, or its handler returned. Code that goes on now would act on a state
        that a later attempt has yet to reach, so what it waits for raises `AttemptOver`: `finally`
        blocks run, `except Exception` and PydanticAI's hooks for errors and cancellations do not.
        """
        if self._closed:
            return
        self._closed = True
        with self._entered():
            for _ in range(_CLOSE_ROUNDS):
                if not (tasks := [task for task in self._tasks if not task.done()]):
                    break
                for task in reversed(tasks):  # the youngest first: the older mostly wait for them
                    waiter: asyncio.Future[Any] | None = getattr(task, "_fut_waiter", None)
                    if waiter is not None and not isinstance(waiter, asyncio.Task):
                        if not waiter.done():
                            waiter.set_exception(AttemptOver())
                self._run_all()
        for task in self._tasks:
            if task.done():
                if not task.cancelled():
                    task.exception()  # nobody is left who could ask for it
            else:
                logger.warning("A task of a handler went on after the end of its attempt: %r", task)

    def _run_all(self) -> None:
        while self._ready:
            handle = self._ready.popleft()
            if not handle.cancelled():
                try:
                    handle._run()
                except (AttemptOver, SystemExit):
                    pass  # the task has it; asyncio hands these on to whoever runs the loop

    @contextmanager
    def _entered(self) -> Generator[None]:
        """Make this the running loop of the thread, with async generators finalized here."""
        hooks = sys.get_asyncgen_hooks()
        host, host_task = asyncio.get_running_loop(), asyncio.current_task()
        if host_task is not None:
            asyncio._leave_task(host, host_task)
        events._set_running_loop(self)
        sys.set_asyncgen_hooks(firstiter=self._asyncgens.add, finalizer=self._finalize_asyncgen)
        try:
            yield
        finally:
            sys.set_asyncgen_hooks(*hooks)
            events._set_running_loop(host)
            if host_task is not None:
                asyncio._enter_task(host, host_task)

    def _finalize_asyncgen(self, generator: AsyncGenerator[Any, Any]) -> None:
        self.create_task(generator.aclose())

    # What tasks and futures need

    def call_soon(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Queue `callback`.

        anyio delivers a cancellation again in each turn of the loop until all tasks of the scope have
        ended, which may take a durable operation (in a shielded scope). After a few turns it waits
        for the next completion, so that the queue runs empty.
        """
        handle = asyncio.Handle(callback, args, self, context)
        if getattr(callback, "__func__", None) is redeliver_cancellation:
            scope: object = getattr(callback, "__self__", None)
            self._redeliveries[scope] += 1
            if self._redeliveries[scope] > _REDELIVERIES:
                self._parked.append(handle)
                return handle
        self._ready.append(handle)
        return handle

    def call_later(
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run `callback` after a durable sleep of `delay` seconds."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run `callback` after a durable sleep, when the loop's clock shows `when` seconds."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if when <= self._now:
            self._ready.append(handle)
        elif not self._closed:
            self._attempt.start_timer(when - self._now, handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: the driver asks the handle itself."""

    def time(self) -> float:
        """Return the seconds on the loop's clock, which stands still between completions."""
        return self._now

    def create_future(self) -> asyncio.Future[Any]:
        """Create a future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        """Create a task of this loop."""
        task = _HandlerTask(coro, loop=self, name=name, context=context)
        self._created += 1
        task.number = self._created
        self._tasks[task] = None
        return task

    def get_task_factory(self) -> None:
        """Return that tasks are created by `create_task`."""
        return None

    def get_debug(self) -> bool:
        """Return the host loop's debug mode."""
        return self._debug

    def is_running(self) -> bool:
        """Return whether the host loop runs: what was opened for this loop's code lives there.

        PydanticAI asks, and makes a new HTTP client for a model whose last loop does not run any more.
        """
        return self._host.is_running()

    def is_closed(self) -> bool:
        """Return whether the attempt is over."""
        return self._closed

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Report an exception that no task awaits, as the host loop does."""
        if not self._closed:  # what ends because the attempt is over is no news
            self._host.call_exception_handler(context)

    async def shutdown_asyncgens(self) -> None:
        """Do nothing: `close` ends what is left."""

    # What would bring in the outside world

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> NoReturn:
        """Refuse: a thread's timing differs on replay."""
        raise _refusal("a thread (`asyncio.to_thread`, `run_in_executor`)")

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        """Refuse a result from another thread by ending the attempt: the thread could do nothing."""
        error = _refusal("a thread (`anyio.to_thread`, `call_soon_threadsafe`)")
        self._host.call_soon_threadsafe(self._attempt.fail, error)
        return asyncio.Handle(callback, args, self, context)


def _refusal(what: str) -> UserError:
    return UserError(
        f"Handler code used {what}, which would not happen the same way when Restate replays the "
        'handler. Do it inside a step: `await ctx.run_typed("name", function)`, or in a tool without '
        '`metadata={"restate": False}`.'
    )


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: HandlerLoop, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal(f"the event loop's `{name}`")

    refuse.__name__ = name
    return refuse


def _refuse_sync(self: HandlerLoop, *args: Any, **kwargs: Any) -> NoReturn:
    raise UserError(
        "Handler code used a blocking call (`agent.run_sync`, `run_until_complete`), which cannot wait for "
        "durable operations. Use the async form: `await agent.run(...)`."
    )


_OUTSIDE_WORLD = (
    "add_reader add_signal_handler add_writer connect_accepted_socket connect_read_pipe connect_write_pipe "
    "create_connection create_datagram_endpoint create_server create_unix_connection create_unix_server "
    "getaddrinfo getnameinfo remove_reader remove_signal_handler remove_writer "
    "sendfile set_default_executor shutdown_default_executor sock_accept sock_connect sock_recv sock_recv_into "
    "sock_recvfrom sock_recvfrom_into sock_sendall sock_sendfile sock_sendto start_tls stop subprocess_exec "
    "subprocess_shell"
)
for _name in _OUTSIDE_WORLD.split():
    setattr(HandlerLoop, _name, _refusing(_name))
for _name in ("run_forever", "run_until_complete"):
    setattr(HandlerLoop, _name, _refuse_sync)
