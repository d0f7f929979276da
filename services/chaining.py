"""Call chaining service: `POST /CallChainingService/run`.

Text → prompt 1 → result 1 → prompt 2 → result 2 → ... → final text
"""

from typing import Annotated

import restate
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from agents.chaining import step_prompt, transformer

EXAMPLE_TEXT = """\
Q3 performance summary
Customer satisfaction climbed to 92 points, and revenue was up 45 % on the same quarter last year.
We now hold 23 % of our main market. Churn went down to 5 %, from 8 % in spring, and winning a new
customer cost 43 USD on average. The product's adoption rate reached 78 %, employees rated their
satisfaction at 87 points, and the operating margin came out at 34 %."""

EXAMPLE_PROMPTS = [
    "List every figure with the metric it belongs to, one per line, written as `value: metric`.",
    "Write each value as a percentage where that makes sense: points out of 100 become percent. "
    "Leave amounts of money as they are. One per line.",
    "Sort the lines by value, the largest first, and keep `value: metric` on each line.",
    "Turn the lines into a markdown table with the columns Metric and Value.",
]

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=8000)]
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=1000)]

call_chaining = restate.Service(
    "CallChainingService",
    description="Applies prompts to a text, each to the result of the one before.",
)


class CallChainingRequest(BaseModel):
    """A text and what to do with it, step by step."""

    model_config = ConfigDict(extra="forbid")

    text: Text = EXAMPLE_TEXT
    prompts: list[Prompt] = Field(default=EXAMPLE_PROMPTS, min_length=1, max_length=20)


class ChainStep(BaseModel):
    """One link of the chain."""

    prompt: str
    result: str


class CallChainingResponse(BaseModel):
    """Every step in order, and the text that the last one left."""

    steps: list[ChainStep]
    text: str


@call_chaining.handler()
async def run(ctx: restate.Context, request: CallChainingRequest) -> CallChainingResponse:
    """Apply each prompt to the result of the previous one."""
    text = request.text
    steps: list[ChainStep] = []
    # 1. One agent run per prompt; a crash here goes on with the prompt that was not answered yet.
    for prompt in request.prompts:
        result = await transformer.run(step_prompt(prompt=prompt, text=text))
        text = result.output.text
        steps.append(ChainStep(prompt=prompt, result=text))

    # 2. The final text, with the way there.
    return CallChainingResponse(steps=steps, text=text)
