"""Where am I: in handler code, inside a step, or outside Restate altogether?

The three answers decide what an agent does. In handler code its operations become journaled steps.
Inside a step the code already runs in a `ctx.run`, which cannot be nested, so an agent called there
runs as a plain agent. Outside a handler everything is plain PydanticAI.

`durable.app` sets the answer when a handler starts and around each step's body; it is a context
variable, so tasks and threads started from either inherit it.
"""

import asyncio
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Any

from pydantic_ai.exceptions import UserError
from restate import Context, TerminalError
from restate.extensions import current_context

from durable._agent_run import Inbox
from durable._preloaded import Preloaded
from durable._sdk import disable_threads
from durable._telemetry import current_telemetry


@dataclass(kw_only=True)
class Invocation:
    """One attempt of one Restate invocation hosted by `durable.app`."""

    context: Context
    """The Restate context that the handler received."""

    services: frozenset[str] = frozenset()
    """The names of the services that the app hosts."""

    preloaded: Preloaded | None = None
    """The state that the server sent with the start of the attempt, where it can be known."""

    host: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    """The ordinary event loop, on which steps run."""

    run_numbers: Iterator[int] = field(default_factory=count)
    """Numbers the agent runs of this invocation in the order they start: the same on every replay."""

    step_numbers: Iterator[int] = field(default_factory=count)
    """Numbers the steps of agents in the order they are created: the same on every replay."""

    evaluation_numbers: Iterator[int] = field(default_factory=count)
    """Numbers the agent runs that `OnlineEvaluation` looks at: the same on every replay."""

    now: datetime | None = None
    """The journaled time of the invocation: when the body of its latest step ended."""

    agents: dict[str, object] = field(default_factory=dict[str, object])
    """The capability of each agent that ran, by the agent's name."""

    inbox: Inbox | None = None
    """Messages from outside, from the first model request on."""

    def observe(self, began: float, ended: float) -> None:
        """Take in the journaled times of a completed step, in seconds since the epoch."""
        if (telemetry := current_telemetry()) is not None:
            telemetry.observe(began, ended)
        latest = datetime.fromtimestamp(ended, UTC)
        self.now = latest if self.now is None else max(self.now, latest)

    def run_on_host(self, work: Coroutine[Any, Any, None]) -> None:
        """Start `work` on the host loop and do not wait for it: for closing what a step opened."""
        task = self.host.create_task(work)
        _work_on_host.add(task)
        task.add_done_callback(_work_on_host.discard)


_work_on_host: set[asyncio.Task[None]] = set()  # a loop holds its tasks only weakly

_invocation: ContextVar[Invocation | None] = ContextVar("durable.invocation", default=None)
_in_step: ContextVar[bool] = ContextVar("durable.in_step", default=False)


def current_invocation() -> Invocation | None:
    """Return the invocation whose handler code is running, `None` inside a step or outside.

    Raises:
        UserError: In a Restate handler that `durable.app` does not host, where steps could neither
            run in parallel nor be told from handler code.
    """
    if _in_step.get():
        return None
    invocation = _invocation.get()
    if invocation is None and _sdk_context() is not None:
        message = (
            "An agent with `RestateDurability` runs in a Restate handler that `durable.app` does not "
            "host. Build the application with `app = durable.app([...services])` instead of "
            "`restate.app([...services])`; everything else stays as it is."
        )
        # nothing of ours is around the handler to end it, so the SDK is told in its own way
        raise UserError(message) from TerminalError(message)
    return invocation


def restate_context() -> Context:
    """Return the Restate context of the handler that is running.

    For tools that orchestrate: they run in handler code (`metadata={"restate": False}`) and use the
    context to sleep, to call services or to wait for awakeables.

    Raises:
        UserError: Outside a handler, or inside a step, where Restate's context must not be used.
    """
    invocation = current_invocation()
    if invocation is not None:
        return invocation.context
    if _in_step.get():
        raise UserError(
            "`restate_context()` was called inside a step (`ctx.run`), where the Restate context "
            'cannot be used. Give the tool `metadata={"restate": False}` so that it runs in handler code.'
        )
    raise UserError("`restate_context()` was called outside a Restate handler.")


@contextmanager
def handler_scope(invocation: Invocation) -> Generator[None]:
    """Mark the running task as handler code of `invocation`, where threads cannot be used."""
    token, threads = _invocation.set(invocation), disable_threads.set(True)
    try:
        yield
    finally:
        disable_threads.reset(threads)
        _invocation.reset(token)


@contextmanager
def step_scope() -> Generator[None]:
    """Mark the running task as the body of a step, where sync functions run in threads again."""
    token, threads = _in_step.set(True), disable_threads.set(False)
    try:
        yield
    finally:
        disable_threads.reset(threads)
        _in_step.reset(token)


def _sdk_context() -> Context | None:
    try:
        return current_context()
    except LookupError:  # outside a handler; the SDK's annotation says it would return `None`
        return None
