"""FEATURES.md names a test for each feature, and each of them exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "FEATURES.md").read_text()
HEADER = ("| feature | test |", "|---|---|")
ROWS = [it for it in PAGE.splitlines() if it.startswith("|") and it not in HEADER]


def functions_in(path: Path) -> set[str]:
    """The names of the test functions in a file."""
    if not path.exists():
        return set()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_a_feature_is_shown_by_tests_that_exist(row: str) -> None:
    """Live ones, or unit tests where the path says so."""
    _, feature, named, _ = row.split("|")
    assert feature.strip()
    tests = [
        re.fullmatch(r"`(unit/)?(test_\w+\.py)::(test_\w+)`", it.strip()) for it in named.split(",")
    ]
    for test in tests:
        assert test is not None, f"{named.strip()} does not name tests"
        folder, file, name = test.groups()
        assert name in functions_in(ROOT / "tests" / (folder or "live") / file), test[0]


def test_the_tables_are_found() -> None:
    """A change of the page's format must not leave the other test without rows."""
    assert len(ROWS) > 50
