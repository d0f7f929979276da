"""A FastAPI backend that calls a durable agent as it would call a function."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel

import durable
from durable.client import Client, ClientError, Handle, NotReady, RunFailed

# The agent, and what hosts it: `durable serve fastapi_backend:services`.


class Ticket(BaseModel):
    """What a customer wants."""

    text: str = Field(min_length=1)


class Reply(BaseModel):
    """What the customer is told."""

    text: str
    urgent: bool = False


helpdesk = durable.agent_service(
    Agent(
        TestModel(custom_output_args={"text": "We look into it."}),
        name="helpdesk",
        output_type=Reply,
        capabilities=[durable.RestateDurability()],
    ),
    input_type=Ticket,
)
services = durable.app([helpdesk])


# The backend, in any other process.


def backend(ingress_url: str) -> FastAPI:
    """Return the backend, which calls the agent at `ingress_url`."""

    @asynccontextmanager
    async def with_client(app: FastAPI) -> AsyncGenerator[None]:
        async with Client(ingress_url) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=with_client)

    @app.exception_handler(ClientError)
    async def as_response(request: Request, error: ClientError) -> JSONResponse:
        status = (error.status or 502) if isinstance(error, RunFailed) else 503
        return JSONResponse({"detail": error.message}, status)

    @app.post("/tickets")
    async def answer(ticket: Ticket, client: Durable) -> Reply:
        return await client.call(helpdesk.run, ticket)

    @app.put("/tickets/{number}")
    async def file(number: str, ticket: Ticket, client: Durable) -> str:
        handle = await client.send(helpdesk.run, ticket, idempotency_key=number)
        return str(handle)

    @app.get("/replies/{run}")
    async def look_up(run: str, client: Durable) -> Reply:
        try:
            return await client.output(Handle.parse(run, helpdesk.run))
        except NotReady:
            raise HTTPException(202, "The agent is at work.") from None

    _ = answer, file, look_up, as_response
    return app


def _client(request: Request) -> Client:
    client = request.app.state.client
    assert isinstance(client, Client)
    return client


Durable = Annotated[Client, Depends(_client)]
