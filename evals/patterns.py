"""What is evaluated: each pattern's service, how it runs without a server, and what a perfect model says.

Without a server the service's own handler runs, with the same agents: only calls of other handlers and state
need a context, and `InProcess` is one. A person to wait for takes a server, so that pattern has a stand-in.
"""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_ai.messages import ModelResponsePart, TextPart, ToolCallPart

from agents.chaining import Transformed, step_prompt
from agents.evaluator_optimizer import Attempt, evaluation_prompt, generation_prompt
from agents.human_in_the_loop import Draft, revision_prompt, writer
from agents.orchestrator_workers import Plan, Synthesis, Work, synthesis_prompt, work_prompt
from agents.parallelization import Analysis, Estimate, analysis_prompt
from agents.routing import Reply, Route
from services.chaining import CallChainingRequest
from services.chaining import run as run_chaining
from services.client import PATTERNS as CLIENT_PATTERNS
from services.client import Pattern
from services.evaluator_optimizer import EvaluatorOptimizerRequest
from services.evaluator_optimizer import run as run_evaluator_optimizer
from services.human_in_the_loop import (
    Feedback,
    HumanInTheLoopRequest,
    HumanInTheLoopResponse,
    Round,
)
from services.orchestrator_workers import OrchestratorWorkersRequest
from services.orchestrator_workers import run as run_orchestrator_workers
from services.parallelization import ParallelizationRequest, RunToolsRequest, run_tools
from services.parallelization import run as run_parallelization
from services.routing import RoutingRequest
from services.routing import run as run_routing

RequestT = TypeVar("RequestT", bound=BaseModel)
ReferenceT = TypeVar("ReferenceT")

Exchange = tuple[type[BaseModel], str, list[list[ModelResponsePart]]]
"""A run of an agent: the type of its output, its prompt, and what the model answers, request by request."""


class CaseMetadata(BaseModel, Generic[ReferenceT]):
    """What a case is there for, and an answer that is right."""

    model_config = ConfigDict(extra="forbid")

    difficulty: Literal["plain", "hard", "adversarial"]
    why: str = Field(min_length=1, description="What is tested, and what goes wrong easily.")
    reference: ReferenceT = Field(description="What a perfect model says: passes all evaluators.")


class RoutingReference(BaseModel):
    """Both answers of a routed ticket."""

    route: Route
    reply: Reply


class ToolsReference(BaseModel):
    """The calls of the tool, all in one response, and the answer."""

    calls: list[tuple[str, float, float]] = Field(description="Item, amount and percent of each.")
    answer: str


class OrchestratorReference(BaseModel):
    """The plan, the text of each of its tasks, and the joined text."""

    plan: Plan
    works: list[str]
    text: str


class ReviewedTask(BaseModel):
    """What is to be written, and what the reviewer says of one draft after the other."""

    model_config = ConfigDict(extra="forbid")

    task: str = Field(min_length=1)
    reviews: list[Feedback] = Field(min_length=1)

    @model_validator(mode="after")
    def _ends(self) -> "ReviewedTask":
        if [it.verdict for it in self.reviews].index("PASS") != len(self.reviews) - 1:
            raise ValueError("the last review passes the draft, and no other does")
        return self


class InProcess:
    """The part of a Restate context that the patterns use, without a server."""

    def set(self, name: str, value: object) -> None:
        """Forget the state: nobody else can read it."""

    async def service_call(self, handler: Callable[..., Awaitable[Any]], arg: Any) -> Any:
        """Run the handler here."""
        return await handler(self, arg)


@dataclass(frozen=True, kw_only=True)
class EvalPattern(Generic[RequestT, ReferenceT]):
    """A pattern as the eval suite sees it."""

    client: Pattern[Any]
    """How it is called over the ingress."""

    request_type: type[RequestT]
    """The inputs of a case."""

    reference_type: type[ReferenceT]

    handler: Callable[[Any, RequestT], Awaitable[BaseModel]]
    """The service's handler, or what stands for it in this process."""

    request: Callable[[RequestT], BaseModel] = lambda inputs: inputs
    """Makes the service's request of the inputs of a case."""

    reviews: Callable[[RequestT], Sequence[Feedback]] = lambda inputs: ()
    """What a person answers while the handler runs."""

    script: Callable[[RequestT, ReferenceT], Iterator[Exchange]]
    """What the agents are asked in a case, and the reference's answers."""


def _says(output: BaseModel) -> list[list[ModelResponsePart]]:
    return [[TextPart(output.model_dump_json())]]


def _chaining(request: CallChainingRequest, reference: list[str]) -> Iterator[Exchange]:
    for prompt, before, after in zip(
        request.prompts, [request.text, *reference], reference, strict=False
    ):
        yield Transformed, step_prompt(prompt=prompt, text=before), _says(Transformed(text=after))


