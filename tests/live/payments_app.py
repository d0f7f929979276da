"""An agent whose tool is a handler that waits in the middle, for a test that kills the worker then."""

import os
from pathlib import Path

import restate
from pydantic_ai import Agent
from restate import Context

import durable
from tests.live.hosting import agent_service
from tests.live.scripted import call, script

payments = restate.Service("Payments")


@payments.handler()
async def charge(ctx: Context, amount: int) -> str:
    """Charge the customer's card."""
    approval, approved = ctx.awakeable(type_hint=str)

    def book() -> None:
        with Path(os.environ["PAYMENTS_BOOK"]).open("a") as book:
            book.write(f"{amount} {approval}\n")

    await ctx.run_typed("book", book)
    return f"{amount} {await approved}"


shopper = Agent(
    script([call("charge", amount=5)]),
    name="shopper",
    toolsets=[durable.HostedToolset(charge, id="payments")],
    capabilities=[durable.RestateDurability()],
)
app = durable.app([payments, agent_service("Shopper", shopper)])
