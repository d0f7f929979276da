"""A handler under a crash at every step."""

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from restate import TerminalError

from durable.testing._invocation import InMemoryInvocation

OutputT = TypeVar("OutputT")


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
