"""`durable dev` and `durable server` as a user runs them: real processes, stopped with Ctrl-C."""

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.live.hosting import PATIENCE

pytestmark = pytest.mark.live

APP = """
    import os

    import restate
    from pydantic import BaseModel

    class Request(BaseModel):
        name: str = "Ada"

    greeter = restate.Service("Greeter")

    @greeter.handler()
    async def greet(ctx: restate.Context, request: Request) -> str:
        return f"hello {request.name}"

    counter = restate.VirtualObject("Counter")

    @greeter.handler()
    async def ingress(ctx: restate.Context) -> str:
        return os.environ["RESTATE_INGRESS_URL"]

    @greeter.handler(ingress_private=True)
    async def secret(ctx: restate.Context) -> None: ...

    @counter.handler()
    async def add(ctx: restate.ObjectContext, value: int) -> int:
        total = (await ctx.get("total", type_hint=int) or 0) + value
        ctx.set("total", total)
        return total

    app = restate.app([greeter, counter])
"""


class Command:
    """A `durable` command that runs in a directory, and what it has written so far."""

    def __init__(self, directory: Path, arguments: Sequence[str]) -> None:
        self._output = directory / "output.txt"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "durable", *arguments],
                cwd=directory,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str, *, times: int = 1) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.output.count(text) < times:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.05)

    def curls(self) -> dict[str, list[str]]:
        """Return the printed curl commands by the path they call."""
        commands = [shlex.split(line) for line in self.output.splitlines() if "  curl " in line]
        return {httpx2.URL(command[1]).path: command for command in commands}

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@contextmanager
def durable(directory: Path, *arguments: str) -> Generator[Command]:
    # one at a time, also of tests in other processes: they all want the usual ports
    with (Path(tempfile.gettempdir()) / "durable-usual-ports.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = Command(directory, arguments)
        try:
            yield command
        finally:
            if command.process.poll() is None:
                command.stop()
        assert processes_in(directory) == []


def processes_in(directory: Path) -> list[str]:
    """Return the commands that run in or below a directory; only Linux tells."""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(process / "cwd")).is_relative_to(directory):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def run(command: Sequence[str]) -> object:
    """Do what a printed curl command does."""
    body = command[command.index("-d") + 1]
    answer = httpx2.post(
        command[1],
        content=body,
        headers={"content-type": "application/json"},
        trust_env=False,
        timeout=PATIENCE,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "hosted.py").write_text(textwrap.dedent(APP))
    return tmp_path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_dev(project: Path) -> None:
    """Printed curl lines work; edits are served, broken ones survived; Ctrl-C ends all."""
    code = project / "hosted.py"
    with durable(project, "dev", "hosted:app") as dev:
        dev.wait_for("/Greeter/ingress -X POST")
        curls = dev.curls()
        assert list(curls) == ["/Counter/my-key/add", "/Greeter/greet", "/Greeter/ingress"]
        assert json.loads(curls["/Greeter/greet"][-1]) == {"name": "Ada"}
        assert run(curls["/Greeter/greet"]) == "hello Ada"
        assert run(curls["/Counter/my-key/add"]) == 1
        told = curls["/Greeter/ingress"][1]
        assert (
            told == httpx2.post(told, trust_env=False, timeout=PATIENCE).json() + "/Greeter/ingress"
        )
        assert "/ui/" in dev.output

        edit(code, "hello", "welcome")
        dev.wait_for("ready")
        assert run(curls["/Greeter/greet"]) == "welcome Ada"

        edit(code, 'f"welcome', 'f"(')
        edit(code, "return f", "return (f")
        dev.wait_for("waiting for the next change")
        assert "SyntaxError" in dev.output
        edit(code, "return (f", "return f")
        dev.wait_for("ready", times=2)
        assert run(curls["/Greeter/greet"]) == "( Ada"

        edit(code, '"Ada"', '"Grace"')
        dev.wait_for('"Grace"')

        assert dev.stop() == 0
        assert "Traceback" not in dev.output.rpartition("Grace")[2]
    assert sorted(path.name for path in project.iterdir() if not path.name.startswith("__")) == [
        ".durable",
        "hosted.py",
        "output.txt",
    ]

    with durable(project, "dev", "hosted:app", "--no-reload") as dev:
        dev.wait_for("/Greeter/greet")
        assert run(dev.curls()["/Counter/my-key/add"]) == 2
        assert dev.stop(signal.SIGTERM) == 0


