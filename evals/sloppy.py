"""A model that is sloppy in one way per pattern: what evaluators are there for, or they are worth nothing.

It says what the references say, spoiled: wrong figures, the wrong team, a call made twice, code waved through.
"""

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, cast

from pydantic_evals import Case

from agents.evaluator_optimizer import Attempt
from agents.parallelization import Analysis
from agents.routing import Team
from evals.patterns import CaseMetadata, OrchestratorReference, RoutingReference, ToolsReference

SLOPPY = "sloppy"
"""The name of this model on the command line."""


def spoiled(pattern: str, cases: Iterable[Case[Any, Any, Any]]) -> list[Case[Any, Any, Any]]:
    """Return the cases with references that are wrong."""
    copies = [deepcopy(case) for case in cases]
    for case in copies:
        metadata = cast(CaseMetadata[Any], case.metadata)
        metadata.reference = _SPOIL[pattern](metadata.reference)
    return copies


def _bumped(reference: list[str]) -> list[str]:
    """Every number is one too high."""
    return [re.sub(r"\d+", lambda it: str(int(it[0]) + 1), text) for text in reference]


def _misrouted(reference: RoutingReference) -> RoutingReference:
    """To billing, whatever it is about, and money is promised."""
    team: Team = "product" if reference.route.team == "billing" else "billing"
    body = f"{reference.reply.body} 1234 USD has been refunded."
    return RoutingReference(
        route=reference.route.model_copy(update={"team": team}),
        reply=reference.reply.model_copy(update={"body": body}),
    )


def _unranked(reference: list[Analysis]) -> list[Analysis]:
    """Each analysis is that of the next input, its actions upside down."""
    return [
        it.model_copy(update={"actions": it.actions[::-1]}) for it in [*reference[1:], reference[0]]
    ]


def _calculated_twice(reference: ToolsReference) -> ToolsReference:
    return reference.model_copy(update={"calls": [*reference.calls, *reference.calls[:1]]})


def _shortened(reference: OrchestratorReference) -> OrchestratorReference:
    """The last task is forgotten, which leaves too short a plan where there were two."""
    plan = reference.plan.model_copy(update={"tasks": reference.plan.tasks[:-1]})
    return reference.model_copy(update={"plan": plan, "works": reference.works[:-1]})


def _waved_through(reference: list[Attempt]) -> list[Attempt]:
    """The first attempt passes, whatever it is worth."""
    first = reference[0]
    verdict = first.evaluation.model_copy(update={"verdict": "PASS"})
    return [first.model_copy(update={"evaluation": verdict})]


def _unimpressed(reference: list[str]) -> list[str]:
    """No comment changes anything."""
    return [reference[0]] * len(reference)


_SPOIL: dict[str, Callable[[Any], Any]] = {
    "chaining": _bumped,
    "routing": _misrouted,
    "parallelization": _unranked,
    "parallel-tools": _calculated_twice,
    "orchestrator-workers": _shortened,
    "evaluator-optimizer": _waved_through,
    "human-in-the-loop": _unimpressed,
}
