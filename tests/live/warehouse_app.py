"""Services in a process of their own, hosted with the bare SDK; only the server knows them."""

from typing import Any

import restate
from pydantic import BaseModel, Field
from restate import Context, ObjectContext, TerminalError

warehouse = restate.Service("Warehouse")
shelf = restate.VirtualObject("Shelf")


class Part(BaseModel):
    """Something that is stored."""

    sku: str
    parts: list["Part"] = []


class Reservation(BaseModel):
    """What to keep for a customer."""

    part: Part
    quantity: int = Field(ge=1, description="How many.")


@warehouse.handler()
async def reserve(ctx: Context, reservation: Reservation) -> Reservation:
    """Keep parts for a customer."""
    if reservation.part.sku == "gone":
        raise TerminalError("There are none left.", status_code=410)
    return reservation


@warehouse.handler()
async def count(ctx: Context, sku: str) -> int:
    """Say how many there are."""
    return len(sku)


@warehouse.handler()
async def weigh(ctx: Context, part: Part) -> str:
    """Weigh a part, and the parts in it."""
    return f"{part.sku} and {[inner.sku for inner in part.parts]}"


@warehouse.handler()
async def report(ctx: Context) -> None:
    """Take stock."""


@warehouse.handler(ingress_private=True)
async def burn(ctx: Context) -> None:
    """Nothing for others."""


@shelf.handler()
async def put(ctx: ObjectContext, item: dict[str, Any]) -> str:
    """Put something on a shelf."""
    return f"{item} on {ctx.key()}"


app = restate.app([warehouse, shelf])
