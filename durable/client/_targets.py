"""Handlers as the client sees them: where they are, how their input is written and their output read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from inspect import Parameter, Signature, signature
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_ai.exceptions import UserError
from pydantic_core import PydanticSerializationError, from_json, to_json
from restate.serde import DefaultSerde, PydanticJsonSerde, Serde

from durable._errors import list_problems
from durable._sdk import Handler, handler_from_callable
from durable.client._errors import RejectedInput, UnexpectedOutput

OutputT = TypeVar("OutputT")


@dataclass(frozen=True, kw_only=True)
class Target(Generic[OutputT]):
    """A handler to call."""

    service: str
    handler: str

    write: Callable[[Any], bytes]
    """Makes the request of the input, or raises what is wrong with it."""

    read: Callable[[bytes], OutputT]
    """Makes the output of the response, or raises what is wrong with it."""

    keyed: bool | None = None
    """Whether it belongs to a virtual object or workflow; `None` where only the server knows."""

    once: bool = False
    """Whether it runs once per key: what a workflow is."""

    content_type: str = "application/json"

    def __str__(self) -> str:
        """Return how the server calls it."""
        return f"{self.service}/{self.handler}"

    def path(self, key: str | None) -> tuple[str, ...]:
        """Return the path at the ingress.

        Raises:
            RejectedInput: When the key is missing, empty or superfluous.
        """
        if key == "" or (key is None and self.keyed):
            raise RejectedInput(f"`{self}` needs a key: say which one with `key=`.")
        if key is not None and self.keyed is False:
            raise RejectedInput(
                f"`{self}` belongs to a service, which has no keys: leave `key=` out."
            )
        return (self.service, self.handler) if key is None else (self.service, key, self.handler)

    def encode(self, input: Any) -> bytes:
        """Return the request's body, empty for `None`.

        Raises:
            RejectedInput: When the input does not fit the handler's type.
        """
        if input is None:
            return b""
        try:
            return self.write(input)
        except ValidationError as error:
            message = f"The input does not fit `{self}`: {list_problems(error)}."
            raise RejectedInput(message) from None  # the original quotes values
        except (PydanticSerializationError, TypeError, ValueError) as error:
            message = f"The input of `{self}` cannot be written, a {type(input).__name__}: {error}"
            raise RejectedInput(message) from error

    def decode(self, body: bytes) -> OutputT:
        """Return the output.

        Raises:
            UnexpectedOutput: When it does not fit the handler's type.
        """
        try:
            return self.read(body)
        except ValueError as error:
            invalid = isinstance(error, ValidationError)
            raise UnexpectedOutput(
                f"`{self}` answered what does not fit its type"
                f"{': ' + list_problems(error) if invalid else ''}. Another version of it is hosted."
            ) from None


def target(handler: Callable[..., Any] | str | Target[Any]) -> Target[Any]:
    """Return the target that a handler function is, or that a name (`Service/handler`) stands for.

    Raises:
        UserError: When the function is not a handler.
        RejectedInput: When the name is none.
    """
    if isinstance(handler, Target):
        return cast("Target[Any]", handler)
    return _by_name(handler) if isinstance(handler, str) else _of_function(handler)


def typed(service: str, handler: str, input: Any, output: Any) -> Target[Any]:
    """Return the target of a keyed handler whose types are known."""
    write, read = _writer(DefaultSerde(), input), _reader(DefaultSerde(), output)
    return Target(service=service, handler=handler, keyed=True, write=write, read=read)


def _by_name(name: str) -> Target[Any]:
    service, slash, handler = name.partition("/")
    if not (service and slash and handler) or "/" in handler:
        raise RejectedInput(
            f"{name!r} does not name a handler: write `Service/handler`, and a key as `key=`."
        )
    return Target(service=service, handler=handler, write=to_json, read=read_json)


def read_json(body: bytes) -> Any:
    """Read what a handler of unknown type returned: JSON, else text."""
    if not body:
        return None
    try:
        return from_json(body)
    except ValueError:
        return body.decode(errors="replace")


@lru_cache(maxsize=1024)
def _of_function(function: Callable[..., Any]) -> Target[Any]:
    try:
        handler: Handler[Any, Any] = handler_from_callable(function)
    except (ValueError, TypeError):
        raise UserError(
            f"`{getattr(function, '__name__', function)}` is not a handler: decorate it with "
            "`@service.handler()`, or name a handler of elsewhere as 'Service/handler'."
        ) from None
    tag, io = handler.service_tag, handler.handler_io
    types = signature(handler.fn, eval_str=True)
    _, *inputs = types.parameters.values()
    try:
        return Target(
            service=tag.name,
            handler=handler.name,
            keyed=tag.kind != "service",
            once=handler.kind == "workflow",
            # the server checks `accept`, which may be a wildcard
            content_type=io.content_type if "*" in io.accept else io.accept,
            write=_writer(io.input_serde, inputs[0].annotation if inputs else None),
            read=_reader(io.output_serde, types.return_annotation),
        )
    except PydanticUserError as error:
        raise UserError(
            f"`{tag.name}/{handler.name}` has types that Pydantic does not know: "
            f"{error.message.splitlines()[0]} Give the handler an `input_serde` and `output_serde`."
        ) from error


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    unknown = annotation in (Parameter.empty, Signature.empty)
    return TypeAdapter(Any if unknown else annotation)


def _writer(serde: Serde[Any], annotation: Any) -> Callable[[Any], bytes]:
    if isinstance(serde, DefaultSerde | PydanticJsonSerde):
        adapter = _adapter(annotation)
        return lambda input: adapter.dump_json(
            adapter.validate_python(input), by_alias=True, round_trip=True
        )

    def write(input: Any) -> bytes:
        body = serde.serialize(input)
        serde.deserialize(body)  # which the handler does: what it would refuse is refused here
        return body

    return write


def _reader(serde: Serde[Any], annotation: Any) -> Callable[[bytes], Any]:
    if not isinstance(serde, DefaultSerde | PydanticJsonSerde):
        return serde.deserialize
    adapter = _adapter(annotation)
    # handlers write names, not aliases, where restate-sdk does it
    return lambda body: adapter.validate_json(body, by_alias=True, by_name=True) if body else None
