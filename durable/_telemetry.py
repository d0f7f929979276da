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

A call of another handler carries the trace in its headers. The journal holds them and restate-server compares
them on replay, so they are a function of the request and of the calls made before, and not of how
traces are configured: the number of the call names the span that the handler's spans lie under.

A process that is killed loses what its exporter has not sent yet, as always with OpenTelemetry.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import wraps
from hashlib import blake2b
from inspect import signature
from itertools import count
from typing import Any, NamedTuple, TypeVar, cast

from opentelemetry import metrics, trace
from opentelemetry.context import Context as TraceContext
from opentelemetry.sdk.metrics import Counter, Histogram, UpDownCounter
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, Tracer
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Sampler
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pydantic_ai.exceptions import UserError

from durable._errors import readable
from durable._names import AGENT_RUN
from durable._sdk import Failure, PendingSpanProcessor

T = TypeVar("T")

logger = logging.getLogger(__name__)

_TRACE_CONTEXT = TraceContextTextMapPropagator()

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


class Wait(NamedTuple):
    """The span that shows a wait."""

    name: str
    attributes: Mapping[str, float] = {}


SLEEP_SECONDS = "restate.sleep.seconds"
"""The attribute that says how long a sleep takes."""

_WAITS: Mapping[str, Callable[[Mapping[str, Any]], Wait]] = {
    "attach_invocation": lambda given: Wait(f"attach {given['invocation_id']}"),
    "sys_awakeable": lambda given: Wait("awakeable"),
    "sys_get_promise": lambda given: Wait(f"promise {given['name']}"),
    "sys_signal": lambda given: Wait(f"signal {given['signal_name']}"),
    "sys_sleep": lambda given: Wait("sleep", {SLEEP_SECONDS: given["millis"] / 1000}),
}
"""What handler code can wait for besides steps and calls, from the arguments of the SDK's method."""

_MARK = "durable"
"""The key in `tracestate` of a call's headers: its trace id is the caller's idea, which restate-server may overrule."""

_DECIDED, _UNDECIDED = "decided", "undecided"
"""What the mark says: whether anybody has decided yet if the trace is kept."""


class AttemptTelemetry:
    """What the handler code of one attempt has made and the journal has not decided about."""

    def __init__(self, vm: Any, invocation: str, headers: Mapping[str, str]) -> None:
        """Start with nothing.

        Args:
            vm: The core of the SDK.
            invocation: The invocation's id.
            headers: Those of the request.
        """
        self._vm = vm
        self._invocation = invocation
        self._headers = headers
        self._began = self._now = time.time_ns()
        self._journaled: int | None = None
        self._replaying: bool = vm.is_replaying()
        self._emitting = False
        self._held: list[Callable[[], None]] = []
        self._span_names = map(str, count())
        self._open: list[_HeldSpan] = []
        self._waits: dict[int, Wait] = {}
        self._calls: dict[int, trace.Span] = {}
        self._call_numbers = count()
        self.commands: Any = _Commands(vm, self)
        """The core of the SDK, with what happens told here."""
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
        self._emitting = True
        try:
            if self._replaying and self._journaled is not None and self._journaled < self._began:
                _suspended.record((self._began - self._journaled) / 1e9)
            self._replaying = False
            for emit in held:
                with reported():
                    emit()
        finally:
            self._emitting = False

    # Time

    def delivered(self) -> None:
        """Take the clock's time for what was delivered, until a step tells its own."""
        self._now = time.time_ns()
        self._journaled_now = False

    _journaled_now = False
    """Whether the time comes from the journal, and not from the clock of an attempt that replays."""

    def observe(self, began: float, ended: float) -> None:
        """Take in the journaled times of a step, in seconds since the epoch."""
        self._now = self._journaled = int(ended * 1e9)
        self._journaled_now = True
        self.began_by(int(began * 1e9))

    def began_by(self, time: int) -> None:
        """Correct the spans that are open and do not know when they began: not after `time`."""
        for span in self._open:
            span.start = min(span.start, time)
        self._open.clear()

    @property
    def now(self) -> int:
        """What spans take for the present, in nanoseconds since the epoch."""
        return self._now

    # Spans

    def start_span(self, tracer: Tracer, start: Callable[..., Any], **options: Any) -> Any:
        """Start a span of handler code, with an id that is the same in every attempt."""
        mine = copy(tracer)
        span = _HeldSpan(self, tracer.span_processor)
        if self._vm.is_replaying() and not self._journaled_now:
            self._open.append(span)
        mine.span_processor = span  # pyright: ignore[reportAttributeAccessIssue]
        mine.id_generator = _Ids(self._invocation, next(self._span_names))
        context = _decided(tracer.sampler, options.pop("context"))
        given: Mapping[str, Any] = options.pop("attributes") or {}
        attributes = {"restate.invocation.id": self._invocation, **given}
        return start(mine, context=context, attributes=attributes, start_time=self._now, **options)

    def closed(self, span: "_HeldSpan") -> bool:
        """Return whether the start of `span`, which ends now, is certain."""
        certain = span not in self._open
        if not certain:
            self._open.remove(span)
        return certain

    def waits(self, handle: int, wait: Wait) -> None:
        """Take note of what it means when handler code waits for `handle`."""
        self._waits[handle] = wait

    def waiting_for(self, handles: Iterable[int]) -> Wait | None:
        """Return what handler code waits for when it waits for any of `handles`, `None` for steps and calls."""
        waits = [self._waits[handle] for handle in handles if handle in self._waits]
        if not waits:
            return None
        if len(waits) == 1:
            return waits[0]
        return Wait(" | ".join(dict.fromkeys(wait.name for wait in waits)))

    # Calls of other handlers

    def start_call(self, name: str) -> tuple[trace.Span, dict[str, str]]:
        """Start the span of a call, and return it with the headers that make the handler a part of it."""
        span_name = f"call:{next(self._call_numbers)}"
        names, self._span_names = self._span_names, iter([span_name])
        try:
            span = trace.get_tracer(SCOPE).start_span(name)
        finally:
            self._span_names = names
        caller = request_context(self._headers)
        decided = caller.is_valid and caller.trace_state.get(_MARK) != _UNDECIDED
        mark = _DECIDED if decided else _UNDECIDED
        context = SpanContext(
            trace_id=caller.trace_id or _hash(self._invocation, size=16),
            span_id=_hash(f"{self._invocation}:{span_name}", size=8),
            is_remote=False,
            trace_flags=caller.trace_flags if decided else TraceFlags(TraceFlags.SAMPLED),
            trace_state=caller.trace_state.update(_MARK, mark),
        )
        headers: dict[str, str] = {}
        _TRACE_CONTEXT.inject(headers, trace.set_span_in_context(NonRecordingSpan(context)))
        if "baggage" in self._headers:
            headers["baggage"] = self._headers["baggage"]
        return span, headers

    def called(self, handle: int, span: trace.Span) -> None:
        """End `span` when `handle` completes."""
        self._calls[handle] = span

    def completed(self, is_completed: Callable[[int], bool]) -> None:
        """End the spans of calls that are over."""
        for handle in [handle for handle in self._calls if is_completed(handle)]:
            self._calls.pop(handle).end()

    def ended(self) -> None:
        """End the spans of calls that the handler has not waited for."""
        self.completed(lambda handle: True)


