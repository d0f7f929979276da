"""Routing: one agent names the team that owns a support ticket, that team's agent answers it.

Outside a Restate handler these are ordinary PydanticAI agents.

Ticket → classifier → billing | account | technical | product → Reply
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent

from agents.models import DEFAULT_MODEL
from durable import RestateDurability

Team = Literal["billing", "account", "technical", "product"]


class Route(BaseModel):
    """Who should answer, and why."""

    # First: a model that has written down its reasons decides better.
    reasoning: str = Field(max_length=300, description="One or two sentences: what decides it.")
    team: Team


class Reply(BaseModel):
    """A specialist's answer to the customer."""

    subject: str = Field(min_length=1, max_length=100)
    body: str = Field(min_length=1, max_length=1000)
    next_steps: list[Annotated[str, Field(min_length=1, max_length=150)]] = Field(
        max_length=4, description="What the customer or we do next, in order."
    )


classifier = Agent(
    DEFAULT_MODEL,
    name="routing-classifier",  # stored in journals: see the step-name table
    output_type=Route,
    instructions=(
        "You assign support tickets to the team that can solve them.\n"
        "- billing: charges, invoices, refunds, plans and prices\n"
        "- account: sign-in, passwords, locked accounts, users and permissions\n"
        "- technical: errors, crashes, outages, integrations that stopped working\n"
        "- product: how to do something, what a feature can do, wishes\n"
        "Decide by what the customer needs done, not by the words or the mood of the ticket."
    ),
    capabilities=[RestateDurability()],
)


def _specialist(team: Team, instructions: str) -> Agent[None, Reply]:
    return Agent(
        DEFAULT_MODEL,
        name=f"routing-{team}",  # stored in journals: see the step-name table
        output_type=Reply,
        instructions=(
            f"{instructions} Answer the customer's ticket: a short subject, a friendly body of at "
            "most 120 words and up to four next steps of one short sentence each. Never invent "
            "facts about the customer; ask for what you need to know."
        ),
        capabilities=[RestateDurability()],
    )


specialists: dict[Team, Agent[None, Reply]] = {
    "billing": _specialist(
        "billing",
        "You work in billing. Name the amounts in question, say how the charge is checked and how "
        "long a correction or refund takes, and never promise money before the check.",
    ),
    "account": _specialist(
        "account",
        "You work in account support. Get people back into their account quickly and safely: "
        "verify who they are first, never ask for a password, and take deadlines seriously.",
    ),
    "technical": _specialist(
        "technical",
        "You work in technical support. Narrow the fault down with precise steps, one thing at a "
        "time, and name the version, message or log that you need.",
    ),
    "product": _specialist(
        "product",
        "You are a product expert. Explain how to reach the customer's goal with the features "
        "there are, as numbered clicks where possible, and mention the limits that matter.",
    ),
}
