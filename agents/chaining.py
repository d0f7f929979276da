"""Chaining: the result of one prompt is the input of the next.

Outside a Restate handler this is an ordinary PydanticAI agent.

Text → prompt 1 → result 1 → prompt 2 → result 2 → ... → final text
"""

from pydantic import BaseModel, Field
from pydantic_ai import Agent

from agents.models import DEFAULT_MODEL
from durable import RestateDurability


class Transformed(BaseModel):
    """A text after one step."""

    text: str = Field(
        min_length=1,
        max_length=2000,  # ends a small model that would go on and on
        description="The result alone, without a comment on it.",
    )


transformer = Agent(
    DEFAULT_MODEL,
    name="chaining-transformer",  # stored in journals: see the step-name table
    output_type=Transformed,
    instructions=(
        "You carry out one step of a longer text-processing job. Apply the instruction to the "
        "input. Keep every figure exactly as it is unless the instruction changes it, add nothing "
        "that is not in the input, and return only the result, in at most 250 words."
    ),
    capabilities=[RestateDurability()],
)


def step_prompt(*, prompt: str, text: str) -> str:
    """Put an instruction and the text it applies to into one message."""
    return f"Instruction: {prompt}\n\nInput:\n{text}"
