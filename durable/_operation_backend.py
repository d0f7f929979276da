"""One operation of an agent, one `ctx.run` step.

Model requests, tool calls, MCP I/O, toolset discovery, event handlers and capability operations all
arrive here as a name and a body. On replay the journal answers and the body does not run.

A step stores, as JSON, `{"at": [began, ended], "result": ...}`, with times in seconds since the epoch,
and `"usage"` where the body ran other agents on the run's account.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeVar

from opentelemetry.trace import NoOpTracer
from pydantic import TypeAdapter
from pydantic_ai.durable_exec import (
    BoundDurableOperation,
    DurableOperation,
    DurableOperationId,
    JournalCallableOperationBackend,
    ModelRequestId,
    ToolsetCallToolId,
)
from pydantic_ai.exceptions import ToolFailed, UserError
from pydantic_ai.tools import RunContext
from pydantic_ai.usage import RunUsage
from pydantic_core import PydanticSerializationError, from_json, to_json
from restate import RunOptions, TerminalError
from restate.exceptions import RetryableError
from restate.serde import BytesSerde

from durable._context import current_invocation
from durable._driver import InvocationCancelled, hold_back
from durable._errors import (
    describe,
    exceptions_only,
    not_serializable,
    original_error,
    step_failure,
    verdict,
)
from durable._identity import current_run_clock
from durable._names import declaration, renamed
from durable._options import StepOptions
from durable._telemetry import steps
from durable._tracing import failed_try, note_step

ParamsT = TypeVar("ParamsT")
WireT = TypeVar("WireT")
ResultT = TypeVar("ResultT")

MAX_RESULT_SIZE = 32 * 1024 * 1024 - 1024
"""Bytes that a step's result may take: what restate-server accepts in one message, by default."""

_BYTES = BytesSerde()
_USAGE = TypeAdapter(RunUsage)


@dataclass
class Step:
    """What a step's body knows about itself."""

    key: str
    """Names this step among all steps of all invocations, the same on every try and replay."""

    usage: RunUsage | None = None
    """What agents that ran inside the body used, on the account of the run."""


@dataclass
class FinishedCall:
    """A tool call whose step is waited for in spite of a cancellation, because its result is needed."""

    id: tuple[str | None, str | None]
    """Of the run and of the tool call."""

    cancellation: BaseException | None = None
    """What was held back."""

    def hold_back(self, cancellation: BaseException) -> None:
        """Keep `cancellation` for later; a second one from outside is in earnest."""
        if isinstance(self.cancellation, InvocationCancelled):
            if isinstance(cancellation, InvocationCancelled):
                raise cancellation
            return
        self.cancellation = cancellation


current_step: ContextVar[Step | None] = ContextVar("durable.step", default=None)
finished_call: ContextVar[FinishedCall | None] = ContextVar("durable.finished_call", default=None)
"""The call whose tool is called, and waited for to the end."""
_caller: ContextVar[RunContext[Any] | None] = ContextVar("durable.caller", default=None)


class RestateOperationBackend(JournalCallableOperationBackend[StepOptions]):
    """Executes each operation as one journaled step of the current invocation."""

    def bind(
        self, operation: DurableOperation[ParamsT, WireT, ResultT]
    ) -> BoundDurableOperation[ParamsT, WireT, ResultT]:
        """Bind `operation`, and remember on each call for which run it is called."""
        return _Bound(super().bind(operation))

    async def execute(
        self,
        *,
        operation_id: DurableOperationId,
        name: str,
        body: Callable[[], Awaitable[object]],
        cache_key: tuple[object, ...],
        config: StepOptions,
    ) -> object:
        """Run `body` as the step `name`, or return what the journal holds for it.

        Args:
            operation_id: Which operation it is.
            name: Name of the step in the journal: stored data, see the README's table.
            body: The work, with its result already reduced to JSON.
            cache_key: Not used: Restate's journal is positional.
            config: Retries and limits of the step.

        Raises:
            Exception: The original exception of a step that failed for good, also on replay.
            TerminalError: When the step's retries are used up, or its exception is not PydanticAI's.
        """
        del cache_key
        if isinstance(operation_id, ModelRequestId | ToolsetCallToolId):
            note_step(name)
        call, ctx = finished_call.get(), _caller.get()
        own = call is not None and ctx is not None and call.id == (ctx.run_id, ctx.tool_call_id)
        token = hold_back.set(call.hold_back if call is not None and own else None)
        try:
            return await run_step(name, body, config)
        finally:
            hold_back.reset(token)


