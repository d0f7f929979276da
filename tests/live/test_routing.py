"""Routing, to a specialist beside it and to one hosted elsewhere: the worker is killed between the two requests."""

import pytest

from agents.routing import Reply, Route
from durable.server import RestateServer
from tests.live.kills import killed_runs

pytestmark = pytest.mark.live


def output(name: str, prompt: str) -> Route | Reply:
    """Choose a team, and reply as it."""
    if name == "Route":
        return Route(reasoning="It is about money.", team="billing")
    return Reply(subject="Your ticket", body=prompt, next_steps=[])


@pytest.mark.parametrize("handler", ["run", "run_hosted"])
async def test_a_killed_worker(server: RestateServer, handler: str) -> None:
    """A decision that was made stands."""
    body = {"ticket": "I was charged twice."}
    path = f"RoutingService/{handler}"
    async for run in killed_runs(server, lambda _: path, body, output, steps=2):
        assert run.response["route"]["team"] == "billing"
        assert run.response["reply"]["body"] == body["ticket"]
        assert (run.before + run.after).total() == 2
        assert run.after.total() == 2 - run.before.total()
