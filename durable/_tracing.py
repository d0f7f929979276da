"""One trace of a run: spans and metrics of handler code are emitted once, whatever is replayed.

Handler code runs again in each attempt, and with it PydanticAI's instrumentation. What it makes on the
handler loop is therefore held back, and the next entry of the journal decides:

- Handler code writes a new entry: no earlier attempt has come this far, so what ended before is emitted.
- It comes to an entry that the journal holds: the attempt that wrote the entry has emitted it. It is dropped.
- The attempt ends first (suspension, crash, retry): dropped; the attempt that gets further emits it.

So no ambient flag says "replaying"; each operation answers for what came before it. Span ids are derived from
the invocation and the order in which handler code opens spans, so what steps emit while they run, in any
attempt and process, already points to the spans that are emitted later. Times come from the journal, where
it has them: a span that waited a week for a replay does not begin with the replay.

The bodies of steps run on the host loop and are not touched: they run once, and so do their spans.

A process that is killed loses what its exporter has not sent yet, as always with OpenTelemetry.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import wraps
from hashlib import blake2b
from inspect import signature
from typing import Any, TypeVar

from opentelemetry import metrics, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context as TraceContext
from opentelemetry.context import attach, detach
from opentelemetry.sdk.metrics import Counter, Histogram, UpDownCounter
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, Tracer
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from durable._sdk import PendingSpanProcessor

T = TypeVar("T")

logger = logging.getLogger(__name__)

_TRACE_CONTEXT = TraceContextTextMapPropagator()
_BAGGAGE = W3CBaggagePropagator()

SCOPE = "pydantic-ai-restate"
"""The instrumentation scope of the spans and metrics made here."""

_JOURNAL_ENTRIES = frozenset(
    "attach_invocation sys_call sys_cancel sys_clear_all_state sys_clear_state sys_complete_promise_failure "
    "sys_complete_promise_success sys_get_promise sys_get_state sys_get_state_keys sys_peek_promise "
    "sys_reject_awakeable sys_reject_signal sys_resolve_awakeable sys_resolve_signal sys_run sys_send "
    "sys_set_state sys_sleep sys_write_output_failure sys_write_output_success".split()
)
"""The methods of the SDK's core that write an entry to the journal, or come to one that it holds."""


_meter = metrics.get_meter(SCOPE)
_replays = _meter.create_counter(
    "durable.replays", description="Attempts that began with replaying a journal."
)
_suspended = _meter.create_histogram(
    "durable.suspended", unit="s", description="How long a run was out of memory."
)
steps = _meter.create_counter("durable.steps", description="Steps whose body ran to its end.")
failed_tries = _meter.create_counter(
    "durable.failed_tries", description="Tries of steps that failed and are made again."
)

_WAITS: Mapping[str, Callable[[Any, Any], tuple[str, int]]] = {
    "attach_invocation": lambda given, handle: (f"attach {given['invocation_id']}", handle),
    "sys_awakeable": lambda given, awakeable: ("awakeable", awakeable[1]),
    "sys_call": lambda given, call: (
        f"call {given['service']}/{given['handler']}",
        call.result_handle,
    ),
    "sys_get_promise": lambda given, handle: (f"promise {given['name']}", handle),
    "sys_signal": lambda given, handle: (f"signal {given['signal_name']}", handle),
    "sys_sleep": lambda given, handle: ("sleep", handle),
}
"""What handler code can wait for besides steps: the span's name and the handle, from arguments and result."""