class _Commands:
    """The core of the SDK, with each journal entry announced, and failures in text that it can send."""

    def __init__(self, vm: Any, telemetry: AttemptTelemetry) -> None:
        self._vm = vm
        self._telemetry = telemetry

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._vm, name)
        if name in _JOURNAL_ENTRIES:
            method = self._announced(method)
            if not name.startswith("sys_write_output"):  # of the handler's result, by the SDK
                method = self._in_handler_code(method)
        if name in _WAITS:
            method = self._noted(method, _WAITS[name])
        if name in _CALLS:
            method = self._traced(method, _CALLS[name])
        if name in _FAILURES:
            method = _readably(method)
        setattr(self, name, method)
        return method

    def _in_handler_code(self, method: Callable[..., T]) -> Callable[..., T]:
        """Refuse a step that uses its handler's context: when its entry came would be a matter of luck."""

        @wraps(method)
        def write(*args: Any, **kwargs: Any) -> T:
            if current_attempt() is not self._telemetry:
                raise UserError(
                    "The Restate context was used inside a step (`ctx.run`), where the journal cannot be written. Steps "
                    "cannot be nested: use it in handler code, in a tool with "
                    '`metadata={"restate": False}` for instance.'
                )
            return method(*args, **kwargs)

        return write

    def _announced(self, method: Callable[..., T]) -> Callable[..., T]:
        @wraps(method)
        def announce(*args: Any, **kwargs: Any) -> T:
            replayed = self._vm.is_replaying()
            result = method(*args, **kwargs)
            self._telemetry.entry(replayed=replayed)
            return result

        return announce

    def _noted(
        self, method: Callable[..., T], wait: Callable[[Mapping[str, Any]], Wait]
    ) -> Callable[..., T]:
        arguments = signature(method).bind

        @wraps(method)
        def note(*args: Any, **kwargs: Any) -> T:
            result = method(*args, **kwargs)
            handle: Any = result
            if isinstance(handle, tuple):  # of an awakeable: with its name
                _, handle = cast("tuple[str, int]", handle)
            self._telemetry.waits(handle, wait(arguments(*args, **kwargs).arguments))
            return result

        return note

    def _traced(self, method: Callable[..., T], verb: str) -> Callable[..., T]:
        arguments = signature(method).bind

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> T:
            given = arguments(*args, **kwargs)
            it = given.arguments
            if it["service"] == AGENT_RUN:
                return method(*args, **kwargs)
            span, trace_headers = self._telemetry.start_call(
                f"{verb} {it['service']}/{it['handler']}"
            )
            headers: dict[str, str] = dict(it.get("headers") or ())
            it["headers"] = list(
                (headers if "traceparent" in headers else trace_headers | headers).items()
            )
            result: Any = method(*given.args, **given.kwargs)
            if verb == "call":
                self._telemetry.called(result.result_handle, span)
            else:
                span.end()
            return result

        return call


