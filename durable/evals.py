"""Online evals: a share of an agent's live runs is evaluated, durably, after the run and apart from it.

    run → step that decides and collects → one-way call → OnlineEvaluation/evaluate → a step per evaluator → report

It needs pydantic-evals: `pip install 'pydantic-ai-restate[evals]'`.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime
from functools import reduce
from hashlib import blake2b
from typing import Any

import restate
from opentelemetry import context as otel_context
from opentelemetry import trace
from pydantic import BaseModel, TypeAdapter
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.capabilities import AbstractCapability, WrapRunHandler
from pydantic_ai.exceptions import RunCancelled, UserError
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ToolReturnPart,
    UserContent,
)
from pydantic_ai.run import AgentRunResult
from pydantic_ai.tools import AgentDepsT, RunContext
from pydantic_core import to_json, to_jsonable_python
from restate import Context, TerminalError

from durable import _names
from durable._codec import JournalDecodeError, ResultCodec
from durable._context import Invocation, current_invocation
from durable._driver import InvocationCancelled
from durable._errors import (
    Retry,
    describe,
    ends_invocation,
    handler_failure,
    original_error,
    verdict,
)
from durable._operation_backend import MAX_RESULT_SIZE, run_step
from durable._options import StepOptions
from durable._sdk import types_from_output_spec
from durable._sdk_evals import (
    CallbackSink,
    EvaluationResult,
    EvaluationSink,
    EvaluatorContext,
    EvaluatorFailure,
    OnlineEvaluator,
    SamplingContext,
    SinkPayload,
    SpanNode,
    SpanReference,
    SpanTree,
    build_parent_context,
    emit_otel_events,
    run_evaluators,
)
from durable._sdk_evals import OnlineEvaluation as PlainOnlineEvaluation

__all__ = ["Evaluated", "OnlineEvaluation"]

logger = logging.getLogger(__name__)


class _Span(BaseModel):
    """What a model request or a tool call of the run was, with the attributes of PydanticAI's spans."""

    name: str
    start: datetime
    end: datetime
    attributes: dict[str, Any]


class _Failure(BaseModel):
    message: str
    status: int
    metadata: dict[str, str] | None


class _Run(BaseModel):
    """A run that is to be evaluated."""

    run: str
    """Names it: the idempotency key."""

    target: str
    """The agent."""

    evaluators: list[str]
    inputs: Any
    output: Any = None
    failure: _Failure | None = None
    metadata: dict[str, Any] | None
    duration: float
    spans: list[_Span]
    metrics: dict[str, float]
    trace_id: str | None
    span_id: str | None


class Evaluated(BaseModel):
    """What the evaluators found of a run: the output of the service's handler, which Restate's UI shows."""

    run: str
    """The run: the id of its invocation, and its number there."""

    target: str
    """The agent."""

    results: list[EvaluationResult[Any]]
    failures: list[EvaluatorFailure]
    """Evaluators that raised, or whose retries are used up."""


_Outcome = tuple[list[EvaluationResult[Any]], list[EvaluatorFailure]]
_OUTCOME = TypeAdapter(_Outcome)
_INPUTS = str | list[UserContent] | None
_CODEC = ResultCodec()


