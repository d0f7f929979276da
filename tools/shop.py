"""A shop's tools, hosted as Restate handlers.

Each is a plain typed function on a service or a virtual object. What the model reads is the docstring; a
call is an invocation of its own, one at a time per customer where it writes.

agent → lookup_order | add_note | read_notes | remind → Orders, Customers
"""

from datetime import date, timedelta

import restate
from pydantic import BaseModel, Field
from restate import Context, ObjectContext, ObjectSharedContext, TerminalError

import durable


class Order(BaseModel):
    """What a customer has bought."""

    number: str
    customer: str
    status: str
    delivery: date


class Reminder(BaseModel):
    """What to remind somebody of."""

    customer: str = Field(description="E-mail address of the customer.")
    text: str = Field(description="What the reminder says, in one sentence.")


ORDERS = {
    "A-1001": Order(
        number="A-1001", customer="ada@example.com", status="shipped", delivery=date(2026, 12, 1)
    ),
    "A-1002": Order(
        number="A-1002", customer="bob@example.com", status="packed", delivery=date(2026, 12, 4)
    ),
}

orders = restate.Service("Orders")
customers = restate.VirtualObject("Customers")


@orders.handler()
async def lookup_order(ctx: Context, number: str) -> Order:
    """Look up the status and the delivery date of an order.

    Args:
        number: The order's number, such as A-1001.
    """
    if number not in ORDERS:
        raise TerminalError(f"There is no order {number!r}.", status_code=404)
    return ORDERS[number]


@customers.handler()
async def add_note(ctx: ObjectContext, note: str) -> int:
    """Put a note into a customer's file, and return how many there are.

    Args:
        note: One sentence.
        customer: E-mail address of the customer.
    """
    notes = [*(await ctx.get("notes", type_hint=list[str]) or []), note]
    ctx.set("notes", notes)
    return len(notes)


@customers.handler(kind="shared")
async def read_notes(ctx: ObjectSharedContext) -> list[str]:
    """Read the notes in a customer's file.

    Args:
        customer: E-mail address of the customer.
    """
    return await ctx.get("notes", type_hint=list[str]) or []


@orders.handler()
async def remind(ctx: Context, reminder: Reminder) -> None:
    """Remind a customer tomorrow."""
    text = f"A reminder: {reminder.text}"
    await ctx.object_call(add_note, key=reminder.customer, arg=text)


shop = durable.HostedToolset(
    lookup_order,
    durable.HostedTool(add_note, key="customer"),
    durable.HostedTool(read_notes, key="customer"),
    durable.HostedTool(remind, delay=timedelta(days=1)),
    id="shop",
)
"""For agents in an app that hosts `orders` and `customers`: `durable.app([..., orders, customers])`."""
