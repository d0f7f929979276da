"""What an experiment found: as data, as a table, as markdown, and beside an earlier one."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_ai.exceptions import UserError
from rich.box import SIMPLE_HEAD
from rich.table import Table

NOTES = {
    "local": "SmolLM2-135M, a model of 135 million parameters on a CPU: the floor. It shows that the suite runs "
    "without a key and that its checks can fail, and says nothing about what the agents are worth.",
    "reference": "No language model: the answers that the datasets hold as references, which pass by definition.",
    "sloppy": "No language model: the references, spoiled in one way per pattern (wrong figures, the wrong team, a call made "
    "twice, code waved through), so that the checks which are there for it fail.",
}
"""What has to be known of a model to read its figures."""

COLUMNS = (
    "pattern",
    "passed",
    "score",
    "failed",
    "p50",
    "p95",
    "requests",
    "tokens",
    "USD",
)


class Result(BaseModel):
    """One run of a case."""

    checks: dict[str, bool] = {}
    faults: dict[str, str] = {}
    """Why checks failed."""

    error: str | None = None
    """Why there is no answer to check."""

    seconds: float = 0
    requests: int = 0
    tokens: int = 0
    cost: float | None = None
    """In USD, `None` when the price of the model is not known."""

    output: Any = None

    @property
    def score(self) -> float:
        """The share of checks that passed: nothing when there is no answer."""
        return statistics.mean(self.checks.values()) if self.checks and self.error is None else 0.0

    @property
    def passed(self) -> bool:
        """Whether there is an answer and all checks passed."""
        return self.error is None and all(self.checks.values())


class PatternReport(BaseModel):
    """All runs of a pattern's cases."""

    dataset_version: str
    cases: dict[str, list[Result]]

    @property
    def results(self) -> list[Result]:
        """All runs of all cases."""
        return [result for results in self.cases.values() for result in results]

    @property
    def score(self) -> float:
        """The mean score of all runs."""
        return statistics.mean(result.score for result in self.results)


