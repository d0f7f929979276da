"""A perfect model passes everything; a sloppy one fails exactly the checks it should, whatever the pattern."""

from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import logfire
import pytest

import durable
from agents.models import DEFAULT_MODEL
from agents.parallelization import Action, Analysis
from agents.routing import Reply
from evals.experiment import LocalRunner, run_pattern
from evals.loading import LoadedDataset, load
from evals.patterns import (
    EVAL_PATTERNS,
)
from evals.reference import ReferenceModel, exchanges_of
from evals.report import PatternReport
from evals.sloppy import spoiled


@pytest.fixture(autouse=True)
def _instrumented() -> Generator[None]:
    """Behavioural checks read spans; the model of the agents is put back."""
    logfire.configure(send_to_logfire=False, console=False, distributed_tracing=True)
    durable.configure_logfire()
    before = DEFAULT_MODEL.wrapped
    yield
    DEFAULT_MODEL.wrapped = before


async def ran(name: str, loaded: LoadedDataset, *, repeat: int = 1) -> PatternReport:
    DEFAULT_MODEL.wrapped = ReferenceModel(exchanges_of(name, loaded.dataset.cases))
    return await run_pattern(name, loaded, LocalRunner(), experiment="test", repeat=repeat)


@pytest.mark.parametrize("name", EVAL_PATTERNS)
async def test_a_perfect_model_passes_everything(name: str) -> None:
    report = await ran(name, load(name), repeat=2)
    assert {result.passed for result in report.results} == {True}
    assert report.score == 1
    assert all(result.requests and result.tokens for result in report.results)
    assert {len(results) for results in report.cases.values()} == {2}


ECHOES: dict[str, Callable[[Any, Any], Any]] = {
    "chaining": lambda inputs, it: [inputs.text] * len(it),
    "routing": lambda inputs, it: it.model_copy(
        update={"reply": Reply(subject="Hello", body=inputs.ticket, next_steps=["Nothing."])}
    ),
    "parallelization": lambda inputs, it: [
        Analysis(impacts=[text], actions=[Action(action=text, priority="high")], conclusion=text)
        for text in inputs.inputs
    ],
    "parallel-tools": lambda inputs, it: it.model_copy(update={"answer": inputs.question}),
    "orchestrator-workers": lambda inputs, it: it.model_copy(update={"text": inputs.assignment}),
    "human-in-the-loop": lambda inputs, it: [
        inputs.task,
        *(f"{inputs.task} {review.comment}" for review in inputs.reviews[:-1]),
    ],
}
"""The reference of a model that does what can be counted, and answers with what it was given."""


@pytest.mark.parametrize("name", ECHOES)
async def test_an_echo_is_no_answer(name: str) -> None:
    loaded = load(name)
    for case in loaded.dataset.cases:
        assert case.metadata is not None
        case.metadata.reference = ECHOES[name](case.inputs, case.metadata.reference)
    report = await ran(name, loaded)
    passed = {name for name, results in report.cases.items() if results[0].passed}
    assert passed <= {"many-short-inputs"}  # one word each, which any answer has
    assert report.score < 0.9  # the threshold of models that are not scripted


async def sloppy(name: str) -> PatternReport:
    loaded = load(name)
    loaded.dataset.cases = spoiled(name, loaded.dataset.cases)
    return await ran(name, loaded)


def outcomes(report: PatternReport) -> tuple[Counter[str], Counter[str]]:
    """Count how often each check passed and failed."""
    checks = [it for result in report.results for it in result.checks.items()]
    return Counter(n for n, it in checks if it), Counter(n for n, it in checks if not it)


async def test_sloppy_chaining() -> None:
    """Wrong figures; the cases without any are not touched."""
    report = await sloppy("chaining")
    passed, failed = outcomes(report)
    assert {name for name, results in report.cases.items() if results[0].passed} == {
        "no-figures",
        "long-chain",
        "pipe-in-cell",
    }
    assert failed == {
        "NoInventedFigures": 10,
        "Figures": 7,
        "InOrder": 2,
        "Json": 1,
        "MarkdownTable": 2,
    }
    assert passed["NothingTwice"] == passed["Agents"] == 13


async def test_sloppy_routing() -> None:
    report = await sloppy("routing")
    passed, failed = outcomes(report)
    assert failed["RoutedTo"] == failed["NoInventedFigures"] == 12
    assert failed["Avoids"] + failed["Avoids_2"] == 13  # one case forbids the word by itself, too
    assert set(failed) == {"RoutedTo", "NoInventedFigures", "Avoids", "Avoids_2"}
    assert passed["Agents"] == passed["NothingTwice"] == 12


async def test_sloppy_parallelization() -> None:
    report = await sloppy("parallelization")
    alone = {"empty-of-facts", "priorities-in-the-text"}  # one input each
    right = {n for n, results in report.cases.items() if results[0].checks["EveryInput"]}
    assert right == alone
    _, failed = outcomes(report)
    assert failed["MostUrgentFirst"] == 3
    assert "Agents" not in failed


async def test_sloppy_tools() -> None:
    """A call that is made twice is found by what was calculated, by the count, and as a repetition."""
    passed, failed = outcomes(await sloppy("parallel-tools"))
    assert failed == {"Calculated": 11, "Tools": 11, "NothingTwice": 11}
    assert passed["Agents"] == 12


async def test_sloppy_orchestrator() -> None:
    """Runs that fail for good are counted, and do not end the suite."""
    report = await sloppy("orchestrator-workers")
    errors = [result.error for result in report.results if result.error is not None]
    assert len(errors) == 8  # plans of two tasks
    assert all("A plan has 2 to 5 tasks, and this one has 1" in error for error in errors)
    assert report.cases["five-audiences"][0].checks["Plan"] is False
    assert report.cases["six-parts-in-five"][0].checks["Plan"] is True  # four tasks may do, too


async def test_sloppy_evaluator() -> None:
    report = await sloppy("evaluator-optimizer")
    wrong = {n for n, results in report.cases.items() if not results[0].passed}
    assert wrong == {
        "looks-right-median",
        "looks-right-leap",
        "stable-dedupe",
        "contradictory-task",
    }
    _, failed = outcomes(report)
    assert failed == {"CodeWorks": 3, "CodeJudged": 3, "Outcome": 1}


async def test_sloppy_writer() -> None:
    report = await sloppy("human-in-the-loop")
    assert {n for n, results in report.cases.items() if results[0].passed} == {"passed-at-once"}
    _, failed = outcomes(report)
    assert failed["EveryDraft"] == 11
    assert "Agents" not in failed
