"""Parallelization: one prompt over many inputs at once, and one agent that calls tools at once.

Outside a Restate handler these are ordinary PydanticAI agents.

Prompt, inputs → input 1 | input 2 | ... → analyses, in the order of the inputs
Question → model → tool call 1 | tool call 2 | ... → model → answer
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent

from agents.models import DEFAULT_MODEL
from durable import RestateDurability

Priority = Literal["high", "medium", "low"]


class Action(BaseModel):
    """Something to do."""

    action: str = Field(min_length=1, max_length=200)
    priority: Priority


class Analysis(BaseModel):
    """What one input is in for, and what to do about it."""

    impacts: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        min_length=1, max_length=5, description="The effects, the gravest first."
    )
    actions: list[Action] = Field(
        min_length=1, max_length=5, description="What to do, the most urgent first."
    )
    conclusion: str = Field(min_length=1, max_length=400, description="One or two sentences.")


analyst = Agent(
    DEFAULT_MODEL,
    name="parallelization-analyst",  # stored in journals: see the step-name table
    output_type=Analysis,
    instructions=(
        "You apply an instruction to one input; others are handled elsewhere. Name up to five "
        "effects that are specific to this input, recommend up to five actions with a priority, "
        "and conclude in one or two sentences. Keep to what the input says and invent no figures."
    ),
    capabilities=[RestateDurability()],
)


def analysis_prompt(*, prompt: str, text: str) -> str:
    """Put the instruction and one of the inputs into one message."""
    return f"Instruction: {prompt}\n\nInput:\n{text}"


class Estimate(BaseModel):
    """The answer to a question about costs."""

    answer: str = Field(min_length=1, max_length=1000)


estimator = Agent(
    DEFAULT_MODEL,
    name="parallelization-estimator",  # stored in journals: see the step-name table
    output_type=Estimate,
    instructions=(
        "You answer questions about costs that change. Do not calculate yourself: call "
        "`apply_change` once for each cost, with all the calls in one response, and then answer "
        "from the results."
    ),
    capabilities=[RestateDurability()],
)


@estimator.tool_plain
def apply_change(
    item: Annotated[str, Field(max_length=100)],
    amount: Annotated[float, Field(ge=0, le=1e15)],
    percent: Annotated[float, Field(ge=-100, le=1000)],
) -> float:
    """Calculate what an amount is after a change.

    Args:
        item: What the amount is spent on.
        amount: The amount before the change.
        percent: The change in percent; negative for a decrease.
    """
    return round(amount * (1 + percent / 100), 2)