_FAILURES = {
    "notify_error",
    "propose_run_completion_failure",
    "propose_run_completion_transient",
    "propose_run_completion_transient_with_delay_override",
    "sys_write_output_failure",
}
"""What tells the core of a failure, which would be lost, and waited for, if the core could not encode its text."""


def _readably(method: Callable[..., T]) -> Callable[..., T]:
    def clean(it: Any) -> Any:
        if isinstance(it, str):
            return readable(it)
        if isinstance(it, Failure):
            return replace(it, message=readable(it.message), stacktrace=clean(it.stacktrace))
        return it

    @wraps(method)
    def tell(*args: Any, **kwargs: Any) -> T:
        return method(*map(clean, args), **{name: clean(it) for name, it in kwargs.items()})

    return tell


_CALLS = {"sys_call": "call", "sys_send": "send"}
"""The calls that traces show, and carry on to the handlers; not those to the virtual object behind a run."""


class _Ids(IdGenerator):
    """The ids of one span: a function of the invocation and the span's name in it."""

    def __init__(self, invocation: str, name: str) -> None:
        self._invocation = invocation
        self._name = name

    def generate_trace_id(self) -> int:
        return _hash(self._invocation, size=16)

    def generate_span_id(self) -> int:
        return _hash(f"{self._invocation}:{self._name}", size=8)


def _hash(text: str, *, size: int) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=size).digest(), "big") or 1


class _HeldSpan(SpanProcessor):
    """Stands between one span of handler code and the processors it is for."""

    def __init__(self, telemetry: AttemptTelemetry, processor: Any) -> None:
        self._telemetry = telemetry
        self._processor = processor
        self.start = telemetry.now

    def on_start(self, span: Span, parent_context: TraceContext | None = None) -> None:
        with reported():
            self._processor.on_start(span, parent_context)

    def _on_ending(self, span: Span) -> None:
        with reported():
            self._processor._on_ending(span)

    def on_end(self, span: ReadableSpan) -> None:
        ended = self._telemetry.now
        slept = (span.attributes or {}).get(SLEEP_SECONDS)
        if not self._telemetry.closed(self) and isinstance(slept, float):
            self.start = min(self.start, ended - int(slept * 1e9))
            self._telemetry.began_by(self.start)

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
                    start_time=self.start,
                    end_time=max(self.start, ended),
                    instrumentation_scope=span.instrumentation_scope,
                )
            )

        self._telemetry.hold(emit)


@contextmanager
def reported() -> Generator[None]:
    """Let nothing out that telemetry raises, which is none of the run's business: it is logged once."""
    try:
        yield
    except Exception:
        if not _reported:
            _reported.append(True)
            logger.exception("Telemetry could not be emitted; this is logged once.")


_reported: list[bool] = []


def request_context(headers: Mapping[str, str]) -> SpanContext:
    """Return which span the request says it is a part of; not a valid one when it does not."""
    return trace.get_current_span(
        _TRACE_CONTEXT.extract(headers, TraceContext())
    ).get_span_context()


def marked(caller: SpanContext) -> bool:
    """Return whether the headers of a call that handler code made say so."""
    return caller.trace_state.get(_MARK) is not None


def _decided(sampler: Sampler, context: TraceContext | None) -> TraceContext | None:
    """Decide whether the trace is kept, as the handler that called did, when nobody had before it."""
    parent = trace.get_current_span(context).get_span_context()
    if not (parent.is_remote and parent.trace_state.get(_MARK) == _UNDECIDED):
        return context
    decision = sampler.should_sample(TraceContext(), parent.trace_id, "").decision
    if decision.is_sampled():
        return context
    return trace.set_span_in_context(
        NonRecordingSpan(
            SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=TraceFlags(0))
        ),
        context,
    )


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


def current_attempt() -> AttemptTelemetry | None:
    """Return the attempt whose handler code is running, whether or not it is held, `None` anywhere else."""
    return getattr(asyncio._get_running_loop(), "telemetry", None)


def current_telemetry() -> AttemptTelemetry | None:
    """Return the telemetry of the attempt whose handler code is running, `None` anywhere else."""
    telemetry = current_attempt()
    return telemetry if telemetry is not None and telemetry.holds else None
