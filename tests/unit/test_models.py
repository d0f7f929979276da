"""Which model the environment asks for, and what reaches the wire."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.exceptions import UserError
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

from agents import local_model, models
from agents.models import ConfiguredModel, LocalModel, configured_model

VARIABLES = (
    "AGENTS_MODEL",
    "AGENTS_LOCAL_URL",
    "OPENAI_API_KEY",
    "OPENAI_BASE_URL",
    "ANTHROPIC_API_KEY",
)


class Note(BaseModel):
    text: str = Field(max_length=40)
    tags: list[str] = Field(max_length=2)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


class Stub(ThreadingHTTPServer):
    """Answers chat completions with a `Note` and keeps what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Answer(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Stub)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.requests.append(
            (self.path, {k.lower(): v for k, v in self.headers.items()}, body)
        )
        note = Note(text="hello", tags=["a"]).model_dump_json()
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": note},
                }
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("variables", "kind", "name"),
    [
        ({}, LocalModel, local_model.MODEL_NAME),
        ({"OPENAI_API_KEY": "k"}, OpenAIResponsesModel, models.OPENAI_DEFAULT),
        ({"ANTHROPIC_API_KEY": "k"}, AnthropicModel, models.ANTHROPIC_DEFAULT),
        (
            {"OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"},
            OpenAIResponsesModel,
            models.OPENAI_DEFAULT,
        ),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}, OpenAIChatModel, models.OPENAI_DEFAULT),
        ({"OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""}, LocalModel, local_model.MODEL_NAME),
        ({"AGENTS_MODEL": "", "ANTHROPIC_API_KEY": "k"}, AnthropicModel, models.ANTHROPIC_DEFAULT),
        ({"AGENTS_MODEL": "local", "OPENAI_API_KEY": "k"}, LocalModel, local_model.MODEL_NAME),
        (
            {"AGENTS_MODEL": "anthropic:x", "OPENAI_API_KEY": "k", "ANTHROPIC_API_KEY": "k"},
            AnthropicModel,
            "x",
        ),
        (
            {"AGENTS_MODEL": "openai:a:b", "OPENAI_BASE_URL": "http://127.0.0.1:1/v1"},
            OpenAIChatModel,
            "a:b",
        ),
        (
            {"AGENTS_MODEL": "openai:x", "OPENAI_API_KEY": "k", "OPENAI_BASE_URL": ""},
            OpenAIResponsesModel,
            "x",
        ),
    ],
)
def test_the_environment_chooses_the_model(
    environment: pytest.MonkeyPatch, variables: dict[str, str], kind: type[Model], name: str
) -> None:
    """`AGENTS_MODEL`, then OpenAI, then Anthropic, then local; empty variables count as unset."""
    for variable, value in variables.items():
        environment.setenv(variable, value)
    model = configured_model()
    assert type(model) is kind
    assert model.model_name == name
    assert model.profile.get("default_structured_output_mode") == (
        "native" if model.profile.get("supports_json_schema_output") else "tool"
    )


@pytest.mark.parametrize("default", [models.OPENAI_DEFAULT, models.ANTHROPIC_DEFAULT])
def test_the_default_models_have_json_schema_mode(
    environment: pytest.MonkeyPatch, default: str
) -> None:
    """A bare `output_type=SomeModel` uses it."""
    environment.setenv("OPENAI_API_KEY", "k")
    environment.setenv("ANTHROPIC_API_KEY", "k")
    provider = "openai" if default == models.OPENAI_DEFAULT else "anthropic"
    environment.setenv("AGENTS_MODEL", f"{provider}:{default}")
    assert configured_model().profile.get("default_structured_output_mode") == "native"


@pytest.mark.parametrize(
    "chosen", ["gpt-6", "mistral:large", "openai:", "openai: ", ":x", "local:x"]
)
def test_a_bad_name_says_what_is_possible(environment: pytest.MonkeyPatch, chosen: str) -> None:
    """The message repeats the value and lists the three forms."""
    environment.setenv("AGENTS_MODEL", chosen)
    with pytest.raises(UserError) as error:
        configured_model()
    for part in (f"AGENTS_MODEL={chosen}", "openai:NAME", "anthropic:NAME", "`local`"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("chosen", "variable"),
    [("openai:x", "OPENAI_API_KEY"), ("anthropic:x", "ANTHROPIC_API_KEY")],
)
def test_a_missing_key_is_named(
    environment: pytest.MonkeyPatch, chosen: str, variable: str
) -> None:
    """Asking for a provider without its key is an error at once."""
    environment.setenv("AGENTS_MODEL", chosen)
    with pytest.raises(UserError, match=variable):
        ConfiguredModel().check()


def test_importing_agents_needs_no_key_and_starts_nothing() -> None:
    """Not even a wrong `AGENTS_MODEL` disturbs a test that scripts its models."""
    code = (
        "import agents.routing, agents.models, agents.local_model\n"
        "assert 'wrapped' not in vars(agents.models.DEFAULT_MODEL)\n"
        "assert not agents.local_model._shared.running\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=Path(__file__).parents[2],
        env={"AGENTS_MODEL": "nonsense", "PATH": ""},
    )


async def test_an_openai_compatible_server_gets_the_bounded_schema(
    environment: pytest.MonkeyPatch, stub: Stub
) -> None:
    """`OPENAI_BASE_URL` is used, without a key, by chat completions in JSON-schema mode."""
    environment.setenv("OPENAI_BASE_URL", stub.url)
    environment.setenv("AGENTS_MODEL", "openai:my/model")
    async with Agent(ConfiguredModel(), output_type=Note) as agent:
        result = await agent.run("hi")
    assert result.output == Note(text="hello", tags=["a"])
    [(path, headers, body)] = stub.requests
    assert path == "/v1/chat/completions"
    assert body["model"] == "my/model"
    assert headers["authorization"].startswith("Bearer ")
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["text"]["maxLength"] == 40


async def test_the_local_model_gets_bounds_where_the_schema_has_none(
    environment: pytest.MonkeyPatch, stub: Stub
) -> None:
    """Its grammar ends every string and list, and its tokens suffice for them."""
    environment.setenv("AGENTS_LOCAL_URL", stub.url)
    async with Agent(ConfiguredModel(), output_type=Note) as agent:
        await agent.run("hi")
    [(path, _, body)] = stub.requests
    assert path == "/v1/chat/completions"
    assert body["model"] == local_model.MODEL_NAME
    assert body["max_completion_tokens"] == 2048
    properties = body["response_format"]["json_schema"]["schema"]["properties"]
    assert properties["text"]["maxLength"] == 40
    assert properties["tags"]["maxItems"] == 2
    assert properties["tags"]["items"]["maxLength"] == models.LOCAL_STRING


def test_one_model_serves_several_event_loops(environment: pytest.MonkeyPatch, stub: Stub) -> None:
    """One after the other: as in a test suite, or in a program that calls `asyncio.run` twice."""
    environment.setenv("AGENTS_LOCAL_URL", stub.url)
    agent = Agent(ConfiguredModel(), output_type=Note)

    async def run() -> Note:
        async with agent:
            return (await agent.run("hi")).output

    assert asyncio.run(run()) == asyncio.run(run())
    assert len(stub.requests) == 2


async def test_where_the_local_model_is_missing_the_error_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The caller gets a `UserError`, not an import error from deep inside."""

    def no_package(name: str) -> None:
        assert name

    monkeypatch.setattr(local_model.importlib.util, "find_spec", no_package)
    with pytest.raises(UserError) as error:
        await Agent(ConfiguredModel()).run("hi")
    for part in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "make setup"):
        assert part in str(error.value)