def _routing(request: RoutingRequest, reference: RoutingReference) -> Iterator[Exchange]:
    yield Route, request.ticket, _says(reference.route)
    yield Reply, request.ticket, _says(reference.reply)


def _parallelization(
    request: ParallelizationRequest, reference: list[Analysis]
) -> Iterator[Exchange]:
    for text, analysis in zip(request.inputs, reference, strict=True):
        yield Analysis, analysis_prompt(prompt=request.prompt, text=text), _says(analysis)


def _parallel_tools(request: RunToolsRequest, reference: ToolsReference) -> Iterator[Exchange]:
    calls = [
        ToolCallPart("apply_change", {"item": item, "amount": amount, "percent": percent})
        for item, amount, percent in reference.calls
    ]
    answers = _says(Estimate(answer=reference.answer))
    yield Estimate, request.question, [list(calls), *answers] if calls else answers


def _orchestrator_workers(
    request: OrchestratorWorkersRequest, reference: OrchestratorReference
) -> Iterator[Exchange]:
    assignment, works = (
        request.assignment,
        list(zip(reference.plan.tasks, reference.works, strict=True)),
    )
    yield Plan, assignment, _says(reference.plan)
    for task, text in works:
        yield Work, work_prompt(assignment=assignment, task=task), _says(Work(text=text))
    joined = synthesis_prompt(assignment=assignment, works=works)
    yield Synthesis, joined, _says(Synthesis(text=reference.text))


def _evaluator_optimizer(
    request: EvaluatorOptimizerRequest, reference: list[Attempt]
) -> Iterator[Exchange]:
    for number, attempt in enumerate(reference):
        prompt = generation_prompt(request.task, reference[:number])
        yield type(attempt.solution), prompt, _says(attempt.solution)
        judged = evaluation_prompt(request.task, attempt.solution)
        yield type(attempt.evaluation), judged, _says(attempt.evaluation)


async def _reviewed(_: object, inputs: ReviewedTask) -> HumanInTheLoopResponse:
    """Do what the service does, with a reviewer who answers at once and a memory in a variable."""
    result = await writer.run(inputs.task)
    rounds = [Round(number=1, request=inputs.task, draft=result.output)]
    for number, feedback in enumerate(inputs.reviews[:-1], start=2):
        prompt, history = revision_prompt(feedback.comment), result.all_messages()
        result = await writer.run(prompt, message_history=history)
        rounds.append(Round(number=number, request=feedback.comment, draft=result.output))
    return HumanInTheLoopResponse(
        outcome="passed", decided_by="reviewer", draft=rounds[-1].draft, rounds=rounds
    )


def _human_in_the_loop(inputs: ReviewedTask, reference: list[str]) -> Iterator[Exchange]:
    drafts = [Draft(plan="What was asked for.", text=text) for text in reference]
    yield Draft, inputs.task, [turn for draft in drafts for turn in _says(draft)]


EVAL_PATTERNS: dict[str, EvalPattern[Any, Any]] = {
    "chaining": EvalPattern(
        client=CLIENT_PATTERNS["chaining"],
        request_type=CallChainingRequest,
        reference_type=list[str],
        handler=run_chaining,
        script=_chaining,
    ),
    "routing": EvalPattern(
        client=CLIENT_PATTERNS["routing"],
        request_type=RoutingRequest,
        reference_type=RoutingReference,
        handler=run_routing,
        script=_routing,
    ),
    "parallelization": EvalPattern(
        client=CLIENT_PATTERNS["parallelization"],
        request_type=ParallelizationRequest,
        reference_type=list[Analysis],
        handler=run_parallelization,
        script=_parallelization,
    ),
    "parallel-tools": EvalPattern(
        client=CLIENT_PATTERNS["parallel-tools"],
        request_type=RunToolsRequest,
        reference_type=ToolsReference,
        handler=run_tools,
        script=_parallel_tools,
    ),
    "orchestrator-workers": EvalPattern(
        client=CLIENT_PATTERNS["orchestrator-workers"],
        request_type=OrchestratorWorkersRequest,
        reference_type=OrchestratorReference,
        handler=run_orchestrator_workers,
        script=_orchestrator_workers,
    ),
    "evaluator-optimizer": EvalPattern(
        client=CLIENT_PATTERNS["evaluator-optimizer"],
        request_type=EvaluatorOptimizerRequest,
        reference_type=list[Attempt],
        handler=run_evaluator_optimizer,
        script=_evaluator_optimizer,
    ),
    "human-in-the-loop": EvalPattern(
        client=CLIENT_PATTERNS["human-in-the-loop"],
        request_type=ReviewedTask,
        reference_type=list[str],
        handler=_reviewed,
        request=lambda inputs: HumanInTheLoopRequest(task=inputs.task),
        reviews=lambda inputs: inputs.reviews,
        script=_human_in_the_loop,
    ),
}
"""One dataset each, in `evals/datasets`; the names are those of `services.client`."""
