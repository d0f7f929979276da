"""Parallelization: results in order, failures in place, progress, and a crash at every step."""

import asyncio
from collections import Counter

import pytest
from pydantic import ValidationError
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from restate import TerminalError

from agents.parallelization import (
    Action,
    Analysis,
    Estimate,
    analysis_prompt,
    analyst,
    apply_change,
    estimator,
)
from durable.testing import InMemoryInvocation, check_every_crash
from services.parallelization import (
    EXAMPLE_INPUTS,
    MAX_INPUTS,
    MAX_TEXT,
    Analysed,
    Failed,
    ParallelizationRequest,
    RunToolsRequest,
    progress,
    run,
    run_tools,
)
from tests.typed_model import JSON_SCHEMA_MODE, Answer, TypedModel

INPUTS = ["one", "two", "three", "four", "five"]
REQUEST = {"prompt": "Analyse.", "inputs": INPUTS}


def analysis(text: str) -> Analysis:
    """What the scripted model says about an input."""
    return Analysis(
        impacts=[f"impact on {text}"],
        actions=[Action(action=f"help {text}", priority="high")],
        conclusion=f"about {text}",
    )


def input_of(prompt: str) -> str:
    """Return the input that a prompt is about."""
    return prompt.rpartition("\n")[2]


def analyse(prompt: str) -> Answer:
    """Answer as a model that never fails."""
    return analysis(input_of(prompt))


async def test_results_are_in_the_order_of_the_inputs() -> None:
    """Also when the last input is analysed first; each is given the prompt and itself alone."""
    analysed = {text: asyncio.Event() for text in INPUTS}

    async def last_first(prompt: str) -> Answer:
        text = input_of(prompt)
        for later in INPUTS[INPUTS.index(text) + 1 :]:
            await analysed[later].wait()
        analysed[text].set()
        return analysis(text)

    model = TypedModel(last_first)
    with analyst.override(model=model):
        response = await InMemoryInvocation(run, REQUEST, key="k").run()
    assert response.results == [Analysed(input=it, analysis=analysis(it)) for it in INPUTS]
    assert sorted(model.asked) == sorted(
        analysis_prompt(prompt="Analyse.", text=it) for it in INPUTS
    )


async def test_a_failure_stays_in_its_place() -> None:
    """A request that the provider rejects and output that never fits: the other three are there."""

    def answer(prompt: str) -> Answer:
        match input_of(prompt):
            case "two":
                raise ModelHTTPError(status_code=400, model_name="scripted")
            case "four":
                return "I would rather talk about something else."
            case text:
                return analysis(text)

    with analyst.override(model=TypedModel(answer)):
        invocation = InMemoryInvocation(run, REQUEST, key="k")
        response = await invocation.run()
        await invocation.replay()
    assert [result.status for result in response.results] == [
        *("done", "failed", "done", "failed", "done")
    ]
    two, four = response.results[1], response.results[3]
    assert isinstance(two, Failed)
    assert isinstance(four, Failed)
    assert two.input == "two"
    assert "model `scripted` answered 400" in two.error
    assert "output retries" in four.error
    assert invocation.state["progress"] == {
        "statuses": ["done", "failed", "done", "failed", "done"]
    }


async def test_nothing_but_failures_is_a_failure() -> None:
    """A provider that rejects everything is an error for the caller, with the reason once."""

    def reject(prompt: str) -> Answer:
        raise ModelHTTPError(status_code=401, model_name="scripted")

    with (
        analyst.override(model=TypedModel(reject)),
        pytest.raises(TerminalError, match="All inputs failed: ") as caught,
    ):
        await InMemoryInvocation(run, REQUEST, key="k").run()
    assert caught.value.status_code == 502
    assert caught.value.message.count("401") == 1


async def test_a_crash_after_three_of_five_repeats_two() -> None:
    """The three that have their result are not asked about again."""
    crashed = asyncio.Event()

    async def three_at_first(prompt: str) -> Answer:
        if input_of(prompt) in INPUTS[3:]:
            await crashed.wait()
        return analyse(prompt)

    model = TypedModel(three_at_first)
    with analyst.override(model=model):
        invocation = InMemoryInvocation(run, REQUEST, key="k")
        await invocation.run_until_crash(after=3)
        crashed.set()
        response = await invocation.run()
    assert len(invocation.invoked) == 2
    assert [result.status for result in response.results] == ["done"] * 5
    assert Counter(map(input_of, model.asked)) == Counter(INPUTS) + Counter(INPUTS[3:])


async def test_a_crash_after_any_step() -> None:
    """The same results, and no completed step again."""
    with analyst.override(model=TypedModel(analyse)):
        response = await check_every_crash(run, REQUEST, key="k")
    assert [result.input for result in response.results] == INPUTS


async def test_a_cancelled_run_is_cancelled() -> None:
    """It does not end with five failures in the place of results."""
    asked = asyncio.Event()

    async def never(prompt: str) -> Answer:
        asked.set()
        return await asyncio.Future[Answer]()

    with analyst.override(model=TypedModel(never)):
        invocation = InMemoryInvocation(run, REQUEST, key="k")
        running = asyncio.create_task(invocation.run())
        await asked.wait()
        invocation.cancel()
        with pytest.raises(TerminalError, match="cancelled") as caught:
            await running
    assert caught.value.status_code == 409


