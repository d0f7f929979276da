"""An application whose agent is evaluated online; tests kill its workers while evaluators run."""

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import restate
from pydantic_ai import Agent
from pydantic_evals.evaluators import Evaluator, EvaluatorContext

import durable
from durable.evals import OnlineEvaluation
from tests.live.scripted import script

FOLDER = Path(os.environ["EVALUATED_FOLDER"])


def note(what: str) -> None:
    """Append a line that survives a kill."""
    file = os.open(FOLDER / "trace", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{what}\n".encode())
    os.close(file)


@dataclass
class Quick(Evaluator[Any, Any, Any]):
    """Is done before the kill."""

    def evaluate(self, ctx: EvaluatorContext[Any, Any, Any]) -> bool:
        """Note it."""
        note("quick")
        return True


@dataclass
class Held(Evaluator[Any, Any, Any]):
    """Is under way when the worker is killed."""

    async def evaluate(self, ctx: EvaluatorContext[Any, Any, Any]) -> float:
        """Note it, and go on when the file `go` is there."""
        note("held begins")
        while not (FOLDER / "go").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.02)
        note("held ends")
        return 0.5


evaluation = OnlineEvaluation(evaluators=[Quick(), Held()])
agent = Agent(script(), name="evaluated", capabilities=[durable.RestateDurability(), evaluation])
service = restate.Service("Evaluated")


@service.handler()
async def run(ctx: restate.Context) -> str:
    """Run the agent."""
    return (await agent.run("go")).output


app = durable.app([service, evaluation.service])
