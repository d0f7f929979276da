"""Ready-to-paste curl lines for handlers, with bodies made from their JSON schemas."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

_KEYS = {"VirtualObject": "/my-key", "Workflow": "/my-id"}

_BY_TYPE: Mapping[Any, Any] = {"string": "text", "integer": 1, "number": 1.0, "boolean": True}


def curl(service: Mapping[str, Any], handler: Mapping[str, Any], *, ingress_url: str) -> str:
    """Return a curl command that calls `handler` with a body that fits its input schema.

    Args:
        service: The service as the admin API describes it.
        handler: One of its handlers, likewise.
        ingress_url: Where services are called.
    """
    key = _KEYS.get(service["ty"], "")
    command = ["curl", f"{ingress_url}/{service['name']}{key}/{handler['name']}"]
    if handler.get("input_description") == "none":
        return shlex.join([*command, "-X", "POST"])
    schema: Mapping[str, Any] = handler.get("input_json_schema") or {}
    body = json.dumps(example(schema, definitions=schema.get("$defs", {})), ensure_ascii=False)
    return shlex.join([*command, "-H", "content-type: application/json", "-d", body])


def example(schema: Mapping[str, Any], *, definitions: Mapping[str, Any], depth: int = 0) -> Any:
    """Return a value that fits a JSON schema: its example or default, else one made from its type.

    Args:
        schema: The schema of the value.
        definitions: What its `$ref`s name.
        depth: How deep this is: schemas may contain themselves.
    """
    if depth > 8:
        return None
    if "$ref" in schema:
        target = definitions.get(schema["$ref"].rpartition("/")[2], {})
        beside = {name: value for name, value in schema.items() if name != "$ref"}
        return example({**target, **beside}, definitions=definitions, depth=depth + 1)
    for one in ("default", "const"):
        if one in schema and not schema.get("examples"):
            return schema[one]
    for several in ("examples", "enum"):
        if schema.get(several):
            return schema[several][0]
    for choice in ("anyOf", "oneOf", "allOf"):
        if schema.get(choice):
            return example(schema[choice][0], definitions=definitions, depth=depth + 1)
    return _of_type(schema, definitions=definitions, depth=depth + 1)


def _of_type(schema: Mapping[str, Any], *, definitions: Mapping[str, Any], depth: int) -> Any:
    kind = schema.get("type")
    if kind == "array":
        return [example(schema.get("items", {}), definitions=definitions, depth=depth)]
    if kind not in (None, "object"):
        return schema.get("minimum", _BY_TYPE.get(kind))
    values = {
        name: example(of, definitions=definitions, depth=depth)
        for name, of in schema.get("properties", {}).items()
    }
    required = schema.get("required", ())
    return {name: value for name, value in values.items() if name in required or value is not None}
