"""The typed client: backends, scripts and notebooks call durable agents, and watch over their runs.

    async with Client("http://localhost:8080") as client:
        answer = await client.call(run, Request(ticket="..."), idempotency_key="ticket-1")

`Client` is for asyncio and `SyncClient` for everything else. They say the same things to the server: `_operations`
holds each thing once, without I/O; `_exchange` knows how it is sent, repeated, and what answers mean.
"""

from durable.client._async import Client, Session
from durable.client._errors import (
    ClientError,
    Conflict,
    NotFound,
    NotReady,
    RejectedInput,
    RunFailed,
    Timeout,
    UnexpectedOutput,
    Unreachable,
)
from durable.client._invocations import Handle, Invocation, Payloads, Step
from durable.client._operations import DERIVED, CallOptions, SendOptions
from durable.client._sync import SyncClient, SyncSession

__all__ = [
    "CallOptions",
    "Client",
    "ClientError",
    "Conflict",
    "DERIVED",
    "Handle",
    "Invocation",
    "NotFound",
    "NotReady",
    "Payloads",
    "RejectedInput",
    "RunFailed",
    "SendOptions",
    "Session",
    "Step",
    "SyncClient",
    "SyncSession",
    "Timeout",
    "UnexpectedOutput",
    "Unreachable",
]
