"""Online evals without a server: what is left behind by a run, crash by crash, and which runs are sampled."""

from dataclasses import dataclass
from typing import Any

import pytest
import restate
from pydantic_ai import Agent
from pydantic_ai.models.test import TestModel
from pydantic_evals.evaluators import Evaluator, EvaluatorContext
from pydantic_evals.online import OnlineEvalConfig, OnlineEvaluator, SamplingMode

import durable
from durable.evals import OnlineEvaluation
from durable.testing import InMemoryInvocation, check_every_crash


@dataclass
class Fine(Evaluator[Any, Any, Any]):
    """Finds everything fine."""

    def evaluate(self, ctx: EvaluatorContext[Any, Any, Any]) -> bool:
        return True


def handler(evaluation: OnlineEvaluation[Any]) -> Any:
    agent = Agent(TestModel(), name="poet", capabilities=[durable.RestateDurability(), evaluation])
    service = restate.Service("Poet")

    @service.handler()
    async def write(ctx: restate.Context, topic: str) -> str:
        return (await agent.run(topic)).output

    return write


async def test_every_crash() -> None:
    write = handler(OnlineEvaluation(evaluators=[Fine()]))
    invocation = InMemoryInvocation(write, "spring")
    await invocation.run()
    assert [entry.name for entry in invocation.stored] == [
        "poet__model.request",
        "poet__online_evaluation",
        "OnlineEvaluation/evaluate",
    ]
    await invocation.replay()
    await check_every_crash(write, "spring")


@pytest.mark.parametrize("config", [{"enabled": False}, {"default_sample_rate": 0.0}])
async def test_runs_that_are_not_sampled(config: dict[str, Any]) -> None:
    evaluation = OnlineEvaluation(evaluators=[Fine()], config=OnlineEvalConfig(**config))
    invocation = InMemoryInvocation(handler(evaluation), "spring")
    await invocation.run()
    assert [entry.name for entry in invocation.stored] == ["poet__model.request"]


async def test_replays_decide_alike() -> None:
    evaluation = OnlineEvaluation(
        evaluators=[OnlineEvaluator(evaluator=Fine(), sample_rate=0.5)],
    )
    agent = Agent(TestModel(), name="poet", capabilities=[durable.RestateDurability(), evaluation])
    service = restate.Service("Poets")

    @service.handler()
    async def write(ctx: restate.Context) -> None:
        for _ in range(20):
            await agent.run("spring")

    invocation = InMemoryInvocation(write)
    await invocation.run()
    assert 0 < [entry.name for entry in invocation.stored].count("OnlineEvaluation/evaluate") < 20
    for _ in range(3):
        await invocation.replay()


@pytest.mark.parametrize(("mode", "both"), [("independent", 0.09), ("correlated", 0.3)])
def test_sampling(mode: SamplingMode, both: float) -> None:
    """Shares are what was asked for; correlated, the runs of the lower rate are among those of the higher."""
    evaluation = OnlineEvaluation(
        evaluators=[
            OnlineEvaluator(evaluator=Fine(), sample_rate=0.3),
            OnlineEvaluator(evaluator=Fine(), sample_rate=0.3),
        ],
        config=OnlineEvalConfig(sampling_mode=mode),
    )
    runs = [f"inv_{number}:0" for number in range(5000)]
    sampled: list[set[str]] = [
        {run for run in runs if evaluation._may_be_sampled(online, run, label)}
        for label, online in evaluation._labelled.items()
    ]
    assert [*evaluation._labelled] == ["Fine", "Fine_2"]
    assert all(len(some) / len(runs) == pytest.approx(0.3, abs=0.03) for some in sampled)
    assert len(sampled[0] & sampled[1]) / len(runs) == pytest.approx(both, abs=0.03)
