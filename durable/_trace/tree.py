"""A run as a tree of lines: what was done, when and for how long, with which outcome."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic_core import from_json
from rich.text import Text

from durable._runs import printable

SECOND = 1_000_000_000
"""Times are in nanoseconds since the epoch, as OpenTelemetry has them."""


@dataclass(kw_only=True)
class Node:
    """One line of the tree, and what lies under it."""

    name: str
    began: int
    ended: int | None
    """`None` while it is under way."""

    notes: list[str] = field(default_factory=list[str])
    """What was used: tokens, costs."""

    given: str = ""
    """Arguments."""

    result: str = ""
    failure: str | None = None
    children: "list[Node]" = field(default_factory=list["Node"])
    aside: bool = False
    """Whether it only tells what the server did around the run."""


def draw(root: Node, width: int, *, over: bool, full: bool) -> Iterator[Text]:
    """Return the lines to print for `root` and all below it.

    Args:
        root: The tree.
        width: How many characters fit into a line.
        over: Whether nothing is under way any more.
        full: Whether arguments and results take as many lines as they need.
    """
    nodes = [(root, "", "", over)]
    while nodes:
        node, branch, below, over = nodes.pop()
        for number, line in enumerate(_lines(node, since=root.began, over=over, full=full)):
            # of a very deep tree only the innermost branches
            guide = (below if number else branch)[-width // 2 :]
            drawn = guide.lstrip(
                " "
            )  # no style on spaces: some viewers of pictures leave those out
            yield Text.assemble(" " * (len(guide) - len(drawn)), (drawn, "dim"), line)
        ended = over or node.ended is not None
        for child in reversed(node.children):
            last = child is node.children[-1]
            branches = (
                f"{below}{'└── ' if last else '├── '}",
                f"{below}{'    ' if last else '│   '}",
            )
            nodes.append((child, *branches, ended))


def _lines(node: Node, *, since: int, over: bool, full: bool) -> Iterator[Text]:
    line = Text.assemble(printable(node.name, "dim" if node.aside else "bold"))
    for text, style in _figures(node, since=since, over=over):
        line.append("  ")
        line.append(text, "dim" if node.aside else style)
    content = [
        (node.given and f"({node.given})", ""),
        (node.result and f"→ {node.result}", "green"),
        (node.failure, "red"),
    ]
    shown = [(text, style) for text, style in content if text]
    if full:
        yield line
        yield from (printable(it, style) for text, style in shown for it in text.splitlines())
        return
    for text, style in shown:
        line.append("  ")
        line.append_text(printable(" ".join(text.split()), style))
    yield line


def _figures(node: Node, *, since: int, over: bool) -> Iterator[tuple[str, str]]:
    if node.ended is None:
        running = f"under way for {duration(time.time_ns() - node.began)}"
        yield ("not finished" if over else running), "yellow"
    elif node.ended > node.began:
        yield duration(node.ended - node.began), "cyan"
    if node.began >= since + SECOND // 1000:
        yield f"at {duration(node.began - since)}", "dim"
    for note in node.notes:
        yield note, "magenta"


def duration(nanoseconds: int) -> str:
    """Write a time as people read it: `<1 ms`, `12 ms`, `3.4 s`, `5 min 6 s`, `7 h 8 min`, `9 d 10 h`."""
    seconds = nanoseconds / SECOND
    if seconds < 0.001:
        return "<1 ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    size, unit, smaller, smaller_unit = next(it for it in _UNITS if whole >= it[0])
    return f"{whole // size} {unit} {whole % size // smaller} {smaller_unit}"


_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))
"""Seconds and name of each unit, and of the one that is told with it."""


def tokens(usage: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """Return the note for the tokens that went into a model and came out."""
    given, made = (usage.get(f"{prefix}{it}_tokens") for it in ("input", "output"))
    return [f"{given or 0} → {made or 0} tokens"] if given or made else []


def cost(dollars: object) -> list[str]:
    """Return the note for a cost."""
    known = isinstance(dollars, int | float) and math.isfinite(dollars)
    return [f"${dollars:.4g}"] if known else []


def call(name: object, arguments: object) -> str:
    """Write the call of a tool as code has it."""
    return f"{name}({written(arguments)})"


def written(value: object) -> str:
    """Write a JSON value briefly; an object as arguments are, and text as it is."""
    if isinstance(value, str):
        return _parsed(value)
    if isinstance(value, dict):
        arguments = cast("dict[str, Any]", value)
        return ", ".join(f"{key}={_json(it)}" for key, it in arguments.items())
    return "" if value is None else _json(value)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parsed(text: str) -> str:
    """Write text that is the JSON of an object as the object."""
    if text.startswith("{"):
        try:
            return written(from_json(text))
        except ValueError:
            return text
    return text
