"""The tree of a run from the spans that `durable dev` has collected."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from durable._collector import Span, latest, spans_of
from durable._trace.tree import Node, call, cost, tokens, written

_INVOCATION = "restate.invocation.id"
_SERVER = "Restate"
"""What restate-server calls itself in its spans."""


def read_span_trees(file: Path, invocation: str) -> list[Node]:
    """Return the trees of the spans of an invocation and of what it called, none when there are no spans."""
    spans = latest(spans_of(file, _INVOCATION, invocation))
    by_id = {it.span_id: it for it in spans}
    under: defaultdict[str | None, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda it: (it.start, it.name)):
        under[span.parent_id].append(span)

    def tree(span: Span) -> Node:
        node = _node(span)
        node.children = [*_brief(map(tree, under[span.span_id]))]
        return node

    def inside(span: Span) -> bool:
        """Whether the span lies under another one of the invocation."""
        seen = {span.span_id}
        above = by_id.get(span.parent_id or "")
        while above is not None and above.span_id not in seen:
            if _of(above) == invocation:
                return True
            seen.add(above.span_id)
            above = by_id.get(above.parent_id or "")
        return False

    roots = [it for it in spans if _of(it) == invocation and not inside(it)]
    roots.sort(key=lambda it: it.start)
    return [tree for tree in map(tree, roots) if not _empty(tree)]


def _of(span: Span | None) -> object:
    return span.attributes.get(_INVOCATION) if span else None


def _brief(nodes: Iterator[Node]) -> Iterator[Node]:
    """Leave out what the server did for other invocations, and count attempts that nothing lies under."""
    for (name, aside, leaf), group in groupby(
        nodes, lambda it: (it.name, it.aside, not it.children)
    ):
        several = list(group)
        if not (aside and leaf):
            yield from (it for it in several if not _empty(it))
        elif name.startswith("invocation-attempt "):
            times = f" × {len(several)}" if len(several) > 1 else ""
            several[0].name += times
            several[0].ended = several[-1].ended
            yield several[0]


def _empty(node: Node) -> bool:
    """Return whether only the server speaks here."""
    return node.aside and all(_empty(it) for it in node.children)


def _node(span: Span) -> Node:
    attributes = span.attributes
    usage = "gen_ai.aggregated_usage." if "final_result" in attributes else "gen_ai.usage."
    return Node(
        name=str(attributes.get("logfire.msg", span.name))
        if span.scope == "logfire"
        else span.name,
        began=span.start,
        ended=None if span.pending else span.end,
        notes=tokens(attributes, prefix=usage) + cost(attributes.get("operation.cost")),
        given=written(attributes.get("gen_ai.tool.call.arguments")),
        result=_result(attributes),
        failure=_failure(span),
        aside=span.service == _SERVER,
    )


def _failure(span: Span) -> str | None:
    return None if span.error is None else span.error or "failed"


def _result(attributes: Mapping[str, Any]) -> str:
    if "gen_ai.output.messages" in attributes:
        return _said(attributes["gen_ai.output.messages"])
    return written(attributes.get("gen_ai.tool.call.result", attributes.get("final_result")))


class _Part(TypedDict, total=False):
    type: str
    name: str
    arguments: Any
    content: Any


class _Message(TypedDict, total=False):
    parts: list[_Part]


_MESSAGES = TypeAdapter(list[_Message])


def _said(messages: object) -> str:
    """Write what a model answered, from the messages as OpenTelemetry has them."""
    try:
        known = _MESSAGES.validate_json(messages if isinstance(messages, str) else "")
    except ValidationError:  # cut off by a limit, or of another shape
        return written(messages)
    said: list[str] = []
    for part in (part for message in known for part in message.get("parts", [])):
        if part.get("type") == "tool_call":
            said.append(call(part.get("name"), part.get("arguments")))
        elif part.get("type") == "text":
            said.append(written(part.get("content")))
    return "; ".join(said)
