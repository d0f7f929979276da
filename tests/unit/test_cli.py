"""The command line's errors, and the curl lines that `durable dev` prints."""

import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from durable.__main__ import main
from durable._curl import curl


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs in a directory of its own; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


class TestServeErrors:
    @pytest.mark.parametrize(
        ("app", "message"),
        [
            ("services", "error: 'services' is not `MODULE:APP`, for example `services:app`."),
            ("missing_module:app", "error: There is no module 'missing_module' to get"),
            ("my_app.missing:app", "error: There is no module 'my_app.missing' to get"),
            ("my_app:missing", "error: The module 'my_app' has no 'missing'."),
            ("my_app:number", "error: 'my_app:number' is not an ASGI application but a int"),
        ],
    )
    def test_one_line_and_exit_code_2(
        self, here: Path, capsys: pytest.CaptureFixture[str], app: str, message: str
    ) -> None:
        package = here / "my_app"
        package.mkdir()
        (package / "__init__.py").write_text("number = 1")
        assert main(["serve", app]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(message)

    def test_errors_in_the_module_keep_their_traceback(self, here: Path) -> None:
        (here / "broken_app.py").write_text("import not_installed_anywhere\n")
        with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
            main(["serve", "broken_app:app"])

    def test_a_taken_port_is_named(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (here / "fine_app.py").write_text("def app(): ...\n")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert main(["serve", "fine_app:app", "--port", str(port)]) == 1
        assert f"port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dev"], "the following arguments are required: MODULE:APP"),
        (["server", "--admin-port", "70000"], "70000 is not a port: 1 to 65535"),
        (["server", "--admin-port", "x"], "argument --admin-port: invalid"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_server_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESTATE_SERVER_BINARY", "/nowhere/restate-server")
    assert main(["server"]) == 1
    assert capsys.readouterr().err.startswith("error: `RESTATE_SERVER_BINARY` is set to")


class Item(BaseModel):
    name: str
    parts: list["Item"] = []


class Request(BaseModel):
    text: str = "it's fine"
    prompts: list[str] = Field(min_length=1)
    pace: int = Field(default=3, examples=[7])
    limit: int | None = None
    team: Item


class TestCurl:
    def line(self, kind: str, **handler: Any) -> list[str]:
        described = {"name": "run", "input_description": "JSON", **handler}
        return shlex.split(
            curl({"name": "S", "ty": kind}, described, ingress_url="http://127.0.0.1:8080")
        )

    def test_body_comes_from_the_schema(self) -> None:
        command = self.line("Service", input_json_schema=Request.model_json_schema())
        assert command[:4] == [
            "curl",
            "http://127.0.0.1:8080/S/run",
            "-H",
            "content-type: application/json",
        ]
        body = json.loads(command[-1])
        assert body == {
            "text": "it's fine",
            "prompts": ["text"],
            "pace": 7,
            "team": {"name": "text", "parts": []},
        }
        Request.model_validate(body)

    def test_no_input(self) -> None:
        assert self.line("Service", input_description="none")[-2:] == ["-X", "POST"]

    @pytest.mark.parametrize(("kind", "key"), [("VirtualObject", "my-key"), ("Workflow", "my-id")])
    def test_keys(self, kind: str, key: str) -> None:
        command = self.line(kind, input_json_schema={"type": "integer", "minimum": 5})
        assert command[1] == f"http://127.0.0.1:8080/S/{key}/run"
        assert command[-1] == "5"

    def test_a_schema_without_end(self) -> None:
        endless = {"$ref": "#/$defs/A", "$defs": {"A": {"items": {"$ref": "#/$defs/A"}}}}
        endless["$defs"]["A"]["type"] = "array"  # type: ignore[index]
        json.loads(self.line("Service", input_json_schema=endless)[-1])


@pytest.mark.parametrize(
    "program",
    [
        "from durable.__main__ import main; main(['export-case', 'inv_1'])",
        "from durable.evals import OnlineEvaluation",
    ],
)
def test_without_pydantic_evals(program: str) -> None:
    """It is an extra: whoever needs it is told so, and nobody else does."""
    missing = "import sys; sys.modules['pydantic_evals'] = None; import durable, durable.__main__; "
    done = subprocess.run(
        [sys.executable, "-c", missing + program], capture_output=True, text=True, check=False
    )
    assert "pip install 'pydantic-ai-restate[evals]'" in done.stderr
