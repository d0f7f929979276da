"""A provider of language models on loopback, for the real `openai` client to talk to."""

import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from threading import Thread
from time import monotonic
from typing import Any

from openai import AsyncOpenAI
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


@dataclass
class Answer:
    """One scripted HTTP answer."""

    text: str = "done"
    status: int = 200
    """0 drops the connection."""

    headers: dict[str, str] = field(default_factory=dict[str, str])
    code: str = "scripted_code"
    finish_reason: str = "stop"


@dataclass
class Provider:
    """What a provider was asked, and when."""

    url: str
    times: list[float] = field(default_factory=list[float])
    requests: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def model(self) -> OpenAIChatModel:
        """Return a model behind the real client, whose own retries are off."""
        client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="canary-key", max_retries=0)
        return OpenAIChatModel("scripted", provider=OpenAIProvider(openai_client=client))

    @property
    def env(self) -> dict[str, str]:
        """The environment of a worker that uses it, whatever is configured for this process."""
        unset = {
            name: "" for name in os.environ if name.startswith(("OPENAI_", "ANTHROPIC_", "AGENTS_"))
        }
        return {
            **unset,
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "AGENTS_MODEL": "openai:scripted",
        }


@contextmanager
def provider(
    answers: Sequence[Answer] | Callable[[dict[str, Any], int], Answer],
) -> Generator[Provider]:
    """Serve a model.

    Args:
        answers: Given in turn, the last one again and again; or a function that makes the answer
            from the request and its number, which starts with one.
    """
    numbers = count(1)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            served.requests.append(request)
            served.times.append(monotonic())
            number = next(numbers)
            if callable(answers):
                answer = answers(request, number)
            else:
                answer = answers[min(number, len(answers)) - 1]
            if not answer.status:
                self.close_connection = True
                return
            body = json.dumps(_body(answer)).encode()
            self.send_response(answer.status)
            for name, value in {"content-type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Provider(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def filled(request: dict[str, Any], number: int) -> Answer:
    """Fill in whatever JSON schema is asked for, with the request's number in its texts."""
    schema = request["response_format"]["json_schema"]["schema"]
    return Answer(json.dumps(_fill(schema, schema, number)))


def _fill(schema: dict[str, Any], root: dict[str, Any], number: int) -> Any:
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "enum" in schema:
        return schema["enum"][0]
    if schema["type"] == "object":
        return {name: _fill(it, root, number) for name, it in schema["properties"].items()}
    if schema["type"] == "array":
        return [_fill(schema["items"], root, number)]
    assert schema["type"] == "string", schema
    return f"text {number}"


def _body(answer: Answer) -> dict[str, Any]:
    if answer.status != 200:
        return {"error": {"message": answer.text, "code": answer.code, "type": "scripted"}}
    message = {"role": "assistant", "content": answer.text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": answer.finish_reason}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }
