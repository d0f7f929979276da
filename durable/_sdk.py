"""The one door to private names of restate-sdk, pydantic-ai, anyio and asyncio.

Everything undocumented that this project touches is imported here and nowhere else
(`tests/unit/test_conventions.py` checks it), for the pinned ranges in `pyproject.toml`. What is used
without an import is listed here too, so that a new release is a matter of this page:

- `ServerInvocationContext`: `vm`, `receive`, `tasks`, `run_coros_to_execute`,
  `create_poll_or_cancel_coroutine`, `create_run_coroutine`, `take_and_send_output`, replaced per
  invocation by `durable._driver`
- `journal_codec` of the same, and `StartMessage` of the service protocol, by which `durable._sessions` reads state
  that is sent in advance
- `ReceiveChannel`'s interface, methods of `VMWrapper` and version 6 of the service protocol, which
  `durable.testing` speaks in the place of restate-server
- `asyncio.Handle._run`, `_callback` and `_args` of a `TimerHandle`, `asyncio.Task._fut_waiter`, `asyncio.events._set_running_loop`, `asyncio._enter_task` and `_leave_task`,
  used by `durable._loop` as event loops outside the standard library do

Verified with restate-sdk 1.3.0, pydantic-ai 2.68.0 and anyio 4.16.0 on 2026-11-23.
"""

from asyncio.futures import (
    _set_result_unless_cancelled,  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
)
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any, cast

from anyio._backends._asyncio import CancelScope
from logfire import DEFAULT_LOGFIRE_INSTANCE
from logfire._internal.exporters.processor_wrapper import MainSpanProcessorWrapper
from logfire._internal.tracer import PendingSpanProcessor
from opentelemetry.sdk.trace import SpanProcessor
from pydantic_ai import Agent
from pydantic_ai import _utils as _pydantic_ai_utils
from pydantic_ai._output import types_from_output_spec
from pydantic_ai.durable_exec._toolset import (
    DurableDynamicToolset,
    DurableMCPToolset,
    DurableToolsetBase,
)
from pydantic_ai.durable_exec._utils import DurableModel
from pydantic_ai.exceptions import UserError
from restate.handler import Handler, TypeHint, handler_from_callable
from restate.server import (
    process_invocation_to_completion as _process_invocation,  # pyright: ignore[reportUnknownVariableType]
)
from restate.server_context import DisconnectedException, ServerInvocationContext
from restate.vm import (
    AllCompletedUnresolvedFuture,
    DoProgressAnyCompleted,
    DoProgressCancelSignalReceived,
    DoProgressExecuteRun,
    DoProgressWaitExternalProgress,
    Failure,
    FirstCompletedUnresolvedFuture,
    SingleUnresolvedFuture,
    Suspended,
    UnresolvedFuture,
    VMWrapper,
)
from restate.vm import (
    VMException as _VMException,  # pyright: ignore[reportUnknownVariableType]
)

SDK_SERIES = "1.3."
"""The releases of restate-sdk whose private names are known."""


def check_sdk_version() -> None:
    """Raise `UserError` when another restate-sdk is installed than the tested ones."""
    installed = metadata.version("restate-sdk")
    if not installed.startswith(SDK_SERIES):
        raise UserError(
            f"This version of pydantic-ai-restate works with restate-sdk {SDK_SERIES}x, but {installed} "
            f"is installed. Run `pip install 'restate-sdk~={SDK_SERIES}0'`, or install a version of "
            "pydantic-ai-restate made for it."
        )


def logfire_is_configured() -> bool:
    """Return whether the program has called `logfire.configure()`."""
    return DEFAULT_LOGFIRE_INSTANCE.config._initialized  # pyright: ignore[reportPrivateUsage]


def scrubbed(processor: SpanProcessor) -> SpanProcessor:
    """Give `processor` its spans as the program's Logfire sends them: without what it scrubs."""
    return MainSpanProcessorWrapper(processor, DEFAULT_LOGFIRE_INSTANCE.config.scrubber)


def agents_are_instrumented() -> bool:
    """Return whether the program has instrumented all agents."""
    return Agent._instrument_default is not False  # pyright: ignore[reportPrivateUsage]


redeliver_cancellation = CancelScope._deliver_cancellation  # pyright: ignore[reportPrivateUsage]
"""What anyio calls in each turn of an event loop while a cancelled scope has tasks."""

end_sleep: Callable[..., None] = cast(Any, _set_result_unless_cancelled)
"""What the timer behind `asyncio.sleep` calls."""

VMException: type[Exception] = cast(Any, _VMException)
"""What the SDK's core raises when an attempt cannot go on."""

process_invocation_to_completion: Callable[..., Awaitable[None]] = cast(Any, _process_invocation)
"""Runs one attempt over a connection; `durable.testing` gives it one in memory."""

disable_threads = _pydantic_ai_utils._disable_threads  # pyright: ignore[reportPrivateUsage]
"""Whether PydanticAI runs sync functions inline instead of in a thread."""

__all__ = [
    "AllCompletedUnresolvedFuture",
    "CancelScope",
    "DisconnectedException",
    "DoProgressAnyCompleted",
    "DoProgressCancelSignalReceived",
    "DoProgressExecuteRun",
    "DoProgressWaitExternalProgress",
    "DurableDynamicToolset",
    "DurableMCPToolset",
    "DurableModel",
    "DurableToolsetBase",
    "Failure",
    "PendingSpanProcessor",
    "FirstCompletedUnresolvedFuture",
    "Handler",
    "ServerInvocationContext",
    "SingleUnresolvedFuture",
    "Suspended",
    "UnresolvedFuture",
    "TypeHint",
    "VMException",
    "VMWrapper",
    "agents_are_instrumented",
    "check_sdk_version",
    "disable_threads",
    "end_sleep",
    "handler_from_callable",
    "logfire_is_configured",
    "process_invocation_to_completion",
    "redeliver_cancellation",
    "scrubbed",
    "types_from_output_spec",
]