@dataclass(kw_only=True)
class OnlineEvaluation(PlainOnlineEvaluation[AgentDepsT]):
    """Evaluates a share of an agent's runs: pydantic-evals' `OnlineEvaluation`, made durable.

    It takes the same evaluators, sample rates and sinks. In a handler that `durable.app` hosts the run only leaves
    a message behind, and `service` evaluates it: each evaluator is a step with retries, in an invocation of
    its own, once per run. Nothing of it delays the run or makes it fail. Outside a handler, and inside a step, it is
    pydantic-evals' own capability.

    Whether a run is sampled depends on its id and on nothing else, so each replay decides alike; where a
    `sample_rate` is a function, what it decides is journaled.

    Example:
        ```python
        evaluation = OnlineEvaluation(
            evaluators=[
                OnlineEvaluator(evaluator=LLMJudge(rubric="It is a haiku."), sample_rate=0.05)
            ],
        )
        agent = Agent(
            "openai:gpt-5-mini",
            name="poet",
            capabilities=[durable.RestateDurability(), evaluation],
        )
        app = durable.app([poet, evaluation.service])
        ```

    Results are the output of `OnlineEvaluation/evaluate`, OpenTelemetry events under the span of the run, as
    pydantic-evals emits them, and what the sinks of the configuration get. An evaluator sees the run's prompt, output,
    usage and duration, and a span tree of the agent's own model requests and tool calls.
    """

    name: str = "OnlineEvaluation"
    """The service's name. It, and the evaluators' names, are stored data."""

    service: restate.Service = field(init=False, repr=False)
    """Evaluates: host it with `durable.app([..., evaluation.service])`."""

    _agents: dict[str, AbstractAgent[Any, Any]] = field(
        init=False, repr=False, default_factory=dict[str, AbstractAgent[Any, Any]]
    )

    def __post_init__(self) -> None:
        """Name the evaluators, and make the service."""
        super().__post_init__()
        self._labelled = dict(_labels(self._online_evaluators))
        self.service = restate.Service(self.name)

        async def evaluate(ctx: Context, run: _Run) -> Evaluated:
            return await self._evaluate(run)

        self.service.handler(ingress_private=True)(evaluate)

    def for_agent(self, agent: AbstractAgent[AgentDepsT, Any]) -> AbstractCapability[AgentDepsT]:
        """Remember the agent: its evaluators want outputs of its type."""
        self._agents[agent.name or _NAMELESS] = agent
        return self

    async def wrap_run(
        self, ctx: RunContext[AgentDepsT], *, handler: WrapRunHandler
    ) -> AgentRunResult[Any]:
        """Run, then leave behind what is to be evaluated.

        Raises:
            UserError: When the app does not host `service`.
        """
        invocation = current_invocation()
        if invocation is None:
            return await super().wrap_run(ctx, handler=handler)
        # without a name it is a test in memory
        if invocation.services and self.name not in invocation.services:
            raise UserError(
                f"`OnlineEvaluation` evaluates in the service {self.name!r}, which this app does not host. Add it: "
                "`durable.app([..., evaluation.service])`."
            )
        run = f"{invocation.context.request().id}:{next(invocation.evaluation_numbers)}"
        span = trace.get_current_span().get_span_context()
        try:
            result = await handler()
        except Exception as error:
            cancelled = isinstance(error, InvocationCancelled | RunCancelled)
            if not cancelled and ends_invocation(error):
                await self._leave(invocation, ctx, run, span, error=error)
            raise
        await self._leave(invocation, ctx, run, span, result=result)
        return result

    # In the run

    async def _leave(
        self,
        invocation: Invocation,
        ctx: RunContext[AgentDepsT],
        run: str,
        span: trace.SpanContext,
        *,
        result: AgentRunResult[Any] | None = None,
        error: Exception | None = None,
    ) -> None:
        if not self._resolved_config.should_evaluate():
            return
        sampled = [
            label
            for label, online in self._labelled.items()
            if (error is None or online.run_on_errors) and self._may_be_sampled(online, run, label)
        ]
        if not sampled:
            return
        target = _name(ctx)

        async def collect() -> object:
            try:
                return self._collect(invocation, ctx, run, sampled, span, result, error)
            except Exception:
                logger.exception("A run of %r is not evaluated: see the error.", target)
                return None

        # a step, because the call's bytes must be the same on every replay, and an output may hold a set
        letter = await run_step(_names.online_evaluation(target), collect, StepOptions())
        if letter is not None:
            invocation.context.generic_send(
                self.name, "evaluate", to_json(letter), idempotency_key=run
            )

    def _may_be_sampled(self, online: OnlineEvaluator, run: str, label: str) -> bool:
        rate = self._rate(online)
        return True if callable(rate) else self._seed(run, label) < rate

    def _rate(self, online: OnlineEvaluator) -> float | Callable[[SamplingContext], float | bool]:
        own = online.sample_rate
        return self._resolved_config.default_sample_rate if own is None else own

    def _seed(self, run: str, label: str) -> float:
        """Return a number from 0 to 1 that stands for chance."""
        correlated = self._resolved_config.sampling_mode == "correlated"
        digest = blake2b((run if correlated else f"{run}:{label}").encode(), digest_size=7)
        return int.from_bytes(digest.digest(), "big") / 2**56

    def _is_sampled(self, ctx: RunContext[AgentDepsT], run: str, label: str) -> bool:
        online, config = self._labelled[label], self._resolved_config
        rate = self._rate(online)
        if not callable(rate):
            return True
        context = SamplingContext(
            evaluator=online.evaluator,
            inputs=ctx.prompt,
            metadata=config.metadata,
            call_seed=self._seed(run, ""),
        )
        try:
            decided: bool | float = rate(context)
        except Exception as error:
            if (tell := online.on_sampling_error or config.on_sampling_error) is not None:
                tell(error, online.evaluator)
            else:
                logger.exception("The sample rate of %r failed, so it does not run.", label)
            return False
        return decided if isinstance(decided, bool) else self._seed(run, label) < decided

    def _collect(
        self,
        invocation: Invocation,
        ctx: RunContext[AgentDepsT],
        run: str,
        sampled: Sequence[str],
        span: trace.SpanContext,
        result: AgentRunResult[Any] | None,
        error: Exception | None,
    ) -> object:
        evaluators = [label for label in sampled if self._is_sampled(ctx, run, label)]
        if not evaluators:
            return None
        messages = ctx.messages if result is None else result.all_messages()
        own = [message for message in messages if message.run_id == ctx.run_id]
        usage = ctx.usage if result is None else result.usage
        spans = list(_spans(_name(ctx), own))
        began = min((it.start for it in spans), default=None)
        costs = [it.attributes.get("operation.cost", 0.0) for it in spans]
        metrics = {
            "requests": usage.requests,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cost": sum(costs),
        }
        metadata = self._resolved_config.metadata, ctx.metadata
        letter = _Run(
            run=run,
            target=_name(ctx),
            evaluators=evaluators,
            inputs=ctx.prompt,
            output=None if result is None else result.output,
            failure=None if error is None else _failure(error),
            metadata={**(metadata[0] or {}), **(metadata[1] or {})} or None,
            duration=(invocation.now - began).total_seconds() if began and invocation.now else 0.0,
            spans=spans,
            metrics={name: value for name, value in metrics.items() if value},
            trace_id=trace.format_trace_id(span.trace_id) if span.is_valid else None,
            span_id=trace.format_span_id(span.span_id) if span.is_valid else None,
        )
        encoded = to_jsonable_python(letter, bytes_mode="base64")
        if (size := len(to_json(encoded))) > MAX_RESULT_SIZE // 2:
            raise ValueError(f"prompt and output take {size:,} bytes as JSON")
        return encoded

    # In the service

    async def _evaluate(self, run: _Run) -> Evaluated:
        context = self._context(run)
        reference = None
        if run.trace_id and run.span_id:
            reference = SpanReference(trace_id=run.trace_id, span_id=run.span_id)
        known = [label for label in run.evaluators if label in self._labelled]
        found = await asyncio.gather(*[self._judge(it, context, reference) for it in known])
        outcomes = dict(zip(known, found, strict=True))
        await self._report(run.target, list(outcomes.values()), reference)
        await self._submit(run.target, outcomes, context, reference)
        results, failures = _joined(outcomes.values())
        return Evaluated(run=run.run, target=run.target, results=results, failures=failures)

    def _context(self, run: _Run) -> EvaluatorContext[Any, Any, Any]:
        return EvaluatorContext(
            name=run.run,
            inputs=_loaded(_INPUTS, run.inputs),
            output=self._output(run),
            expected_output=None,
            metadata=run.metadata,
            duration=run.duration,
            _span_tree=_tree(run.spans),
            attributes={},
            metrics=run.metrics,
        )

    def _output(self, run: _Run) -> Any:
        if run.failure is not None:
            failure = TerminalError(
                run.failure.message, run.failure.status, metadata=run.failure.metadata
            )
            return original_error(failure) or failure
        agent = self._agents.get(run.target)
        if agent is None:
            return run.output
        types: Sequence[Any] = types_from_output_spec(agent.output_type)
        return _loaded(reduce(lambda one, other: one | other, types), run.output)

    async def _judge(
        self, label: str, context: EvaluatorContext[Any, Any, Any], reference: SpanReference | None
    ) -> _Outcome:
        online = self._labelled[label]

        async def body() -> object:
            while not online.semaphore.acquire(blocking=False):  # noqa: ASYNC110 - of threads too
                await asyncio.sleep(0.05)
            try:
                with _under(reference):
                    return _OUTCOME.dump_python(await _run(online, context), mode="json")
            finally:
                online.semaphore.release()

        try:
            stored = await run_step(_names.evaluator(label), body, StepOptions())
        except InvocationCancelled:
            raise
        except (TerminalError, UserError) as error:
            return [], [_gave_up(online, error)]
        return _CODEC.load(_Outcome, stored)

    async def _report(
        self, target: str, outcomes: Sequence[_Outcome], reference: SpanReference | None
    ) -> None:
        config = self._resolved_config

        async def body() -> None:
            results, failures = _joined(outcomes)
            with _under(reference):
                emit_otel_events(
                    results=results,
                    failures=failures,
                    target=target,
                    include_baggage=config.include_baggage,
                )

        if config.emit_otel_events:
            await run_step(_names.EVALUATION_REPORT, body, StepOptions())

    async def _submit(
        self,
        target: str,
        outcomes: dict[str, _Outcome],
        context: EvaluatorContext[Any, Any, Any],
        reference: SpanReference | None,
    ) -> None:
        groups: dict[int, tuple[list[EvaluationSink], list[str]]] = {}
        for label in outcomes:
            own = self._labelled[label].sink
            sink = self._resolved_config.default_sink if own is None else own
            if sink is not None:
                groups.setdefault(id(sink), (_sinks(sink), []))[1].append(label)
        submissions = [(sink, labels) for sinks, labels in groups.values() for sink in sinks]
        for number, (sink, labels) in enumerate(submissions):
            results, failures = _joined(outcomes[label] for label in labels)
            payload = SinkPayload(
                results=results,
                failures=failures,
                context=context,
                span_reference=reference,
                target=target,
            )

            async def body(sink: EvaluationSink = sink, payload: SinkPayload = payload) -> None:
                await sink.submit(payload)

            try:
                await run_step(_names.evaluation_sink(number), body, StepOptions())
            except InvocationCancelled:
                raise
            except (TerminalError, UserError):
                logger.exception("A sink did not take the evaluations of a run of %r.", target)


