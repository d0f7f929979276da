"""The names of journal entries are pinned: an invocation in flight replays against them."""

from pathlib import Path

import pytest
from pydantic_ai.durable_exec import (
    CapabilityOperationId,
    DurableOperationId,
    EventStreamHandlerId,
    JournalOperationNamer,
    ModelCancelSuspendedResponseId,
    ModelCompactMessagesId,
    ModelRequestId,
    ToolsetCallToolId,
    ToolsetGetInstructionsId,
    ToolsetGetToolsId,
    ToolsetValidateToolArgumentsId,
)

from durable import _names

README = (Path(__file__).parents[2] / "README.md").read_text()

TOOL = "a__function_toolset__<agent>.call_tool:t"


@pytest.mark.parametrize(
    ("operation", "label", "name"),
    [
        (ModelRequestId(None, streaming=False, model_name="m"), None, "a__model.request"),
        (ModelRequestId("fast", streaming=False, model_name="m"), None, "a__model.request.fast"),
        (ModelRequestId(None, streaming=True, model_name="m"), None, "a__model.request_stream"),
        (ModelCompactMessagesId(None, model_name="m"), None, "a__model.compact_messages"),
        (
            ModelCancelSuspendedResponseId(None, model_name="m"),
            None,
            "a__model.cancel_suspended_response",
        ),
        (EventStreamHandlerId(), None, "a__event_stream_handler"),
        (ToolsetCallToolId("function", toolset_id="<agent>"), "t", TOOL),
        (
            ToolsetValidateToolArgumentsId("function", toolset_id="x"),
            "t",
            "a__function_toolset__x.validate_args",
        ),
        (ToolsetGetToolsId("dynamic", toolset_id="x"), None, "a__dynamic_toolset__x.get_tools"),
        (ToolsetCallToolId("dynamic", toolset_id="x"), "t", "a__dynamic_toolset__x.call_tool:t"),
        (ToolsetGetToolsId("mcp", toolset_id="x"), None, "a__mcp_server__x.get_tools"),
        (ToolsetGetInstructionsId(toolset_id="x"), None, "a__mcp_server__x.get_instructions"),
        (ToolsetCallToolId("mcp", toolset_id="x"), "t", "a__mcp_server__x.call_tool"),
        (CapabilityOperationId("x", operation="save"), None, "a__capability__x.save"),
    ],
)
def test_names_of_operations(operation: DurableOperationId, label: str | None, name: str) -> None:
    """PydanticAI's names, which our journals hold."""
    assert JournalOperationNamer("a").invocation_name(operation, label=label).operation_name == name


def test_names_of_our_own() -> None:
    """What we add to them."""
    assert _names.run_start_time("a") == "a__run_start_time"
    assert _names.output_function("a", "send") == "a__output_function:send"
    assert _names.output_function("a", None) == "a__output_function:output"
    assert _names.own_step("rules") == "step:rules"
    assert _names.declaration(TOOL) == f"{TOOL}.declared"
    assert _names.renamed(TOOL, "v2") == "a__function_toolset__<agent>.call_tool:v2"
    assert _names.TIMER == "timer"
    assert _names.notification("a", "refund") == "a__notify:refund"
    assert _names.online_evaluation("a") == "a__online_evaluation"
    assert _names.evaluator("Judge_2") == "evaluate:Judge_2"
    assert _names.evaluation_sink(0) == "evaluate.sink:0"
    assert _names.EVALUATION_REPORT == "evaluate.report"
    assert _names.undo("a", "hotel") == "a__undo:hotel"
    assert _names.external_event("a", "review") == "a__external_event.review"
    assert _names.steering_signal(0) == "agent_run.steer:0"
    assert (_names.SESSION, _names.SESSION_OPENED) == ("session", "session.open")
    assert _names.session_turn(0) == "session.turn:0"
    assert _names.session_summary(0) == "session.summary:0"
    assert _names.hosted_toolset("shop") == "hosted_toolset__shop.get_tools"


@pytest.mark.parametrize(
    "name",
    [
        "__model.request`",
        "__model.request_stream",
        "__model.compact_messages",
        "__model.cancel_suspended_response",
        ".call_tool:{tool}",
        ".validate_args",
        "__dynamic_toolset__",
        "__mcp_server__",
        ".get_instructions",
        "__event_stream_handler",
        "__capability__{capability id}",
        "__output_function:",
        "__run_start_time",
        "step:{function}",
        ".declared",
        "`timer`",
        "__notify:{tool}",
        "__undo:{tool}",
        "__online_evaluation",
        "`evaluate:{evaluator}`",
        "`evaluate.report`",
        "`evaluate.sink:{number}`",
        "hosted_toolset__{toolset id}.get_tools",
        "__external_event.{name}",
        "`agent_run.steer:{number}`",
        "`session.open`",
        "`session.turn:{number}`",
        "`session.summary:{number}`",
    ],
)
def test_the_readme_lists_them(name: str) -> None:
    """The table in the README is complete."""
    assert name in README
