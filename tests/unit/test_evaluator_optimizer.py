"""Evaluator and optimizer: rounds until a solution passes, their bound, a crash at every step."""

import pytest
from pydantic import ValidationError
from restate import TerminalError

from agents.evaluator_optimizer import (
    Attempt,
    Evaluation,
    Solution,
    Verdict,
    evaluation_prompt,
    evaluator,
    generation_prompt,
    generator,
)
from durable.testing import InMemoryInvocation, check_every_crash
from services.evaluator_optimizer import EXAMPLE_TASK, EvaluatorOptimizerRequest, run
from tests.typed_model import Answer, TypedModel

REQUEST = {"task": "A stack.", "max_rounds": 3}


def attempt(number: int, verdict: Verdict) -> Attempt:
    """The attempt of a round."""
    return Attempt(
        solution=Solution(approach=f"idea {number}", solution=f"code {number}"),
        evaluation=Evaluation(feedback=f"feedback {number}", verdict=verdict),
    )


class Rounds:
    """A generator and an evaluator that play these attempts, whatever round they are asked in."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.attempts = [attempt(number, it) for number, it in enumerate(verdicts, start=1)]
        self.generator = TypedModel(self._solution)
        self.evaluator = TypedModel(self._evaluation)

    def _solution(self, prompt: str) -> Answer:
        return self.attempts[prompt.count("was judged")].solution

    def _evaluation(self, prompt: str) -> Answer:
        [judged] = [it for it in self.attempts if it.solution.solution in prompt]
        return judged.evaluation


@pytest.mark.parametrize(
    "verdicts",
    [
        ["PASS"],
        ["NEEDS_IMPROVEMENT", "PASS"],
        ["FAIL", "NEEDS_IMPROVEMENT", "PASS"],
    ],
)
async def test_rounds_until_a_solution_passes(verdicts: list[Verdict]) -> None:
    """The response has the solution that passed and all attempts before it."""
    rounds = Rounds(*verdicts)
    with (
        generator.override(model=rounds.generator),
        evaluator.override(model=rounds.evaluator),
    ):
        invocation = InMemoryInvocation(run, REQUEST)
        response = await invocation.run()
        await invocation.replay()
    assert response.outcome == "passed"
    assert response.solution == rounds.attempts[-1].solution
    assert response.attempts == rounds.attempts


async def test_rounds_that_are_used_up() -> None:
    """The outcome says so, no solution is passed off as good, and the attempts are all there."""
    rounds = Rounds("FAIL", "NEEDS_IMPROVEMENT", "NEEDS_IMPROVEMENT")
    with (
        generator.override(model=rounds.generator),
        evaluator.override(model=rounds.evaluator),
    ):
        response = await InMemoryInvocation(run, REQUEST).run()
    assert response.outcome == "rounds_used_up"
    assert response.solution is None
    assert response.attempts == rounds.attempts
    assert len(rounds.generator.asked) == len(rounds.evaluator.asked) == 3


def test_the_generator_is_told_all_feedback() -> None:
    """And of the solutions the last one, which it is to improve."""
    first, second = attempt(1, "FAIL"), attempt(2, "NEEDS_IMPROVEMENT")
    assert generation_prompt("A stack.") == "Task:\nA stack."
    assert generation_prompt("A stack.", [first, second]) == (
        "Task:\nA stack.\n\nAttempt 1 was judged FAIL:\nfeedback 1\n\nYour last solution:\ncode 2\n\n"
        "Attempt 2 was judged NEEDS_IMPROVEMENT:\nfeedback 2"
    )


def test_the_evaluator_judges_the_solution_alone() -> None:
    """Not the arguments for it."""
    prompt = evaluation_prompt("A stack.", attempt(1, "PASS").solution)
    assert prompt == "Task:\nA stack.\n\nSolution:\ncode 1"
    assert list(Evaluation.model_json_schema()["properties"]) == ["feedback", "verdict"]


async def test_an_unknown_verdict_is_sent_back() -> None:
    """Corrected, it counts as if it had been said at once."""
    answers = iter(
        ['{"feedback": "?", "verdict": "MAYBE"}', '{"feedback": "!", "verdict": "PASS"}']
    )
    rounds = Rounds("PASS")
    with (
        generator.override(model=rounds.generator),
        evaluator.override(model=TypedModel(lambda _: next(answers))),
    ):
        response = await InMemoryInvocation(run, REQUEST).run()
    assert response.outcome == "passed"
    assert response.attempts[0].evaluation == Evaluation(feedback="!", verdict="PASS")


async def test_an_unknown_verdict_that_stays_ends_the_run() -> None:
    """It is neither a pass nor another round."""
    rounds = Rounds("PASS")
    judging = TypedModel(lambda _: '{"feedback": "?", "verdict": "MAYBE"}')
    with (
        generator.override(model=rounds.generator),
        evaluator.override(model=judging),
        pytest.raises(TerminalError, match="output retries") as caught,
    ):
        await InMemoryInvocation(run, REQUEST).run()
    assert caught.value.status_code == 502
    assert len(rounds.generator.asked) == 1
    assert len(judging.asked) == 2


async def test_a_crash_after_any_step() -> None:
    """The same attempts, and each prompt is asked once: steps do not run beside each other here."""
    rounds = Rounds("FAIL", "NEEDS_IMPROVEMENT", "PASS")
    with (
        generator.override(model=rounds.generator),
        evaluator.override(model=rounds.evaluator),
    ):
        response = await check_every_crash(run, REQUEST)
    assert response.attempts == rounds.attempts
    runs = 1 + 6  # undisturbed, and a crash after each of six steps
    assert len(rounds.generator.asked) == len(rounds.evaluator.asked) == 3 * runs


async def test_a_large_task_is_refused() -> None:
    """413, with the field and its limit, before the model is asked."""
    model = TypedModel(lambda _: attempt(1, "PASS").solution)
    with (
        generator.override(model=model),
        pytest.raises(
            TerminalError, match="`task`: String should have at most 4000 characters"
        ) as caught,
    ):
        await InMemoryInvocation(run, {"task": "a" * 4001}).run()
    assert caught.value.status_code == 413
    assert model.asked == []


def test_the_example_request_is_the_stack() -> None:
    """`{}` is a whole request, so the playground works without typing."""
    assert EvaluatorOptimizerRequest.model_validate_json("{}").task == EXAMPLE_TASK
    assert all(name in EXAMPLE_TASK for name in ("push", "pop", "getMin", "O(1)"))


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"task": ""}', "task"),
        ('{"task": 5}', "task"),
        ('{"max_rounds": 0}', "max_rounds"),
        ('{"max_rounds": 11}', "max_rounds"),
        ('{"rounds": 3}', "rounds"),
    ],
)
def test_bad_input_names_the_field(body: str, field: str) -> None:
    """`durable.app` turns this into a 400."""
    with pytest.raises(ValidationError) as error:
        EvaluatorOptimizerRequest.model_validate_json(body)
    assert error.value.errors()[0]["loc"] == (field,)
