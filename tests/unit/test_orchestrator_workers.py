"""Orchestrator and workers: the plan's bounds, failed workers, and a crash at every step."""

from collections.abc import Awaitable, Callable

import pytest
from pydantic import ValidationError
from pydantic_ai.exceptions import ModelHTTPError, UnexpectedModelBehavior
from pydantic_ai.messages import RetryFeedbackPart
from restate import TerminalError

from agents.orchestrator_workers import (
    MAX_TASKS,
    MIN_TASKS,
    Plan,
    Synthesis,
    Task,
    Work,
    orchestrator,
    synthesiser,
    worker,
)
from durable.testing import InMemoryInvocation, check_every_crash
from services.orchestrator_workers import (
    EXAMPLE_ASSIGNMENT,
    EXAMPLE_TASK,
    Done,
    Failed,
    OrchestratorWorkersRequest,
    WorkRequest,
    run,
    work,
)
from tests.typed_model import Answer, TypedModel

REQUEST = {"assignment": "Write copy."}


def plan(tasks: int) -> Plan:
    """A plan with so many tasks."""
    return Plan(
        analysis="It needs several versions.",
        tasks=[Task(type=f"style {number}", description="Write it.") for number in range(tasks)],
    )


def planning(*sizes: int) -> TypedModel:
    """A model that plans so many tasks, request by request."""
    plans = iter(sizes)
    return TypedModel(lambda _: plan(next(plans)))


def join(prompt: str) -> Answer:
    """Answer as a synthesiser that shows what it was given."""
    return Synthesis(text=prompt)


def delivered(request: WorkRequest) -> Work:
    """Stands in for the workers' invocations."""
    return Work(text=f"{request.assignment} in {request.task.type}")


async def test_the_results_are_joined() -> None:
    """One call per task, at the same time; the synthesiser gets what came back."""
    with (
        orchestrator.override(model=TypedModel(lambda _: plan(2))),
        synthesiser.override(model=TypedModel(join)),
    ):
        invocation = InMemoryInvocation(run, REQUEST, calls={work: delivered})
        response = await invocation.run()
        await invocation.replay()
    assert response.analysis == "It needs several versions."
    assert response.works == [
        Done(task=task, text=f"Write copy. in {task.type}") for task in plan(2).tasks
    ]
    assert "Result (style 1):\nWrite copy. in style 1" in response.text
    assert [it.kind for it in invocation.stored] == ["Run", "Call", "Call", "Run"]
    assert invocation.stored[2].request == {
        "assignment": "Write copy.",
        "task": plan(2).tasks[1].model_dump(),
    }


async def test_a_worker_is_given_its_task_and_the_assignment() -> None:
    """`work` is a run of its own."""
    model = TypedModel(lambda _: Work(text="Cold for a day."))
    with worker.override(model=model):
        answered = await InMemoryInvocation(work, {}).run()
    assert answered == Work(text="Cold for a day.")
    [prompt] = model.asked
    assert EXAMPLE_ASSIGNMENT in prompt
    assert EXAMPLE_TASK.description in prompt


@pytest.mark.parametrize("tasks", [0, 1, 6, 50])
async def test_a_plan_out_of_bounds_is_corrected(tasks: int) -> None:
    """The model is told the bounds and what it made of them."""
    model = planning(tasks, 3)
    with orchestrator.override(model=model):
        result = await orchestrator.run("Write copy.")
    assert len(result.output.tasks) == 3
    feedback = [
        part.content
        for message in result.all_messages()
        for part in message.parts
        if isinstance(part, RetryFeedbackPart)
    ]
    assert feedback == [
        f"A plan has 2 to 5 tasks, and this one has {tasks}. Divide the assignment again."
    ]


@pytest.mark.parametrize("tasks", [0, 50])
async def test_a_plan_that_stays_out_of_bounds_ends_the_run(tasks: int) -> None:
    """With what is wrong, and without a worker or a further request."""
    model = planning(tasks, tasks)
    with (
        orchestrator.override(model=model),
        pytest.raises(
            TerminalError, match=f"A plan has 2 to 5 tasks, and this one has {tasks}"
        ) as caught,
    ):
        await InMemoryInvocation(run, REQUEST).run()
    assert caught.value.status_code == 502
    assert len(model.asked) == 2


@pytest.mark.parametrize("tasks", [MIN_TASKS, MAX_TASKS])
async def test_the_bounds_themselves_are_plans(tasks: int) -> None:
    """And the schema says them, for models that are held to it."""
    with orchestrator.override(model=planning(tasks)):
        assert len((await orchestrator.run("Write copy.")).output.tasks) == tasks
    schema = Plan.model_json_schema()["properties"]["tasks"]
    assert (schema["minItems"], schema["maxItems"]) == (2, 5)
    assert list(Plan.model_json_schema()["properties"]) == ["analysis", "tasks"]


