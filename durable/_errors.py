"""Which failures end a run, which are retried, and when.

Restate retries everything that is not a `TerminalError`. An agent's failures are of two kinds: those
that a later attempt can heal (a refused connection, a 503, a rate limit) and those that it repeats
word for word (a wrong API key, a usage limit, output that never validates). One table, `VERDICTS`,
tells them apart; an exception is looked up by its closest base class in it.

    failure in a step ── retried ──> `RetryableError`, after the delay the provider asked for
                     └── hopeless ─> `TerminalError`, journaled with what is needed to rebuild the
                                     original exception, which handler code then sees
    failure that leaves the handler ── hopeless ─> `TerminalError` for the caller, with a status
                                   └── else ─────> Restate's retry policy

Messages carry no response bodies and no headers: they are stored in the journal and sent to callers.
"""

import asyncio
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

from pydantic import ValidationError
from pydantic_ai import exceptions as pai
from pydantic_core import from_json, to_json, to_jsonable_python
from restate import TerminalError
from restate.exceptions import RetryableError

METADATA_KEY = "pydantic_ai.error"
"""Key of a journaled failure's metadata that holds the original exception."""

NOT_UNDONE = "Not undone: "
"""Begins the note on an error that names a call which its saga could not undo."""


@dataclass(frozen=True)
class Terminal:
    """The run ends at once; the caller gets `status`."""

    status: int


@dataclass(frozen=True)
class Retry:
    """The step runs again, at the pace of its retry options or after the provider's `retry_after`."""


RETRY = Retry()

VERDICTS: Mapping[type[BaseException], Terminal | Retry] = {
    # the agent or its configuration
    pai.UserError: Terminal(500),
    pai.UsageLimitExceeded: Terminal(429),
    pai.UnexpectedModelBehavior: Terminal(502),
    pai.ContentFilterError: Terminal(422),
    pai.RunCancelled: Terminal(409),
    pai.RunTimedOut: Terminal(504),
    pai.SuspendedResponseExpired: Terminal(410),
    pai.ConcurrencyLimitExceeded: RETRY,
    pai.AgentRunError: Terminal(500),
    # the provider
    pai.ModelAPIError: RETRY,  # with an HTTP status but without a category: see `verdict`
    pai.ModelRateLimitError: RETRY,
    pai.ModelQuotaExceededError: Terminal(503),
    pai.ModelUnavailableError: RETRY,
    pai.ModelServerError: RETRY,
    pai.ModelConnectionError: RETRY,
    pai.ModelRequestTimeout: RETRY,
    pai.ModelRequestRejectedError: Terminal(502),
    pai.ModelContextWindowExceededError: Terminal(413),
    pai.FallbackExceptionGroup: Terminal(502),  # see `verdict`: retried while one model may recover
    # control flow that PydanticAI turns into values; outside a tool call it is a mistake in the code
    pai.ModelRetry: Terminal(500),
    pai.ToolFailed: Terminal(500),
    pai.ApprovalRequired: Terminal(500),
    pai.CallDeferred: Terminal(500),
    pai.SkipModelRequest: Terminal(500),
    pai.RetryModelRequest: Terminal(500),
    pai.SkipToolValidation: Terminal(500),
    pai.SkipToolExecution: Terminal(500),
    pai.ToolRetryError: Terminal(500),
    pai.ToolFailedError: Terminal(500),
}


