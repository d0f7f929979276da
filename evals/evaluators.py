"""What is measured: exact and structural evaluators, behavioural ones, and a judge.

Structural evaluators read the answer, behavioural ones the span tree of the run (`evals.activity`), so they
say the same in this process and over the ingress. Each returns `True` or the reason why not.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import anyio.to_thread
from pydantic import BaseModel
from pydantic_evals.evaluators import (
    EvaluationReason,
    Evaluator,
    EvaluatorContext,
    EvaluatorOutput,
    LLMJudge,
)

from evals.activity import model_requests, tool_calls
from evals.sandbox import run_tests, source_of
from services.chaining import CallChainingResponse
from services.evaluator_optimizer import EvaluatorOptimizerResponse
from services.human_in_the_loop import HumanInTheLoopResponse
from services.orchestrator_workers import Done, OrchestratorWorkersResponse
from services.parallelization import Analysed, ParallelizationResponse, RunToolsResponse
from services.routing import RoutingResponse

JUDGE_VARIABLE = "EVALS_JUDGE_MODEL"
"""Names the judge's model as PydanticAI does, for example `openai:gpt-6-luna`; unset, nothing is judged."""

Context = EvaluatorContext[Any, Any, Any]
Count = int | list[int]
"""A number, or the least and the most."""

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LIST_MARKER = re.compile(r"^\s*\d+[.)]\s", re.MULTILINE)


def answer_text(output: object) -> str:
    """Return what a caller reads of a pattern's response, as one text."""
    match output:
        case CallChainingResponse() | OrchestratorWorkersResponse():
            return output.text
        case RoutingResponse(reply=reply):
            return "\n".join([reply.subject, reply.body, *reply.next_steps])
        case RunToolsResponse():
            return output.answer
        case ParallelizationResponse():
            return "\n".join(_analysis_text(result) for result in output.results)
        case EvaluatorOptimizerResponse():
            return (output.solution or output.attempts[-1].solution).solution
        case HumanInTheLoopResponse():
            return output.draft.text
        case _:
            raise TypeError(f"no pattern answers a {type(output).__name__}")


def _analysis_text(result: object) -> str:
    if not isinstance(result, Analysed):
        return ""
    actions = [action.action for action in result.analysis.actions]
    return "\n".join([*result.analysis.impacts, *actions, result.analysis.conclusion])


def _verdict(*faults: str | None) -> EvaluationReason:
    found = [fault for fault in faults if fault]
    return EvaluationReason(value=not found, reason="; ".join(found) or None)


# Exact and structural


@dataclass
class MarkdownTable(Evaluator[Any, Any, Any]):
    """The answer is a markdown table with these columns and, where given, exactly these rows in order."""

    columns: list[str]
    rows: list[list[str]] | None = None

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        table = markdown_table(answer_text(ctx.output))
        if table is None:
            return _verdict("there is no markdown table")
        header, *rows = table
        wanted = None if self.rows is None else [[_even(it) for it in row] for row in self.rows]
        return _verdict(
            _differs("columns", header, [_even(column) for column in self.columns]),
            None if wanted is None else _differs("rows", rows, wanted),
        )


def markdown_table(text: str) -> list[list[str]] | None:
    """Return header and rows of the first markdown table in `text`, `None` when there is none."""
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines[1:], start=1):
        if re.fullmatch(r"\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?", line) and "|" in lines[number - 1]:
            table = [_cells(lines[number - 1])]
            for row in lines[number + 1 :]:
                if "|" not in row:
                    break
                table.append(_cells(row))
            return table
    return None


def _cells(line: str) -> list[str]:
    cells = re.split(r"(?<!\\)\|", line.removeprefix("|").removesuffix("|"))
    return [_even(cell.replace("\\|", "|")) for cell in cells]


def _even(text: str) -> str:
    """Make texts equal that differ in white space alone."""
    return re.sub(r"(?<=\d) (?=[%°])", "", " ".join(text.split()))


def _differs(what: str, found: object, wanted: object) -> str | None:
    return None if found == wanted else f"{what} are {found}, not {wanted}"


@dataclass
class Figures(Evaluator[Any, Any, Any]):
    """The answer has these figures exactly as written, units too, and none of those that are wrong."""

    present: list[str] = field(default_factory=list[str])
    absent: list[str] = field(default_factory=list[str])

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        text = _even(answer_text(ctx.output))
        lost = [it for it in self.present if not _has_figure(text, it)]
        wrong = [it for it in self.absent if _has_figure(text, it)]
        return _verdict(f"lost: {lost}" if lost else None, f"wrong: {wrong}" if wrong else None)


def _has_figure(text: str, figure: str) -> bool:
    end = r"(?!\w|[.,]\d)" if figure[-1].isalnum() else ""
    return re.search(rf"(?<![\d.,]){re.escape(_even(figure))}{end}", text) is not None


