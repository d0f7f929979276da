"""`durable.app`: the one line that hosts handlers so that agents in them are durable.

It is `restate.app` with every handler wrapped. The wrapper knows when handler code runs and when a
step's body runs, and it turns a request that does not fit the handler's input type into a 400 that
names the field (413 when it is only too large): restate-sdk alone answers 500. A result that cannot be serialised ends the call, where
restate-sdk alone would try for ever.
"""

from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from copy import copy
from dataclasses import dataclass, replace
from functools import wraps
from inspect import iscoroutinefunction, signature
from typing import Any, cast

import restate
from pydantic import BaseModel, ValidationError
from pydantic_ai.exceptions import UserError
from pydantic_core import PydanticSerializationError, to_json
from restate import Service, TerminalError, VirtualObject, Workflow
from restate.serde import Serde

from durable._context import Invocation, handler_scope
from durable._driver import Driver
from durable._errors import handler_failure, list_problems
from durable._preloaded import attempt_preloaded, watched
from durable._sdk import Handler, ServerInvocationContext

AnyService = Service | VirtualObject | Workflow


def app(services: Iterable[AnyService], **options: Any) -> Any:
    """Build the ASGI application that hosts `services`, with durable agents in their handlers.

    Takes the place of `restate.app`; handlers that run no agent behave as they do there, except
    that input which does not fit their type is answered with 400 instead of 500.

    Args:
        services: The services, virtual objects and workflows to host. They are not changed.
        options: What `restate.app` takes: `protocol`, `identity_keys`, `journal_value_codec`.

    Returns:
        An ASGI application for any server with HTTP/2, or an AWS Lambda handler when on Lambda.

    Raises:
        UserError: When two of the services have one name.
    """
    services = list(services)
    names = frozenset(service.name for service in services)
    if twice := sorted(
        name for name, times in Counter(it.name for it in services).items() if times > 1
    ):
        raise UserError(
            f"Several services are named {', '.join(map(repr, twice))}: the name is their address. Give each "
            "another one; `durable.agent_session(agent, name=...)` does it for sessions of the same agent."
        )
    hosting = restate.app([_hosted(service, names) for service in services], **options)
    return watched(hosting) if iscoroutinefunction(hosting) else hosting


def _hosted(service: AnyService, services: frozenset[str]) -> AnyService:
    hosted = copy(service)
    handlers: dict[str, Handler[Any, Any]] = cast(Any, service).handlers
    hosted.handlers = {
        name: hosted_handler(handler, services) for name, handler in handlers.items()
    }
    return hosted


def hosted_handler(
    handler: Handler[Any, Any], services: frozenset[str] = frozenset()
) -> Handler[Any, Any]:
    """Return `handler` as `durable.app` hosts it, beside the services of these names."""
    io = replace(
        handler.handler_io,
        input_serde=_InputSerde(handler.handler_io.input_serde, needs_body=_takes_model(handler)),
        output_serde=_OutputSerde(handler.handler_io.output_serde, handler.name),
    )

    handle: Callable[..., Coroutine[Any, Any, Any]] = cast(Any, handler.fn)

    @wraps(handle)
    async def run(context: ServerInvocationContext, *arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, _BadInput):
                raise TerminalError(
                    argument.message, status_code=argument.status
                ) from argument.error
        invocation = Invocation(
            context=context, services=services, preloaded=attempt_preloaded.get()
        )
        with handler_scope(invocation):
            try:
                return await Driver(context).run(handle(context, *arguments))
            except Exception as error:
                if (failure := handler_failure(error)) is not None:
                    raise failure from error
                raise

    return replace(handler, fn=run, handler_io=io)


_TOO_LARGE = {"bytes_too_long", "string_too_long", "too_long"}  # types of Pydantic's errors


def _takes_model(handler: Handler[Any, Any]) -> bool:
    """Whether the input is a Pydantic model and not optional; the SDK makes `None` of an empty body."""
    parameters = list(signature(handler.fn, eval_str=True).parameters.values())
    annotation = parameters[1].annotation if len(parameters) > 1 else None
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


@dataclass(frozen=True)
class _BadInput:
    """A request body that could not be read, carried past the SDK, which would answer 500."""

    message: str
    error: Exception
    status: int = 400


class _InputSerde(Serde[Any]):
    """Reads a handler's input, with what is wrong with it as a value instead of an exception."""

    def __init__(self, inner: Serde[Any], *, needs_body: bool) -> None:
        self._inner = inner
        self._needs_body = needs_body

    def deserialize(self, buf: bytes) -> Any:
        if self._needs_body and not buf:
            error = ValueError("the request body is empty")
            return _BadInput(
                f"The request cannot be handled: {error}. Send `{{}}` for defaults.", error
            )
        try:
            return self._inner.deserialize(buf)
        except ValidationError as error:
            too_large = all(problem["type"] in _TOO_LARGE for problem in error.errors())
            return _BadInput(_describe(error), error, 413 if too_large else 400)
        except Exception as error:  # noqa: BLE001 - a serde may raise anything; the caller gets a 400
            return _BadInput(f"The request body could not be read: {error}", error)

    def serialize(self, obj: Any) -> bytes:
        return self._inner.serialize(obj)


class _OutputSerde(Serde[Any]):
    """Writes a handler's result, lists of models and the like too; what cannot be written ends the call."""

    def __init__(self, inner: Serde[Any], handler: str) -> None:
        self._inner = inner
        self._handler = handler

    def deserialize(self, buf: bytes) -> Any:
        return self._inner.deserialize(buf)

    def serialize(self, obj: Any) -> bytes:
        try:
            return self._inner.serialize(obj)
        except Exception as error:  # noqa: BLE001 - a serde may raise anything, and would again on each retry
            try:
                return to_json(obj)
            except PydanticSerializationError:
                raise TerminalError(
                    f"The result of `{self._handler}`, a {type(obj).__name__}, cannot be written as JSON: "
                    f"{error}. Return JSON-compatible values, Pydantic models or dataclasses."
                ) from error


def _describe(error: ValidationError) -> str:
    return f"The request does not fit `{error.title}`: {list_problems(error)}."