_NAMELESS = "agent"
"""What pydantic-evals calls an agent without a name."""


def _name(ctx: RunContext[Any]) -> str:
    return (ctx.agent.name if ctx.agent is not None else None) or _NAMELESS


def _labels(evaluators: Sequence[OnlineEvaluator]) -> Iterator[tuple[str, OnlineEvaluator]]:
    seen: Counter[str] = Counter()
    for online in evaluators:
        name = online.evaluator.get_default_evaluation_name()
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}", online


def _failure(error: Exception) -> _Failure:
    failure = handler_failure(error)
    cause: BaseException | None = error
    while failure is None and cause is not None:
        failure = cause if isinstance(cause, TerminalError) else None
        cause = cause.__cause__
    assert failure is not None  # `ends_invocation`
    return _Failure(message=failure.message, status=failure.status_code, metadata=failure.metadata)


def _spans(agent: str, messages: Sequence[ModelMessage]) -> Iterator[_Span]:
    """Yield the model requests and tool calls that the messages tell of."""
    returned = {
        part.tool_call_id: part.timestamp
        for message in messages
        if isinstance(message, ModelRequest)
        for part in message.parts
        if isinstance(part, ToolReturnPart)
    }
    asked: datetime | None = None
    for message in messages:
        if isinstance(message, ModelRequest):
            asked = message.timestamp
            continue
        yield _Span(
            name=f"chat {message.model_name}",
            start=min(asked or message.timestamp, message.timestamp),
            end=message.timestamp,
            attributes={
                "gen_ai.operation.name": "chat",
                "gen_ai.agent.name": agent,
                **_usage(message),
            },
        )
        for call in message.tool_calls:
            ended = returned.get(call.tool_call_id, message.timestamp)
            yield _Span(
                name=f"execute_tool {call.tool_name}",
                start=min(message.timestamp, ended),
                end=ended,
                attributes={
                    "gen_ai.operation.name": "execute_tool",
                    "gen_ai.agent.name": agent,
                    "gen_ai.tool.name": call.tool_name,
                    "gen_ai.tool.call.id": call.tool_call_id,
                    "gen_ai.tool.call.arguments": call.args_as_json_str(),
                },
            )


