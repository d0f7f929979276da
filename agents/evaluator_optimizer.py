"""Evaluator and optimizer: one agent proposes a solution, another judges it, until it passes.

Outside a Restate handler these are ordinary PydanticAI agents.

Task → generator → solution → evaluator → PASS
          ↑                       ↓
          └─ NEEDS_IMPROVEMENT | FAIL, with feedback
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent

from agents.models import DEFAULT_MODEL
from durable import RestateDurability

Verdict = Literal["PASS", "NEEDS_IMPROVEMENT", "FAIL"]


class Solution(BaseModel):
    """A proposal."""

    # First: a model that has written down its approach follows it.
    approach: str = Field(
        min_length=1, max_length=600, description="The idea, and what the feedback changed in it."
    )
    solution: str = Field(
        min_length=1, max_length=6000, description="The whole solution, without a comment on it."
    )


class Evaluation(BaseModel):
    """A judgement, and the reasons for it."""

    # First: a model that has written down its reasons judges better.
    feedback: str = Field(
        min_length=1, max_length=1000, description="What is right, what is wrong, what to change."
    )
    verdict: Verdict


class Attempt(BaseModel):
    """A solution and how it was judged."""

    solution: Solution
    evaluation: Evaluation


generator = Agent(
    DEFAULT_MODEL,
    name="evaluator-optimizer-generator",  # stored in journals: see the step-name table
    output_type=Solution,
    instructions=(
        "You solve a task. Say in a few sentences how, then give the whole solution. Where earlier "
        "attempts were judged, answer every point of the feedback: improve the last solution if it "
        "needs improvement, and take another approach if it failed."
    ),
    capabilities=[RestateDurability()],
)

evaluator = Agent(
    DEFAULT_MODEL,
    name="evaluator-optimizer-evaluator",  # stored in journals: see the step-name table
    output_type=Evaluation,
    instructions=(
        "You judge a solution against its task, strictly and by what the task asks for alone. First "
        "the reasons, point by point, then the verdict:\n"
        "- PASS: every requirement is met and nothing is left to improve\n"
        "- NEEDS_IMPROVEMENT: the approach is right, and the feedback says what to change\n"
        "- FAIL: the approach cannot meet the requirements\n"
        "Do not solve the task yourself."
    ),
    capabilities=[RestateDurability()],
)


def generation_prompt(task: str, attempts: Sequence[Attempt] = ()) -> str:
    """Ask for a solution that answers all feedback so far; only the last attempt is shown whole."""
    parts = [f"Task:\n{task}"]
    for number, attempt in enumerate(attempts, start=1):
        if number == len(attempts):
            parts.append(f"Your last solution:\n{attempt.solution.solution}")
        judged = attempt.evaluation
        parts.append(f"Attempt {number} was judged {judged.verdict}:\n{judged.feedback}")
    return "\n\n".join(parts)


def evaluation_prompt(task: str, solution: Solution) -> str:
    """Ask for a judgement of a solution."""
    return f"Task:\n{task}\n\nSolution:\n{solution.solution}"
