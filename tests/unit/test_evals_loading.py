"""The datasets are complete, and a malformed one says in which line and field."""

from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic_ai.exceptions import UserError

from evals.loading import DATASETS, load, schema
from evals.patterns import EVAL_PATTERNS, CaseMetadata
from evals.reference import exchanges_of
from services.client import PATTERNS

ROUTING = (DATASETS / "routing.yaml").read_text()
LINES = ROUTING.splitlines()


def line(text: str) -> int:
    return next(number for number, it in enumerate(LINES, start=1) if text in it)


@pytest.mark.parametrize("name", EVAL_PATTERNS)
def test_datasets(name: str) -> None:
    """Twelve cases or more, hard and adversarial ones among them; the schema is up to date."""
    metadata = [cast(CaseMetadata[Any], case.metadata) for case in load(name).dataset.cases]
    difficulties = Counter(it.difficulty for it in metadata)
    assert difficulties.total() >= 12
    assert difficulties["hard"] + difficulties["adversarial"] >= 6
    assert difficulties["adversarial"] >= 2
    found = (DATASETS / f"{name}.schema.json").read_text()
    assert found == schema(name) + "\n", "write the schemas with: python -m evals.loading"


def test_every_pattern_has_a_dataset() -> None:
    assert set(PATTERNS) - set(EVAL_PATTERNS) == {"hosted-routing"}  # the same agents as routing
    assert {path.stem for path in DATASETS.glob("*.yaml")} == set(EVAL_PATTERNS)


def test_the_version_is_that_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text(ROUTING)
    assert load("routing", directory=tmp_path).version == load("routing").version
    path.write_text(ROUTING.replace("5 pm", "6 pm"))
    assert load("routing", directory=tmp_path).version != load("routing").version


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            'inputs: {ticket: "How can',
            'inputs: {tikcet: "How can',
            f"{line('How can I export')}: cases.3.inputs.tikcet: Extra inputs are not permitted",
        ),
        (
            "team: product}",
            "team: produkt}",
            f"{line('team: product}')}: cases.3.metadata.reference.route.team: Input should be",
        ),
        (
            "difficulty: plain",
            "difficulty: trivial",
            f"{line('difficulty: plain')}: cases.0.metadata.difficulty: Input should be",
        ),
        ("cases:\n", "cases: [\n", f"{line('cases:') + 1}: this is no YAML"),
        (
            "RoutedTo: [technical]",
            "RoutedTo: technical",
            f"{line('RoutedTo: [technical]')}: RoutedTo.teams: Input should be a valid list, not 't",
        ),
        (
            "RoutedTo: [technical]",
            "RoutesTo: [technical]",
            f"{line('RoutedTo: [technical]')}: Evaluator 'RoutesTo' is not",
        ),
        (
            "Mentions: [dark mode]",
            "Mentions: {tekst: [dark mode]}",
            f"{line('name: angry-wish')}: Failed to instantiate evaluator 'Mentions'",
        ),
        (
            "name: export-all",
            "name: export-crashes",
            f"{line('name: export-all')}: Duplicate case name: 'export-crashes'",
        ),
        (
            "name: export-all",
            "name: Export All",
            f"{line('name: export-all')}: case 'Export All': every case has a name",
        ),
        (ROUTING, "cases: []", "1: cases: there are none"),
        (
            "  evaluators:\n  - RoutedTo: [technical]\n",
            "  evaluators: []\n  evaluators:\n  - RoutedTo: [technical]\n",
            f"{line('RoutedTo: [technical]')}: evaluators: twice",
        ),
        ("name: routing", "name: routing\a", "2: this is no YAML: special characters"),
        (ROUTING, "cases: 3", "1: cases: Input should be a valid list"),
        (ROUTING, "", "1: the file: Input should be a valid dictionary"),
    ],
)
def test_malformed(tmp_path: Path, old: str, new: str, fault: str) -> None:
    path = tmp_path / "routing.yaml"
    path.write_text(ROUTING.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load("routing", directory=tmp_path)
    assert str(error.value).startswith(f"{path}:{fault}")


def test_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "routing.yaml"
    path.write_bytes("name: routing\ncases: [{name: é}]".encode("latin-1"))
    with pytest.raises(UserError, match=r"routing\.yaml:2: this is no UTF-8"):
        load("routing", directory=tmp_path)


def test_a_run_that_was_exported(tmp_path: Path) -> None:
    """Nobody has said yet what it is there for, or what a perfect model says."""
    path = tmp_path / "routing.yaml"
    path.write_text("cases:\n- name: a\n  inputs: {ticket: t}\n")
    [case] = load("routing", directory=tmp_path).dataset.cases
    assert case.metadata is None
    assert list(exchanges_of("routing", [case])) == []


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load("chaining", directory=tmp_path)
