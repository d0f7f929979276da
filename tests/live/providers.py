"""A provider of language models on loopback, for the real `openai` client to talk to."""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    headers: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Provider:
    """What a provider was asked, and when."""

    url: str
    times: list[float] = field(default_factory=list[float])

    def model(self) -> OpenAIChatModel:
        """Return a model behind the real client, whose own retries are off."""
        client = AsyncOpenAI(base_url=f"{self.url}/v1", api_key="canary-key", max_retries=0)
        return OpenAIChatModel("scripted", provider=OpenAIProvider(openai_client=client))


@contextmanager
def provider(answers: Sequence[Answer]) -> Generator[Provider]:
    """Serve `answers` in turn, the last one again and again."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            answer = answers[min(len(served.times), len(answers) - 1)]
            served.times.append(monotonic())
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


def _body(answer: Answer) -> dict[str, Any]:
    if answer.status != 200:
        return {"error": {"message": answer.text, "code": "scripted_code", "type": "scripted"}}
    message = {"role": "assistant", "content": answer.text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8},
    }
