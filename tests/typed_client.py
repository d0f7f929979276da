"""What a type checker knows of the client: pyright checks this file, nothing runs it.

Each `pyright: ignore` is a mistake that has to be found: without the mistake, the comment is an error.
"""

from typing import Any, assert_type

import restate
from pydantic import BaseModel
from pydantic_ai import Agent

import durable
from durable.client import DERIVED, Client, Handle, Step, SyncClient


class Order(BaseModel):
    """What is ordered."""

    item: str


class Receipt(BaseModel):
    """What it costs."""

    price: int


shop = restate.Service("Shop")
stock = restate.VirtualObject("Stock")


@shop.handler()
async def buy(ctx: restate.Context, order: Order) -> Receipt:
    """Take input, return output."""
    return Receipt(price=len(order.item))


@shop.handler()
async def opens(ctx: restate.Context) -> str:
    """Take no input."""
    return "at nine"


@stock.handler()
async def take(ctx: restate.ObjectContext, number: int) -> None:
    """Return nothing."""


@stock.handler()
async def more(ctx: restate.ObjectContext, number: int | None = None) -> list[Receipt]:
    """Need no input."""
    return []


clerk = durable.agent_service(Agent("test", name="clerk", output_type=Receipt))


async def right(client: Client, sync: SyncClient) -> None:
    """What is inferred."""
    assert_type(await client.call(buy, Order(item="tea")), Receipt)
    assert_type(await client.call(opens), str)
    assert_type(await client.call(more, key="k"), list[Receipt])
    assert_type(await client.call(more, 3, key="k"), list[Receipt])
    assert_type(await client.call(clerk.run, "anything"), Receipt)
    assert_type(await client.call("Shop/buy", {"item": "tea"}), Any)
    await client.call(take, 3, key="k", idempotency_key=DERIVED)

    handle = await client.send(buy, Order(item="tea"))
    assert_type(handle, Handle[Receipt])
    assert_type(await client.attach(handle), Receipt)
    assert_type(await client.output(Handle.parse("inv_1…", buy)), Receipt)
    assert_type(await client.attach(Handle.parse("inv_1…")), Any)
    assert_type(await client.restart_from(handle, "step"), Handle[Receipt])
    assert_type([step async for step in client.progress(handle)], list[Step])
    assert_type(await client.session("chat", "ada", Receipt).message("Hello!"), Receipt)

    assert_type(sync.call(buy, Order(item="tea")), Receipt)
    assert_type(sync.attach(sync.send(opens)), str)
    assert_type(sync.session("chat", "ada", str).message("Hello!"), str)


async def wrong(client: Client, sync: SyncClient) -> None:
    """What is found."""
    await client.call(buy, "tea")  # pyright: ignore[reportCallIssue, reportArgumentType]
    await client.call(buy)  # pyright: ignore[reportCallIssue, reportArgumentType]
    await client.call(opens, 3)  # pyright: ignore[reportCallIssue, reportArgumentType]
    await client.send(take, "3", key="k")  # pyright: ignore[reportCallIssue, reportArgumentType]
    await client.call(opens, delay=3)  # pyright: ignore[reportCallIssue]
    await client.call(opens, idempotency_key=3)  # pyright: ignore[reportArgumentType, reportCallIssue]
    receipt: str = await client.call(buy, Order(item="tea"))  # pyright: ignore[reportAssignmentType]
    sync.call(buy, receipt)  # pyright: ignore[reportCallIssue, reportArgumentType]
