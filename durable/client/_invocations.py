"""What the client knows of an invocation: how to find it again, how it is, and its steps."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field

from durable._agent_run import INVOCATION_ID
from durable.client._errors import RejectedInput

OutputT = TypeVar("OutputT")
T = TypeVar("T")


@dataclass(frozen=True)
class Handle(Generic[OutputT]):
    """Finds an invocation again: `str(handle)` can be stored, `Handle.parse` reads it in any process."""

    invocation_id: str
    """The invocation's id, as in Restate's UI."""

    handler: Callable[..., Awaitable[OutputT]] | None = field(
        default=None, repr=False, compare=False
    )
    """The handler function, which knows the type of the output; without one it is JSON."""

    def __post_init__(self) -> None:
        """Check the id.

        Raises:
            RejectedInput: When no server made it.
        """
        if not INVOCATION_ID.fullmatch(self.invocation_id):
            raise RejectedInput(
                f"{self.invocation_id!r} is not the id of an invocation: it begins with `inv_1`, and "
                "is what `str(handle)`, the header `x-restate-id` and Restate's UI say."
            )

    def __str__(self) -> str:
        """Return the invocation's id."""
        return self.invocation_id

    @overload
    @staticmethod
    def parse(text: str, handler: Callable[..., Awaitable[T]]) -> "Handle[T]": ...
    @overload
    @staticmethod
    def parse(text: str) -> "Handle[Any]": ...
    @staticmethod
    def parse(text: str, handler: Callable[..., Awaitable[Any]] | None = None) -> "Handle[Any]":
        """Return the handle that was stored as `text`.

        Args:
            text: What `str(handle)` returned.
            handler: The handler function that runs, for an output of its type.

        Raises:
            RejectedInput: When it is not the id of an invocation.
        """
        return Handle(text.strip(), handler)


class Invocation(BaseModel):
    """How an invocation is, as the server's table `sys_invocation` says."""

    model_config = ConfigDict(frozen=True)

    id: str
    target: str = ""
    """The handler: `Service/handler`, or `Object/key/handler`."""

    status: str
    """`scheduled`, `pending`, `ready`, `running`, `suspended`, `backing-off`, `paused` or `completed`."""

    result: Literal["success", "failure"] | None = Field(
        default=None, validation_alias="completion_result"
    )
    """How it ended."""

    failure: str | None = Field(default=None, validation_alias="completion_failure")
    """The error that it ended with."""

    last_failure: str | None = None
    """The error of its last attempt, while it is under way."""

    attempts: int = Field(default=0, validation_alias="retry_count")
    """How often it was tried since it last made progress, while it is under way."""

    idempotency_key: str | None = None
    created_at: datetime
    scheduled_start_at: datetime | None = None
    completed_at: datetime | None = None
    restarted_from: str | None = None
    """The invocation whose steps it took over."""


@dataclass(frozen=True)
class Step:
    """A step of a run: a model request, a tool call, or anything else that is journaled with a result."""

    index: int
    """Where the journal has it."""

    name: str
    """Its name in the journal: README.md lists them."""

    status: Literal["running", "completed", "failed"]
    started_at: datetime
    ended_at: datetime | None = None


@dataclass(frozen=True)
class Payloads:
    """What a run that has ended well was given and what it returned, as bytes: JSON, unless its handler says otherwise."""

    input: bytes
    output: bytes
