"""What ran in a case, read from its span tree, and that tree made from a journal.

In this process the tree has PydanticAI's own spans. A run over the ingress ran elsewhere: its spans come from a
collector. Some may be lost with a worker that was killed, but the journal says the same, which steps ran and what they
returned. So what is missing is made of the journal's steps, with the attributes that PydanticAI's spans have.
"""

import json
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import TypeAdapter
from pydantic_ai.messages import ModelResponse
from pydantic_evals.otel import SpanNode, SpanTree

from durable.testing import Span

STEP = "restate.step.id"
"""The attribute of a span that was made of a step: where it stands in which journal."""

_RESPONSE = TypeAdapter(ModelResponse)


@dataclass(frozen=True)
class Action:
    """A model request or a tool call; equal to another one when both ask for the same."""

    name: str
    """The agent that made the request, or the tool that was called."""

    asked: str


def model_requests(tree: SpanTree) -> list[Action]:
    """Return the model requests, in order."""
    return [
        Action(
            str(node.attributes.get("gen_ai.agent.name")),
            str(node.attributes.get(STEP) or node.attributes.get("gen_ai.input.messages")),
        )
        for node in tree
        if node.attributes.get("gen_ai.operation.name") == "chat"
    ]


def tool_calls(tree: SpanTree) -> list[Action]:
    """Return the tool calls, in order."""
    return [
        Action(
            str(node.attributes["gen_ai.tool.name"]),
            str(node.attributes.get("gen_ai.tool.call.arguments")),
        )
        for node in tree
        if node.attributes.get("gen_ai.operation.name") == "execute_tool"
    ]


def journal_tree(rows: Sequence[Mapping[str, Any]]) -> SpanTree:
    """Make a span tree of journals.

    Each result of a step is one span, so a step that was completed twice is there twice.

    Args:
        rows: Of `sys_journal`, in order, with `id`, `index`, `entry_type`, `name`, `raw` and `entry_lite_json`.
    """
    steps: dict[tuple[str, int], Mapping[str, Any]] = {}
    arguments: defaultdict[tuple[str, str], deque[str]] = defaultdict(deque)
    spans: list[SpanNode] = []
    for row in rows:
        entry = json.loads(row["entry_lite_json"])
        if row["entry_type"] == "Command: Run":
            steps[row["id"], entry["Command"]["Run"]["completion_id"]] = row
        elif row["entry_type"] == "Notification: Run":
            step = steps[row["id"], entry["Notification"]["id"]["CompletionId"]]
            if (span := _span(len(spans) + 1, step, _value(row["raw"]), arguments)) is not None:
                spans.append(span)
    return SpanTree(nodes_by_id={span.node_key: span for span in spans})


def _value(raw: str) -> dict[str, Any] | None:
    """Return what a step stored, with the times it ran at; `None` for a failure."""
    text = bytes.fromhex(raw).decode(errors="replace")
    start = text.find('{"at":')
    return json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None


def _span(
    number: int,
    step: Mapping[str, Any],
    value: dict[str, Any] | None,
    arguments: defaultdict[tuple[str, str], deque[str]],
) -> SpanNode | None:
    agent, _, operation = str(step.get("name", "")).partition("__")
    kind, _, tool = operation.rpartition(".call_tool:")
    attributes: dict[str, Any] = {
        "gen_ai.agent.name": agent,
        STEP: f"{step['id']}/{step['index']}",
    }
    if operation.startswith("model.request"):
        attributes |= {"gen_ai.operation.name": "chat"}
        if value is not None:
            response = _RESPONSE.validate_python(value["result"])
            attributes |= _usage(response)
            for call in response.tool_calls:
                arguments[step["id"], call.tool_name].append(call.args_as_json_str())
    elif kind:
        asked = arguments[step["id"], tool]
        attributes |= {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": tool,
            "gen_ai.tool.call.arguments": asked.popleft() if asked else attributes[STEP],
        }
    else:
        return None
    began, ended = value["at"] if value is not None else (0, 0)
    return SpanNode(
        name=step["name"],
        trace_id=1,
        span_id=number,
        parent_span_id=None,
        start_timestamp=datetime.fromtimestamp(began, UTC),
        end_timestamp=datetime.fromtimestamp(ended, UTC),
        attributes=attributes,
        status="unset" if value is not None else "error",
    )


def _usage(response: ModelResponse) -> dict[str, str | float]:
    usage: dict[str, str | float] = {
        "gen_ai.request.model": response.model_name or "",
        "gen_ai.usage.input_tokens": response.usage.input_tokens,
        "gen_ai.usage.output_tokens": response.usage.output_tokens,
    }
    try:
        usage["operation.cost"] = float(response.cost().total_price)
    except LookupError:
        pass  # nobody knows the price of this model
    return usage


def completed_tree(
    spans: Iterable[Span], journal: SpanTree, invocations: Collection[str]
) -> tuple[SpanTree, bool]:
    """Make a span tree of the spans of some invocations, completed from their journals.

    Args:
        spans: Of a collector, others among them.
        journal: The tree made of the journals.
        invocations: Their ids.

    Returns:
        The tree, and whether spans are missing in it.
    """
    found = _spans_of(spans, invocations)
    places = Counter(_place(node) for node in found)
    steps = Counter(_place(node) for node in journal)
    lost = {place for place, count in steps.items() if places[place] != count}
    nodes = [node for node in journal if _place(node) in lost]
    nodes += [node for node in found if _place(node) not in lost]
    nodes.sort(key=lambda node: node.start_timestamp)
    return SpanTree(nodes_by_id={node.node_key: node for node in nodes}), bool(lost)


def _place(node: SpanNode) -> tuple[object, object]:
    """Return the invocation of a model request or tool call, and the name of its step."""
    if STEP in node.attributes:  # it is made of the step
        return str(node.attributes[STEP]).partition("/")[0], node.name
    return node.attributes.get("restate.invocation.id"), node.attributes.get("restate.step")


def _spans_of(spans: Iterable[Span], invocations: Collection[str]) -> list[SpanNode]:
    """Return the spans of the handlers, and what lies under them."""
    found: dict[str, Span] = {}
    for it in sorted((it for it in spans if not it.pending), key=lambda it: it.start):
        invocation = it.attributes.get("restate.invocation.id")
        if invocation in invocations or (invocation is None and it.parent_id in found):
            found[it.span_id] = it
    return [
        SpanNode(
            name=it.name,
            trace_id=int(it.trace_id, 16),
            span_id=int(it.span_id, 16),
            parent_span_id=None if it.parent_id is None else int(it.parent_id, 16),
            start_timestamp=datetime.fromtimestamp(it.start / 1e9, UTC),
            end_timestamp=datetime.fromtimestamp(it.end / 1e9, UTC),
            attributes=it.attributes,
            status="unset" if it.error is None else "error",
        )
        for it in found.values()
    ]


def spent(tree: SpanTree) -> dict[str, float]:
    """Add up what model requests took, under the names that pydantic-evals has for it."""
    names = {
        "gen_ai.usage.input_tokens": "input_tokens",
        "gen_ai.usage.output_tokens": "output_tokens",
        "operation.cost": "cost",
    }
    metrics: defaultdict[str, float] = defaultdict(float, requests=len(model_requests(tree)))
    for node in tree:
        for attribute, name in names.items():
            # Only requests: the runs around them repeat the sum.
            value = node.attributes.get(attribute)
            if node.attributes.get("gen_ai.operation.name") == "chat" and isinstance(
                value, int | float
            ):
                metrics[name] += value
    return dict(metrics)