class Report(BaseModel):
    """An experiment."""

    experiment: str
    model: str
    via: str
    repeat: int
    judge: str | None
    finished: datetime
    seconds: float
    patterns: dict[str, PatternReport]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a pattern did, beside the baseline."""

    change: float
    """Of the score."""

    interval: tuple[float, float] | None
    """Where the change is with a confidence of 95 %, by the spread of the repeats; `None` without repeats."""

    better: list[str]
    worse: list[str]
    """Cases."""

    @property
    def verdict(self) -> str:
        """What can be said."""
        if self.interval is None:
            return "one run each: no interval"
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "within the noise"


def compare(report: PatternReport, baseline: PatternReport) -> Difference:
    """Compare the runs of a pattern with earlier ones of the same dataset."""
    changes: dict[str, float] = {}
    variance: float | None = 0.0
    for name, results in report.cases.items():
        now, before = [it.score for it in results], [it.score for it in baseline.cases[name]]
        changes[name] = statistics.mean(now) - statistics.mean(before)
        if variance is None or min(len(now), len(before)) < 2:
            variance = None
        else:
            variance += sum(statistics.variance(it) / len(it) for it in (now, before))
    change = statistics.mean(changes.values())
    margin = None if variance is None else 1.96 * variance**0.5 / len(changes)
    return Difference(
        change=change,
        interval=None if margin is None else (change - margin, change + margin),
        better=[name for name, it in changes.items() if it > 0],
        worse=[name for name, it in changes.items() if it < 0],
    )


def read_baseline(path: Path, versions: Mapping[str, str], *, judge: str | None = None) -> Report:
    """Read a report to compare with.

    Args:
        path: The JSON report.
        versions: The versions of the datasets that will be run.
        judge: The model that will judge.

    Raises:
        UserError: It is no report, or one of other datasets or by another judge.
    """
    try:
        baseline = Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"The baseline cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path} is no report of the eval suite: {where}: {first['msg']}"
        ) from error
    for name, version in versions.items():
        if (old := baseline.patterns.get(name)) and old.dataset_version != version:
            raise UserError(
                f"The baseline {path} was made with version {old.dataset_version} of the dataset {name!r}, and "
                f"this is version {version}: their figures cannot be compared. Run the baseline's model again."
            )
    if not baseline.patterns.keys() & versions.keys():
        raise UserError(f"The baseline {path} has none of: {', '.join(versions)}.")
    if baseline.judge != judge:
        raise UserError(
            f"The baseline {path} was made {_judged(baseline.judge)}, and this is {_judged(judge)}: scores with another "
            "share of checks cannot be compared."
        )
    return baseline


def differences(report: Report, baseline: Report | None) -> dict[str, Difference]:
    """Compare what both have."""
    old = baseline.patterns if baseline else {}
    return {n: compare(it, old[n]) for n, it in report.patterns.items() if n in old}


def table(report: Report) -> Table:
    """Show the figures in a terminal."""
    shown = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(COLUMNS):
        shown.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in _rows(report):
        shown.add_row(*row)
    return shown


def markdown(report: Report, baseline: Report | None = None) -> str:
    """Write the report for people."""
    parts = [
        f"# Evals: {report.model}",
        *([NOTES[report.model]] if report.model in NOTES else []),
        f"Experiment {report.experiment}, finished {report.finished:%Y-%m-%d %H:%M} UTC after {report.seconds:.0f} s; "
        f"via {report.via}, {report.repeat} run(s) of each case, {_judged(report.judge)}. *passed*: runs with no "
        "check failed. *score*: the share of checks that passed; a run that failed has none. p50 and p95 are seconds, "
        "of runs beside each other; USD are `-` where nobody knows the model's price. Runs that failed are not in "
        "seconds, requests, tokens and USD.",
        _markdown_table(COLUMNS, _rows(report)),
    ]
    if changes := differences(report, baseline):
        assert baseline is not None
        parts += [
            f"## Compared with {baseline.experiment} ({baseline.model})",
            _comparison(changes),
        ]
    parts.append("## Checks")
    parts.append(_markdown_table(("pattern", "check", "passed"), _check_rows(report)))
    parts.append("## What failed")
    parts += [f"- {fault}" for fault in faults(report)] or ["Nothing."]
    return _joined(parts) + "\n"


def _judged(judge: str | None) -> str:
    return f"judged by {judge}" if judge else "without a judge"


def faults(report: Report) -> Iterable[str]:
    """Say what failed, case by case."""
    for pattern, of_pattern in report.patterns.items():
        for name, results in of_pattern.cases.items():
            for number, result in enumerate(results, start=1):
                run = f"{pattern}/{name}" + (f" [{number}]" if len(results) > 1 else "")
                if result.error is not None:
                    yield f"{run}: **failed**: {_line(result.error)}"
                elif missed := [check for check, passed in result.checks.items() if not passed]:
                    yield f"{run}: " + "; ".join(
                        f"{it}: {_line(result.faults[it])}" if it in result.faults else it
                        for it in missed
                    )


def comparison_table(changes: Mapping[str, Difference]) -> Iterable[tuple[str, str, str]]:
    """Give pattern, change with interval, and the verdict, one row each."""
    for name, it in changes.items():
        interval = f" [{it.interval[0]:+.1%}, {it.interval[1]:+.1%}]" if it.interval else ""
        yield name, f"{it.change:+.1%}{interval}", it.verdict


def _comparison(changes: Mapping[str, Difference]) -> str:
    rows = _markdown_table(("pattern", "change of score", "verdict"), comparison_table(changes))
    cases = [
        f"- {name} {word}: {', '.join(names)}"
        for name, it in changes.items()
        for word, names in (("better", it.better), ("worse", it.worse))
        if names
    ]
    return rows + "\n\n" + "\n".join(cases)


def _rows(report: Report) -> Iterable[tuple[str, ...]]:
    every: list[Result] = []
    for name, pattern in report.patterns.items():
        every += pattern.results
        yield _row(name, pattern.results)
    if len(report.patterns) > 1:
        yield _row("all", every)


def _row(name: str, results: Sequence[Result]) -> tuple[str, ...]:
    seconds = sorted(it.seconds for it in results if it.error is None) or [0.0]
    costs = [it.cost for it in results if it.cost is not None]
    return (
        name,
        f"{sum(it.passed for it in results)}/{len(results)}",
        f"{statistics.mean(it.score for it in results):.1%}",
        str(sum(it.error is not None for it in results)),
        f"{statistics.median(seconds):.1f}",
        f"{seconds[round(0.95 * (len(seconds) - 1))]:.1f}",
        str(sum(it.requests for it in results)),
        str(sum(it.tokens for it in results)),
        f"{sum(costs):.4f}" if costs else "-",
    )


def _check_rows(report: Report) -> Iterable[tuple[str, str, str]]:
    for name, pattern in report.patterns.items():
        checks = [check for result in pattern.results for check in result.checks.items()]
        for check in sorted({check for check, _ in checks}):
            passed = [it for other, it in checks if other == check]
            yield name, check, f"{sum(passed)}/{len(passed)}"


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _line(text: str) -> str:
    text = " ".join(text.split())
    # a model's text: no terminal is to obey it
    text = "".join(it if it.isprintable() else ascii(it)[1:-1] for it in text)
    return (text if len(text) <= 160 else text[:157] + "...").replace("|", "\\|")


def _joined(parts: Sequence[str]) -> str:
    """Put an empty line between blocks, none between the items of a list."""
    text = parts[0]
    for before, part in zip(parts, parts[1:], strict=False):
        text += ("\n" if before.startswith("- ") and part.startswith("- ") else "\n\n") + part
    return text
