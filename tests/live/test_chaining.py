"""Call chaining: the worker is killed between any two links of the chain."""

import pytest

from agents.chaining import Transformed
from durable.server import RestateServer
from tests.live.kills import killed_runs

pytestmark = pytest.mark.live

PROMPTS = ["one", "two", "three"]


def output(name: str, prompt: str) -> Transformed:
    """Answer with which prompt it was."""
    return Transformed(text=prompt.removeprefix("Instruction: ").partition("\n")[0])


async def test_a_killed_worker(server: RestateServer) -> None:
    """What was answered before the kill is not asked again; the rest is, once."""
    body = {"text": "zero", "prompts": PROMPTS}
    path = "CallChainingService/run"
    async for run in killed_runs(server, lambda _: path, body, output, steps=len(PROMPTS)):
        assert [step["result"] for step in run.response["steps"]] == PROMPTS
        assert not run.before & run.after
        assert (run.before + run.after).total() == len(PROMPTS)
