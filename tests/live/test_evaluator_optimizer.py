"""`EvaluatorOptimizerService` on the real server; the worker killed between any two steps."""

import pytest

from agents.evaluator_optimizer import Evaluation, Solution, evaluator, generator
from durable.server import RestateServer
from services.evaluator_optimizer import evaluator_optimizer
from tests.live.hosting import hosted
from tests.live.kills import killed_runs
from tests.typed_model import TypedModel

pytestmark = pytest.mark.live

PATH = "EvaluatorOptimizerService/run"


def output(name: str, prompt: str) -> Solution | Evaluation:
    """Play two rounds: the second solution passes."""
    if name == "Solution":
        number = prompt.count("was judged") + 1
        return Solution(approach=f"idea {number}", solution=f"code {number}")
    if "code 1" in prompt:
        return Evaluation(feedback="Too slow.", verdict="NEEDS_IMPROVEMENT")
    return Evaluation(feedback="Good.", verdict="PASS")


ATTEMPTS = [
    {
        "solution": {"approach": "idea 1", "solution": "code 1"},
        "evaluation": {"feedback": "Too slow.", "verdict": "NEEDS_IMPROVEMENT"},
    },
    {
        "solution": {"approach": "idea 2", "solution": "code 2"},
        "evaluation": {"feedback": "Good.", "verdict": "PASS"},
    },
]


async def test_the_example(server: RestateServer) -> None:
    """`{}` improves the stack until it passes: one step per solution and per judgement."""
    generating = TypedModel(lambda prompt: output("Solution", prompt))
    judging = TypedModel(lambda prompt: output("Evaluation", prompt))
    with generator.override(model=generating), evaluator.override(model=judging):
        async with hosted(server, evaluator_optimizer) as ingress:
            assert await ingress.call(PATH, {}) == {
                "outcome": "passed",
                "solution": ATTEMPTS[1]["solution"],
                "attempts": ATTEMPTS,
            }
            steps = await ingress.steps("EvaluatorOptimizerService")
            assert [it.split("__")[0].rpartition("-")[2] for it in steps] == [
                *("generator", "evaluator", "generator", "evaluator")
            ]
    assert "getMin" in generating.asked[0]


async def test_rounds_that_are_used_up(server: RestateServer) -> None:
    """An outcome of its own, with the attempts."""
    with (
        generator.override(model=TypedModel(lambda prompt: output("Solution", prompt))),
        evaluator.override(model=TypedModel(lambda prompt: output("Evaluation", prompt))),
    ):
        async with hosted(server, evaluator_optimizer) as ingress:
            assert await ingress.call(PATH, {"max_rounds": 1}) == {
                "outcome": "rounds_used_up",
                "solution": None,
                "attempts": ATTEMPTS[:1],
            }


async def test_failures_are_clear(server: RestateServer) -> None:
    """A verdict that does not exist, a task that is too large, a bound that is none: no retries."""
    with (
        generator.override(model=TypedModel(lambda prompt: output("Solution", prompt))),
        evaluator.override(model=TypedModel(lambda _: '{"feedback": "?", "verdict": "MAYBE"}')),
    ):
        async with hosted(server, evaluator_optimizer) as ingress:
            for body, status, says in [
                ({}, 502, "output retries"),
                ({"task": "a" * 4001}, 413, "at most 4000 characters"),
                ({"max_rounds": 0}, 400, "`max_rounds`"),
            ]:
                response = await ingress.post(PATH, body)
                assert response.status_code == status, response.text
                assert says in response.json()["message"]
                assert await ingress.retries("EvaluatorOptimizerService") == 0


async def test_a_kill_between_any_two_steps(server: RestateServer) -> None:
    """What was answered before the kill is not asked again; all else is asked once."""
    runs = [it async for it in killed_runs(server, lambda _: PATH, {}, output, steps=4)]
    [whole] = [run.after for run in runs if not run.before]
    assert set(whole.values()) == {1}
    for run in runs:
        assert run.response["attempts"] == ATTEMPTS
        assert run.after == whole - run.before
