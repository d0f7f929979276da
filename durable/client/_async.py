"""The client for asyncio."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
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


class Client:
    """Calls durable handlers and agents, and watches over their runs.

    A handler is named by its function, so that input and output have its types, or as `Service/handler`. One client
    serves a whole program; all of it raises `durable.client.ClientError` where something does not work.

    Example:
        ```python
        async with Client("http://localhost:8080") as client:
            haiku = await client.call(write, "spring", idempotency_key="haiku-1")
        ```

    Args:
        ingress_url: Where Restate's ingress answers; a path in it is kept.
        admin_url: Where Restate's admin API answers: `status`, `cancel`, `steps` and the like need it.
        token: A bearer token, as Restate Cloud has it, for both. restate-server itself checks none, and stores the
            headers that reach it with the run: the gateway in front of it is to take the token off.
        headers: Other headers to send to both.
        timeout: How long calls may take, unless they say otherwise. Without it calls wait as long as they take, and
            everything else 30 seconds.
        retries: How often a request is sent again when the connection breaks: only where doing it twice is doing it
            once, as with an idempotency key.
        verify: `False`, or a context with the certificates to trust and to show.

    Raises:
        UserError: When something of it is wrong.
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
            httpx2.AsyncClient(**server.http_options(url))
            for url in (server.ingress_url, server.admin_url or server.ingress_url)
        )

    def __repr__(self) -> str:
        """Return where it points to; nothing secret."""
        return f"{type(self).__name__}({self._server})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Runs that were called go on."""
        await self._ingress.aclose()
        await self._admin.aclose()

    @overload
    async def call(
        self,
        handler: Callable[[Any, InputT], Awaitable[OutputT]],
        input: InputT,
        **options: Unpack[CallOptions],
    ) -> OutputT: ...
    @overload
    async def call(
        self, handler: Callable[[Any], Awaitable[OutputT]], **options: Unpack[CallOptions]
    ) -> OutputT: ...
    @overload
    async def call(
        self, handler: str, input: Any = None, **options: Unpack[CallOptions]
    ) -> Any: ...
    async def call(
        self,
        handler: Callable[..., Awaitable[Any]] | str,
        input: Any = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Call a handler, wait for its output and return it.

        A workflow runs once per key: calling it again returns what it returned.

        Args:
            handler: The handler function, or `Service/handler`.
            input: What it takes.
            options: `key`, `idempotency_key` and `timeout`: see `CallOptions`.

        Raises:
            RunFailed: When the run ended with an error.
            RejectedInput: When the input does not fit.
            NotFound: When there is no such handler.
            Timeout: When it took too long. The run goes on.
            Unreachable: When Restate does not answer.
        """
        return await self._do(self._operations.call(handler, input, **options))

    @overload
    async def send(
        self,
        handler: Callable[[Any, InputT], Awaitable[OutputT]],
        input: InputT,
        **options: Unpack[SendOptions],
    ) -> Handle[OutputT]: ...
    @overload
    async def send(
        self, handler: Callable[[Any], Awaitable[OutputT]], **options: Unpack[SendOptions]
    ) -> Handle[OutputT]: ...
    @overload
    async def send(
        self, handler: str, input: Any = None, **options: Unpack[SendOptions]
    ) -> Handle[Any]: ...
    async def send(
        self,
        handler: Callable[..., Awaitable[Any]] | str,
        input: Any = None,
        **options: Unpack[SendOptions],
    ) -> Handle[Any]:
        """Call a handler and return the handle of its run at once.

        Args:
            handler: The handler function, or `Service/handler`.
            input: What it takes.
            options: `key`, `idempotency_key` and `delay`: see `SendOptions`.

        Raises:
            RejectedInput: When the input does not fit.
            NotFound: When there is no such handler.
            Unreachable: When Restate does not answer.
        """
        return await self._do(self._operations.send(handler, input, **options))

    async def attach(
        self,
        handle: Handle[OutputT],
        *,
        timeout: timedelta | None = None,  # noqa: ASYNC109 - as in `call`
    ) -> OutputT:
        """Wait until a run ends, and return its output.

        Raises:
            RunFailed: When it ended with an error.
            NotFound: When there is no such run, or the server has forgotten it.
            Timeout: When it took too long.
        """
        return await self._do(self._operations.attach(handle, timeout=timeout))

    async def output(self, handle: Handle[OutputT]) -> OutputT:
        """Return the output of a run that has ended.

        Raises:
            NotReady: When it has not.
            RunFailed: When it ended with an error.
            NotFound: When there is no such run, or the server has forgotten it.
        """
        return await self._do(self._operations.output(handle))

    async def status(self, handle: Handle[Any]) -> Invocation:
        """Return how a run is.

        Raises:
            NotFound: When there is no such run, or the server has forgotten it.
        """
        return await self._do(self._operations.status(handle))

    async def invocations(
        self, *, service: str | None = None, status: str | None = None, limit: int = 50
    ) -> list[Invocation]:
        """Return invocations, the latest first.

        Args:
            service: Of this service only.
            status: With this status only.
            limit: How many at most.
        """
        return await self._do(
            self._operations.invocations(service=service, status=status, limit=limit)
        )

    async def cancel(self, handle: Handle[Any]) -> None:
        """Ask a run to end: its code gets the chance to clean up, and what it waits for is cancelled too.

        Raises:
            NotFound: When there is no such run.
        """
        await self._do(self._operations.change(handle, "cancel"))

    async def kill(self, handle: Handle[Any]) -> None:
        """End a run at once, without its code: only where `cancel` does not help.

        Raises:
            NotFound: When there is no such run.
        """
        await self._do(self._operations.change(handle, "kill"))

    async def resume(self, handle: Handle[Any]) -> None:
        """Have a paused run go on, and one that waits for its next attempt begin it.

        Raises:
            NotFound: When there is no such run.
            Conflict: When it has ended.
        """
        await self._do(self._operations.change(handle, "resume"))

    async def restart_from(self, handle: Handle[OutputT], step: Step | str) -> Handle[OutputT]:
        """Run again what has ended, from a step on: a new run, on the latest code, takes over what came before it.

        Args:
            handle: The run that has ended. Workflows cannot be restarted.
            step: The first step to do again, out of `steps`, or its name where it is the only one of that name.

        Raises:
            Conflict: When the run has not ended.
            NotFound: When there is no such run.
            RejectedInput: When it has no such step, or Restate cannot restart there.
        """
        return await self._do(self._operations.restart_from(handle, step))

    async def steps(self, handle: Handle[Any]) -> list[Step]:
        """Return the steps of a run, in the order in which they began.

        Raises:
            NotFound: When there is no such run.
        """
        return await self._do(self._operations.steps(handle))

    async def payloads(self, handle: Handle[Any]) -> Payloads:
        """Return what a run that has ended well was given and what it returned, from its journal.

        Raises:
            NotFound: When there is no such run, or its journal is gone: the server keeps it for a day by default.
            NotReady: When it has not ended.
            Conflict: When it failed.
        """
        return await self._do(self._operations.payloads(handle))

    async def query(self, sql: str) -> list[dict[str, Any]]:
        """Return rows of the server's tables, such as `sys_invocation` and `sys_journal`.

        Args:
            sql: A query, as Restate's documentation of its introspection has them.

        Raises:
            RejectedInput: When the server does not understand it.
        """
        return await self._do(self._operations.query(sql))

    async def progress(
        self, handle: Handle[Any], *, interval: timedelta = timedelta(seconds=0.5)
    ) -> AsyncGenerator[Step]:
        """Iterate over the steps of a run as they begin and end, until the run ends.

        A step comes once when it begins and once when it has ended; one that did both in an interval comes once.

        Args:
            handle: The run.
            interval: How often the server is asked.

        Raises:
            NotFound: When there is no such run.
        """
        journal = JournalReader(self._operations, handle)
        while not journal.ended:
            for step in await self._do(journal.read()):
                yield step
            if not journal.ended:
                await asyncio.sleep(interval.total_seconds())

    async def resolve_awakeable(self, id: str, value: JsonValue = None) -> None:
        """Give an awakeable its value: of a handler, or the token of an agent's external event.

        The server takes the value for any awakeable that there could be, whether somebody waits for it or not.

        Raises:
            RejectedInput: When it is not the id of an awakeable.
        """
        await self._do(self._operations.resolve_awakeable(id, value))

    async def reject_awakeable(self, id: str, reason: str) -> None:
        """Fail whoever waits for an awakeable.

        Raises:
            RejectedInput: When it is not the id of an awakeable.
        """
        await self._do(self._operations.reject_awakeable(id, reason))

    async def pending(self, handle: Handle[Any]) -> list[PendingCall]:
        """Return the tool calls of a run that wait for a person. `durable.agent_run` has to be hosted."""
        return await self._do(self._operations.pending(handle))

    async def answer(self, handle: Handle[Any], decision: Approve | Deny | Supply) -> None:
        """Answer a tool call that waits.

        Raises:
            NotFound: When there is no such call.
            Conflict: When it has its answer, or waits no longer.
            RejectedInput: When the answer does not fit the call.
        """
        await self._do(self._operations.answer(handle, decision))

    async def steer(
        self, handle: Handle[Any], message: SteeringMessage | str | list[UserContent]
    ) -> None:
        """Give a run a message, and return when it has it. `durable.agent_run` has to be hosted.

        Raises:
            NotFound: When there is no such run.
            Conflict: When it ended first.
        """
        await self._do(self._operations.steer(handle, message))

    async def stop(self, handle: Handle[Any]) -> None:
        """Cancel a run through `durable.agent_run`, which needs no admin API.

        Raises:
            NotFound: When there is no such run.
        """
        await self._do(self._operations.stop(handle))

    def session(
        self, sessions: VirtualObject | str, key: str, output_type: type[OutputT]
    ) -> "Session[OutputT]":
        """Return a session of a `durable.agent_session`.

        Args:
            sessions: What `durable.agent_session` returned, or its name.
            key: Which session.
            output_type: What the agent answers: `str`, or its `output_type`.
        """

        async def call(handler: Target[Any], input: Any = None, **options: Any) -> Any:
            return await self._do(self._operations.call(handler, input, key=key, **options))

        return Session(SessionTargets(sessions, output_type), call)

    async def _do(self, exchange: Exchange[T]) -> T:
        try:
            next_ = next(exchange)
            while True:
                answer = None
                if isinstance(next_, Attempt):
                    http = self._admin if next_.request.admin else self._ingress
                    try:
                        answer = await http.request(**next_.options)
                    except httpx2.TransportError as error:
                        answer = error
                else:
                    await asyncio.sleep(next_.seconds)
                next_ = exchange.send(answer)
        except StopIteration as done:
            return done.value


class Session(Generic[OutputT]):
    """A conversation with an agent: see `Client.session`."""

    def __init__(
        self, handlers: SessionTargets[OutputT], call: Callable[..., Awaitable[Any]]
    ) -> None:
        self._handlers = handlers
        self._call = call

    async def message(
        self, prompt: str | list[UserContent], **options: Unpack[TurnOptions]
    ) -> OutputT:
        """Say something to the agent and return its answer.

        Raises:
            RunFailed: When the turn failed; the session goes on without it.
        """
        return await self._call(self._handlers.message, {"prompt": prompt}, **options)

    async def history(self) -> list[ModelMessage]:
        """Return the messages of the session."""
        return await self._call(self._handlers.history)

    async def status(self) -> SessionStatus:
        """Return what the session is doing; `Handle(status.invocation_id)` is the run of its turn."""
        return await self._call(self._handlers.status)

    async def clear(self) -> None:
        """Forget the session, when the turns before it have ended."""
        await self._call(self._handlers.clear)
