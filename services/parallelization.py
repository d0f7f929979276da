"""Parallelization service: `POST /ParallelizationService/{key}/run`.

Prompt, inputs → input 1 | input 2 | ... → analyses, in the order of the inputs
Question → model → tool call 1 | tool call 2 | ... → model → answer

It is a workflow because that is what Restate calls a run with a name: the caller's key starts it at
most once, `progress` reads the state of the run while `run` still executes (which a plain service
cannot, and a virtual object would have to clean up after), and the outcome stays available under the
key, at `GET /restate/workflow/ParallelizationService/{key}/attach`, for a day.
"""

import asyncio
from typing import Annotated, Any, Literal

import restate
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from pydantic_ai.exceptions import AgentRunError, RunCancelled
from pydantic_ai.messages import ModelMessage, ToolCallPart, ToolReturnPart
from restate import TerminalError

from agents.parallelization import Analysis, analysis_prompt, analyst, estimator

EXAMPLE_PROMPT = (
    "Analyse how market changes will hit this group of stakeholders: energy and raw materials have "
    "become a fifth dearer, a cheaper competitor has entered the market, and rules for the carbon "
    "footprint of products apply from next year."
)
EXAMPLE_INPUTS = [
    "Customers: sensitive to prices, want better technology, care about the environment.",
    "Employees: worry about their jobs, need new skills, want to know where the company is going.",
    "Investors: expect growth, want costs under control, are wary of risk.",
    "Suppliers: limits to their capacity, pressure on their prices, technology in transition.",
]
EXAMPLE_QUESTION = (
    "Our yearly costs change: raw materials, 1,200,000 EUR, by +15 %; labour, 800,000 EUR, by +6 %; "
    "logistics, 300,000 EUR, by -4 %; energy, 150,000 EUR, by +22 %. What will each of them be, and "
    "which change weighs most?"
)

MAX_INPUTS = 50
MAX_TEXT = 4000
"""Characters in the prompt, in each input and in the question."""

STATE = "progress"

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_TEXT)]

parallelization = restate.Workflow(
    "ParallelizationService",
    description="Applies one prompt to many inputs at once. The key names the run.",
)


class ParallelizationRequest(BaseModel):
    """An instruction and the inputs that it is applied to, each by itself."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text = EXAMPLE_PROMPT
    inputs: list[Text] = Field(default=EXAMPLE_INPUTS, min_length=1, max_length=MAX_INPUTS)


class Analysed(BaseModel):
    """The analysis of one input."""

    status: Literal["done"] = "done"
    input: str
    analysis: Analysis


class Failed(BaseModel):
    """Stands in the place of an analysis that failed for good."""

    status: Literal["failed"] = "failed"
    input: str
    error: str = Field(description="Why; trying again would not have helped.")


Result = Annotated[Analysed | Failed, Field(discriminator="status")]


class ParallelizationResponse(BaseModel):
    """One result per input, in the order of the inputs."""

    results: list[Result]


class Progress(BaseModel):
    """How far a run is."""

    statuses: list[Literal["open", "done", "failed"]] = Field(
        description="One per input, in the order of the inputs."
    )


class RunToolsRequest(BaseModel):
    """A question that takes several calculations."""

    model_config = ConfigDict(extra="forbid")

    question: Text = EXAMPLE_QUESTION


class ToolCall(BaseModel):
    """What the model had calculated."""

    tool: str
    arguments: dict[str, Any]
    result: Any


class RunToolsResponse(BaseModel):
    """The answer, and the tool calls that led to it in the order the model made them."""

    answer: str
    calls: list[ToolCall]


@parallelization.main()
async def run(
    ctx: restate.WorkflowContext, request: ParallelizationRequest
) -> ParallelizationResponse:
    """Apply the prompt to all inputs at once; an input that fails does not disturb the others."""
    # 1. One agent run per input, all at once; after a crash only those without a result run again.
    state = Progress(statuses=["open"] * len(request.inputs))
    ctx.set(STATE, state)

    async def analyse_and_report(number: int, text: str) -> Analysed | Failed:
        result = await _analyse(request.prompt, text)
        state.statuses[number] = result.status
        ctx.set(STATE, state)
        return result

    results = await asyncio.gather(
        *(analyse_and_report(number, text) for number, text in enumerate(request.inputs))
    )

    # 2. Failures stay in their places, unless there is nothing else.
    if all(isinstance(result, Failed) for result in results):
        reasons = {result.error: None for result in results if isinstance(result, Failed)}
        raise TerminalError(f"All inputs failed: {'; '.join(reasons)}", status_code=502)
    return ParallelizationResponse(results=results)


async def _analyse(prompt: str, text: str) -> Analysed | Failed:
    try:
        analysis = (await analyst.run(analysis_prompt(prompt=prompt, text=text))).output
    except (AgentRunError, TerminalError) as error:
        if RunCancelled.from_cancellation(error) is not None:
            raise  # it is the whole run that was cancelled
        return Failed(input=text, error=error.message)
    return Analysed(input=text, analysis=analysis)


@parallelization.handler()
async def progress(ctx: restate.WorkflowSharedContext) -> Progress:
    """Say how far the run with this key is, while it runs or afterwards.

    Raises:
        TerminalError: 404 when no run with this key has begun.
    """
    state = await ctx.get(STATE, type_hint=Progress)
    if state is None:
        raise TerminalError(
            f"No run with the key {ctx.key()!r} has begun: start it with "
            f"`POST /ParallelizationService/{ctx.key()}/run`.",
            status_code=404,
        )
    return state


@parallelization.handler()
async def run_tools(
    ctx: restate.WorkflowSharedContext, request: RunToolsRequest
) -> RunToolsResponse:
    """Answer the question with one agent, which calls its tool for all figures at once."""
    # The calls of one response run at the same time, each in a step of its own.
    result = await estimator.run(request.question)
    return RunToolsResponse(answer=result.output.answer, calls=_tool_calls(result.new_messages()))


def _tool_calls(messages: list[ModelMessage]) -> list[ToolCall]:
    """Return the calls that succeeded: not those that the model was asked to correct."""
    parts = [part for message in messages for part in message.parts]
    results = {
        part.tool_call_id: part.content
        for part in parts
        if isinstance(part, ToolReturnPart) and part.outcome == "success"
    }
    return [
        ToolCall(
            tool=part.tool_name, arguments=part.args_as_dict(), result=results[part.tool_call_id]
        )
        for part in parts
        if isinstance(part, ToolCallPart) and part.tool_call_id in results
    ]
