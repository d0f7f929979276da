"""The spans of our own: handlers, calls, waits, and tries that failed."""

from collections.abc import Coroutine, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context as TraceContext
from opentelemetry.context import attach, detach
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from durable._preloaded import attempt_preloaded
from durable._telemetry import SCOPE, SLEEP_SECONDS, Wait, failed_tries, marked, reported

T = TypeVar("T")

_TRACE_CONTEXT = TraceContextTextMapPropagator()
_BAGGAGE = W3CBaggagePropagator()

_tracer = trace.get_tracer(SCOPE)
_waits: ContextVar[bool] = ContextVar("durable.waits", default=False)


@dataclass(frozen=True)
class Target:
    """What was invoked."""

    invocation: str
    service: str
    handler: str
    key: str | None
    shown: bool = True
    """Whether it has a span: not the private handlers of the virtual object behind a run."""

    @property
    def attributes(self) -> dict[str, str]:
        """What leads from a span to the invocation in Restate's UI."""
        key = {} if self.key is None else {"restate.key": self.key}
        return {
            "restate.invocation.id": self.invocation,
            "restate.service": self.service,
            "restate.handler": self.handler,
            **key,
        }


async def traced_handler(
    handler: Coroutine[Any, Any, T],
    target: Target,
    *,
    headers: Mapping[str, str],
    attempt_headers: Mapping[str, str],
) -> T:
    """Run `handler` in a span that joins the trace of the caller and of restate-server.

    Args:
        handler: The handler code.
        target: What was invoked.
        headers: The headers of the request.
        attempt_headers: Those with which restate-server began the attempt.
    """
    if not target.shown:
        return await handler
    token = attach(_caller(headers, attempt_headers))
    try:
        with _tracer.start_as_current_span(
            f"{target.service}/{target.handler}",
            kind=SpanKind.SERVER,
            attributes=target.attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                return await handler
            except Exception as error:
                span.set_status(StatusCode.ERROR, type(error).__name__)
                raise
    finally:
        detach(token)


def _caller(headers: Mapping[str, str], attempt_headers: Mapping[str, str]) -> TraceContext:
    """Find the parent: for a call through the ingress a span of restate-server, if it has any.

    A handler that calls another one knows better where in the trace of the server the call belongs.
    """
    request = _TRACE_CONTEXT.extract(headers, TraceContext())
    attempt = _TRACE_CONTEXT.extract(attempt_headers, TraceContext())
    of_caller = trace.get_current_span(request).get_span_context()
    of_server = trace.get_current_span(attempt).get_span_context()
    parent = attempt if of_server.is_valid else request
    if of_server.is_valid and "x-restate-ingress-path" not in headers:
        if marked(of_caller) or of_caller.trace_id == of_server.trace_id:
            parent = trace.set_span_in_context(
                NonRecordingSpan(
                    SpanContext(
                        trace_id=of_server.trace_id,
                        span_id=of_caller.span_id,
                        is_remote=True,
                        trace_flags=of_server.trace_flags,
                    )
                )
            )
    return _BAGGAGE.extract(headers, parent)


def trace_headers() -> dict[str, str]:
    """Return the headers that make a request over HTTP a part of the current span.

    Not for calls through Restate's context: those have headers from `durable._telemetry`.
    """
    headers: dict[str, str] = {}
    _TRACE_CONTEXT.inject(headers)
    _BAGGAGE.inject(headers)
    return headers


@contextmanager
def waiting(wait: Wait | None) -> Generator[None]:
    """Show in the trace that handler code waits; not for `None`, and not what is part of another wait."""
    if wait is None or _waits.get():
        yield
        return
    token = _waits.set(True)
    with _tracer.start_as_current_span(
        wait.name, attributes=wait.attributes, record_exception=False, set_status_on_exception=False
    ):
        try:
            yield
        finally:
            _waits.reset(token)


def sleeping_span(seconds: float) -> trace.Span:
    """Start the span of a sleep; whoever ends the sleep ends it."""
    return _tracer.start_span("sleep", attributes={SLEEP_SECONDS: float(seconds)})


def note_step(name: str) -> None:
    """Write on the current span, of a model request or a tool call, which step it is."""
    trace.get_current_span().set_attribute("restate.step", name)


def failed_try(step: str, began: float, error: BaseException, *, message: str | None) -> None:
    """Emit a span for a try of a step that failed and will be made again.

    Its `restate.retry_count` is the server's: how often the run was tried before since it last made progress.

    Args:
        step: The step's name.
        began: When the try began, in seconds since the epoch.
        error: Why it failed.
        message: The error's text, without what must not be shown.
    """
    preloaded = attempt_preloaded.get()
    of_step = {"restate.step": step, "restate.retry_count": preloaded.retries() if preloaded else 0}
    with reported():
        span = _tracer.start_span(
            f"failed try: {step}", start_time=int(began * 1e9), attributes=of_step
        )
        attributes = {"exception.type": type(error).__qualname__}
        span.add_event(
            "exception",
            attributes if message is None else {**attributes, "exception.message": message},
        )
        span.set_status(StatusCode.ERROR, message or type(error).__qualname__)
        span.end()
    failed_tries.add(1, {"restate.step": step})
