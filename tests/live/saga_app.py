"""An application whose bookings and undos leave a trace on disk, served by workers that tests kill."""

import asyncio
import os
from pathlib import Path
from typing import Any

import restate
from pydantic_ai import Agent, RunContext
from restate import TerminalError

import durable
from tests.live.crash_app import trace
from tests.live.scripted import call, script

BOOKINGS = ("flight", "hotel", "train")
"""What is booked, in this order."""

HELD = ("undo hotel", "pay")
"""What does not end before the file exists."""

RELEASE = Path(os.environ.get("SAGA_RELEASE", "release"))

service = restate.Service("Sagas")


async def traced(ctx: RunContext[Any], step: str) -> None:
    """Leave a trace of the step's begin and end."""
    step_id = step.replace(" ", ":")
    trace("begin", ctx.run_id, step_id)
    while step in HELD and not RELEASE.exists():  # noqa: ASYNC110, ASYNC240 - a test makes it
        await asyncio.sleep(0.02)
    trace("end", ctx.run_id, step_id)


async def sold_out() -> None:
    """Fail for good."""
    raise TerminalError("sold out", status_code=410)


bookings = durable.Saga()
booker = Agent(
    script(*([call(name)] for name in (*BOOKINGS, "car"))),
    name="booker",
    capabilities=[durable.RestateDurability(), bookings],
)
booker.tool_plain(name="car")(sold_out)


def _booking(name: str) -> None:
    @booker.tool(name=name)
    async def book(ctx: RunContext) -> str:
        await traced(ctx, name)
        return name

    @bookings.undo(name)
    async def undo(ctx: RunContext, result: str) -> None:
        await traced(ctx, f"undo {result}")


for name in BOOKINGS:
    _booking(name)


@service.handler()
async def book(ctx: restate.Context) -> str:
    """Book, and find that there is no car."""
    return (await booker.run("go")).output


payments = durable.Saga()
payer = Agent(
    script([call("pay")], [call("car")]),
    name="payer",
    capabilities=[durable.RestateDurability(), payments],
)
payer.tool_plain(name="car")(sold_out)


@payer.tool(metadata={"restate": {"at_most_once": True}})
async def pay(ctx: RunContext) -> str:
    """Pay, and be killed before saying so."""
    await traced(ctx, "pay")
    return "paid"


@payments.undo(pay)
async def refund(ctx: RunContext, result: str | None) -> None:
    """Give the money back, if any."""
    await traced(ctx, f"refund {result}")


@service.handler()
async def pay_and_fail(ctx: restate.Context) -> str:
    """Run the agent that pays."""
    return (await payer.run("go")).output


app = durable.app([service])