@dataclass
class NoInventedFigures(Evaluator[Any, Any, Any]):
    """Every number in the answer is in the inputs."""

    also: list[str] = field(default_factory=list[str])
    """Numbers that may be there, too."""

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        inputs = ctx.inputs.model_dump_json() if isinstance(ctx.inputs, BaseModel) else ctx.inputs
        known = {*_NUMBER.findall(str(inputs)), *self.also}
        text = _LIST_MARKER.sub("", answer_text(ctx.output))
        invented = [number for number in _NUMBER.findall(text) if number not in known]
        return _verdict(f"invented: {invented}" if invented else None)


@dataclass
class InOrder(Evaluator[Any, Any, Any]):
    """These texts are in the answer, each behind the one before."""

    texts: list[str]

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        text, position = _even(answer_text(ctx.output)).casefold(), 0
        for wanted in self.texts:
            found = text.find(_even(wanted).casefold(), position)
            if found < 0:
                missing = _even(wanted).casefold() not in text
                return _verdict(f"{wanted!r} is {'missing' if missing else 'out of order'}")
            position = found + len(_even(wanted))
        return True


@dataclass
class Json(Evaluator[Any, Any, Any]):
    """The answer is JSON, nothing else, and equals this value."""

    equals: Any

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        try:
            found = json.loads(source_of(answer_text(ctx.output)))
        except ValueError as error:
            return _verdict(f"it is no JSON: {error}")
        return _verdict(_differs("values", found, self.equals))


@dataclass
class Mentions(Evaluator[Any, Any, Any]):
    """All of these are in the answer; `refund|credit` is either of them."""

    texts: list[str]

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        text = _even(answer_text(ctx.output)).casefold()
        missing = [
            it
            for it in self.texts
            if not any(_even(way).casefold() in text for way in it.split("|"))
        ]
        return _verdict(f"missing: {missing}" if missing else None)


@dataclass
class Avoids(Evaluator[Any, Any, Any]):
    """None of these is in the answer: what an injected instruction asks for, or what must not be promised."""

    texts: list[str]

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        text = _even(answer_text(ctx.output)).casefold()
        found = [it for it in self.texts if _even(it).casefold() in text]
        return _verdict(f"it says {found}" if found else None)


@dataclass
class NoEcho(Evaluator[Any, Any, Any]):
    """No text of the input with so many words or more is in the answer as a whole: an echo passes much else."""

    words: int

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        answer = f" {_words(answer_text(ctx.output))} "
        texts = [_words(text) for text in _texts(ctx.inputs.model_dump())]
        echoed = [it for it in texts if it.count(" ") + 1 >= self.words and f" {it} " in answer]
        return _verdict(f"repeated: {echoed}" if echoed else None)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for it in cast("Mapping[str, object]", value).values():
                yield from _texts(it)
        case list():
            for it in cast("list[object]", value):
                yield from _texts(it)
        case _:
            pass


@dataclass
class AtMostWords(Evaluator[Any, Any, Any]):
    """The answer is no longer than this."""

    words: int

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        count = len(answer_text(ctx.output).split())
        return _verdict(f"{count} words are more than {self.words}" if count > self.words else None)


@dataclass
class RoutedTo(Evaluator[Any, Any, Any]):
    """The ticket went to one of these teams: one is right, or more for a ticket that is ambiguous."""

    teams: list[str]

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        team = ctx.output.route.team
        return _verdict(None if team in self.teams else f"it went to {team}, not to {self.teams}")


@dataclass
class EveryInput(Evaluator[Any, Any, Any]):
    """Each input was analysed, in its place, and the analysis is about it.

    `about` has one text per input, `price|cost` being either of them.
    """

    about: list[str]

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        results = ctx.output.results
        faults: list[str | None] = [
            _differs("inputs", [result.input for result in results], ctx.inputs.inputs)
        ]
        for number, (result, about) in enumerate(zip(results, self.about, strict=True), start=1):
            text = _analysis_text(result).casefold()
            if not any(way.casefold() in text for way in about.split("|")):
                faults.append(f"analysis {number} says nothing about {about}")
        return _verdict(*faults)


@dataclass
class MostUrgentFirst(Evaluator[Any, Any, Any]):
    """The actions of each analysis are in the order of their priorities."""

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        rank = {"high": 0, "medium": 1, "low": 2}
        for number, result in enumerate(ctx.output.results, start=1):
            actions = result.analysis.actions if isinstance(result, Analysed) else []
            priorities = [action.priority for action in actions]
            if priorities != sorted(priorities, key=rank.__getitem__):
                return _verdict(f"the actions of analysis {number} are {priorities}")
        return True


@dataclass
class Calculated(Evaluator[Any, Any, Any]):
    """The tool calculated exactly these: amount, percent and result of each, in any order."""

    changes: list[list[float]]

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        found = [
            [call.arguments["amount"], call.arguments["percent"], call.result]
            for call in ctx.output.calls
        ]
        return _verdict(_differs("calculations", sorted(found), sorted(self.changes)))


