"""The tree of a run from its journal, and from those of the handlers that it called."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from durable._names import AGENT_RUN
from durable._trace.tree import SECOND, Node, call, cost, duration, tokens, written
from durable.client import ClientError, Handle, SyncClient

_TIME = TypeAdapter(datetime)
_UNSEEN = {"Input", "Output"}
"""Entries that the line of the invocation itself speaks for."""


def read_journals(
    client: SyncClient, handle: Handle[object], *, callers: frozenset[str] = frozenset()
) -> Node:
    """Return the tree of an invocation.

    Args:
        client: Knows the admin API.
        handle: The invocation.
        callers: Those that wait for it.

    Raises:
        NotFound: When the server does not know it.
    """
    invocation = client.status(handle)
    node = Node(
        name=invocation.target,
        began=_ns(invocation.created_at),
        ended=invocation.completed_at and _ns(invocation.completed_at),
        failure=invocation.failure or invocation.last_failure,
    )
    journal = _Journal(client, handle, callers | {str(handle)})
    node.result = journal.output
    node.children = [*journal.nodes()]
    return node


class _Completion(NamedTuple):
    """How an entry ended."""

    at: int
    value: Any
    failure: str | None


class _Journal:
    """The entries of one invocation."""

    def __init__(self, client: SyncClient, handle: Handle[object], callers: frozenset[str]) -> None:
        self._client = client
        self._callers = callers
        self.output = ""
        self._commands: list[tuple[str, Mapping[str, Any], int]] = []
        self._completions: dict[int, _Completion] = {}
        self._signals: list[Node] = []
        for row in client.query(
            f"SELECT entry_json, appended_at FROM sys_journal WHERE id = '{handle}' ORDER BY index"
        ):
            self._read(from_json(row.get("entry_json", "{}")), _at(row))
        # by the number of the command that failed
        self._tries: dict[int | None, list[Node]] = {}
        for row in client.query(
            "SELECT event_json, appended_at FROM sys_journal_events "
            f"WHERE id = '{handle}' AND event_type = 'TransientError' ORDER BY appended_at"
        ):
            event = from_json(row["event_json"])
            tries = self._tries.setdefault(event.get("related_command_index"), [])
            at, why = _at(row), f"{event['error_code']}: {event['error_message']}"
            tries.append(Node(name="failed try", began=at, ended=at, failure=why))

    def _read(self, entry: Mapping[str, Any], at: int) -> None:
        if "Command" in entry:
            [(kind, it)] = entry["Command"].items()
            self._commands.append((kind, it, at))
            if kind == "Output":
                completion = _completion(at, it["result"])
                self.output = _shown(completion.value)
        elif "Completion" in entry.get("Notification", {}):
            [(_, it)] = entry["Notification"]["Completion"].items()
            self._completions[it["completion_id"]] = _completion(at, it.get("result"))
        elif "Signal" in entry.get("Notification", {}):
            it = entry["Notification"]["Signal"]
            [name] = it["id"].values()
            completion = _completion(at, it["result"])
            self._signals.append(
                Node(
                    name="cancel" if name == _CANCEL else f"signal {name}",
                    began=at,
                    ended=at,
                    result=_shown(completion.value),
                    failure=completion.failure,
                )
            )

    def nodes(self) -> Iterator[Node]:
        """Return what the invocation did, in the order in which it began."""
        nodes = [
            self._node(number, *it)
            for number, it in enumerate(self._commands)
            if it[0] not in _UNSEEN
        ]
        found = [it for it in nodes if it is not None] + self._signals
        yield from sorted(found, key=lambda it: it.began)
        for tries in self._tries.values():  # of what is not shown, or of nothing in particular
            yield from tries

    def _node(self, number: int, kind: str, it: Mapping[str, Any], at: int) -> Node | None:
        id: Any = it.get("result_completion_id", it.get("completion_id"))
        completion = self._completions.get(id)
        name = f"{_words(kind)} {it.get('name') or it.get('key') or ''}".strip()
        node = Node(name=name, began=at, ended=at)
        if id is not None:
            node.ended = completion and completion.at
        if completion is not None:
            node.failure = completion.failure
            node.result = _shown(completion.value)
        if kind == "Run":
            _tell_step(node, it["name"], completion)
        elif kind in {"Call", "OneWayCall"}:
            if not self._called(node, kind, it["request"]):
                return None
        elif kind == "Sleep":
            node.notes.append(f"for {duration(it['wake_up_time'] * (SECOND // 1000) - at)}")
        node.children += self._tries.pop(number, [])
        return node

    def _called(self, node: Node, kind: str, request: Mapping[str, Any]) -> bool:
        """Show the run of another handler under the call, and return whether the call is to be shown."""
        [target] = request["invocation_target"].values()
        if target["name"] == AGENT_RUN:
            return False
        called = request["invocation_id"]
        if kind == "OneWayCall":  # a run of its own, which may have sent others, and so on
            node.name = f"send {target['name']}/{target['handler']}"
            node.notes.append(called)
            return True
        node.name = f"call {target['name']}/{target['handler']}"
        if called in self._callers or len(self._callers) >= _DEPTH:
            node.notes.append(called)
            return True
        try:
            tree = read_journals(self._client, Handle(called), callers=self._callers)
        except ClientError:  # forgotten, or not begun
            node.notes.append(called)
        else:
            node.children.append(tree)
            node.result, node.failure = "", None  # its own line says it
        return True


_DEPTH = 20
"""How many calls within calls are shown."""

_CANCEL = 1
"""The number of the signal with which Restate cancels."""


def _tell_step(node: Node, name: str, completion: _Completion | None) -> None:
    node.name = name
    value = completion and completion.value
    if not isinstance(value, dict) or value.keys() - {"at", "result", "usage"} or "at" not in value:
        return  # not a step of this library
    entry = cast("dict[str, Any]", value)
    try:
        began, ended = _TIMES.validate_python(entry["at"])
    except ValidationError:
        return
    node.began, node.ended = int(began * SECOND), int(ended * SECOND)
    result = entry.get("result")
    node.result = _shown(result)
    if not isinstance(result, dict):
        return
    outcome = cast("dict[str, Any]", result)
    if "__model." in name and isinstance(outcome.get("usage"), dict):
        usage = cast("dict[str, Any]", outcome["usage"])
        node.notes += tokens(usage) + cost(usage.get("cost"))
        node.result = _said(outcome.get("parts", []))
    elif ".call_tool" in name and "kind" in outcome:
        if outcome["kind"] != "tool_return":
            node.notes.append(_words(str(outcome["kind"])))
        node.result = _shown(outcome.get("result", outcome.get("message")))


_TIMES = TypeAdapter(tuple[float, float])


def _said(parts: list[dict[str, Any]]) -> str:
    """Write what a model answered, from the response as PydanticAI has it."""
    said: list[str] = []
    for part in parts:
        if part.get("part_kind") == "tool-call":
            said.append(call(part["tool_name"], part["args"]))
        elif part.get("part_kind") == "text":
            said.append(written(part["content"]))
    return "; ".join(said)


def _completion(at: int, result: Any) -> _Completion:
    if not isinstance(result, dict) or len(cast("dict[str, Any]", result)) != 1:
        return _Completion(at, None, None)
    [(kind, it)] = cast("dict[str, Any]", result).items()
    if kind == "Failure":
        return _Completion(at, None, f"{it['code']}: {it['message']}")
    return _Completion(at, _value(it), None)


def _value(content: Any) -> Any:
    """Read a value that the journal holds: JSON, or else text as far as it is any."""
    if not isinstance(content, list):
        return content
    try:
        raw = bytes(cast("list[int]", content))
    except (TypeError, ValueError):
        return cast("list[object]", content)
    try:
        return from_json(raw) if raw else None
    except ValueError:
        return raw.decode(errors="replace")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else written(value)


def _words(name: str) -> str:
    """Write `SetState` and `model_retry` as words."""
    spaced = "".join(f" {it}" if it.isupper() else it for it in name.replace("_", " "))
    return spaced.strip().lower()


def _at(row: Mapping[str, Any]) -> int:
    return _ns(_TIME.validate_python(row["appended_at"]))


def _ns(time: datetime) -> int:
    return int(time.timestamp() * SECOND)