async def test_a_plan_without_tasks_at_all() -> None:
    """Output of another form is told apart from a plan out of bounds."""
    with (
        orchestrator.override(model=TypedModel(lambda _: '{"analysis": "?"}')),
        pytest.raises(UnexpectedModelBehavior, match="output retries"),
    ):
        await orchestrator.run("Write copy.")


async def test_a_failed_worker_does_not_disturb_the_others() -> None:
    """Its error is in its place, and the synthesiser joins the rest."""

    def one_fails(request: WorkRequest) -> Work:
        if request.task.type == "style 1":
            raise TerminalError("the provider rejects it", 502)
        return delivered(request)

    joining = TypedModel(join)
    with (
        orchestrator.override(model=TypedModel(lambda _: plan(3))),
        synthesiser.override(model=joining),
    ):
        response = await InMemoryInvocation(run, REQUEST, calls={work: one_fails}).run()
    assert [it.status for it in response.works] == ["done", "failed", "done"]
    assert response.works[1] == Failed(task=plan(3).tasks[1], error="the provider rejects it")
    [prompt] = joining.asked
    assert "style 0" in prompt
    assert "style 1" not in prompt


async def test_nothing_but_failures_is_a_failure() -> None:
    """There is nothing to join: an error with the reason, once."""
    joining = TypedModel(join)

    def fail(request: WorkRequest) -> Work:
        raise TerminalError("rejected", 502)

    with (
        orchestrator.override(model=TypedModel(lambda _: plan(3))),
        synthesiser.override(model=joining),
        pytest.raises(TerminalError, match=r"^All tasks failed: rejected$") as caught,
    ):
        await InMemoryInvocation(run, REQUEST, calls={work: fail}).run()
    assert caught.value.status_code == 502
    assert joining.asked == []


async def test_a_cancelled_worker_cancels_the_run() -> None:
    """It is not a result that is missing: somebody wanted it to stop."""

    def cancelled(request: WorkRequest) -> Work:
        raise TerminalError("cancelled", 409)

    with (
        orchestrator.override(model=TypedModel(lambda _: plan(2))),
        pytest.raises(TerminalError, match="cancelled") as caught,
    ):
        await InMemoryInvocation(run, REQUEST, calls={work: cancelled}).run()
    assert caught.value.status_code == 409


async def test_a_crash_after_any_step() -> None:
    """The same text, the plan stands, and no completed step runs again."""
    planned, joined = TypedModel(lambda _: plan(3)), TypedModel(join)
    with orchestrator.override(model=planned), synthesiser.override(model=joined):
        await check_every_crash(run, REQUEST, calls={work: delivered})
    # undisturbed, and with a crash after the plan and after the synthesis
    assert len(planned.asked) == len(joined.asked) == 3


async def test_a_crash_after_the_workers_step() -> None:
    """Each worker has a journal of its own."""
    model = TypedModel(lambda _: Work(text="Cold for a day."))
    with worker.override(model=model):
        await check_every_crash(work, {})
    assert len(model.asked) == 2


@pytest.mark.parametrize("handler", [run, work])
async def test_a_large_request_is_refused(handler: Callable[..., Awaitable[object]]) -> None:
    """413, with the field and its limit."""
    with pytest.raises(
        TerminalError, match="`assignment`: String should have at most 4000 characters"
    ) as caught:
        await InMemoryInvocation(handler, {"assignment": "a" * 4001}).run()
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"assignment": " "}', ("assignment",)),
        ('{"assignment": null}', ("assignment",)),
        ('{"task": "a"}', ("task",)),
    ],
)
def test_bad_input_names_the_field(body: str, field: tuple[str, ...]) -> None:
    """`durable.app` turns this into a 400."""
    with pytest.raises(ValidationError) as error:
        OrchestratorWorkersRequest.model_validate_json(body)
    assert error.value.errors()[0]["loc"] == field


async def test_a_rejected_request_of_a_worker_is_its_failure() -> None:
    """What `run` is told about it has the status and no response body."""

    def reject(prompt: str) -> Answer:
        raise ModelHTTPError(status_code=401, model_name="scripted", body={"secret": "canary"})

    with worker.override(model=TypedModel(reject)), pytest.raises(TerminalError) as caught:
        await InMemoryInvocation(work, {}).run()
    assert "answered 401" in caught.value.message
    assert "canary" not in caught.value.message