async def run_step(
    name: str,
    body: Callable[[], Awaitable[object]],
    options: StepOptions,
    *,
    caller: RunContext[Any] | None = None,
) -> object:
    """Run `body`, whose result is JSON-compatible, as a step of the current invocation.

    It is on the account of the run that called the operation, or of `caller`.
    """
    invocation = current_invocation()
    assert invocation is not None
    caller = caller or _caller.get()
    step = Step(key=f"{invocation.context.request().id}:{next(invocation.step_numbers)}")
    if options.name is not None:
        name = renamed(name, options.name)
    if options.at_most_once:
        body = await _declare(name, step, body, options)
        options = replace(options, timeout=None)  # what `_declare` returned keeps to it

    async def journaled() -> bytes:
        began = _now()
        current_step.set(step)
        try:
            async with asyncio.timeout(options.timeout):
                with exceptions_only("The step"):
                    result = await body()
        except Exception as error:  # noqa: BLE001 - raised again
            _raise_failure(error, name, began, caller, _tries.of(step.key, options.run, began))
        _tries.forget(step.key)
        steps.add(1, {"restate.step": name})
        return _stored(result, began, step, name)

    try:
        stored = await invocation.context.run_typed(
            name, journaled, replace(options.run, serde=_BYTES)
        )
    except TerminalError as failure:
        if (error := original_error(failure)) is not None:
            raise error from failure
        raise
    entry = from_json(stored)
    invocation.observe(*entry["at"])
    if (clock := current_run_clock.get()) is not None:
        clock.observe(*entry["at"])
    if "usage" in entry and caller is not None:
        caller.usage.incr(_USAGE.validate_python(entry["usage"]))
    return entry["result"]


class _Tries:
    """Counts how often steps failed in this process.

    Restate counts too, but begins anew whenever the journal grows, as it does when a tool beside the failing one
    makes progress.
    """

    def __init__(self) -> None:
        self._failed: dict[str, tuple[int, float]] = {}

    def of(self, step: str, options: RunOptions[Any], began: float) -> bool:
        """Count a failed try of `step` that began then, and return whether it was the last one."""
        count, first = self._failed.pop(step, (0, began))
        attempts, duration = options.max_attempts, options.max_duration
        if (attempts is not None and count + 1 >= attempts) or (
            duration is not None and _now() - first >= duration.total_seconds()
        ):
            return True
        self._failed[step] = (count + 1, first)
        if len(self._failed) > _REMEMBERED:
            del self._failed[next(iter(self._failed))]
        return False

    def forget(self, step: str) -> None:
        """Forget a step that has its result."""
        self._failed.pop(step, None)


_tries = _Tries()


def _raise_failure(
    error: Exception, name: str, began: float, caller: RunContext[Any] | None, last: bool
) -> NoReturn:
    """Raise what ends the step for `error`, shown in the trace when the step will be tried again."""
    failure = step_failure(error, name)
    hidden = _hides_content(caller) and verdict(error) is None
    if not isinstance(failure, TerminalError):
        failed_try(name, began, error, message=None if hidden else describe(error))
    if hidden:
        failure = RetryableError(f"{type(error).__qualname__} (message hidden)")
    if last and not isinstance(failure, TerminalError):
        known = isinstance(failure, RetryableError)
        message = failure.message if known else repr(failure)
        failure = TerminalError(message, status_code=failure.status_code if known else 500)
    if hidden:
        raise failure from None
    raise failure from (error if failure is not error else error.__cause__)