class AttemptTelemetry:
    """What the handler code of one attempt has made and the journal has not decided about."""

    def __init__(self, vm: Any, invocation: str) -> None:
        """Start with nothing.

        Args:
            vm: The core of the SDK.
            invocation: The invocation's id.
        """
        self._vm = vm
        self._invocation = invocation
        self._spans = 0
        self._held: list[Callable[[], None]] = []
        self._open: list[_HeldSpan] = []
        self._began = self._now = time.time_ns()
        self._journaled: int | None = None
        self._emitting = False
        self._waits: dict[int, str] = {}
        self.commands: Any = _Commands(vm, self)
        self._replaying: bool = vm.is_replaying()
        if self._replaying:
            _replays.add(1)

    @property
    def holds(self) -> bool:
        """Whether what is made now has to wait: not what is made while something is emitted."""
        return not self._emitting

    def hold(self, emit: Callable[[], None]) -> None:
        """Call `emit` when the next journal entry is a new one."""
        self._held.append(emit)

    def entry(self, *, replayed: bool) -> None:
        """Decide about everything that is held: handler code came to an entry of the journal."""
        held, self._held = self._held, []
        if replayed:
            return
        if self._replaying:
            self._replaying = False
            if self._journaled is not None:
                _suspended.record(max(0, self._began - self._journaled) / 1e9)
        self._emitting = True
        try:
            for emit in held:
                try:
                    emit()
                except Exception:
                    if not _reported:
                        _reported.append(True)
                        logger.exception("Telemetry could not be emitted; this is logged once.")
        finally:
            self._emitting = False

    # Time

    def delivered(self) -> None:
        """Take the clock's time for what was delivered, until a step tells its own."""
        self._now = time.time_ns()

    def observe(self, began: float, ended: float) -> None:
        """Take in the journaled times of a step, in seconds since the epoch."""
        self._now = self._journaled = int(ended * 1e9)
        for span in self._open:
            span.not_after(int(began * 1e9))
        self._open = [span for span in self._open if span.uncertain]

    def start_span(self, tracer: Tracer, start: Callable[..., Any], **options: Any) -> Any:
        """Start a span of handler code, with an id that is the same in every attempt."""
        mine = copy(tracer)
        span = _HeldSpan(self, tracer.span_processor, self._now, uncertain=self._vm.is_replaying())
        mine.span_processor = span  # pyright: ignore[reportAttributeAccessIssue]
        mine.id_generator = _Ids(self._invocation, self._spans)
        self._spans += 1
        if span.uncertain:
            self._open.append(span)
        options["attributes"] = {
            "restate.invocation.id": self._invocation,
            **(options["attributes"] or {}),
        }
        return start(mine, **options, start_time=self._now)

    def end_time(self) -> int:
        """Return when the span that ends now ended, in nanoseconds since the epoch."""
        return self._now

    # Waiting

    def created(self, name: str, handle: int) -> None:
        """Take note that handler code can wait for `handle`, under the span's `name`."""
        self._waits[handle] = name

    def waiting_for(self, handles: Iterable[int]) -> str | None:
        """Return the name of the span of a wait for any of `handles`, `None` for steps."""
        names = {self._waits[handle]: None for handle in handles if handle in self._waits}
        return " | ".join(names) or None


_reported: list[bool] = []


class _Commands:
    """The core of the SDK, with each journal entry announced."""

    def __init__(self, vm: Any, telemetry: AttemptTelemetry) -> None:
        self._vm = vm
        self._telemetry = telemetry

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._vm, name)
        if name in _JOURNAL_ENTRIES:
            method = self._announced(method)
        if name in _WAITS:
            method = self._noted(method, _WAITS[name])
        setattr(self, name, method)
        return method

    def _announced(self, method: Callable[..., T]) -> Callable[..., T]:
        @wraps(method)
        def announce(*args: Any, **kwargs: Any) -> T:
            replayed = self._vm.is_replaying()
            result = method(*args, **kwargs)
            self._telemetry.entry(replayed=replayed)
            return result

        return announce

    def _noted(
        self, method: Callable[..., T], wait: Callable[[Any, Any], tuple[str, int]]
    ) -> Callable[..., T]:
        arguments = signature(method).bind

        @wraps(method)
        def note(*args: Any, **kwargs: Any) -> T:
            result = method(*args, **kwargs)
            self._telemetry.created(*wait(arguments(*args, **kwargs).arguments, result))
            return result

        return note


class _Ids(IdGenerator):
    """The ids of one span: a function of the invocation and the span's number in it."""

    def __init__(self, invocation: str, number: int) -> None:
        self._invocation = invocation
        self._number = number

    def generate_trace_id(self) -> int:
        return _hash(self._invocation, size=16)

    def generate_span_id(self) -> int:
        return _hash(f"{self._invocation}:{self._number}", size=8)


def _hash(text: str, *, size: int) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=size).digest(), "big") or 1


class _HeldSpan(SpanProcessor):
    """Stands between one span of handler code and the processors it is for."""

    def __init__(
        self, telemetry: AttemptTelemetry, processor: Any, start: int, *, uncertain: bool
    ) -> None:
        self._telemetry = telemetry
        self._processor = processor
        self._start = start
        self.uncertain = uncertain
        """Whether the start was read from the clock by code that is being replayed."""

    def not_after(self, began: int) -> None:
        """Correct the start: a step within the span began then."""
        self._start = min(self._start, began)
        self.uncertain = False

    def on_start(self, span: Span, parent_context: TraceContext | None = None) -> None:
        self._processor.on_start(span, parent_context)

    def _on_ending(self, span: Span) -> None:
        self._processor._on_ending(span)

    def on_end(self, span: ReadableSpan) -> None:
        ended = max(self._start, self._telemetry.end_time())
        self.uncertain = False

        def emit() -> None:
            self._processor.on_end(
                ReadableSpan(
                    name=span.name,
                    context=span.context,
                    parent=span.parent,
                    resource=span.resource,
                    attributes=span.attributes,
                    events=span.events,
                    links=span.links,
                    kind=span.kind,
                    status=span.status,
                    start_time=self._start,
                    end_time=ended,
                    instrumentation_scope=span.instrumentation_scope,
                )
            )

        self._telemetry.hold(emit)


