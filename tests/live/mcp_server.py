"""A real MCP server that writes down what happens to it: `python -m tests.live.mcp_server TRACE`.

Over stdio it is a process of its own; over streamable HTTP it is an ASGI application. Each line of
the trace is an event: `connect`, `disconnect`, `list`, `call NAME`, `user NAME`, `pid NUMBER`.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ImageContent

HANDSHAKES = {"initialize", "server/discover"}


@dataclass(frozen=True)
class Trace:
    """What happened to servers, in a file that all of them append to."""

    path: Path

    def add(self, event: str) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(f"{event}\n")

    def events(self) -> Counter[str]:
        """Count the lines."""
        return Counter(self.path.read_text().splitlines()) if self.path.exists() else Counter()

    def pids(self) -> set[int]:
        """Return the processes of the servers over stdio."""
        return {
            int(event.removeprefix("pid ")) for event in self.events() if event.startswith("pid ")
        }


def build(trace: Trace, **options: Any) -> MCPServer:
    """Build the server."""
    server: MCPServer = MCPServer("traced", instructions="Be exact.", log_level="ERROR", **options)

    @server.tool()
    async def add(a: int, b: int) -> int:
        """Add two numbers."""
        trace.add("call add")
        return a + b

    @server.tool()
    async def divide(a: int, b: int) -> float:
        """Divide two numbers."""
        trace.add("call divide")
        if b == 0:
            raise ToolError("b must not be zero")
        return a / b

    @server.tool()
    async def picture() -> ImageContent:
        """Return an image."""
        trace.add("call picture")
        return ImageContent(type="image", data="iVBORw0KGgo=", mime_type="image/png")

    @server.tool()
    async def hang() -> str:
        """Take longer than anybody waits."""
        trace.add("call hang")
        await anyio.sleep(60)
        return "too late"

    return server


class HTTPApp:
    """The server over streamable HTTP, as an ASGI application that sees every request.

    Args:
        trace: Where it writes.
        refuse: How many requests it answers with 503 first, as if it were still starting.
    """

    def __init__(self, trace: Trace, *, refuse: int = 0) -> None:
        self._trace = trace
        self._refuse = refuse
        self._app: Any = build(trace).streamable_http_app()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._refuse:
            self._refuse -= 1
            await send({"type": "http.response.start", "status": 503, "headers": []})
            return await send({"type": "http.response.body", "body": b""})
        if scope["method"] == "DELETE":
            self._trace.add("disconnect")
        if scope["method"] == "POST":
            body = await _body(receive)
            method = json.loads(body).get("method")
            if method in HANDSHAKES:
                self._trace.add("connect")
                self._trace.add(f"user {dict(scope['headers']).get(b'x-user', b'').decode()}")
            elif method == "tools/list":
                self._trace.add("list")
            receive = _again(body, receive)
        return await self._app(scope, receive, send)


async def _body(receive: Callable[[], Awaitable[Any]]) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _again(body: bytes, receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Any:
        return messages.pop() if messages else await receive()

    return receive_again


def main() -> None:
    """Serve over stdio."""
    trace = Trace(Path(sys.argv[1]))

    @asynccontextmanager
    async def lifespan(server: MCPServer) -> AsyncGenerator[None]:
        trace.add(f"pid {os.getpid()}")
        trace.add("connect")
        try:
            yield
        finally:
            trace.add("disconnect")

    build(trace, lifespan=lifespan).run("stdio")


if __name__ == "__main__":
    main()
