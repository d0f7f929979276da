"""Hosting services in the test's own process, behind a real restate-server."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx2
import restate
from hypercorn.asyncio import serve  # pyright: ignore[reportUnknownVariableType]
from hypercorn.config import Config
from pydantic_ai import Agent

import durable
from durable._process import free_ports
from durable.server import RestateServer

AT_MOST_TWICE = restate.InvocationRetryPolicy(
    initial_interval=timedelta(milliseconds=10), max_attempts=2, on_max_attempts="kill"
)
"""Ends what should have ended at once."""

PATIENCE = 60.0
"""How many seconds what is not measured may take: no test fails because the machine is busy."""


def http_client(**options: Any) -> httpx2.AsyncClient:
    """A client for servers on loopback."""
    return httpx2.AsyncClient(**options, timeout=PATIENCE, trust_env=False)


@dataclass
class Ingress:
    """Calls handlers through the ingress of `server`."""

    server: RestateServer
    http: httpx2.AsyncClient

    async def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx2.Response:
        """Post JSON to `{service}/{handler}`."""
        if body is not None:
            kwargs["json"] = body
        return await self.http.post(f"{self.server.ingress_url}/{path}", **kwargs)

    async def call(self, path: str, body: Any = None, **kwargs: Any) -> Any:
        """Post, and return the answer's JSON, or fail with the error that the caller would see."""
        response = await self.post(path, body, **kwargs)
        assert response.status_code == 200, response.text
        return response.json()

    async def until(
        self, sql: str, fact: Callable[[list[dict[str, Any]]], bool], *, within: float = PATIENCE
    ) -> None:
        """Wait until `fact` holds for what the server answers to `sql`, so many seconds at most."""
        async with asyncio.timeout(within):
            while True:
                if fact(await self.server.query(sql)):
                    return
                await asyncio.sleep(0.05)

    async def steps(self, service: str) -> list[str]:
        """Return the names of the steps in the journal of the last invocation of `service`."""
        return await self.entries(service, "Run")

    async def entries(self, service: str, command: str) -> list[str]:
        """Return the names of such commands in the journal of the last invocation of `service`."""
        newest = await self.invocation(service)
        rows = await self.server.query(
            f"SELECT name FROM sys_journal WHERE id = '{newest['id']}' "
            f"AND entry_type = 'Command: {command}' ORDER BY index"
        )
        return [row.get("name", "") for row in rows]

    async def cancel(self, service: str) -> None:
        """Cancel the last invocation of `service`."""
        invocation = await self.invocation(service)
        url = f"{self.server.admin_url}/invocations/{invocation['id']}/cancel"
        (await self.http.patch(url)).raise_for_status()

    async def retries(self, service: str) -> int:
        """Return how often the last invocation of `service` was retried, by the server's log.

        `sys_invocation` knows of retries only while an invocation is under way.
        """
        invocation = await self.invocation(service)
        _, *errors = self.server.log_file.read_text().split("Invocation error, ")
        return sum(f"restate.invocation.id={invocation['id']}" in error for error in errors)

    async def invocation(self, service: str) -> dict[str, Any]:
        """Return the last invocation of `service`; what is null is left out."""
        rows = await self.server.query(
            "SELECT id, status, completion_result, completion_failure FROM sys_invocation "
            f"WHERE target_service_name = '{service}' ORDER BY created_at DESC LIMIT 1"
        )
        return rows[0]


def agent_service(name: str, agent: Agent[None, Any]) -> restate.Service:
    """A service whose handler `run` runs the agent, and ends with a step.

    That step makes always-replay mode replay the whole run.
    """
    service = restate.Service(name)

    @service.handler()
    async def run(ctx: restate.Context) -> Any:
        output = (await agent.run("go")).output
        await ctx.run_typed("after", after)
        return output

    return service


async def after() -> None:
    """A last step, so that always-replay mode replays everything before it."""


@asynccontextmanager
async def hosted(server: RestateServer, *services: Any) -> AsyncGenerator[Ingress]:
    """Serve `services` with `durable.app` in this process and register them."""
    async with serving(durable.app(services)) as url:
        await server.register(url)
        async with http_client() as http:
            yield Ingress(server, http)


@asynccontextmanager
async def serving(app: Any) -> AsyncGenerator[str]:
    """Serve an ASGI application in this process on a free port."""
    config = Config()
    (port,) = free_ports(1)
    config.bind = [f"127.0.0.1:{port}"]
    config.h2_max_concurrent_streams = 2**31 - 1
    config.keep_alive_max_requests = 2**31 - 1  # hypercorn drops what comes after 1,000
    config.loglevel = "ERROR"
    stop = asyncio.Event()
    task = asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait))
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        stop.set()
        await task