def _usage(response: ModelResponse) -> dict[str, str | float]:
    usage: dict[str, str | float] = {
        "gen_ai.request.model": response.model_name or "",
        "gen_ai.usage.input_tokens": response.usage.input_tokens,
        "gen_ai.usage.output_tokens": response.usage.output_tokens,
    }
    with suppress(LookupError, AssertionError):  # nobody knows the price of some models
        usage["operation.cost"] = float(response.cost().total_price)
    return usage


def _tree(spans: Sequence[_Span]) -> SpanTree:
    nodes = [
        SpanNode(
            name=span.name,
            trace_id=1,
            span_id=number,
            parent_span_id=None,
            start_timestamp=span.start,
            end_timestamp=span.end,
            attributes=span.attributes,
        )
        for number, span in enumerate(spans, start=1)
    ]
    return SpanTree(nodes_by_id={node.node_key: node for node in nodes})


def _loaded(tp: Any, value: Any) -> Any:
    """Return the value as the type that it has in most runs, else as it is: a run can have one of its own."""
    try:
        return _CODEC.load(tp, value)
    except JournalDecodeError:
        return value


@contextmanager
def _under(reference: SpanReference | None) -> Generator[None]:
    """Put spans and events under the span of the run."""
    parent = build_parent_context(reference)
    token = None if parent is None else otel_context.attach(parent)
    try:
        yield
    finally:
        if token is not None:
            otel_context.detach(token)


