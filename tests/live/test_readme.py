"""The README's first program works as it stands, but for the model."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai.models.test import TestModel
from pydantic_evals.evaluators import LLMJudge
from pydantic_evals.online import OnlineEvaluator

from durable.server import RestateServer
from tests.live.hosting import Ingress, http_client, serving

pytestmark = pytest.mark.live

README = (Path(__file__).parents[2] / "README.md").read_text()


async def test_the_first_program(server: RestateServer) -> None:
    """Copied from the README into a file, hosted, and called with the README's curl."""
    program = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert '"openai:gpt-5-mini"' in program
    namespace: dict[str, Any] = {"TEST_MODEL": TestModel(custom_output_text="old pond")}
    exec(program.replace('"openai:gpt-5-mini"', "TEST_MODEL"), namespace)
    [(path, body)] = re.findall(r"curl localhost:8080/(Poet\S+) --json '(.*)'", README)
    async with serving(namespace["app"]) as url, http_client() as http:
        await server.register(url)
        ingress = Ingress(server, http)
        json = {"content-type": "application/json"}
        answer = await ingress.post(path, content=body.encode(), headers=json)
        assert answer.json() == "old pond"
        assert await ingress.steps("Poet") == ["poet__model.request"]


async def test_the_test_of_a_handler() -> None:
    """The README's test of its first program passes."""
    program, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    [test] = [fence for fence in others if "InMemoryInvocation" in fence]
    namespace: dict[str, Any] = {"TestModel": TestModel}
    exec(program.replace("openai:gpt-5-mini", "test"), namespace)
    exec(test, namespace)
    await namespace["test_write"]()


async def test_the_client(server: RestateServer, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's calls of its first program work."""
    program, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    [calls] = [fence for fence in others if "restart_from" in fence]
    namespace: dict[str, Any] = {}
    exec(program.replace("openai:gpt-5-mini", "test"), namespace)
    calls = calls.replace("http://localhost:8080", server.ingress_url)
    exec(calls.replace("http://localhost:9070", server.admin_url), namespace)
    async with serving(namespace["app"]) as url:
        await server.register(url)
        await namespace["calls"]()
    assert "poet__model.request completed" in capsys.readouterr().out


def test_online_evals() -> None:
    """The README's capability goes with its first program."""
    program, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    [evals] = [fence for fence in others if "durable.evals" in fence]
    namespace: dict[str, Any] = {"LLMJudge": LLMJudge, "OnlineEvaluator": OnlineEvaluator}
    exec(program.replace("openai:gpt-5-mini", "test"), namespace)
    exec(evals.replace("openai:gpt-5-mini", "test"), namespace)
