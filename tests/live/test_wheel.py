"""The wheel alone, in an empty environment and without the checkout, runs a durable agent."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]

APP = """
import restate
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel

import durable

agent = Agent(TestModel(), name="installed", capabilities=[durable.RestateDurability()])
service = restate.Service("Installed")


@agent.tool_plain
def look() -> str:
    return "seen"


@service.handler()
async def run(ctx: restate.Context, prompt: str) -> str:
    return (await agent.run(prompt)).output


app = durable.app([service])
"""

MAIN = """
import asyncio
from importlib.util import find_spec
from pathlib import Path

import httpx2

import durable
from durable.server import RestateServer
from durable.worker import Worker


async def main() -> None:
    assert "site-packages" in durable.__file__, durable.__file__
    assert find_spec("mcp") is None
    async with RestateServer() as server, Worker("app:app") as worker:
        await server.register(worker.url)
        async with httpx2.AsyncClient(trust_env=False, timeout=30) as http:
            answer = await http.post(f"{server.ingress_url}/Installed/run", json="go")
        print(answer.json())
        steps = await server.query("SELECT name FROM sys_journal WHERE entry_type = 'Command: Run'")
        print(len(steps))


asyncio.run(main())
"""


ONLINE = """
try:
    from durable.evals import OnlineEvaluation
except ImportError as error:
    print(error)
else:
    print(OnlineEvaluation(evaluators=[]))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_the_wheel_runs_a_durable_agent(tmp_path: Path) -> None:
    """Built, installed with its declared dependencies only (without MCP), and used as a user would."""
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT)
    [wheel] = tmp_path.glob("*.whl")
    names = {name.split("/")[0] for name in ZipFile(wheel).namelist()}
    assert names == {"durable", wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info"}

    uv = [sys.executable, "-m", "uv", "--quiet"]
    python = tmp_path / "env" / "bin" / "python"
    run(*uv, "venv", "--python", sys.executable, tmp_path / "env", cwd=tmp_path)
    constraints = ROOT / "requirements" / "dev.txt"
    run(
        *uv, "pip", "install", "--python", python, "--constraint", constraints, f"{wheel}[server]",
        cwd=tmp_path,
    )  # fmt: skip
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "main.py").write_text(MAIN)
    assert run(python, "main.py", cwd=tmp_path).splitlines()[-2:] == ['{"look":"seen"}', "3"]

    (tmp_path / "online.py").write_text(ONLINE)
    assert "pip install 'pydantic-ai-restate[evals]'" in run(python, "online.py", cwd=tmp_path)
    # without its dependencies: of its releases, each wants a pydantic-ai of its own number
    run(
        *uv, "pip", "install", "--python", python, "--constraint", constraints, "--no-deps",
        "pydantic-evals", "pyyaml", cwd=tmp_path,
    )  # fmt: skip
    assert "OnlineEvaluation" in run(python, "online.py", cwd=tmp_path)
