"""Rules that would break users if they were broken, kept by tests instead of by memory."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("agents", "durable", "evals", "services", "tools")
MAY_IMPORT = {
    "durable": set[str](),
    "tools": {"durable"},
    "agents": {"durable", "tools"},
    "services": {"durable", "tools", "agents"},
    "evals": {"durable", "tools", "agents", "services"},
}
WRAPPED = ("hypercorn", "pydantic_ai", "pydantic_evals", "restate")
UNDOCUMENTED = ("restate.handler", "restate.server_context", "restate.vm")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[str]:
    """The full names of the modules and objects that a file imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    """Layers import downwards, and private names of others only come through `durable/_sdk*.py`."""
    folder = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        top, *rest = name.split(".")
        if top in MAY_IMPORT:
            assert top == folder or top in MAY_IMPORT[folder], f"{folder} imports {name}"
            if top == "durable" != folder:
                assert not any(part.startswith("_") for part in rest), f"{name} is private"
        elif not path.name.startswith("_sdk") and top in WRAPPED:
            assert not any(part.startswith("_") for part in rest), f"{name} is private"
            assert not name.startswith(UNDOCUMENTED), f"{name} is undocumented"


@pytest.mark.parametrize(
    "name",
    ["durable", *(f"durable.{it}" for it in ("client", "evals", "server", "testing", "worker"))],
)
def test_public_names(name: str) -> None:
    """`__all__` is sorted, and all of it is there and documented."""
    module = importlib.import_module(name)
    assert module.__all__ == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public).__doc__, f"{name}.{public} has no docstring"


def test_every_file_says_what_it_is_for() -> None:
    """Each module has a docstring; no file is called utils, helpers or common."""
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
        assert path.stem not in {"utils", "helpers", "common"}


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright"]],
    ids=["lint", "format", "types"],
)
def test_the_code_is_clean(command: list[str]) -> None:
    """What `make check` checks."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
