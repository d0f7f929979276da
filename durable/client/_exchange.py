"""How a request gets its answer, and what the answer means, without I/O.

An exchange is a generator: it yields what to send or how long to pause, and is sent the response, or the error that
came instead. `Client` and `SyncClient` do the rest, in a few lines each.
"""

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeVar, cast
from urllib.parse import quote

import httpx2

from durable.client._errors import (
    ClientError,
    Conflict,
    NotFound,
    NotReady,
    RejectedInput,
    Timeout,
    Unreachable,
    run_failure,
)

T = TypeVar("T")

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a connection, whatever the call may take."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_SHORTEST = 0.001  # httpx takes no 0
_NOT_READY = 470  # of the ingress
_NOT_REPEATED = (
    " It was not sent again, since it might be done twice: an `idempotency_key` prevents that."
)
_ERRORS: Mapping[int, type[ClientError]] = {
    404: NotFound,
    409: Conflict,
    _NOT_READY: NotReady,
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the server."""

    method: str
    path: tuple[str, ...]
    """Segments, not quoted yet."""

    admin: bool = False
    """Whether the admin API is asked, not the ingress."""

    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    params: Mapping[str, str] = field(default_factory=dict[str, str])

    repeatable: bool = True
    """Whether it may be sent again when the connection broke, since doing it twice is doing it once."""

    @property
    def url(self) -> str:
        """The path, quoted: a segment may be anything."""
        return "/".join(
            quote(part, safe="") if part.strip(".") else "%2E" * len(part) for part in self.path
        )


@dataclass(frozen=True)
class Attempt:
    """Send the request."""

    request: Request
    timeout: httpx2.Timeout

    @property
    def options(self) -> dict[str, Any]:
        """What `request` of an HTTP client takes."""
        it = self.request
        return {
            "method": it.method,
            "url": it.url,
            "content": it.body,
            "headers": it.headers,
            "params": it.params,
            "timeout": self.timeout,
        }


@dataclass(frozen=True)
class Pause:
    """Wait before the next attempt."""

    seconds: float


Exchange = Generator[Attempt | Pause, httpx2.Response | httpx2.TransportError | None, T]


def exchange(request: Request, *, seconds: float | None, retries: int) -> Exchange[httpx2.Response]:
    """Get the answer to `request`.

    Args:
        request: What is asked.
        seconds: How long it may take, with all attempts.
        retries: How often a repeatable request is sent again when the connection breaks.

    Raises:
        ClientError: When there is no answer, or one that says what is wrong.
    """
    deadline = None if seconds is None else time.monotonic() + seconds

    def left() -> float:
        return inf if deadline is None else max(deadline - time.monotonic(), 0)

    for pause in [*_pauses(retries if request.repeatable else 0), None]:
        read = None if deadline is None else max(left(), _SHORTEST)
        answer = yield Attempt(
            request, httpx2.Timeout(read, connect=min(read or inf, CONNECT_TIMEOUT))
        )
        assert answer is not None
        if isinstance(answer, httpx2.Response) and not _unavailable(answer):
            return _checked(answer)
        if not left() or _is_late(answer):
            raise Timeout(f"No answer within {seconds:g} s. A run that has begun goes on.")
        if pause is None:
            raise _unreachable(request, answer)
        yield Pause(min(pause, left()))
    raise AssertionError("unreachable: the last attempt has no pause")


def _is_late(answer: httpx2.Response | httpx2.TransportError) -> bool:
    timed_out = isinstance(answer, httpx2.TimeoutException)
    return timed_out and not isinstance(answer, httpx2.ConnectTimeout)


def _pauses(retries: int) -> list[float]:
    return [min(_FIRST_PAUSE * 2**number, _LONGEST_PAUSE) for number in range(retries)]


def _unreachable(request: Request, answer: httpx2.Response | httpx2.TransportError) -> Unreachable:
    where = "admin API" if request.admin else "ingress"
    option = "admin_url" if request.admin else "ingress_url"
    if isinstance(answer, httpx2.Response):
        said = f"HTTP {answer.status_code}"
    else:
        said = f"{type(answer).__name__} {answer}".strip()
    size = (
        f", or {len(request.body):,} bytes are more than it takes"
        if len(request.body) > 2**24
        else ""
    )
    repeated = "" if request.repeatable else _NOT_REPEATED
    error = Unreachable(
        f"Restate's {where} does not answer ({said}). Check `{option}`, and that the server runs{size}."
        f"{repeated}"
    )
    error.__cause__ = answer if isinstance(answer, Exception) else None
    return error


def _unavailable(answer: httpx2.Response) -> bool:
    """Whether something on the way says that it does not reach Restate."""
    return answer.status_code in {502, 503, 504} and _source(answer) != "invocation"


def _source(answer: httpx2.Response) -> str:
    return answer.headers.get("x-restate-error-source", "")


def _checked(answer: httpx2.Response) -> httpx2.Response:
    if answer.is_success:
        return answer
    said, status = _said(answer), answer.status_code
    message = said.get("message") or f"HTTP {status} without an explanation"
    if _source(answer) == "invocation":
        raise run_failure(message, status, said.get("metadata"), answer.headers.get("x-restate-id"))
    if status in {401, 403}:
        raise ClientError(
            f"The credentials are refused ({status}): check `token` and `headers`.", status=status
        )
    if status in _ERRORS:
        raise _ERRORS[status](message, status=status)
    if answer.is_client_error:
        raise RejectedInput(message, status=status)
    raise ClientError(f"The server answered {status}: {message}", status=status)


def _said(answer: httpx2.Response) -> dict[str, Any]:
    try:
        said = answer.json()
    except ValueError:  # not from Restate, but from something on the way
        return {}
    return cast("dict[str, Any]", said) if isinstance(said, dict) else {}
