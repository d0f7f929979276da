"""What is wrong with a value, by a JSON schema that may come from anywhere."""

import re
from collections.abc import Callable
from typing import Any


def validator(schema: dict[str, Any]) -> Callable[[Any], list[str]]:
    """Return a function that lists what is wrong with arguments; none where the schema is not for Python to check."""
    # takes as long to import as this library, and only some calls need it
    from jsonschema import Draft202012Validator  # noqa: PLC0415
    from referencing import Registry  # noqa: PLC0415
    from referencing.exceptions import Unresolvable  # noqa: PLC0415

    validator: Any = Draft202012Validator(schema, registry=Registry())  # which fetches nothing

    def problems(value: Any) -> list[str]:
        try:
            return [
                f"`{'.'.join(map(str, error.path)) or 'arguments'}`: {error.message}"
                for error in validator.iter_errors(value)
            ]
        except (re.error, Unresolvable):
            return []  # a pattern that is none of Python's, or a reference to elsewhere

    return problems
