"""Orchestrator-workers service: `POST /OrchestratorWorkersService/run`.

Assignment → orchestrator → 2 to 5 tasks → work | work | ... → synthesiser → text
"""

import asyncio
from typing import Annotated, Literal

import restate
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from restate import TerminalError

from agents.orchestrator_workers import (
    Plan,
    Task,
    Work,
    orchestrator,
    synthesis_prompt,
    synthesiser,
    work_prompt,
    worker,
)

EXAMPLE_ASSIGNMENT = (
    "Write product copy for a new eco-friendly water bottle, in two versions: one in a technical "
    "style for readers who compare specifications, and one in a conversational style for social "
    "media. Facts: steel with 90 % recycled content, keeps drinks cold for 24 hours, 750 ml, 320 g, "
    "no plastic parts, lifetime warranty."
)
EXAMPLE_TASK = Task(
    type="technical",
    description="The version for readers who compare specifications: precise, with all figures.",
)


_CANCELLED = 409

orchestrator_workers = restate.Service(
    "OrchestratorWorkersService",
    description="Divides an assignment into tasks, has them done in parallel, joins the results.",
)

Assignment = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)]


class OrchestratorWorkersRequest(BaseModel):
    """What is to be delivered."""

    model_config = ConfigDict(extra="forbid")

    assignment: Assignment = EXAMPLE_ASSIGNMENT


class WorkRequest(OrchestratorWorkersRequest):
    """One task, and the assignment that it is a part of."""

    task: Task = EXAMPLE_TASK


class Done(BaseModel):
    """A task and what its worker delivered."""

    status: Literal["done"] = "done"
    task: Task
    text: str


class Failed(BaseModel):
    """A task whose worker failed for good."""

    status: Literal["failed"] = "failed"
    task: Task
    error: str = Field(description="Why; trying again would not have helped.")


class OrchestratorWorkersResponse(BaseModel):
    """The plan's analysis, each task with its outcome in the plan's order, and the joined text."""

    analysis: str
    works: list[Annotated[Done | Failed, Field(discriminator="status")]]
    text: str = Field(description="Made of the works that are done.")


@orchestrator_workers.handler()
async def run(
    ctx: restate.Context, request: OrchestratorWorkersRequest
) -> OrchestratorWorkersResponse:
    """Plan the tasks, have them done in parallel, and join the results."""
    # 1. Plan; after a crash the plan stands: it is in the journal.
    plan: Plan = (await orchestrator.run(request.assignment)).output

    # 2. One invocation per task, with retries and a journal of its own, on whatever worker is free.
    works = await asyncio.gather(*(_work(ctx, request.assignment, task) for task in plan.tasks))
    done = [(work.task, work.text) for work in works if isinstance(work, Done)]
    if not done:
        reasons = {work.error: None for work in works if isinstance(work, Failed)}
        raise TerminalError(f"All tasks failed: {'; '.join(reasons)}", status_code=502)

    # 3. Join what was delivered.
    prompt = synthesis_prompt(assignment=request.assignment, works=done)
    text = (await synthesiser.run(prompt)).output.text
    return OrchestratorWorkersResponse(analysis=plan.analysis, works=works, text=text)


async def _work(ctx: restate.Context, assignment: str, task: Task) -> Done | Failed:
    request = WorkRequest(assignment=assignment, task=task)
    try:
        delivered = await ctx.service_call(work, arg=request)
    except TerminalError as error:
        if error.status_code == _CANCELLED:
            raise
        return Failed(task=task, error=error.message)
    return Done(task=task, text=delivered.text)


@orchestrator_workers.handler()
async def work(ctx: restate.Context, request: WorkRequest) -> Work:
    """Do one task; `run` calls it once per task of its plan."""
    return (await worker.run(work_prompt(assignment=request.assignment, task=request.task))).output
