"""`python -m evals`, in this process: figures, exit codes, and what is wrong with the input."""

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from agents.models import DEFAULT_MODEL
from evals import command
from evals.command import main
from evals.ingress import CHECKOUT
from evals.loading import load
from evals.patterns import EVAL_PATTERNS
from evals.report import Report, markdown, read_baseline


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """The model that a run chose is not that of the next test."""
    for name in ("AGENTS_MODEL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "")
    before = DEFAULT_MODEL.wrapped
    yield
    DEFAULT_MODEL.wrapped = before


def test_reports_and_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--data", str(tmp_path), "--report", str(tmp_path / "now")]
    assert main(["routing", "--model", "reference", "--repeat", "2", *files]) == 0
    report = Report.model_validate_json((tmp_path / "now.json").read_bytes())
    assert (report.model, report.repeat, list(report.patterns)) == ("reference", 2, ["routing"])
    assert len(report.patterns["routing"].results) == 24
    assert "| routing | 24/24 | 100.0% |" in (tmp_path / "now.md").read_text()

    again = ["--experiment", "again", "--baseline", str(tmp_path / "now.json")]
    assert main(["routing", "--model", "reference", "--data", str(tmp_path), *again]) == 0
    assert "one run each: no interval" in (tmp_path / "reports" / "again.md").read_text()
    assert "compared with the baseline: routing" in capsys.readouterr().out


def test_below_the_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_thresholds", lambda: {"default": 1.1})
    assert main(["routing", "--model", "reference", "--data", str(tmp_path)]) == 1
    assert "routing scored 100.0%, below 110%" in capsys.readouterr().out
    monkeypatch.undo()
    assert main(["routing", "--model", "sloppy", "--data", str(tmp_path)]) == 1
    assert "routing scored 61.5%, below 90%" in capsys.readouterr().out


def test_committed_reports() -> None:
    """Of the datasets as they are: the perfect model passed everything, the sloppy one did not, the local one is there."""
    versions = {name: load(name).version for name in EVAL_PATTERNS}
    reports = CHECKOUT / "evals" / "reports"
    found = {
        it: read_baseline(reports / f"{it}.json", versions) for it in ("perfect", "sloppy", "local")
    }
    assert [it.model for it in found.values()] == ["reference", "sloppy", "local"]
    for name, report in found.items():
        assert list(report.patterns) == list(EVAL_PATTERNS)
        scores = {it.score for it in report.patterns.values()}
        assert (scores == {1}) == (name == "perfect")
        assert name == "perfect" or max(scores) < 1
        assert (reports / f"{name}.md").read_text() == markdown(report, None)


def test_a_baseline_of_another_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--data", str(tmp_path), "--report", str(tmp_path / "now")]
    assert main(["routing", "--model", "reference", *files]) == 0
    old = json.loads((tmp_path / "now.json").read_text())
    old["patterns"]["routing"]["dataset_version"] = "0123"
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert main(["routing", "--model", "reference", "--baseline", str(tmp_path / "old.json")]) == 2
    assert "version 0123 of the dataset 'routing'" in capsys.readouterr().err


def test_a_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "openai:gpt-6-luna"]) == 2
    assert "`OPENAI_API_KEY` is not set" in capsys.readouterr().err
    assert main(["--model", "gpt"]) == 2
    assert "names no model" in capsys.readouterr().err


@pytest.mark.parametrize("judge", ["nonsense", "openai:gpt-6-luna"])
def test_a_judge_that_cannot_be_asked(
    judge: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the agents are paid for: no check of theirs fails for it."""
    monkeypatch.setenv("EVALS_JUDGE_MODEL", judge)
    assert main(["routing", "--model", "reference", "--data", str(tmp_path)]) == 2
    assert "`EVALS_JUDGE_MODEL` names no model that can be asked" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt-5.2", "gpt-5.2.json", "gpt-5.2.md"])
def test_the_name_of_the_report(name: str, tmp_path: Path) -> None:
    files = ["--data", str(tmp_path), "--report", str(tmp_path / "out" / name)]
    assert main(["routing", "--model", "reference", *files]) == 0
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"gpt-5.2.json", "gpt-5.2.md"}


def test_a_report_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything runs: afterwards the figures would be lost."""
    monkeypatch.setattr(command, "run_pattern", None)
    (tmp_path / "file").touch()
    files = ["--data", str(tmp_path), "--report", str(tmp_path / "file" / "report")]
    assert main(["routing", "--model", "reference", *files]) == 2
    assert "The report cannot be written to" in capsys.readouterr().err


def test_an_ingress_that_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    where = ["--via", "ingress", "--ingress", "http://127.0.0.1:1", "--data", str(tmp_path)]
    assert main(["--model", "openai:m", *where]) == 2
    assert "No answer from http://127.0.0.1:1/restate/health" in capsys.readouterr().err


def test_an_experiment_that_was_begun_with_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--via", "ingress", "--ingress", "http://127.0.0.1:1", "--data", str(tmp_path)]
    begun = tmp_path / "experiments" / "e1.json"
    begun.parent.mkdir()
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    for model, datasets, fault in (
        ("local", "{}", "begun with the model local"),
        ("openai:m", '{"routing": "0"}', "begun with another dataset 'routing'"),
    ):
        begun.write_text(f'{{"model": "{model}", "datasets": {datasets}}}')
        assert main(["routing", "--experiment", "e1", "--model", "openai:m", *where]) == 2
        assert fault in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["rooting"], "no such pattern: rooting; there are chaining, routing"),
        (["--repeat", "0"], "invalid positive_number value: '0'"),
        (["--experiment", "a b"], "letters, digits, hyphens"),
        (["--ingress", "http://127.0.0.1:1"], "--ingress needs --via ingress"),
        (["--model", "reference", "--via", "ingress"], "the reference model has no server"),
        (["--model", "sloppy", "--via", "ingress"], "the sloppy model has no server"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert fault in capsys.readouterr().err