@contextmanager
def exceptions_only(where: str) -> Generator[None]:
    """Raise a `RuntimeError` in the place of what is no `Exception`, which nobody around would catch.

    A `SystemExit` of a command line parser, a panic of a Rust library or a `CancelledError` that was only awaited is
    a failure like any other. What ends the code from outside (the task is cancelled, Ctrl-C) passes.

    Args:
        where: Names the code within, for the message.

    Raises:
        RuntimeError: In the place of such an exception.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        raise RuntimeError(f"{where} raised {error!r}, which is no `Exception`.") from error


def readable(text: str) -> str:
    """Return `text` with escapes for what is no Unicode, such as bytes in the name of a file, and cannot be sent."""
    return text.encode(errors="backslashreplace").decode()


def verdict(error: BaseException) -> Terminal | Retry | None:
    """Look up what happens after `error`, `None` if it is not PydanticAI's.

    A provider's error without a category is judged by its HTTP status: 408, 409, 425, 429 and 5xx are
    retried. A group of errors from fallback models is retried as long as one of them may recover.
    """
    if isinstance(error, pai.FallbackExceptionGroup):
        members = cast("tuple[Exception, ...]", error.exceptions)
        if any(isinstance(verdict(member), Retry) for member in members):
            return RETRY
    base = next((base for base in type(error).__mro__ if base in VERDICTS), None)
    if base is pai.ModelAPIError and isinstance(error, pai.ModelHTTPError):
        passing = error.status_code >= 500 or error.status_code in {408, 409, 425, 429}
        return RETRY if passing else Terminal(502)
    return None if base is None else VERDICTS[base]


def retry_after(error: BaseException) -> timedelta | None:
    """Return how long the provider asked to wait: the longest among the errors of a fallback group."""
    if isinstance(error, pai.FallbackExceptionGroup):
        waits = [retry_after(member) for member in cast("tuple[Exception, ...]", error.exceptions)]
        return max((wait for wait in waits if wait is not None), default=None)
    seconds = error.retry_after if isinstance(error, pai.ModelAPIError) else None
    return None if seconds is None else timedelta(seconds=seconds)


def step_failure(error: Exception, step: str | None = None) -> Exception:
    """Return what a step raises for `error`, so that Restate does what the table says."""
    if isinstance(error, (TerminalError, RetryableError)):
        return error
    found = verdict(error)
    if isinstance(found, Terminal):
        message = describe(error) if step is None else f"{describe(error)} (step `{step}`)"
        return _terminal(error, message, found)
    if isinstance(found, Retry):
        return RetryableError(describe(error), status_code=503, retry_after=retry_after(error))
    return error


def not_serializable(error: Exception) -> pai.UserError:
    """Return the error of a result that cannot be stored: no retry would heal it."""
    # of the message only the type: the rest may quote the result
    found = re.search(r"unknown type: <class '([^']*)'>", str(error))
    what = f"`{found[1]}`" if found else type(error).__name__
    return pai.UserError(
        f"The result cannot be stored in the journal as JSON: {what}. Return what Pydantic can "
        "serialize: built-in types, dataclasses, models, `BinaryContent`; text must be valid Unicode."
    )


def original_error(failure: TerminalError) -> Exception | None:
    """Rebuild the exception that `step_failure` journaled, `None` if `failure` holds none."""
    encoded = (failure.metadata or {}).get(METADATA_KEY)
    return None if encoded is None else _decode(from_json(encoded))


def handler_failure(error: Exception) -> TerminalError | None:
    """Return the `TerminalError` for a hopeless `error` that leaves a handler, `None` to let it pass.

    Looks along the chain of `__cause__`, as restate-sdk does for its own errors, and into the groups that
    `asyncio.TaskGroup` and anyio raise: one hopeless failure in a group makes it hopeless. What
    could not be undone is in the message: the caller has to know.
    """
    failure = _hopeless(error)
    notes = [note for cause in _causes(error) for note in _notes(cause)]
    if not notes or not ends_invocation(error):
        return failure
    failure = failure or next(it for it in _chain(error) if isinstance(it, TerminalError))
    message = "\n".join([failure.message, *notes])
    return TerminalError(message, failure.status_code, failure.metadata)


def _hopeless(error: Exception) -> TerminalError | None:
    if any(isinstance(cause, (TerminalError, RetryableError)) for cause in _chain(error)):
        return None  # the SDK knows what to do
    for cause in _causes(error):
        if isinstance(cause, TerminalError):
            return cause
        if isinstance(found := verdict(cause), Terminal):
            return _terminal(cause, describe(cause), found)
    return None


def _terminal(error: BaseException, message: str, found: Terminal) -> TerminalError:
    metadata = {METADATA_KEY: to_json(_encode(error)).decode()}
    return TerminalError(message, status_code=found.status, metadata=metadata)


def _notes(error: BaseException) -> list[str]:
    notes: list[str] = getattr(error, "__notes__", [])
    return [note for note in notes if note.startswith(NOT_UNDONE)]


def ends_invocation(error: Exception) -> bool:
    """Return whether `error`, when it leaves the handler, ends the invocation: Restate retries the others."""
    for cause in _chain(error):
        if isinstance(cause, (TerminalError, RetryableError)):
            return isinstance(cause, TerminalError)
    return _hopeless(error) is not None


def gives_up(error: BaseException) -> bool:
    """Return whether handler code that `error` leaves is over for good, and not just its attempt."""
    if asyncio.get_running_loop().is_closed():
        return False
    return not isinstance(error, Exception) or ends_invocation(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _causes(error: BaseException) -> Iterator[BaseException]:
    for cause in _chain(error):
        yield cause
        if isinstance(cause, BaseExceptionGroup):
            group = cast("BaseExceptionGroup[BaseException]", cause)
            if verdict(group) is None:
                for member in group.exceptions:
                    yield from _causes(member)


def describe(error: BaseException) -> str:
    """Say what happened, without the provider's body and headers."""
    said = f"{type(error).__name__}: {_message(error)}"
    if isinstance(
        error, pai.UnexpectedModelBehavior
    ):  # behind it: why what the model said did not do
        for cause in _chain(error):
            if isinstance(cause, ValidationError):
                return f"{said}; {list_problems(cause)}"
    return said


