"""The journal as a test reads it: operations with their results, as Python values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json
from restate import TerminalError

from durable._wire import Kind, Message
from durable.testing._server import InMemoryServer, terminal_error

_NAMED_BY_ENTRY = frozenset({Kind.RUN, Kind.SLEEP})
_CALLS = frozenset({Kind.CALL, Kind.ONE_WAY_CALL})


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One operation of the handler, as the journal has it."""

    kind: str
    """As in Restate's `sys_journal`: `Run`, `Sleep`, `Call`, `OneWayCall`, `SetState`, `Signal`..."""

    name: str
    """Of a step or sleep, `{service}/{handler}` of a call, the key of state, a promise's name."""

    request: Any = None
    """What the handler passed: a call's request, the new value of state or of a promise."""

    value: Any = None
    """What the handler gets: JSON as Python values, or bytes."""

    failure: TerminalError | None = None
    """What the handler gets instead, if the operation failed for good."""

    done: bool = True
    """Whether the operation is completed."""


def stored(server: InMemoryServer) -> list[Entry]:
    """Return the operations of the handler, and the signals that it got."""
    results = server.results()
    return [
        _signal(entry, server) if entry.type == Kind.SIGNAL else _operation(entry, results)
        for entry in server.entries
        if (entry.is_command or entry.type == Kind.SIGNAL)
        and entry.type not in {Kind.INPUT, Kind.OUTPUT}
    ]


def line(entry: Message) -> str:
    """Return an entry as `sys_journal` shows it."""
    if entry.is_notification:
        return f"Notification: {entry.kind.label}"
    return f"Command: {entry.kind.label} {entry.text(12)}".rstrip()


def _signal(entry: Message, server: InMemoryServer) -> Entry:
    name = entry.text(3) or server.awakeable_id(entry.number(2))
    return Entry(kind=entry.kind.label, name=name, **_outcome(entry))


def _operation(entry: Message, results: Mapping[int, Message]) -> Entry:
    completion = entry.number(10) if entry.type == Kind.ONE_WAY_CALL else entry.number(11)
    result = results.get(completion) if completion else entry
    return Entry(
        kind=entry.kind.label,
        name=name(entry),
        request=_request(entry),
        done=result is not None,
        **({} if result is None else _outcome(result)),
    )


def name(entry: Message) -> str:
    """Return what the operation is called, or what it is applied to."""
    if entry.kind in _CALLS:
        return f"{entry.text(1)}/{entry.text(2)}"
    return entry.text(12) if entry.kind in _NAMED_BY_ENTRY else entry.text(1)


def _request(entry: Message) -> Any:
    if entry.kind in _CALLS:
        return read(entry.data(3) or b"")
    field = {Kind.SET_STATE: 3, Kind.COMPLETE_PROMISE: 2, Kind.COMPLETE_AWAKEABLE: 2}.get(
        entry.kind
    )
    nested = entry.nested(field) if field else []
    return read(nested[-1].data(1) or b"") if nested else None


def _outcome(result: Message) -> dict[str, Any]:
    """Read the result in a notification, or in a command that holds its own."""
    if result.type == Kind.GET_EAGER_STATE:
        return {"value": read(b"".join(value.data(1) or b"" for value in result.nested(14)))}
    if result.type == Kind.GET_EAGER_STATE_KEYS:
        return {"value": [key for keys in result.nested(14) for key in _texts(keys, 1)]}
    for error in result.nested(6):
        return {"failure": terminal_error(error)}
    for value in result.nested(5):
        return {"value": read(value.data(1) or b"")}
    for keys in result.nested(17):
        return {"value": _texts(keys, 1)}
    return {"value": result.text(16) or None}


def _texts(message: Message, field: int) -> list[str]:
    return [text.decode() for text in message.fields.get(field, []) if isinstance(text, bytes)]


def read(data: bytes) -> Any:
    """Return JSON as Python values, anything else as it is."""
    if not data:
        return None
    try:
        return from_json(data)
    except ValueError:  # another serde than JSON
        return data
