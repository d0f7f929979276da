"""New code while invocations of the old code are under way: they finish, or say what does not fit."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import restate
from pydantic import BaseModel
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import AbstractCapability, durable_operation
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.models.test import TestModel
from restate.ext.pydantic import RestateAgent

import durable
from durable.server import RestateServer
from tests.live.hosting import PATIENCE, Ingress, hosted, http_client, serving
from tests.live.scripted import calls, done

pytestmark = pytest.mark.live

Version = Callable[[restate.Context], Awaitable[Any]]


def updated(name: str, *versions: Version) -> restate.Service:
    """A service whose code is replaced when it has run to its end for the first time, or has failed."""
    service = restate.Service(name)
    left = list(versions)

    @service.handler()
    async def run(ctx: restate.Context) -> Any:
        version = left[0]
        try:
            output = await version(ctx)
        except Exception:
            left.pop(0)
            raise
        if version is versions[0] and len(left) == len(versions):
            left.pop(0)
            raise RuntimeError("the worker is updated now")
        return output

    return service


async def test_a_changed_agent_is_told_what_to_do(
    server: RestateServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A run in flight whose agent was renamed is not lost: it goes on when its code is back."""

    def version(name: str) -> Version:
        agent = Agent(calls(), name=name, capabilities=[durable.RestateDurability()])

        async def run(ctx: restate.Context) -> str:
            return (await agent.run("go")).output

        return run

    before = version("before")
    async with hosted(server, updated("Drift", before, version("after"), before)) as ingress:
        assert await ingress.call("Drift/run") == "hello"
    assert done == {"model": 1}
    assert "`run` does not fit the journal of inv_" in caplog.text
    assert "before__model.request != after__model.request" in caplog.text
    assert "Register the earlier version as a deployment of its own" in caplog.text


class Bill(BaseModel):
    """What was stored."""

    total: int


class BillInCurrency(Bill):
    """What the new code expects."""

    currency: str


def billing(bill_type: Any) -> Callable[..., Any]:
    """A function whose result is stored as `bill_type`."""

    def bill(*args: Any) -> Any:
        done["bill"] += 1
        return Bill(total=7)

    bill.__annotations__["return"] = bill_type
    return bill


def runs(agent: Agent[None, Any]) -> Version:
    """Run the agent once."""

    async def run(ctx: restate.Context) -> None:
        await agent.run("go")

    return run


def capability(bill_type: Any) -> Version:
    """The result of a capability's operation."""

    async def bill(self: Any, ctx: RunContext[Any]) -> Any:
        return billing(bill_type)()

    bill.__annotations__["return"] = bill_type

    class Billing(AbstractCapability[Any]):
        id = "bills"
        book = durable_operation(name="bill")(bill)

        async def before_model_request(
            self, ctx: RunContext[Any], request_context: ModelRequestContext
        ) -> ModelRequestContext:
            await self.book(ctx)
            return request_context

    return runs(
        Agent(calls(), name="billing", capabilities=[Billing(), durable.RestateDurability()])
    )


def own_step(bill_type: Any) -> Version:
    """The result of a function with `@durable.step`."""
    step = durable.step(billing(bill_type))

    async def run(ctx: restate.Context) -> None:
        await step()

    return run


def step_in_a_tool(bill_type: Any) -> Version:
    """The same, called by a context tool."""
    step = durable.step(billing(bill_type))
    agent = Agent(calls("ask"), name="billing", capabilities=[durable.RestateDurability()])

    @agent.tool_plain(metadata={"restate": False})
    async def ask() -> int:
        return (await step()).total

    return runs(agent)


def output_function(bill_type: Any) -> Version:
    """The result of an output function."""
    bill = billing(bill_type)

    def give(total: int) -> Any:
        return bill()

    give.__annotations__["return"] = bill_type
    durability = durable.RestateDurability()
    return runs(Agent(TestModel(), name="billing", output_type=give, capabilities=[durability]))


@pytest.mark.parametrize(
    "version",
    [
        capability,
        own_step,
        step_in_a_tool,
        output_function,
    ],
)
async def test_a_stored_result_that_does_not_fit_any_more(
    server: RestateServer, caplog: pytest.LogCaptureFixture, version: Callable[[Any], Version]
) -> None:
    """The new code is told which type and field; nothing is done again; the old code finishes it."""
    name = f"Schema{version.__name__.title().replace('_', '')}"
    old, new = version(Bill), version(BillInCurrency)
    async with hosted(server, updated(name, old, new, old)) as ingress:
        response = await ingress.post(f"{name}/run")
        assert response.status_code == 200, response.text
    assert done["bill"] == 1
    assert "A result in the journal does not fit" in caplog.text
    assert "currency). Register the version of the code that stored it" in caplog.text


PINNED = (
    "SELECT pinned_deployment_id FROM sys_invocation "
    "WHERE target_service_name = 'Moving' AND status {status}"
)


async def test_moving_from_restates_own_integration(server: RestateServer) -> None:
    """What began on `restate.ext.pydantic` ends there; what begins after the move is ours."""
    waiting: asyncio.Future[str] = asyncio.Future()
    old_agent = RestateAgent(Agent(calls(), name="moving"))
    new_agent = Agent(calls(), name="moving", capabilities=[durable.RestateDurability()])

    def service(agent: Any, *, waits: bool) -> restate.Service:
        moving = restate.Service("Moving")

        @moving.handler()
        async def run(ctx: restate.Context) -> str:
            await agent.run("one")
            if waits:
                awakeable, answer = ctx.awakeable(type_hint=str)

                async def notify() -> None:
                    waiting.set_result(awakeable)

                await ctx.run_typed("notify", notify)
                await answer
            await agent.run("two")
            return type(agent).__name__

        return moving

    async with (
        serving(restate.app([service(old_agent, waits=True)])) as old_url,
        serving(durable.app([service(new_agent, waits=False)])) as new_url,
        http_client() as http,
    ):
        ingress = Ingress(server, http)
        await server.register(old_url)
        begun = asyncio.create_task(ingress.call("Moving/run"))
        awakeable = await waiting
        [old] = await server.query(PINNED.format(status="!= 'completed'"))
        await server.register(new_url)
        assert await ingress.call("Moving/run") == "Agent"
        assert await ingress.steps("Moving") == ["moving__model.request"] * 2
        await ingress.post(f"restate/awakeables/{awakeable}/resolve", "go on")
        assert await begun == "RestateAgent"
        async with asyncio.timeout(PATIENCE):
            while await server.query(PINNED.format(status="!= 'completed'")):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        ended = await server.query(PINNED.format(status="= 'completed'"))
        assert ended.count(old) == 1
        assert len(ended) == 2
        deployment = f"{server.admin_url}/deployments/{old['pinned_deployment_id']}"
        removed = await http.delete(f"{deployment}?force=true")
        assert removed.is_success
        assert await ingress.call("Moving/run") == "Agent"
    assert done == {"model": 6}
