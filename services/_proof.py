"""Did a killed run repeat a completed step? Two witnesses that know nothing of each other answer.

The journal says which steps are there and which had their result when the worker was killed; the
proxy says which requests really went to the model, and when. Each different request is one step, in
the order of the journal.

- A step that was completed at the kill: one request before the restart, none after it.
- The first other step: one request after the restart. One before it, too, when the kill cut it, or
  came between its answer and the journal.
- The steps after that: one request, after the restart.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table

from services._proxy import ModelRequest


@dataclass(frozen=True, kw_only=True)
class JournaledStep:
    """A step as the journal has it."""

    name: str

    results: tuple[str, ...] = ()
    """The stored results: none while it runs, exactly one when it is completed."""


@dataclass(frozen=True, kw_only=True)
class StepAccount:
    """What both witnesses say of one step."""

    step: JournaledStep
    at_kill: Literal["completed", "running", "not begun"]
    before: Sequence[ModelRequest]
    after: Sequence[ModelRequest]


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The outcome, step by step."""

    accounts: Sequence[StepAccount]
    refused: int = 0
    """Requests that the provider answered with an error; they are not counted."""
    problems: list[str] = field(default_factory=list[str])
    """What did not hold; empty when the run was durable."""

    def table(self) -> Table:
        """Show the accounts as a table that fits into 80 columns."""
        table = Table(
            title="Results in the journal, and model requests before and after the restart",
            title_justify="left",
            title_style="",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("step")
        table.add_column("results", justify="right")
        table.add_column("at the kill")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        for number, account in enumerate(self.accounts, start=1):
            table.add_row(
                f"{number} {account.step.name}",
                str(len(account.step.results)),
                account.at_kill,
                str(len(account.before)),
                str(len(account.after)),
            )
        return table

    def summary(self) -> str:
        """Say in one line what was counted."""
        steps = len(self.accounts)
        completed = sum(account.at_kill == "completed" for account in self.accounts)
        requests = [it for account in self.accounts for it in (*account.before, *account.after)]
        cut = sum(not request.delivered for request in requests)
        lost = len(requests) - steps - cut
        parts = [f"{steps} steps = {completed} before the kill + {steps - completed} after it"]
        parts.append(
            f"{len(requests)} model requests = {steps} for the steps + {cut} cut by the kill"
            + (f" + {lost} answered but not yet journaled at the kill" if lost else "")
        )
        if self.refused:
            parts.append(f"{self.refused} more were refused by the provider")
        return "; ".join(parts) + "."


def journaled_steps(rows: Sequence[Mapping[str, Any]]) -> list[JournaledStep]:
    """Read the steps and their results from rows of `sys_journal`.

    Args:
        rows: In order, each with `entry_type`, `name`, `raw` and `entry_lite_json`.
    """
    results: dict[int, list[str]] = {}
    for row in rows:
        if row["entry_type"] == "Notification: Run":
            completion = json.loads(row["entry_lite_json"])["Notification"]["id"]["CompletionId"]
            results.setdefault(completion, []).append(row["raw"])
    steps: list[JournaledStep] = []
    for row in rows:
        if row["entry_type"] == "Command: Run":
            completion = json.loads(row["entry_lite_json"])["Command"]["Run"]["completion_id"]
            stored = tuple(results.get(completion, ()))
            steps.append(JournaledStep(name=row["name"], results=stored))
    return steps


def account(
    *,
    at_kill: Sequence[JournaledStep],
    at_end: Sequence[JournaledStep],
    before: Sequence[ModelRequest],
    after: Sequence[ModelRequest],
    expected: int,
) -> Proof:
    """Compare what the journal and the proxy say of a run that was killed and finished.

    Args:
        at_kill: The journal between the kill and the restart.
        at_end: The journal of the finished run.
        before: The requests of this run that began before the restart.
        after: Those that began after it.
        expected: How many steps the run has at least.
    """
    problems: list[str] = []
    completed = [step for step in at_kill if step.results]
    if not 0 < len(completed) < len(at_end):
        problems.append(f"the kill was not in the middle: {len(completed)} steps were completed")
    if len(at_end) < expected:
        problems.append(f"the journal has {len(at_end)} steps instead of {expected}")
    if completed != list(at_end[: len(completed)]):
        problems.append("the journal of the steps before the kill changed after it")

    refused = sum(request.refused for request in (*before, *after))
    answered = [request for request in (*before, *after) if not request.refused]
    asked = list(dict.fromkeys(request.asked for request in answered))
    if len(asked) != len(at_end):
        problems.append(f"{len(asked)} different model requests for {len(at_end)} steps")

    accounts: list[StepAccount] = []
    for number, step in enumerate(at_end):
        of_step = asked[number : number + 1]
        accounts.append(
            StepAccount(
                step=step,
                at_kill="completed"
                if number < len(completed)
                else "running"
                if number < len(at_kill)
                else "not begun",
                before=[it for it in before if it.asked in of_step and not it.refused],
                after=[it for it in after if it.asked in of_step and not it.refused],
            )
        )
        problems += _problems(accounts[-1], number=number, completed=len(completed))
    return Proof(accounts=accounts, refused=refused, problems=problems)


def _problems(account: StepAccount, *, number: int, completed: int) -> list[str]:
    problems: list[str] = []
    name = f"step {number + 1} ({account.step.name})"
    if (results := len(account.step.results)) != 1:
        problems.append(f"{name} has {results} results in the journal instead of 1")
    before, after = len(account.before), len(account.after)
    if account.at_kill == "completed":
        allowed, wanted_after, final = range(1, 2), 0, account.before
    else:
        # Only the step that ran when the kill came can have been requested before.
        allowed, wanted_after, final = range(2 if number == completed else 1), 1, account.after
    if before not in allowed:
        problems.append(f"{name} was requested {before} times before the restart")
    if after != wanted_after:
        problems.append(f"{name} was requested {after} times after the restart")
    if not all(request.delivered for request in final):
        problems.append(f"{name} has a result, but the model's answer was not delivered")
    return problems