async def test_progress() -> None:
    """What `run` has stored; an error that says what to do before there is a run."""
    statuses = ["done", "open", "failed"]
    state = {"progress": {"statuses": statuses}}
    found = await InMemoryInvocation(progress, key="k", state=state).run()
    assert found.statuses == statuses
    with pytest.raises(TerminalError, match="No run with the key 'k'") as caught:
        await InMemoryInvocation(progress, key="k").run()
    assert caught.value.status_code == 404


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"inputs": ["a"] * (MAX_INPUTS + 1)}, "`inputs`: List should have at most 50 items"),
        ({"inputs": ["a", "b" * 5000]}, "`inputs.1`: String should have at most 4000 characters"),
        ({"prompt": "a" * (MAX_TEXT + 1)}, "`prompt`: String should have at most 4000 characters"),
    ],
)
async def test_a_large_request_is_refused(request_: dict[str, object], message: str) -> None:
    """413, with the field and its limit, before the model is asked."""
    model = TypedModel(analyse)
    with (
        analyst.override(model=model),
        pytest.raises(TerminalError, match=message) as caught,
    ):
        await InMemoryInvocation(run, request_, key="k").run()
    assert caught.value.status_code == 413
    assert model.asked == []


async def test_the_largest_request() -> None:
    """The limits themselves are allowed."""
    request = {"prompt": "a" * MAX_TEXT, "inputs": ["b" * MAX_TEXT] * MAX_INPUTS}
    with analyst.override(model=TypedModel(lambda _: analysis("it"))):
        response = await InMemoryInvocation(run, request, key="k").run()
    assert len(response.results) == MAX_INPUTS


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"inputs": []}', ("inputs",)),
        ('{"inputs": ["a", " "]}', ("inputs", 1)),
        ('{"inputs": "a"}', ("inputs",)),
        ('{"prompt": ""}', ("prompt",)),
        ('{"input": ["a"]}', ("input",)),
    ],
)
def test_bad_input_names_the_field(body: str, field: tuple[str | int, ...]) -> None:
    """`durable.app` turns this into a 400."""
    with pytest.raises(ValidationError) as error:
        ParallelizationRequest.model_validate_json(body)
    assert error.value.errors()[0]["loc"] == field


def test_the_example_request_has_four_groups() -> None:
    """`{}` is a whole request: four groups of stakeholders with three concerns each."""
    request = ParallelizationRequest.model_validate_json("{}")
    assert request.inputs == EXAMPLE_INPUTS
    assert [it.partition(":")[0] for it in request.inputs] == [
        *("Customers", "Employees", "Investors", "Suppliers")
    ]
    assert all(it.count(",") == 2 for it in request.inputs)
    assert len(RunToolsRequest.model_validate_json("{}").question) < MAX_TEXT


# One agent that calls tools at once


def change(id: str, amount: float, percent: float) -> ToolCallPart:
    """A call of the estimator's tool."""
    arguments = {"item": id, "amount": amount, "percent": percent}
    return ToolCallPart("apply_change", arguments, tool_call_id=id)


def estimating(*turns: list[ToolCallPart]) -> FunctionModel:
    """A model that makes the calls of each turn at once, then answers."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        turn = sum(isinstance(message, ModelResponse) for message in messages)
        if turn < len(turns):
            return ModelResponse(parts=turns[turn])
        return ModelResponse(parts=[TextPart(Estimate(answer="Energy.").model_dump_json())])

    return FunctionModel(respond, profile=JSON_SCHEMA_MODE)


async def test_parallel_tools() -> None:
    """One step per call; the response lists the calls with their results, in the model's order."""
    model = estimating([change("materials", 1_200_000, 15), change("logistics", 300_000, -4)])
    with estimator.override(model=model):
        invocation = InMemoryInvocation(run_tools, {"question": "How much?"}, key="k")
        response = await invocation.run()
        await invocation.replay()
    assert response.answer == "Energy."
    assert [(call.arguments["item"], call.result) for call in response.calls] == [
        ("materials", 1_380_000),
        ("logistics", 288_000),
    ]
    operations = [entry.name.split("__")[-1].split(":")[0] for entry in invocation.stored]
    assert operations == [
        *("model.request.function", "<agent>.call_tool", "<agent>.call_tool"),
        "model.request.function",
    ]


async def test_parallel_tools_with_a_call_that_is_corrected() -> None:
    """A percentage out of range goes back to the model and is no result."""
    model = estimating([change("a", 100, 5000), change("b", 100, 50)], [change("c", 100, 500)])
    with estimator.override(model=model):
        response = await InMemoryInvocation(run_tools, {}, key="k").run()
    assert [(call.arguments["item"], call.result) for call in response.calls] == [
        ("b", 150),
        ("c", 600),
    ]


async def test_a_crash_after_any_step_of_the_tools() -> None:
    """The same answer, and no completed step again."""
    model = estimating([change(f"cost {number}", number, 10) for number in range(4)])
    with estimator.override(model=model):
        response = await check_every_crash(run_tools, {}, key="k")
    assert len(response.calls) == 4


async def test_a_large_question_is_refused() -> None:
    """413, with the field and its limit."""
    with pytest.raises(
        TerminalError, match="`question`: String should have at most 4000 characters"
    ) as caught:
        await InMemoryInvocation(run_tools, {"question": "a" * 4001}, key="k").run()
    assert caught.value.status_code == 413


def test_the_tool_is_exact_to_the_cent() -> None:
    """It does what models are bad at."""
    assert apply_change("energy", 150_000, 22) == 183_000
    assert apply_change("energy", 19.99, 7.7) == 21.53
