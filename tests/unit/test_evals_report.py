"""Figures, comparisons and baselines."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic_ai.exceptions import UserError
from rich.console import Console

from evals.report import (
    PatternReport,
    Report,
    Result,
    compare,
    faults,
    markdown,
    read_baseline,
    table,
)


def result(*checks: bool, error: str | None = None, cost: float | None = None) -> Result:
    named = {f"Check{number}": it for number, it in enumerate(checks)}
    return Result(
        checks=named,
        faults={name: f"{name} is | wrong" for name, it in named.items() if not it},
        error=error,
        seconds=1,
        requests=2,
        tokens=10,
        cost=cost,
    )


def pattern(version: str = "v1", **cases: list[Result]) -> PatternReport:
    return PatternReport(dataset_version=version, cases=cases)


def report(**patterns: PatternReport) -> Report:
    return Report(
        experiment="e1",
        model="local",
        via="local",
        repeat=1,
        judge=None,
        finished=datetime(2026, 1, 2, 3, 4, tzinfo=UTC),
        seconds=12,
        patterns=patterns,
    )


def test_scores() -> None:
    """A run without an answer has no score, however many checks it might have had."""
    assert (result(True, False).score, result(True, False).passed) == (0.5, False)
    assert (result(True).score, result(True).passed) == (1, True)
    assert (result(error="e").score, result(error="e").passed) == (0, False)
    of = pattern(a=[result(True), result(False)], b=[result(error="boom")])
    assert of.score == pytest.approx(1 / 3)


def test_markdown() -> None:
    of = report(
        routing=pattern(
            a=[result(True, cost=0.25)], b=[result(error="boom")], c=[result(False, True)]
        )
    )
    text = markdown(of)
    assert "135 million parameters" in text
    assert "| routing | 1/3 | 50.0% | 1 | 1.0 | 1.0 | 6 | 30 | 0.2500 |" in text
    assert "| routing | Check0 | 1/2 |" in text
    assert list(faults(of)) == [
        "routing/b: **failed**: boom",
        "routing/c: Check0: Check0 is \\| wrong",
    ]
    assert "unknown" not in text
    console = Console(width=80, record=True, file=None, quiet=True)
    console.print(table(report(**{"orchestrator-workers": of.patterns["routing"]})))


def test_no_terminal_obeys_a_model() -> None:
    of = report(routing=pattern(a=[result(error="\x1b]0;owned\x07 ‮ ü")]))
    assert list(faults(of)) == ["routing/a: **failed**: \\x1b]0;owned\\x07 \\u202e ü"]


def test_nobody_knows_the_price() -> None:
    assert "| 10 | - |" in markdown(report(routing=pattern(a=[result(True)])))
    assert markdown(report(routing=pattern(a=[result(True)]))).endswith("\n\nNothing.\n")


BEFORE = pattern(
    a=[result(True), result(True)], b=[result(False), result(False)], c=[result(True)] * 2
)


def test_a_difference_beyond_the_noise() -> None:
    found = compare(
        pattern(a=[result(True)] * 2, b=[result(True)] * 2, c=[result(True)] * 2), BEFORE
    )
    assert found.change == pytest.approx(1 / 3)
    assert (found.better, found.worse, found.verdict) == (["b"], [], "better")
    found = compare(
        pattern(a=[result(False)] * 2, b=[result(False)] * 2, c=[result(True)] * 2), BEFORE
    )
    assert (found.better, found.worse, found.verdict) == ([], ["a"], "worse")


def test_a_difference_within_the_noise() -> None:
    now = pattern(
        a=[result(True)] * 2, b=[result(False), result(True)], c=[result(True), result(True)]
    )
    found = compare(now, BEFORE)
    assert found.interval is not None
    low, high = found.interval
    # variance of the mean of b's runs is 0.25; over three cases the error is 0.5 / 3
    assert (low, high) == pytest.approx((1 / 6 - 1.96 / 6, 1 / 6 + 1.96 / 6))
    assert found.verdict == "within the noise"
    assert found.better == ["b"]


def test_one_run_each_has_no_interval() -> None:
    found = compare(pattern(a=[result(True)]), pattern(a=[result(False)]))
    assert (found.interval, found.verdict) == (None, "one run each: no interval")


def test_comparison_in_markdown() -> None:
    text = markdown(
        report(routing=pattern(a=[result(True)])), report(routing=pattern(a=[result(False)]))
    )
    assert "| routing | +100.0% | one run each: no interval |" in text
    assert "- routing better: a" in text


def test_baselines(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(report(routing=pattern(a=[result(True)])).model_dump_json())
    assert read_baseline(path, {"routing": "v1", "chaining": "w1"}).experiment == "e1"
    with pytest.raises(UserError, match=r"version v1 of the dataset 'routing'.*is version v2"):
        read_baseline(path, {"routing": "v2"})
    with pytest.raises(UserError, match="has none of: chaining"):
        read_baseline(path, {"chaining": "w1"})
    with pytest.raises(UserError, match="cannot be read"):
        read_baseline(tmp_path / "missing.json", {})
    with pytest.raises(UserError, match=r"made without a judge, and this is judged by openai:m"):
        read_baseline(path, {"routing": "v1"}, judge="openai:m")
    path.write_text(json.dumps({"experiment": 3}))
    with pytest.raises(UserError, match="is no report of the eval suite: experiment"):
        read_baseline(path, {})
