"""The client for code without an event loop. `durable.client.Client` says more about each method."""

import ssl
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from datetime import timedelta
from typing import Any, Generic, Self, TypeVar, Unpack, overload

import httpx2
from pydantic import JsonValue
from pydantic_ai.messages import ModelMessage, UserContent
from restate import VirtualObject

from durable._agent_run import Approve, Deny, PendingCall, SteeringMessage, Supply
from durable._sessions import SessionStatus
from durable.client._exchange import Attempt, Exchange
from durable.client._invocations import Handle, Invocation, Payloads, Step
from durable.client._operations import (
    CallOptions,
    JournalReader,
    Operations,
    SendOptions,
    SessionTargets,
    TurnOptions,
)
from durable.client._server import Server
from durable.client._targets import Target

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")
T = TypeVar("T")


class SyncClient:
    """`Client`, for code without an event loop.

    Example:
        ```python
        with SyncClient("http://localhost:8080") as client:
            haiku = client.call(write, "spring", idempotency_key="haiku-1")
        ```
    """

    def __init__(
        self,
        ingress_url: str = "http://localhost:8080",
        *,
        admin_url: str | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: timedelta | None = None,
        retries: int = 4,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._server = server = Server.at(
            ingress_url,
            admin_url=admin_url,
            token=token,
            headers=headers,
            timeout=timeout,
            retries=retries,
            verify=verify,
        )
        self._operations = Operations(server)
        self._ingress, self._admin = (
            httpx2.Client(**server.http_options(url))
            for url in (server.ingress_url, server.admin_url or server.ingress_url)
        )

    def __repr__(self) -> str:
        """Return where it points to; nothing secret."""
        return f"{type(self).__name__}({self._server})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Runs that were called go on."""
        self._ingress.close()
        self._admin.close()

    @overload
    def call(
        self,
        handler: Callable[[Any, InputT], Awaitable[OutputT]],
        input: InputT,
        **options: Unpack[CallOptions],
    ) -> OutputT: ...
    @overload
    def call(
        self, handler: Callable[[Any], Awaitable[OutputT]], **options: Unpack[CallOptions]
    ) -> OutputT: ...
    @overload
    def call(self, handler: str, input: Any = None, **options: Unpack[CallOptions]) -> Any: ...
    def call(
        self,
        handler: Callable[..., Awaitable[Any]] | str,
        input: Any = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Call a handler, wait for its output and return it."""
        return self._do(self._operations.call(handler, input, **options))

    @overload
    def send(
        self,
        handler: Callable[[Any, InputT], Awaitable[OutputT]],
        input: InputT,
        **options: Unpack[SendOptions],
    ) -> Handle[OutputT]: ...
    @overload
    def send(
        self, handler: Callable[[Any], Awaitable[OutputT]], **options: Unpack[SendOptions]
    ) -> Handle[OutputT]: ...
    @overload
    def send(
        self, handler: str, input: Any = None, **options: Unpack[SendOptions]
    ) -> Handle[Any]: ...
    def send(
        self,
        handler: Callable[..., Awaitable[Any]] | str,
        input: Any = None,
        **options: Unpack[SendOptions],
    ) -> Handle[Any]:
        """Call a handler and return the handle of its run at once."""
        return self._do(self._operations.send(handler, input, **options))

    def attach(self, handle: Handle[OutputT], *, timeout: timedelta | None = None) -> OutputT:
        """Wait until a run ends, and return its output."""
        return self._do(self._operations.attach(handle, timeout=timeout))

    def output(self, handle: Handle[OutputT]) -> OutputT:
        """Return the output of a run that has ended."""
        return self._do(self._operations.output(handle))

    def status(self, handle: Handle[Any]) -> Invocation:
        """Return how a run is."""
        return self._do(self._operations.status(handle))

    def invocations(
        self, *, service: str | None = None, status: str | None = None, limit: int = 50
    ) -> list[Invocation]:
        """Return invocations, the latest first."""
        return self._do(self._operations.invocations(service=service, status=status, limit=limit))

    def cancel(self, handle: Handle[Any]) -> None:
        """Ask a run to end: its code gets the chance to clean up, and what it waits for is cancelled too."""
        self._do(self._operations.change(handle, "cancel"))

    def kill(self, handle: Handle[Any]) -> None:
        """End a run at once, without its code: only where `cancel` does not help."""
        self._do(self._operations.change(handle, "kill"))

    def resume(self, handle: Handle[Any]) -> None:
        """Have a paused run go on, and one that waits for its next attempt begin it."""
        self._do(self._operations.change(handle, "resume"))

    def restart_from(self, handle: Handle[OutputT], step: Step | str) -> Handle[OutputT]:
        """Run again what has ended, from a step on: a new run, on the latest code, takes over what came before it."""
        return self._do(self._operations.restart_from(handle, step))

    def steps(self, handle: Handle[Any]) -> list[Step]:
        """Return the steps of a run, in the order in which they began."""
        return self._do(self._operations.steps(handle))

    def payloads(self, handle: Handle[Any]) -> Payloads:
        """Return what a run that has ended well was given and what it returned, from its journal."""
        return self._do(self._operations.payloads(handle))

    def query(self, sql: str) -> list[dict[str, Any]]:
        """Return rows of the server's tables, such as `sys_invocation` and `sys_journal`."""
        return self._do(self._operations.query(sql))

    def progress(
        self, handle: Handle[Any], *, interval: timedelta = timedelta(seconds=0.5)
    ) -> Generator[Step]:
        """Iterate over the steps of a run as they begin and end, until the run ends."""
        journal = JournalReader(self._operations, handle)
        while not journal.ended:
            yield from self._do(journal.read())
            if not journal.ended:
                time.sleep(interval.total_seconds())

    def resolve_awakeable(self, id: str, value: JsonValue = None) -> None:
        """Give an awakeable its value: of a handler, or the token of an agent's external event."""
        self._do(self._operations.resolve_awakeable(id, value))

    def reject_awakeable(self, id: str, reason: str) -> None:
        """Fail whoever waits for an awakeable."""
        self._do(self._operations.reject_awakeable(id, reason))

    def pending(self, handle: Handle[Any]) -> list[PendingCall]:
        """Return the tool calls of a run that wait for a person. `durable.agent_run` has to be hosted."""
        return self._do(self._operations.pending(handle))

    def answer(self, handle: Handle[Any], decision: Approve | Deny | Supply) -> None:
        """Answer a tool call that waits."""
        self._do(self._operations.answer(handle, decision))

    def steer(
        self, handle: Handle[Any], message: SteeringMessage | str | list[UserContent]
    ) -> None:
        """Give a run a message, and return when it has it. `durable.agent_run` has to be hosted."""
        self._do(self._operations.steer(handle, message))

    def stop(self, handle: Handle[Any]) -> None:
        """Cancel a run through `durable.agent_run`, which needs no admin API."""
        self._do(self._operations.stop(handle))

    def session(
        self, sessions: VirtualObject | str, key: str, output_type: type[OutputT]
    ) -> "SyncSession[OutputT]":
        """Return a session of a `durable.agent_session`."""

        def call(handler: Target[Any], input: Any = None, **options: Any) -> Any:
            return self._do(self._operations.call(handler, input, key=key, **options))

        return SyncSession(SessionTargets(sessions, output_type), call)

    def _do(self, exchange: Exchange[T]) -> T:
        try:
            next_ = next(exchange)
            while True:
                answer = None
                if isinstance(next_, Attempt):
                    http = self._admin if next_.request.admin else self._ingress
                    try:
                        answer = http.request(**next_.options)
                    except httpx2.TransportError as error:
                        answer = error
                else:
                    time.sleep(next_.seconds)
                next_ = exchange.send(answer)
        except StopIteration as done:
            return done.value


class SyncSession(Generic[OutputT]):
    """A conversation with an agent: see `SyncClient.session`."""

    def __init__(self, handlers: SessionTargets[OutputT], call: Callable[..., Any]) -> None:
        self._handlers = handlers
        self._call = call

    def message(self, prompt: str | list[UserContent], **options: Unpack[TurnOptions]) -> OutputT:
        """Say something to the agent and return its answer."""
        return self._call(self._handlers.message, {"prompt": prompt}, **options)

    def history(self) -> list[ModelMessage]:
        """Return the messages of the session."""
        return self._call(self._handlers.history)

    def status(self) -> SessionStatus:
        """Return what the session is doing; `Handle(status.invocation_id)` is the run of its turn."""
        return self._call(self._handlers.status)

    def clear(self) -> None:
        """Forget the session, when the turns before it have ended."""
        self._call(self._handlers.clear)
