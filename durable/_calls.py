"""Calls of other handlers from handler code, cancelled with the code that waits for them."""

import asyncio

import anyio
from restate import Context


async def call(
    context: Context, service: str, handler: str, body: bytes, key: str | None = None
) -> bytes:
    """Call a handler and return its response.

    Args:
        context: The context of the handler that calls.
        service: The name of the service.
        handler: The name of the handler.
        body: The request.
        key: The key of the virtual object or workflow.

    Raises:
        TerminalError: The handler's. An `InvocationCancelled` when the invocation that calls was cancelled: Restate
            has then cancelled the call too.
    """
    future = context.generic_call(service, handler, body, key)
    try:
        return await future
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            context.cancel_invocation(await future.invocation_id())
        raise
