"""A proxy in front of the model provider that counts what really reaches it.

It knows nothing of Restate or PydanticAI: a witness of its own for how often a model was asked.

Worker → counting proxy → provider of the model
"""

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import anyio
import httpx2
from hypercorn.asyncio import serve  # pyright: ignore[reportUnknownVariableType]
from hypercorn.config import Config

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

# What belongs to one connection and not to the message (RFC 9110), and what is computed anew.
_NOT_FORWARDED = {
    *(b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade"),
    *(b"transfer-encoding", b"content-length", b"host"),
}


@dataclass(kw_only=True)
class ModelRequest:
    """One request that reached the proxy."""

    asked: str
    """Digest of path and body: two requests are equal when they ask the same."""

    status: int | None = None
    """The provider's answer, `None` while there is none."""

    delivered: bool = False
    """Whether the whole answer was handed to the worker's connection while that was open."""

    @property
    def refused(self) -> bool:
        """Whether the provider answered with an error: no answer of a model was paid for."""
        return self.status is not None and self.status >= 400


class CountingProxy:
    """An ASGI application that forwards everything to `upstream` and remembers each request.

    An answer is forwarded in one piece, a streamed one too.
    """

    def __init__(self, *, upstream: str, http: httpx2.AsyncClient) -> None:
        self._upstream = upstream.rstrip("/")
        self._http = http
        self.url = ""
        self.requests: list[ModelRequest] = []
        """In the order in which they began."""

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Forward one request."""
        if scope["type"] != "http":
            return
        if (body := await _body(receive)) is None:
            return
        path = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        request = ModelRequest(asked=hashlib.sha256(path + b"\n" + body).hexdigest())
        self.requests.append(request)
        async with anyio.create_task_group() as group:

            async def stop_when_the_worker_is_gone() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(stop_when_the_worker_is_gone)
            status, headers, content = await self._ask(scope, path.decode(), body)
            request.status = status
            # Not to be cut between the last byte and the note of it; a closed connection is seen
            # before, because from here on nothing waits.
            with anyio.CancelScope(shield=True):
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": content})
            request.delivered = True
            group.cancel_scope.cancel()

    async def _ask(
        self, scope: dict[str, Any], path: str, body: bytes
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        try:
            async with self._http.stream(
                scope["method"],
                f"{self._upstream}{path}",
                headers=_forwarded(scope["headers"]),
                content=body,
            ) as answer:
                # Raw: as the provider encoded it, which is what its headers say.
                content = b"".join([chunk async for chunk in answer.aiter_raw()])
            return answer.status_code, _forwarded(answer.headers.raw), content
        except httpx2.TransportError as error:
            message = f"No answer from {self._upstream}: {error!r}"
            problem = json.dumps({"error": {"message": message, "type": "proxy"}}).encode()
            return 502, [(b"content-type", b"application/json")], problem


@asynccontextmanager
async def counting_proxy(upstream: str) -> AsyncGenerator[CountingProxy]:
    """Serve a proxy for the base URL `upstream` on a free port of loopback."""
    config = Config()
    config.loglevel = "ERROR"
    config.graceful_timeout = 1.0
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    config.bind = [f"fd://{listener.detach()}"]
    stop = asyncio.Event()
    async with httpx2.AsyncClient(timeout=None) as http:
        proxy = CountingProxy(upstream=upstream, http=http)
        proxy.url = f"http://127.0.0.1:{port}"
        # Its own names for ASGI's messages are many typed dicts; plain dicts are what they are.
        app = cast(Any, proxy)
        serving = asyncio.ensure_future(serve(app, config, shutdown_trigger=stop.wait))
        try:
            yield proxy
        finally:
            stop.set()
            await serving


async def _body(receive: Receive) -> bytes | None:
    """Return the body of a request, `None` when its sender went away."""
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            return body
    return None


def _forwarded(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() not in _NOT_FORWARDED]
