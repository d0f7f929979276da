"""Orchestrator and workers: one agent plans the tasks, workers do them, another joins the results.

Outside a Restate handler these are ordinary PydanticAI agents.

Assignment → orchestrator → 2 to 5 tasks → worker | worker | ... → synthesiser → text
"""

from typing import Any

from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.exceptions import UnexpectedModelBehavior

from agents.models import DEFAULT_MODEL
from durable import RestateDurability

MIN_TASKS, MAX_TASKS = 2, 5


class Task(BaseModel):
    """One worker's part of the assignment."""

    type: str = Field(min_length=1, max_length=60, description="A style or a role, in few words.")
    description: str = Field(min_length=1, max_length=500, description="What to deliver, and how.")


class Plan(BaseModel):
    """How the assignment is divided."""

    # First: a model that has thought the assignment over divides it better.
    analysis: str = Field(
        min_length=1,
        max_length=600,
        description="What is asked for, and which parts or versions of it are worth having.",
    )
    tasks: list[Task] = Field(
        # For models that are held to a schema; `_check_plan` holds all of them to it.
        json_schema_extra={"minItems": MIN_TASKS, "maxItems": MAX_TASKS},
        description=f"{MIN_TASKS} to {MAX_TASKS} tasks that do not depend on each other.",
    )


class Work(BaseModel):
    """What a worker delivers."""

    text: str = Field(min_length=1, max_length=2000, description="The result alone.")


class Synthesis(BaseModel):
    """What the workers' results have become together."""

    text: str = Field(min_length=1, max_length=6000, description="The finished text alone.")


orchestrator = Agent(
    DEFAULT_MODEL,
    name="orchestrator-workers-orchestrator",  # stored in journals: see the step-name table
    output_type=Plan,
    instructions=(
        "You divide an assignment among workers who do not see each other's work. Analyse what is "
        f"asked for, then write {MIN_TASKS} to {MAX_TASKS} tasks, each complete in itself: what to "
        "deliver, for whom, in which style."
    ),
    capabilities=[RestateDurability()],
)


@orchestrator.output_validator
async def _check_plan(ctx: RunContext[Any], plan: Plan) -> Plan:
    """Send a plan with too few or too many tasks back, and end the run when it is not corrected."""
    if MIN_TASKS <= len(plan.tasks) <= MAX_TASKS:
        return plan
    fault = f"A plan has {MIN_TASKS} to {MAX_TASKS} tasks, and this one has {len(plan.tasks)}."
    if ctx.last_attempt:
        raise UnexpectedModelBehavior(f"{fault} The model did not correct it.")
    raise ModelRetry(f"{fault} Divide the assignment again.")


worker = Agent(
    DEFAULT_MODEL,
    name="orchestrator-workers-worker",  # stored in journals: see the step-name table
    output_type=Work,
    instructions=(
        "You carry out one task of a larger assignment and others carry out the rest. Deliver what "
        "your task asks for and nothing else, in at most 250 words. Keep to the facts that the "
        "assignment gives."
    ),
    capabilities=[RestateDurability()],
)

synthesiser = Agent(
    DEFAULT_MODEL,
    name="orchestrator-workers-synthesiser",  # stored in journals: see the step-name table
    output_type=Synthesis,
    instructions=(
        "You put the results of several workers together into what the assignment asks for. Keep "
        "the versions apart that are meant to be apart, under headings, drop what is said twice, "
        "and add no facts. What a worker did not deliver is missing: do not make it up."
    ),
    capabilities=[RestateDurability()],
)


def work_prompt(*, assignment: str, task: Task) -> str:
    """Tell a worker its task and what it is a part of."""
    return f"Assignment:\n{assignment}\n\nYour task ({task.type}):\n{task.description}"


def synthesis_prompt(*, assignment: str, works: list[tuple[Task, str]]) -> str:
    """Give the synthesiser the assignment and the delivered works."""
    delivered = "\n\n".join(f"Result ({task.type}):\n{text}" for task, text in works)
    return f"Assignment:\n{assignment}\n\n{delivered}"
