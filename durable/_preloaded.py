"""What the server sends with the start of an attempt, read without a journal entry: state, and retries so far.

`ctx.get` writes the value that it returns into the journal, also when the server has sent it in advance:
a conversation that each turn reads would be stored again with each turn. A value that does not change
while the invocation runs needs no entry: each attempt gets the same one from the server. That holds for
what only exclusive handlers of a virtual object write, as long as the invocation that reads a key
neither sets nor clears it.

The SDK's core keeps what it is sent to itself, so the connection is watched: the first message of an
attempt has the state. (Version 8 of the protocol can read state past the journal; this SDK offers
no such call.) The server leaves out what exceeds its limit, and on AWS Lambda there is no connection to watch;
such values are for `ctx.get`.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from typing import Any

from durable._wire import Message, begins_whole, messages

_STATE, _KEY, _VALUE, _RETRIES = 4, 1, 2, 7  # fields of the protocol's `StartMessage`


class Preloaded:
    """Collects the first message of an attempt as it arrives."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._received = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Take what the server sent; nothing is kept of what comes after the message."""
        if not begins_whole(self._received):
            self._received += chunk

    def state(self) -> Mapping[str, bytes]:
        """Return the state that came with the message: what `ctx.set` stored, by key."""
        start = self._start()
        entries = start.nested(_STATE) if start else ()
        return {entry.text(_KEY): entry.data(_VALUE) or b"" for entry in entries}

    def retries(self) -> int:
        """Return how often the run was tried since it last made progress, this attempt not counted."""
        start = self._start()
        return start.number(_RETRIES) if start else 0

    def _start(self) -> Message | None:
        return next(messages(bytes(self._received))) if begins_whole(self._received) else None


attempt_preloaded: ContextVar[Preloaded | None] = ContextVar("durable.preloaded", default=None)
"""What the server sent to the attempt that runs in this task."""


def watched(app: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Return the ASGI application `app`, with the first message of each request kept."""

    async def watching(scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        preloaded = Preloaded()

        async def received() -> Any:
            event = await receive()
            preloaded.feed(event.get("body", b""))
            return event

        token = attempt_preloaded.set(preloaded)
        try:
            await app(scope, received, send)
        finally:
            attempt_preloaded.reset(token)

    return watching