# What OpenTelemetry's SDK is asked for on the handler loop goes through the attempt's telemetry

_start_span = Tracer.start_span


@wraps(_start_span)
def _start_span_once(
    self: Tracer,
    name: str,
    context: TraceContext | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Any = None,
    links: Any = None,
    start_time: int | None = None,
    record_exception: bool = True,
    set_status_on_exception: bool = True,
) -> Any:
    options: dict[str, Any] = {
        "name": name,
        "context": context,
        "kind": kind,
        "attributes": attributes,
        "links": links,
        "record_exception": record_exception,
        "set_status_on_exception": set_status_on_exception,
    }
    telemetry = current_telemetry()
    if telemetry is None:
        return _start_span(self, start_time=start_time, **options)
    return telemetry.start_span(self, _start_span, **options)


def _once(emit: Callable[..., None]) -> Callable[..., None]:
    @wraps(emit)
    def emit_once(*args: Any, **kwargs: Any) -> None:
        telemetry = current_telemetry()
        if telemetry is None:
            emit(*args, **kwargs)
        else:
            telemetry.hold(lambda: emit(*args, **kwargs))

    return emit_once


Tracer.start_span = _start_span_once
PendingSpanProcessor.on_start = _once(PendingSpanProcessor.on_start)  # Logfire's spans in progress
Counter.add = _once(Counter.add)
UpDownCounter.add = _once(UpDownCounter.add)
Histogram.record = _once(Histogram.record)


def current_telemetry() -> AttemptTelemetry | None:
    """Return the telemetry of the attempt whose handler code is running, `None` anywhere else."""
    telemetry: AttemptTelemetry | None = getattr(asyncio._get_running_loop(), "telemetry", None)
    return telemetry if telemetry is not None and telemetry.holds else None


# The spans of our own

_tracer = trace.get_tracer(SCOPE)


@dataclass(frozen=True)
class Target:
    """What was invoked."""

    invocation: str
    service: str
    handler: str
    key: str | None

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

    A handler that calls another one knows better where the call belongs, as long as it is the same trace.
    """
    empty = TraceContext()
    attempt = _TRACE_CONTEXT.extract(attempt_headers, empty)
    request = _TRACE_CONTEXT.extract(headers, empty)
    of_server = trace.get_current_span(attempt).get_span_context()
    of_caller = trace.get_current_span(request).get_span_context()
    through_ingress = "x-restate-ingress-path" in headers
    use_attempt = of_server.is_valid and (
        through_ingress or of_server.trace_id != of_caller.trace_id
    )
    return _BAGGAGE.extract(headers, attempt if use_attempt else request)


def trace_headers() -> dict[str, str]:
    """Return the headers that make a call to another handler a part of the current span."""
    headers: dict[str, str] = {}
    _TRACE_CONTEXT.inject(headers)
    _BAGGAGE.inject(headers)
    return headers


@contextmanager
def waiting(name: str | None, **attributes: str | float) -> Generator[None]:
    """Show in the trace that handler code waits; with no name it does not."""
    if name is None:
        yield
        return
    with _tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ):
        yield


def sleeping_span(seconds: float) -> trace.Span:
    """Start the span of a sleep; whoever ends the sleep ends it."""
    return _tracer.start_span("sleep", attributes={"restate.sleep.seconds": seconds})


def note_step(name: str) -> None:
    """Write on the current span, of a model request or a tool call, which step it is."""
    trace.get_current_span().set_attribute("restate.step", name)


def failed_try(step: str, began: float, error: BaseException, *, message: str | None) -> None:
    """Emit a span for a try of a step that failed and will be made again.

    Args:
        step: The step's name.
        began: When the try began, in seconds since the epoch.
        error: Why it failed.
        message: The error's text, without what must not be shown.
    """
    span = _tracer.start_span(
        f"failed try: {step}", start_time=int(began * 1e9), attributes={"restate.step": step}
    )
    attributes = {"exception.type": type(error).__qualname__}
    span.add_event(
        "exception", attributes if message is None else {**attributes, "exception.message": message}
    )
    span.set_status(StatusCode.ERROR, message or type(error).__qualname__)
    span.end()
    failed_tries.add(1, {"restate.step": step})