def list_problems(error: ValidationError) -> str:
    """List what is wrong field by field, without the values: they may be secret or huge."""
    return "; ".join(
        f"`{'.'.join(map(str, problem['loc'])) or 'body'}`: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False, include_context=False)
    )


def _message(error: BaseException) -> str:
    if isinstance(error, pai.FallbackExceptionGroup):
        members = cast("tuple[Exception, ...]", error.exceptions)
        return f"all models failed: {'; '.join(map(describe, members))}"
    if isinstance(error, pai.ModelHTTPError):
        code = error.provider_error_code or error.provider_error_type
        reason = f" ({code})" if code else ""
        return f"model `{error.model_name}` answered {error.status_code}{reason}"
    if isinstance(error, pai.UnexpectedModelBehavior):
        return readable(error.message)  # `str` would add the body
    return readable(str(error))


def _encode(error: BaseException) -> dict[str, Any]:
    encoded: dict[str, Any] = {"type": type(error).__name__, "message": _message(error)}
    if isinstance(error, pai.FallbackExceptionGroup):
        encoded["errors"] = [
            _encode(member) for member in cast("tuple[Any, ...]", error.exceptions)
        ]
    elif isinstance(error, pai.ModelHTTPError):
        encoded["status_code"] = error.status_code
    if isinstance(error, pai.ModelAPIError):
        names = (
            "model_name",
            "provider_error_code",
            "provider_error_type",
            "retry_after",
            "timeout",
        )
        fields = {name: getattr(error, name, None) for name in names}
        encoded["fields"] = to_jsonable_python(fields, fallback=str)
    return encoded


def _decode(encoded: dict[str, Any]) -> Exception | None:
    """Build the exception without its constructor: each has its own, and the message is already made."""
    error_type = getattr(pai, encoded["type"], None)
    if not (isinstance(error_type, type) and issubclass(error_type, Exception)):
        return None
    message: str = encoded["message"]
    if issubclass(error_type, pai.FallbackExceptionGroup):
        errors = [_decode(member) for member in encoded["errors"]]
        return error_type(message, [error for error in errors if error is not None])
    fields: dict[str, Any] = encoded.get("fields", {})
    if "status_code" in encoded:
        return _http_error(error_type, encoded["status_code"], fields, message)
    # of the base that decides the memory layout: `RunTimedOut` is an `OSError` too
    error: Exception = cast(Any, error_type.__base__).__new__(error_type)
    error.args = (message,)
    defaults = {
        "message": message,
        "body": None,
        "in_stream": False,
        "phase": None,
        "setting": "request_timeout",
    }
    vars(error).update(defaults | fields)
    return error


def _http_error(
    category: type[Exception], status_code: int, fields: dict[str, Any], message: str
) -> Exception:
    error = pai.ModelHTTPError.for_category(
        None if category is pai.ModelHTTPError else cast(Any, category),
        status_code=status_code,
        model_name=fields["model_name"],
        provider_error_code=fields["provider_error_code"],
        provider_error_type=fields["provider_error_type"],
        retry_after=fields["retry_after"],
    )
    error.message = message
    error.args = (message,)
    return error
