"""`durable runs` lists invocations, `durable watch` shows one while it is under way."""

import os
import time
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from pydantic_ai.exceptions import UserError
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from durable.client import Handle, Invocation, RejectedInput, Step, SyncClient

ADMIN_URL = "http://localhost:9070"
"""Where Restate's admin API usually answers."""

_STYLES = {
    "running": "yellow",
    "backing-off": "red",
    "paused": "red",
    "failed": "red",
    "failure": "red",
    "completed": "green",
    "success": "green",
}


def admin_client(admin_url: str | None) -> SyncClient:
    """Return a client for the admin API: the one given, or that of restate's own command line in the environment.

    Raises:
        RejectedInput: When the address is none.
    """
    try:
        return SyncClient(
            admin_url=admin_url or os.environ.get("RESTATE_ADMIN_URL") or ADMIN_URL,
            token=os.environ.get("RESTATE_AUTH_TOKEN"),
        )
    except UserError as error:
        raise RejectedInput(error.message) from error


def list_runs(client: SyncClient, *, service: str | None, status: str | None, limit: int) -> None:
    """Print invocations, the latest first."""
    table = Table("id", "handler", "status", "started", "took", "failure", box=None)
    table.columns[0].no_wrap = True
    for it in client.invocations(service=service, status=status, limit=limit):
        table.add_row(
            it.id,
            printable(it.target),
            _status(it),
            f"{it.created_at.astimezone():%Y-%m-%d %H:%M:%S}",
            _seconds(it.created_at, it.completed_at),
            printable(it.failure or it.last_failure or ""),
        )
    console = program_console()
    console.print(table if table.rows else "No invocation fits.")


def watch(client: SyncClient, handle: Handle[object]) -> bool:
    """Show the steps of a run until it ends; return whether it ended well."""
    console = program_console()
    with Live(console=console, vertical_overflow="visible") as live:
        while True:
            invocation, steps = client.status(handle), client.steps(handle)
            ended = invocation.status == "completed"
            shown = len(steps) if ended else max(console.height - _OTHER_LINES, 1)
            live.update(_view(invocation, steps[-shown:], left_out=max(len(steps) - shown, 0)))
            if ended:
                break
            time.sleep(_INTERVAL)
    if not console.is_terminal:
        console.line()  # where `Live` leaves it out
    return invocation.result == "success"


_INTERVAL = 0.5  # seconds
_OTHER_LINES = 6  # of the live view


def _view(invocation: Invocation, steps: Sequence[Step], *, left_out: int) -> RenderableType:
    table = Table(box=None, show_header=False)
    if left_out:
        table.add_row(f"… {left_out} more before")
    for step in steps:
        style = _STYLES[step.status]
        took = _seconds(step.started_at, step.ended_at)
        table.add_row(printable(step.name), Text(step.status, style), took)
    head, *failure = headline(invocation)
    return Group(head, table, *failure)


def headline(invocation: Invocation) -> list[Text]:
    """Return the line about an invocation, and the one about its failure, if it has any."""
    head = Text.assemble(printable(invocation.target, "bold"), "  ", _status(invocation), "  ")
    head.append(_seconds(invocation.created_at, invocation.completed_at))
    failure = invocation.failure or invocation.last_failure
    return [head, *([printable(failure, "red")] if failure else [])]


def printable(text: str, style: str = "") -> Text:
    """Return text of a model, a tool or an error so that the terminal obeys nothing in it."""
    return Text("".join(map(_harmless, text)), style)


def _harmless(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in _OBEYED:
        return character
    return character.encode("unicode_escape").decode()


_OBEYED = {"Cc", "Cf", "Cs"}
"""Control and format characters, which may move the cursor or turn the line around, and lone surrogates."""


def _status(invocation: Invocation) -> Text:
    said = invocation.result or invocation.status
    attempts = f", attempt {invocation.attempts}" if invocation.attempts > 1 else ""
    return Text(f"{said}{attempts}", _STYLES.get(said, ""))


def _seconds(since: datetime, until: datetime | None) -> str:
    took = ((until or datetime.now(UTC)) - since) / timedelta(seconds=1)
    return f"{took:.1f} s"


def program_console(*, record: bool = False) -> Console:
    """Return what to print on: as wide as the terminal, or for programs that read it very wide."""
    console = Console(highlight=False, record=record)
    if not console.is_terminal:
        console.width = 240
    return console
