"""How `durable trace` writes what it shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from durable._collector import Collector, read_spans
from durable._runs import printable
from durable._trace.spans import read_span_trees
from durable._trace.tree import Node, draw, duration, written


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0004, "<1 ms"),
        (0.012, "12 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 0 s"),
        (306, "5 min 6 s"),
        (25_700, "7 h 8 min"),
        (815_000, "9 d 10 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(int(seconds * 1e9)) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, ""),
        ("plain", "plain"),
        ('{"order": "A7", "amount": 10}', 'order="A7", amount=10'),
        ("{not JSON", "{not JSON"),
        ({"name": "Jürgen"}, 'name="Jürgen"'),
        ([1, "two"], '[1, "two"]'),
    ],
)
def test_values(value: object, said: str) -> None:
    assert written(value) == said


def test_terminals_obey_nothing_in_text() -> None:
    """Escape sequences, text that is turned around, and what UTF-8 cannot hold."""
    shown = printable("a\x1b[2J\x9b31m[bold]\u202eb\ud800\tc\n").plain
    assert shown == "a\\x1b[2J\\x9b31m[bold]\\u202eb\\ud800\tc\n"


def test_a_very_deep_tree() -> None:
    """Each line is there, with the innermost branches in front of it."""
    root = node = Node(name="0", began=0, ended=1)
    for depth in range(1, 3000):
        node.children = [Node(name=str(depth), began=0, ended=1)]
        [node] = node.children
    lines = [it.plain for it in draw(root, 80, over=True, full=False)]
    assert [line.split()[-3] for line in lines] == [str(depth) for depth in range(3000)]
    assert all(len(line) < 80 for line in lines)


def test_what_has_ended_is_not_under_way() -> None:
    pending = Node(name="cut off", began=0, ended=None)
    root = Node(name="run", began=0, ended=1, children=[pending])
    _, line = draw(root, 80, over=False, full=False)
    assert line.plain == "└── cut off  not finished"


def span(**own: Any) -> str:
    it: dict[str, Any] = {
        "trace_id": "t",
        "span_id": "s",
        "parent_id": None,
        "name": "chat",
        "kind": "CLIENT",
        "start": 0,
        "end": 5_000_000,
        "error": None,
        "service": "worker",
        "scope": "pydantic-ai",
        "attributes": {"restate.invocation.id": "inv_1"},
        "events": [],
        "pending": False,
    }
    it["attributes"] |= own
    return json.dumps(it)


@pytest.mark.parametrize(
    "messages",
    ['[{"role":"assist', "[Scrubbed due to 'secret']", ["a"], None, '{"a":1}', '[{"parts":["x"]}]'],
)
def test_messages_of_another_shape(tmp_path: Path, messages: object) -> None:
    """Cut off by a limit of attributes, scrubbed, or made by others: shown as they are."""
    own = {"gen_ai.output.messages": messages, "operation.cost": "n/a"}
    (tmp_path / "spans.jsonl").write_text(span(**own) + "\n")
    [tree] = read_span_trees(tmp_path / "spans.jsonl", "inv_1")
    assert tree.result == written(messages)
    assert tree.notes == []


def test_a_file_whose_collector_was_killed(tmp_path: Path) -> None:
    """The line that was cut off is lost, and no other."""
    file = tmp_path / "spans.jsonl"
    file.write_text(f"{span()}\n{span()[:20]}")
    with Collector(file), file.open("a") as collected:
        collected.write(f"{span()}\n")
    assert len(list(read_spans(file))) == 2
