"""Evaluator-optimizer service: `POST /EvaluatorOptimizerService/run`.

Task → generator → solution → evaluator → PASS
          ↑                       ↓
          └─ NEEDS_IMPROVEMENT | FAIL, with feedback
"""

from typing import Annotated, Literal

import restate
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from agents.evaluator_optimizer import (
    Attempt,
    Solution,
    evaluation_prompt,
    evaluator,
    generation_prompt,
    generator,
)

EXAMPLE_TASK = (
    "Implement a stack in Python with push(x), pop() and getMin(). All operations take O(1) time, "
    "and pop() and getMin() on an empty stack raise IndexError."
)


evaluator_optimizer = restate.Service(
    "EvaluatorOptimizerService",
    description="Improves a solution until an evaluator passes it, or the rounds are used up.",
)


class EvaluatorOptimizerRequest(BaseModel):
    """What is to be solved, and how often it may be tried."""

    model_config = ConfigDict(extra="forbid")

    task: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)
    ] = EXAMPLE_TASK
    max_rounds: int = Field(
        default=3, ge=1, le=10, description="Rounds of a solution and its evaluation."
    )


class EvaluatorOptimizerResponse(BaseModel):
    """How it ended, and the whole way there."""

    outcome: Literal["passed", "rounds_used_up"]
    solution: Solution | None = Field(description="The one that passed; null when none did.")
    attempts: list[Attempt] = Field(description="All rounds in order.")


@evaluator_optimizer.handler()
async def run(
    ctx: restate.Context, request: EvaluatorOptimizerRequest
) -> EvaluatorOptimizerResponse:
    """Propose and judge solutions until one passes."""
    attempts: list[Attempt] = []
    for _ in range(request.max_rounds):
        # 1. A solution that answers the feedback so far.
        prompt = generation_prompt(request.task, attempts)
        solution = (await generator.run(prompt)).output

        # 2. A judgement of it.
        evaluation = (await evaluator.run(evaluation_prompt(request.task, solution))).output
        attempts.append(Attempt(solution=solution, evaluation=evaluation))

        # 3. Done, or another round; a crash in between goes on with what is not answered yet.
        if evaluation.verdict == "PASS":
            return EvaluatorOptimizerResponse(
                outcome="passed", solution=solution, attempts=attempts
            )
    return EvaluatorOptimizerResponse(outcome="rounds_used_up", solution=None, attempts=attempts)