async def _run(online: OnlineEvaluator, context: EvaluatorContext[Any, Any, Any]) -> _Outcome:
    """Evaluate; raise what may pass, so that Restate tries again, and return what would be the same again."""
    raised: list[Exception] = []
    results, failures = await run_evaluators([_watched(online.evaluator, raised)], context)
    for error in raised:
        if isinstance(verdict(error), Retry) or isinstance(error, ConnectionError | TimeoutError):
            raise error
        for failure in failures:  # without a provider's body
            failure.error_message = describe(error)
            failure.error_stacktrace = ""
    return results, failures


def _watched(evaluator: Any, raised: list[Exception]) -> Any:
    watched = copy(evaluator)

    async def evaluate_async(context: EvaluatorContext[Any, Any, Any]) -> Any:
        try:
            return await evaluator.evaluate_async(context)
        except Exception as error:
            raised.append(error)
            raise

    watched.evaluate_async = evaluate_async
    return watched


def _gave_up(online: OnlineEvaluator, error: TerminalError | UserError) -> EvaluatorFailure:
    evaluator = online.evaluator
    return EvaluatorFailure(
        name=evaluator.get_default_evaluation_name(),
        error_message=error.message,
        error_stacktrace="",
        source=evaluator.as_spec(),
        evaluator_version=evaluator.get_evaluator_version(),
        error_type=type(error).__name__,
    )


def _sinks(given: Any) -> list[EvaluationSink]:
    several: list[Any] = list(given) if isinstance(given, Sequence) else [given]  # pyright: ignore[reportUnknownArgumentType]
    return [it if isinstance(it, EvaluationSink) else CallbackSink(it) for it in several]


def _joined(outcomes: Iterable[_Outcome]) -> _Outcome:
    results: list[EvaluationResult[Any]] = []
    failures: list[EvaluatorFailure] = []
    for found, failed in outcomes:
        results += found
        failures += failed
    return results, failures