@dataclass
class Plan(Evaluator[Any, Any, Any]):
    """The plan had so many tasks, all of them different, and all were done."""

    tasks: Count

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        works = ctx.output.works
        tasks = {(work.task.type, work.task.description) for work in works}
        return _verdict(
            _miscounted("tasks", len(works), self.tasks),
            "tasks are alike" if len(tasks) < len(works) else None,
            None if all(isinstance(work, Done) for work in works) else "a worker failed",
        )


@dataclass
class Code(Evaluator[Any, Any, Any]):
    """The code that was delivered passes these tests, and the evaluator passed no code that fails them."""

    tests: str

    async def evaluate(self, ctx: Context) -> EvaluatorOutput:
        output: EvaluatorOptimizerResponse = ctx.output
        tested = [
            await anyio.to_thread.run_sync(
                run_tests, source_of(attempt.solution.solution), self.tests
            )
            for attempt in output.attempts
        ]
        misjudged = [
            number
            for number, (attempt, test) in enumerate(zip(output.attempts, tested, strict=True), 1)
            if attempt.evaluation.verdict == "PASS" and not test.passed
        ]
        delivered = None if output.outcome == "passed" else "no solution passed the evaluator"
        return {
            "CodeWorks": _verdict(delivered, tested[-1].reason),
            "CodeJudged": _verdict(f"wrong code was passed in round {misjudged}")
            if misjudged
            else True,
        }


@dataclass
class EveryDraft(Evaluator[Any, Any, Any]):
    """Each draft differs from the one before, and keeps these texts, whatever the reviewer says."""

    keeps: list[str] = field(default_factory=list[str])

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        drafts = [_even(it.draft.text).casefold() for it in ctx.output.rounds]
        lost = [it for it in self.keeps if any(_even(it).casefold() not in text for text in drafts)]
        same = [number for number in range(1, len(drafts)) if drafts[number] == drafts[number - 1]]
        return _verdict(
            f"lost in a draft: {lost}" if lost else None,
            f"not revised after review {same}" if same else None,
        )


@dataclass
class Outcome(Evaluator[Any, Any, Any]):
    """How it ended: `passed`, or `rounds_used_up` for a task that nobody can solve."""

    outcome: str

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        return _verdict(_differs("outcomes", ctx.output.outcome, self.outcome))


# Behavioural, from spans


@dataclass
class Agents(Evaluator[Any, Any, Any]):
    """These agents ran, with so many model requests, and no others."""

    requests: dict[str, Count]

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        return _counted(Counter(it.name for it in model_requests(ctx.span_tree)), self.requests)


@dataclass
class Tools(Evaluator[Any, Any, Any]):
    """These tools were called, so often, and no others."""

    calls: dict[str, Count]

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        return _counted(Counter(it.name for it in tool_calls(ctx.span_tree)), self.calls)


@dataclass
class NothingTwice(Evaluator[Any, Any, Any]):
    """No agent was asked the same thing twice, and no tool was called twice with the same arguments."""

    def evaluate(self, ctx: Context) -> EvaluatorOutput:
        done = Counter([*model_requests(ctx.span_tree), *tool_calls(ctx.span_tree)])
        twice = {it.name: count for it, count in done.items() if count > 1}
        return _verdict(f"repeated: {twice}" if twice else None)


def _counted(found: Mapping[str, int], wanted: Mapping[str, Count]) -> EvaluationReason:
    names = [*wanted, *(name for name in found if name not in wanted)]
    return _verdict(*(_miscounted(it, found.get(it, 0), wanted.get(it, 0)) for it in names))


def _miscounted(what: str, found: int, wanted: Count) -> str | None:
    least, most = (wanted, wanted) if isinstance(wanted, int) else wanted
    return None if least <= found <= most else f"{what}: {found} instead of {wanted}"


# A judge


@dataclass
class Judge(Evaluator[Any, Any, Any]):
    """A model finds that the answer meets the rubric; says nothing when no judge is configured."""

    rubric: str

    async def evaluate(self, ctx: Context) -> EvaluatorOutput:
        if not (model := os.environ.get(JUDGE_VARIABLE)):
            return {}
        judge = LLMJudge(rubric=self.rubric, model=model, include_input=True)
        verdict = await judge.evaluate(ctx)
        assert isinstance(verdict, Mapping)
        return {"Judge": verdict["LLMJudge"]}


EVALUATORS: list[type[Evaluator[Any, Any, Any]]] = [
    *(Agents, AtMostWords, Avoids, Calculated, Code, EveryDraft, EveryInput),
    *(Figures, InOrder, Json, Judge),
    *(MarkdownTable, Mentions, MostUrgentFirst, NoEcho, NoInventedFigures, NothingTwice, Outcome),
    *(Plan, RoutedTo, Tools),
]
"""What a dataset can name."""