TRACED_APP = """
    import restate
    from pydantic_ai import Agent
    from pydantic_ai.models.test import TestModel

    import durable

    agent = Agent(TestModel(custom_output_text="hi"), name="poet", capabilities=[durable.RestateDurability()])
    poet = restate.Service("Poet")

    @poet.handler()
    async def write(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

    app = durable.app([poet])
"""


def test_dev_collects_spans(project: Path) -> None:
    """Also of an application that has set up no tracing; `durable trace` shows them, with the server's."""
    (project / "hosted.py").write_text(textwrap.dedent(TRACED_APP))
    with durable(project, "dev", "hosted:app") as dev:
        dev.wait_for("/Poet/write")
        url = dev.curls()["/Poet/write"][1]
        [admin] = [line.split()[1] for line in dev.output.splitlines() if "admin " in line]
        invocation = httpx2.post(url, trust_env=False, timeout=PATIENCE).headers["x-restate-id"]
        deadline = time.monotonic() + PATIENCE
        shown = ""
        while "invocation-attempt" not in shown or "under way" in shown:
            assert time.monotonic() < deadline, shown
            command = [sys.executable, "-m", "durable", "trace", invocation, "--admin", admin]
            shown = subprocess.run(
                command, cwd=project, capture_output=True, text=True, check=True
            ).stdout
    assert [line.strip(" │├└─").partition("  ")[0] for line in shown.splitlines()] == [
        "Poet/write",
        "ingress Poet/write",
        "invocation-start Poet/write",
        "invocation-attempt Poet/write",
        "Poet/write",
        "invoke_agent poet",
        "chat test",
    ]


def test_dev_tells_when_the_worker_ends_by_itself(project: Path) -> None:
    code = project / "hosted.py"
    edit(code, "total =", "import os; os._exit(5) if value == 1 else None\n    total =")
    with durable(project, "dev", "hosted:app") as dev:
        dev.wait_for("/Greeter/greet")
        httpx2.post(
            dev.curls()["/Counter/my-key/add"][1].replace("add", "add/send"),
            json=1,
            trust_env=False,
            timeout=PATIENCE,
        )
        dev.wait_for("the worker exited with code 5, waiting for the next change")
        edit(code, "os._exit(5) if value == 1 else None", "")
        dev.wait_for("ready")


def test_dev_without_an_app_ends(tmp_path: Path) -> None:
    with durable(tmp_path, "dev", "missing:app") as dev:
        assert dev.process.wait(40) == 1
    assert "There is no module 'missing'" in dev.output
    assert "Traceback" not in dev.output


def test_dev_with_a_taken_port_ends(project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for option in ("--ingress-port", "--admin-port", "--port"):
            with durable(project, "dev", "hosted:app", option, port) as dev:
                assert dev.process.wait(40) == 1
            assert f"port {port}" in dev.output
            assert "Traceback" not in dev.output


def test_server_alone(tmp_path: Path) -> None:
    with durable(tmp_path, "server", "--always-replay") as server:
        server.wait_for("/ui/")
        [admin] = [line.split()[1] for line in server.output.splitlines() if "admin " in line]
        assert httpx2.get(f"{admin}/health", trust_env=False, timeout=PATIENCE).status_code == 200
        assert server.stop() == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(admin, trust_env=False, timeout=PATIENCE)
    assert "Traceback" not in server.output
    assert [path.name for path in tmp_path.iterdir()] == ["output.txt"]
