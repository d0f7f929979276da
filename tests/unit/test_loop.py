"""The handler loop: first in, first out, and nothing from outside."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from pydantic_ai.exceptions import UserError

from durable._loop import HandlerLoop


class Attempt:
    """Collects what the loop asks for."""

    def __init__(self) -> None:
        self.started: list[tuple[float, asyncio.TimerHandle]] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start_timer(self, delay: float, handle: asyncio.TimerHandle) -> None:
        self.started.append((delay, handle))

    def fail(self, error: Exception) -> None:
        self.failed.set_exception(error)


@pytest.fixture
async def attempt() -> Attempt:
    return Attempt()


@pytest.fixture
async def loop(attempt: Attempt) -> HandlerLoop:
    return HandlerLoop(host=asyncio.get_running_loop(), attempt=attempt)


def start(loop: HandlerLoop, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Start handler code and run it until it waits."""
    task = loop.create_task(coroutine)
    loop.run_ready()
    return task


async def test_tasks_run_in_the_order_they_became_ready(loop: HandlerLoop) -> None:
    """Paths of different lengths interleave the same way every time."""

    async def run() -> list[str]:
        seen: list[str] = []

        async def branch(name: str, turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            seen.append(name)

        async with asyncio.TaskGroup() as group:
            for name, turns in {"a": 1000, "b": 0, "c": 10, "d": 10}.items():
                group.create_task(branch(name, turns))
        return seen

    assert start(loop, run()).result() == ["b", "c", "d", "a"]


async def test_sleeps_are_durable_timers(loop: HandlerLoop, attempt: Attempt) -> None:
    """`asyncio.sleep` asks for a durable sleep; the clock moves only when one has ended."""

    async def run() -> float:
        await asyncio.sleep(5)
        return asyncio.get_running_loop().time()

    task = start(loop, run())
    [(delay, handle)] = attempt.started
    assert delay == 5
    assert not task.done()
    loop.fire(handle)
    loop.run_ready()
    assert task.result() == 5


async def test_timeouts_are_durable_timers(loop: HandlerLoop, attempt: Attempt) -> None:
    """`asyncio.timeout`, `wait_for` and anyio's scopes count on the same clock."""

    async def run() -> list[str]:
        ended: list[str] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.Event().wait()
        ended.append("timeout")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 2)
        ended.append("wait_for")
        with anyio.move_on_after(3):
            await anyio.Event().wait()
        ended.append("move_on_after")
        return ended

    task = start(loop, run())
    while not task.done():
        loop.fire(attempt.started[-1][1])
        loop.run_ready()
    assert task.result() == ["timeout", "wait_for", "move_on_after"]
    assert [delay for delay, _ in attempt.started] == [1, 2, 3]


@pytest.mark.parametrize(
    "outside",
    [
        pytest.param(lambda: asyncio.to_thread(int), id="to_thread"),
        pytest.param(lambda: asyncio.open_connection("127.0.0.1", 1), id="socket"),
        pytest.param(lambda: asyncio.create_subprocess_exec("true"), id="subprocess"),
        pytest.param(lambda: asyncio.get_running_loop().getaddrinfo("localhost", 1), id="dns"),
    ],
)
async def test_the_outside_world_is_refused(loop: HandlerLoop, outside: Any) -> None:
    """Threads, sockets and processes raise an error that says what to do instead."""

    async def run() -> None:
        await outside()

    with pytest.raises(UserError, match="inside a step"):
        start(loop, run()).result()


async def test_a_result_from_a_thread_ends_the_attempt(loop: HandlerLoop, attempt: Attempt) -> None:
    """anyio starts threads by itself: what they bring back is refused."""

    async def run() -> None:
        await anyio.to_thread.run_sync(int)

    start(loop, run())
    with pytest.raises(UserError, match="inside a step"):
        await attempt.failed
    loop.close()


async def test_closing_ends_what_waits_without_error_handling(loop: HandlerLoop) -> None:
    """`finally` runs, `except Exception` does not; nothing is left and nothing is reported."""
    seen: list[str] = []
    waiter = loop.create_future()

    async def generator() -> AsyncGenerator[int]:
        try:
            yield 1
            await waiter
            yield 2
        finally:
            seen.append("generator")

    async def inner() -> None:
        try:
            async for _ in generator():
                pass
        except Exception:  # noqa: BLE001
            seen.append("wrong")
        finally:
            seen.append("inner")

    async def run() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(inner())
                group.create_task(asyncio.Event().wait())
        finally:
            seen.append("outer")
            await asyncio.sleep(0)

    task = start(loop, run())
    loop.close()
    assert task.done()
    assert seen == ["generator", "inner", "outer"]
    assert loop.is_closed()


async def test_a_cancelled_scope_waits_for_what_withstands_it(loop: HandlerLoop) -> None:
    """anyio repeats a cancellation in each turn of the loop: that must not keep the loop from waiting."""
    durable_operation = loop.create_future()

    async def compensate() -> None:
        while not durable_operation.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(durable_operation)

    async def run() -> str:
        async with anyio.create_task_group() as group:
            group.start_soon(compensate)
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        return "ended"

    task = start(loop, run())  # returns although the group has not ended
    assert not task.done()
    durable_operation.set_result(None)
    loop.run_ready()
    assert task.result() == "ended"


async def test_sets_of_tasks_have_one_order(loop: HandlerLoop) -> None:
    """Task groups cancel their tasks in the order of a set: it must not depend on addresses."""
    cancelled: list[int] = []

    async def branch(number: int) -> None:
        try:
            await loop.create_future()
        finally:
            cancelled.append(number)

    async def run() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(branch(number))
            await asyncio.sleep(0)
            raise RuntimeError

    with pytest.raises(ExceptionGroup):
        start(loop, run()).result()
    assert cancelled == sorted(cancelled)


async def test_the_host_loop_is_untouched(loop: HandlerLoop) -> None:
    """Handler code sees its own loop and task; the test's are the current ones again after it."""
    host, task = asyncio.get_running_loop(), asyncio.current_task()

    async def run() -> tuple[Any, Any]:
        return asyncio.get_running_loop(), asyncio.current_task()

    handler = start(loop, run())
    assert handler.result() == (loop, handler)
    assert (asyncio.get_running_loop(), asyncio.current_task()) == (host, task)


async def test_as_completed_starts_coroutines_in_order(loop: HandlerLoop) -> None:
    """asyncio makes their tasks from a set, in the order of their addresses."""

    async def run() -> list[int]:
        started: list[int] = []

        async def branch(number: int) -> None:
            started.append(number)

        for finished in asyncio.as_completed([branch(number) for number in range(50)]):
            await finished
        return started

    assert start(loop, run()).result() == list(range(50))
