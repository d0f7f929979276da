"""Runs the cases of a dataset, in this process or over the ingress, and collects what was found.

case → task, as often as it is to be repeated → evaluators → result
"""

from collections import Counter
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic_evals import Case
from pydantic_evals.evaluators import EvaluatorContext
from pydantic_evals.lifecycle import CaseLifecycle
from pydantic_evals.reporting import EvaluationReport, ReportCase

from evals.activity import spent
from evals.loading import LoadedDataset
from evals.patterns import EVAL_PATTERNS, InProcess
from evals.report import PatternReport, Result

Context = EvaluatorContext[Any, Any, Any]


class Runner(Protocol):
    """Where cases run."""

    async def run(self, pattern: str, request: BaseModel, *, run: str) -> BaseModel:
        """Run a pattern and return its response.

        Args:
            pattern: Its name.
            request: The inputs of the case.
            run: Names this run of the case within the experiment.
        """
        ...

    async def observe(self, pattern: str, context: Context, *, run: str) -> Context:
        """Give the context the spans of the run, and its duration, where the runner knows better."""
        ...


class LocalRunner:
    """Runs the patterns' own handlers in this process, without a server."""

    async def run(self, pattern: str, request: BaseModel, *, run: str) -> BaseModel:
        """Run the handler."""
        return await EVAL_PATTERNS[pattern].handler(InProcess(), request)

    async def observe(self, pattern: str, context: Context, *, run: str) -> Context:
        """Take the spans as they are."""
        return context


_run: ContextVar[str] = ContextVar("run")


async def run_pattern(
    name: str,
    loaded: LoadedDataset,
    runner: Runner,
    *,
    experiment: str,
    repeat: int = 1,
    max_concurrency: int = 4,
    progress: bool = False,
) -> PatternReport:
    """Run the cases of a pattern. A case whose task or evaluator fails is counted and stops nothing.

    Args:
        name: The pattern.
        loaded: Its dataset.
        runner: Where the cases run.
        experiment: The name under which Logfire shows it.
        repeat: How often each case runs.
        max_concurrency: How many run at the same time.
        progress: Whether to show a progress bar.
    """
    begun: Counter[str] = Counter()

    class Numbered(CaseLifecycle[Any, Any, Any]):
        """Gives each run of a case a name, and its context the spans."""

        async def setup(self) -> None:
            case = str(self.case.name)
            begun[case] += 1
            _run.set(f"{case}.{begun[case]}")

        async def prepare_context(self, ctx: Context) -> Context:
            ctx = await runner.observe(name, ctx, run=_run.get())
            return replace(ctx, metrics=spent(ctx.span_tree))

    async def task(request: BaseModel) -> BaseModel:
        return await runner.run(name, request, run=_run.get())

    report = await loaded.dataset.evaluate(
        task,
        name=experiment,
        task_name=name,
        metadata={"dataset_version": loaded.version},
        repeat=repeat,
        max_concurrency=max_concurrency,
        lifecycle=Numbered,
        progress=progress,
    )
    return PatternReport(
        dataset_version=loaded.version, cases=_by_case(loaded.dataset.cases, report)
    )


def _by_case(
    cases: list[Case[Any, Any, Any]], report: EvaluationReport[Any, Any, Any]
) -> dict[str, list[Result]]:
    results: dict[str, list[Result]] = {str(case.name): [] for case in cases}
    for case in report.cases:
        results[case.source_case_name or case.name].append(_result(case))
    for failure in report.failures:
        name = failure.source_case_name or failure.name
        results[name].append(Result(error=failure.error_message))
    return results


def _result(case: ReportCase[Any, Any, Any]) -> Result:
    broken = {failure.name: failure.error_message for failure in case.evaluator_failures}
    reasons = {name: it.reason for name, it in case.assertions.items() if not it.value}
    return Result(
        checks={
            **{name: it.value for name, it in case.assertions.items()},
            **dict.fromkeys(broken, False),
        },
        faults={name: reason for name, reason in reasons.items() if reason} | broken,
        seconds=case.task_duration,
        requests=int(case.metrics["requests"]),
        tokens=int(case.metrics.get("input_tokens", 0) + case.metrics.get("output_tokens", 0)),
        cost=case.metrics.get("cost"),
        output=case.output.model_dump(mode="json"),
    )
