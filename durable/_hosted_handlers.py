"""What a hosted handler takes and returns, from the types of a function or from the server's description.

Either way the parameters of the tool are the fields of the handler's input where that is an object, else one
parameter that is the input. PydanticAI's own reading of a function decides for functions, docstring
included; a description of the server holds JSON schemas, which other languages fill in too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature, signature
from operator import itemgetter
from typing import Any, cast

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic_ai.exceptions import ModelRetry, UserError
from pydantic_ai.tools import Tool
from pydantic_core import from_json, to_json
from restate.serde import DefaultSerde, PydanticJsonSerde

from durable._json_schema import validator
from durable._sdk import Handler, handler_from_callable

_INPUT = "input"
"""The parameter that is the whole input of a handler by name, whose own parameter has no name here."""


@dataclass(frozen=True, kw_only=True)
class HostedHandler:
    """A handler, as much of it as a call needs."""

    service: str
    name: str

    keyed: bool
    """Whether it belongs to a virtual object or a workflow."""

    description: str | None

    parameters: dict[str, Any]
    """The JSON schema of the arguments, an object with `properties`."""

    result: dict[str, Any]
    """The JSON schema of what it returns."""

    encode: Callable[[dict[str, Any]], bytes]
    """Makes the request of the arguments, or raises what makes the model try again."""

    decode: Callable[[bytes], Any]
    """Reads the response."""

    key_description: str | None = None
    """What the docstring says about the argument that is the key."""

    def __str__(self) -> str:
        """Return how the server calls it."""
        return f"{self.service}/{self.name}"


def from_function(function: Callable[..., Any], key: object) -> HostedHandler:
    """Return the handler behind a decorated `function`.

    Args:
        function: What `@service.handler()` and the like returned.
        key: The name of the argument that is the key, if it has one.

    Raises:
        UserError: When it is not a handler, or its types cannot become those of a tool.
    """
    try:
        handler: Handler[Any, Any] = handler_from_callable(function)
    except (ValueError, TypeError):
        raise UserError(
            f"`{getattr(function, '__name__', function)}` is not a handler: decorate it with "
            "`@service.handler()`, or make it an ordinary tool"
        ) from None
    tag, io = handler.service_tag, handler.handler_io
    own = list(signature(handler.fn, eval_str=True).parameters.values())[1:]
    types = {it.name: Any if it.annotation is Parameter.empty else it.annotation for it in own}
    try:
        tool = _as_tool(handler, types)
        adapters = {name: TypeAdapter[Any](type_) for name, type_ in types.items()}
    except PydanticUserError as error:
        raise UserError(
            f"`{tag.name}/{handler.name}` has no types with a JSON schema: {error.message.splitlines()[0]}"
        ) from error
    schema = tool.function_schema

    def encode(arguments: dict[str, Any]) -> bytes:
        values = schema.validator.validate_json(to_json(arguments))
        for name, adapter in adapters.items():
            if values[name] is None:
                break  # as the SDK does it
            if isinstance(io.input_serde, (DefaultSerde, PydanticJsonSerde)):
                return adapter.dump_json(values[name], by_alias=True, round_trip=True)
            return io.input_serde.serialize(values[name])
        return b""

    def decode(response: bytes) -> Any:
        try:
            return io.output_serde.deserialize(response)
        except ValueError as error:  # Pydantic's would be taken for a mistake of the model
            raise UserError(
                f"`{tag.name}/{handler.name}` returned what does not fit its return type: another version of "
                "it answered."
            ) from error

    return HostedHandler(
        service=tag.name,
        name=handler.name,
        keyed=tag.kind != "service",
        description=tool.description,
        parameters={"properties": {}, **_resolved(schema.json_schema)},
        result=schema.return_schema,
        encode=encode,
        decode=decode,
        key_description=_described(handler, key) if isinstance(key, str) else None,
    )


def _as_tool(handler: Handler[Any, Any], types: Mapping[str, Any]) -> Tool[None]:
    """Return the tool that PydanticAI makes of a function with these parameters and the handler's docstring."""

    def function(**_: Any) -> None: ...

    parameters = [Parameter(name, Parameter.KEYWORD_ONLY, annotation=types[name]) for name in types]
    returned = signature(handler.fn, eval_str=True).return_annotation
    returned = {} if returned is Signature.empty else {"return": returned}
    function.__name__ = function.__qualname__ = handler.name
    function.__doc__ = handler.description
    function.__annotations__ = {**types, **returned}
    cast(Any, function).__signature__ = Signature(parameters)
    return Tool(function, takes_ctx=False)


def _described(handler: Handler[Any, Any], parameter: str) -> str | None:
    schema = _as_tool(handler, {parameter: str}).function_schema.json_schema
    return schema["properties"][parameter].get("description")


def from_description(service: Mapping[str, Any], name: str) -> HostedHandler:
    """Return a handler that the server knows.

    Args:
        service: What the admin API says about the service, reduced by `reduced`.
        name: The handler's.
    """
    handler = service["handlers"][name]
    given: dict[str, Any] | None = handler["input"]
    schema = _object({}) if given is None else _resolved(given)
    flat = schema.get("type") == "object" and "properties" in schema
    if not flat:
        definitions = {it: schema.pop(it) for it in ("$defs", "definitions") if it in schema}
        schema = {**_object({_INPUT: schema}), **definitions}
    problems = validator(schema)

    def encode(arguments: dict[str, Any]) -> bytes:
        if found := problems(arguments):
            raise ModelRetry(f"The arguments do not fit: {'; '.join(found)}.")
        return b"" if given is None else to_json(arguments if flat else arguments[_INPUT])

    return HostedHandler(
        service=service["name"],
        name=name,
        keyed=service["keyed"],
        description=handler["documentation"] or schema.get("description"),
        parameters=schema,
        result=handler["output"] or {},
        encode=encode,
        decode=_read,
    )


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def reduced(service: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is needed of the admin API's description of a service; it goes into the journal."""
    return {
        "name": service["name"],
        "keyed": service["ty"] != "Service",
        "handlers": {
            handler["name"]: {
                "documentation": handler.get("documentation"),
                "public": handler.get("public", True),
                "input": None
                if handler.get("input_description") == "none"
                else handler.get("input_json_schema") or {},
                "output": handler.get("output_json_schema"),
            }
            # the server's order is another one each time, and prompts are cached
            for handler in sorted(service["handlers"], key=itemgetter("name"))
        },
    }


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema that is a reference to one of its own definitions, as recursive types have, in full."""
    place, _, name = schema.get("$ref", "").rpartition("/")
    definition = schema.get(place.removeprefix("#/"), {}).get(name)
    dropped = ["$schema"] if definition is None else ["$schema", "$ref"]
    return {it: schema[it] for it in schema if it not in dropped} | (definition or {})


def _read(response: bytes) -> Any:
    if not response:
        return None
    try:
        return from_json(response)
    except ValueError:  # not JSON: the handler says `text/plain`, for instance
        return response.decode(errors="replace")
