"""Results survive the journal; what does not fit any more says so."""

from dataclasses import dataclass
from typing import Any

import pytest

from durable._codec import JournalDecodeError, ResultCodec


@dataclass
class Before:
    value: str


@dataclass
class After:
    value: int


def test_a_changed_type_is_named_without_its_value() -> None:
    """A run in flight whose types changed waits for code that fits, and the secret stays where it is."""
    stored = ResultCodec().dump(Before, Before("secret"))
    with pytest.raises(
        JournalDecodeError, match=r"does not fit `After` any more \(at value\)"
    ) as error:
        ResultCodec().load(After, stored)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("value", [b"\xff", {"nested": b"text"}])
def test_bytes_are_base64(value: Any) -> None:
    """URL-safe, as PydanticAI writes them for models."""
    assert str(ResultCodec().dump(Any, value)) in {"_w==", "{'nested': 'dGV4dA=='}"}
