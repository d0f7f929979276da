"""Messages that are the same bytes on every replay.

PydanticAI stamps the messages it makes in handler code with the wall clock, which differs on replay,
and with it whatever a handler stores. Every step journals when its body began and ended. From that,
the messages a run has made are stamped again: those up to a model request when its response is there,
the rest when the run ends.
"""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelRequest


@dataclass
class RunClock:
    """The journaled time of one agent run, which moves when a step of the run completes."""

    run_id: str
    started: datetime | None = None
    """When the body of the run's first step began."""

    now: datetime | None = None
    """When the body of the run's latest step ended."""

    parent: "RunClock | None" = None
    """The clock of the run in which this one was started, such as that of a delegating agent."""

    ended: bool = False

    _stamped: dict[int, Any] = field(default_factory=dict[int, Any])

    @property
    def outermost(self) -> bool:
        """Whether this run was started by the handler itself, not by another run."""
        return self.parent is None or self.parent.ended

    def observe(self, began: float, ended: float) -> None:
        """Take in the journaled times of a step, in seconds since the epoch."""
        self.started = self.started or datetime.fromtimestamp(began, UTC)
        latest = datetime.fromtimestamp(ended, UTC)
        self.now = latest if self.now is None else max(self.now, latest)

    def leave_alone(self, messages: Iterable[ModelMessage]) -> None:
        """Keep the messages that the run was given as they are."""
        for message in messages:
            for part in message.parts:
                self._stamped[id(part)] = part

    def stamp(self, messages: Iterable[ModelMessage], at: datetime | None) -> None:
        """Give what the run itself has put into `messages` the time `at`."""
        if at is None:
            return  # no step has completed, so nothing was journaled that could be replayed
        for message in messages:
            if not isinstance(message, ModelRequest) or message.run_id not in (None, self.run_id):
                continue  # None: a history processor has made it
            for part in message.parts:
                if id(part) in self._stamped:
                    continue
                self._stamped[id(part)] = part  # kept, so that no other part gets its id
                message.timestamp = at
                if hasattr(part, "timestamp"):
                    part.timestamp = at  # pyright: ignore[reportAttributeAccessIssue]


current_run_clock: ContextVar[RunClock | None] = ContextVar("durable.run_clock", default=None)
"""The clock of the agent run whose code is running."""
