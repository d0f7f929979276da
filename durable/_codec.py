"""How results become JSON: as PydanticAI's JSON codec does it, but `bytes` as base64.

A plain agent gives a tool's `bytes` to the model as base64; UTF-8, the codec's way, would make another
text of them, or fail.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_ai.durable_exec import JSON_CODEC, DurabilityCodec

_CONFIG = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")


class JournalDecodeError(RuntimeError):
    """A stored result does not fit the type that the code expects now.

    The run waits for code that fits: Restate retries and then pauses it, nothing is executed again. It is
    not a `ValidationError`, which PydanticAI would take for a mistake of the model.
    """


class ResultCodec(DurabilityCodec):
    """Reduces the results of steps to JSON, and rebuilds them."""

    def __init__(self) -> None:
        """Start without adapters."""
        self._adapters: dict[Any, TypeAdapter[Any]] = {}

    def dump(self, tp: Any, value: Any) -> Any:
        """Return `value`, of type `tp`, as JSON-compatible data."""
        adapter = self._adapters.get(tp)
        if adapter is None:
            adapter = self._adapters[tp] = _adapter(tp)
        return adapter.dump_python(value, mode="json")

    def load(self, tp: Any, payload: Any) -> Any:
        """Rebuild what `dump` was given.

        Raises:
            JournalDecodeError: When the type has changed since.
        """
        with stored_result():
            return JSON_CODEC.load(tp, payload)


@contextmanager
def stored_result() -> Generator[None]:
    """Say of a validation error within that it is a stored result that does not fit.

    Raises:
        JournalDecodeError: In the place of the error, without the values, which may be secret.
    """
    try:
        yield
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(map(str, e["loc"])) for e in error.errors()}))
        raise JournalDecodeError(
            f"A result in the journal does not fit `{error.title}` any more (at {fields}). Register the "
            "version of the code that stored it as a deployment of its own, or make the type accept it."
        ) from None


def _adapter(tp: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(tp, config=_CONFIG)
    except PydanticUserError:  # models and dataclasses bring a configuration of their own
        return TypeAdapter(tp)
