"""Each evaluator passes what is right and fails what is wrong."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from pydantic import BaseModel
from pydantic_evals.evaluators import EvaluationReason, Evaluator, EvaluatorContext
from pydantic_evals.otel import SpanNode, SpanTree

from agents.evaluator_optimizer import Attempt, Evaluation, Solution, Verdict
from agents.human_in_the_loop import Draft
from agents.orchestrator_workers import Task
from agents.parallelization import Action, Analysis, Priority
from agents.routing import Reply, Route, Team
from evals.activity import model_requests
from evals.evaluators import (
    EVALUATORS,
    JUDGE_VARIABLE,
    Agents,
    AtMostWords,
    Avoids,
    Calculated,
    Code,
    EveryDraft,
    EveryInput,
    Figures,
    InOrder,
    Json,
    Judge,
    MarkdownTable,
    Mentions,
    MostUrgentFirst,
    NoEcho,
    NoInventedFigures,
    NothingTwice,
    Outcome,
    Plan,
    RoutedTo,
    Tools,
)
from services.chaining import CallChainingRequest, CallChainingResponse
from services.evaluator_optimizer import EvaluatorOptimizerResponse
from services.human_in_the_loop import HumanInTheLoopResponse, Round
from services.orchestrator_workers import Done, Failed, OrchestratorWorkersResponse
from services.parallelization import (
    Analysed,
    ParallelizationRequest,
    ParallelizationResponse,
    RunToolsResponse,
    ToolCall,
)
from services.routing import RoutingResponse
from tests.live.providers import Answer, provider

Spans = Sequence[tuple[str, str, str]]
"""Operation, name and what was asked."""


def text(text: str) -> CallChainingResponse:
    return CallChainingResponse(steps=[], text=text)


def routed(team: Team) -> RoutingResponse:
    return RoutingResponse(
        route=Route(reasoning="", team=team), reply=Reply(subject="s", body="b", next_steps=["n"])
    )


def analysed(*analyses: tuple[str, list[Priority]]) -> ParallelizationResponse:
    return ParallelizationResponse(
        results=[
            Analysed(
                input=name,
                analysis=Analysis(
                    impacts=[name],
                    actions=[Action(action="do", priority=it) for it in priorities],
                    conclusion="so",
                ),
            )
            for name, priorities in analyses
        ]
    )


def calculated(*changes: tuple[float, float, float]) -> RunToolsResponse:
    return RunToolsResponse(
        answer="",
        calls=[
            ToolCall(tool="apply_change", arguments={"amount": a, "percent": p}, result=r)
            for a, p, r in changes
        ],
    )


def worked(*works: Done | Failed) -> OrchestratorWorkersResponse:
    return OrchestratorWorkersResponse(analysis="", works=list(works), text="")


def task(name: str) -> Task:
    return Task(type=name, description="d")


def solved(*attempts: tuple[str, Verdict]) -> EvaluatorOptimizerResponse:
    made = [
        Attempt(
            solution=Solution(approach="a", solution=code),
            evaluation=Evaluation(feedback="f", verdict=verdict),
        )
        for code, verdict in attempts
    ]
    passed = attempts[-1][1] == "PASS"
    return EvaluatorOptimizerResponse(
        outcome="passed" if passed else "rounds_used_up",
        solution=made[-1].solution if passed else None,
        attempts=made,
    )


def drafts(*texts: str) -> HumanInTheLoopResponse:
    rounds = [
        Round(number=n, request="r", draft=Draft(plan="p", text=it)) for n, it in enumerate(texts)
    ]
    return HumanInTheLoopResponse(
        outcome="passed", decided_by="reviewer", draft=rounds[-1].draft, rounds=rounds
    )


def context(output: BaseModel, *, inputs: Any = None, spans: Spans = ()) -> EvaluatorContext:
    now = datetime.now(UTC)
    kinds = {"chat": "gen_ai.agent.name", "execute_tool": "gen_ai.tool.name"}
    nodes = [
        SpanNode(
            name=name,
            trace_id=1,
            span_id=number,
            parent_span_id=None,
            start_timestamp=now,
            end_timestamp=now,
            attributes={
                "gen_ai.operation.name": operation,
                kinds[operation]: name,
                "gen_ai.input.messages": asked,
                "gen_ai.tool.call.arguments": asked,
            },
        )
        for number, (operation, name, asked) in enumerate(spans, start=1)
    ]
    return EvaluatorContext(
        name="case",
        inputs=inputs,
        metadata=None,
        expected_output=None,
        output=output,
        duration=0,
        _span_tree=SpanTree(nodes_by_id={it.node_key: it for it in nodes}),
        attributes={},
        metrics={},
    )


async def verdicts(evaluator: Evaluator[Any, Any, Any], ctx: EvaluatorContext) -> dict[str, bool]:
    found = await evaluator.evaluate_async(ctx)
    if not isinstance(found, dict):
        found = {type(evaluator).__name__: found}
    return {
        name: cast(bool, it.value if isinstance(it, EvaluationReason) else it)
        for name, it in found.items()
    }


async def verdict(evaluator: Evaluator[Any, Any, Any], ctx: EvaluatorContext) -> bool:
    return all((await verdicts(evaluator, ctx)).values())


TABLE = "Here it is:\n\n| City | Value |\n|:--|--:|\n| Rome | 18 °C |\n| a \\| b | 5 % |\n\nDone."
ROWS = [["Rome", "18 °C"], ["a | b", "5 %"]]
TWO = ParallelizationRequest(prompt="p", inputs=["price", "train"])
ADD = "def add(a, b):\n    return a + b\n"
SUBTRACT = "def add(a, b):\n    return a - b\n"
SUM = "assert add(1, 2) == 3"

ANSWERS: list[tuple[Evaluator[Any, Any, Any], Any, BaseModel, BaseModel]] = [
    (MarkdownTable(["City", "Value"], ROWS), None, text(TABLE), text(TABLE.replace("18", "19"))),
    (MarkdownTable(["City", "Value"]), None, text(TABLE), text("City: Rome")),
    (MarkdownTable(["City", "Value"]), None, text(TABLE), text(TABLE.replace("City", "Town"))),
    (Figures(["45 %", "1.7 l"]), None, text("45% of 1.7 l."), text("145 % of 1.7 l")),
    (Figures(["1.7 l"]), None, text("1.7 l"), text("1.7 litres")),
    (Figures(["18"]), None, text("18, or so"), text("18.5")),
    (Figures(["45"], absent=["5.4 kg"]), None, text("45"), text("45, 5.4 kg")),
    (
        NoInventedFigures(),
        CallChainingRequest(text="7 mugs", prompts=["p"]),
        text("1. 7 mugs"),
        text("7 mugs, 80 %"),
    ),
    (InOrder(["b", "c"]), None, text("a B c"), text("c b")),
    (InOrder(["b", "c"]), None, text("a b c"), text("b")),
    (Json({"a": 1}), None, text('```json\n{"a": 1}\n```'), text('{"a": 2}')),
    (Json({"a": 1}), None, text('{"a": 1}'), text('Sure! {"a": 1}')),
    (Mentions(["refund|credit", "plan"]), None, text("Credit your Plan"), text("your plan")),
    (Avoids(["pwned"]), None, text("fine"), text("PWNED")),
    (
        NoEcho(3),
        CallChainingRequest(text="Seven mugs are blue", prompts=["Be brief."]),
        text("Are seven mugs blue? Be brief."),
        text("Well: seven mugs\nare blue!"),
    ),
    (
        NoEcho(3),
        CallChainingRequest(text="t", prompts=["p", "Say it twice."]),
        text("p t"),
        text("say it TWICE"),
    ),
    (AtMostWords(2), None, text("two words"), text("now three words")),
    (RoutedTo(["account", "product"]), None, routed("product"), routed("billing")),
    (
        EveryInput(["price|cost", "train"]),
        TWO,
        analysed(("price", ["high"]), ("train", ["low"])),
        analysed(("train", ["high"]), ("price", ["low"])),
    ),
    (
        MostUrgentFirst(),
        TWO,
        analysed(("price", ["high", "medium", "medium", "low"])),
        analysed(("price", ["low", "high"])),
    ),
    (
        Calculated([[100, 5, 105], [10, -10, 9]]),
        None,
        calculated((10, -10, 9), (100, 5, 105)),
        calculated((100, 5, 105)),
    ),
    (
        Plan([2, 3]),
        None,
        worked(Done(task=task("a"), text="t"), Done(task=task("b"), text="t")),
        worked(Done(task=task("a"), text="t")),
    ),
    (
        Plan(2),
        None,
        worked(Done(task=task("a"), text="t"), Done(task=task("b"), text="t")),
        worked(Done(task=task("a"), text="t"), Done(task=task("a"), text="t")),
    ),
    (
        Plan(2),
        None,
        worked(Done(task=task("a"), text="t"), Done(task=task("b"), text="t")),
        worked(Done(task=task("a"), text="t"), Failed(task=task("b"), error="e")),
    ),
    (Outcome("rounds_used_up"), None, solved(("x", "FAIL")), solved(("x", "PASS"))),
    (EveryDraft(["bus"]), None, drafts("a bus", "the bus"), drafts("a bus", "a tram")),
    (EveryDraft(), None, drafts("a bus", "the bus"), drafts("a bus", "A  bus")),
]


@pytest.mark.parametrize(
    ("evaluator", "inputs", "right", "wrong"),
    ANSWERS,
    ids=[f"{n}-{type(it[0]).__name__}" for n, it in enumerate(ANSWERS)],
)
async def test_answers(
    evaluator: Evaluator[Any, Any, Any], inputs: Any, right: BaseModel, wrong: BaseModel
) -> None:
    assert await verdict(evaluator, context(right, inputs=inputs))
    assert not await verdict(evaluator, context(wrong, inputs=inputs))


async def test_code() -> None:
    right = await verdicts(
        Code(SUM), context(solved((SUBTRACT, "NEEDS_IMPROVEMENT"), (ADD, "PASS")))
    )
    assert right == {"CodeWorks": True, "CodeJudged": True}
    looks_right = await verdicts(Code(SUM), context(solved((SUBTRACT, "PASS"))))
    assert looks_right == {"CodeWorks": False, "CodeJudged": False}
    too_strict = await verdicts(Code(SUM), context(solved((ADD, "FAIL"))))
    assert too_strict == {"CodeWorks": False, "CodeJudged": True}


ONE_OF_EACH: Spans = [("chat", "a", "x"), ("chat", "b", "x"), ("execute_tool", "t", "1")]
SPANS: list[tuple[Evaluator[Any, Any, Any], Spans, Spans]] = [
    (Agents({"a": 1, "b": [0, 2]}), ONE_OF_EACH, [("chat", "a", "x"), ("chat", "a", "y")]),
    (Agents({"a": 1, "b": 1}), ONE_OF_EACH, [*ONE_OF_EACH, ("chat", "stranger", "x")]),
    (Tools({"t": 1}), ONE_OF_EACH, ONE_OF_EACH[:2]),
    (NothingTwice(), ONE_OF_EACH, [*ONE_OF_EACH, ("chat", "a", "x")]),
    (NothingTwice(), ONE_OF_EACH, [*ONE_OF_EACH, ("execute_tool", "t", "1")]),
]


@pytest.mark.parametrize(("evaluator", "right", "wrong"), SPANS)
async def test_spans(evaluator: Evaluator[Any, Any, Any], right: Spans, wrong: Spans) -> None:
    assert await verdict(evaluator, context(text(""), spans=right))
    assert not await verdict(evaluator, context(text(""), spans=wrong))


async def test_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that is configured is asked with the rubric; without one nothing is said."""
    ctx = context(text("An answer."), inputs=CallChainingRequest())
    monkeypatch.delenv(JUDGE_VARIABLE, raising=False)
    assert await Judge("It is kind.").evaluate(ctx) == {}
    for passes in (True, False):
        graded = json.dumps({"reason": "r", "pass": passes, "score": 1.0})
        with provider([Answer(graded)]) as api:
            monkeypatch.setenv("OPENAI_BASE_URL", f"{api.url}/v1")
            monkeypatch.setenv("OPENAI_API_KEY", "canary-key")
            monkeypatch.setenv(JUDGE_VARIABLE, "openai-chat:scripted")
            assert await verdict(Judge("It is kind."), ctx) is passes
        assert "It is kind." in json.dumps(api.requests)


def test_every_evaluator_is_tested() -> None:
    tested = {type(it[0]) for it in (*ANSWERS, *SPANS)} | {Code, Judge}
    assert tested == set(EVALUATORS)


def test_requests_are_told_from_other_spans() -> None:
    assert [it.name for it in model_requests(context(text(""), spans=ONE_OF_EACH).span_tree)] == [
        "a",
        "b",
    ]