def _hides_content(caller: RunContext[Any] | None) -> bool:
    """Whether the agent's instrumentation says that content must not be recorded."""
    return (
        caller is not None
        and not isinstance(caller.tracer, NoOpTracer)
        and not caller.trace_include_content
    )


def _stored(result: object, began: float, step: Step, name: str) -> bytes:
    entry: dict[str, object] = {"at": [began, _now()], "result": result}
    if step.usage is not None:
        entry["usage"] = _USAGE.dump_python(step.usage, mode="json", exclude_defaults=True)
    try:
        stored = to_json(entry)
    except PydanticSerializationError as error:  # text that is no Unicode
        raise step_failure(not_serializable(error), name) from error
    if len(stored) > MAX_RESULT_SIZE:
        raise step_failure(
            UserError(
                f"The result takes {len(stored):,} bytes as JSON, and restate-server accepts "
                f"{MAX_RESULT_SIZE:,}. Store it elsewhere and return where."
            ),
            name,
        )
    return stored


_REMEMBERED = 10_000
"""How many failing steps are counted at once, and how many declared ones are remembered."""

_declared: dict[str, None] = {}
"""The keys of at-most-once steps that this process has declared and not begun."""

_UNKNOWN = (
    "its outcome is unknown: it may or may not have had its effect. It is not repeated. Check the outcome "
    "before you try again."
)


async def _declare(
    name: str, step: Step, body: Callable[[], Awaitable[object]], options: StepOptions
) -> Callable[[], Awaitable[object]]:
    """Journal that `step` is about to begin, and return a body that begins at most once.

    The process that declared it knows whether it has begun. In another process nobody can know, so it
    does not begin.
    """

    async def declare() -> None:
        _declared[step.key] = None
        if len(_declared) > _REMEMBERED:  # those of attempts that went on in another process
            del _declared[next(iter(_declared))]

    await run_step(declaration(name), declare, StepOptions())

    async def at_most_once() -> object:
        if step.key not in _declared:
            raise ToolFailed(
                f"The worker was lost during the call, or before it began, so {_UNKNOWN}"
            )
        del _declared[step.key]
        limit = asyncio.timeout(options.timeout)
        try:
            async with limit:
                return await body()
        except Exception as error:
            if limit.expired():
                raise ToolFailed(
                    f"The call was given up after {options.timeout} seconds, so {_UNKNOWN}"
                ) from error
            raise ToolFailed(f"The call failed and is not repeated. {describe(error)}") from error

    return at_most_once


def _now() -> float:
    return datetime.now(UTC).timestamp()


def idempotency_key(ctx: RunContext[Any]) -> str:
    """Return a key for the tool call that is running, to hand to an API that accepts one.

    Every try of the call, after a failure or a crash, has the same key, and no other call has it, so a
    payment that went through just before the worker died is not made again.

    Args:
        ctx: The tool's run context.

    Raises:
        UserError: Outside a tool call.
    """
    if ctx.tool_call_id is None:
        raise UserError(
            "`idempotency_key` names a tool call: use it in a tool, with the tool's `RunContext`."
        )
    step = current_step.get()
    return f"{ctx.run_id if step is None else step.key}:{ctx.tool_call_id}"


@dataclass
class _Bound(BoundDurableOperation[ParamsT, WireT, ResultT]):
    bound: BoundDurableOperation[ParamsT, WireT, ResultT]

    @property
    def operation(self) -> DurableOperation[ParamsT, WireT, ResultT]:
        return self.bound.operation

    async def __call__(self, params: ParamsT, *, config: object | None = None) -> ResultT:
        token = _caller.set(getattr(params, "ctx", None) or getattr(params, "run_context", None))
        try:
            return await self.bound(params, config=config)
        finally:
            _caller.reset(token)
