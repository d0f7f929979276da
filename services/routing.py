"""Routing service: `POST /RoutingService/run`.

Ticket → classifier → billing | account | technical | product → Reply

`run` asks the specialist in its own invocation. `run_hosted` calls it as a service: in an invocation with a
journal and retries of its own, on whatever worker hosts it.
"""

from typing import Annotated

import restate
from pydantic import BaseModel, ConfigDict, StringConstraints

import durable
from agents.routing import Reply, Route, classifier, specialists

EXAMPLE_TICKETS = [
    "Since this morning I cannot log in: my password is refused, and the reset mail never arrives. "
    "My report is due at 5 pm today and everything I need is in there. Please help, it is urgent!",
    "My card was charged 49.99 USD this month, but I am on the plan for 29.99 USD and did not "
    "change it. Please explain the difference and correct it if it is a mistake.",
    "How can I export the data of all our projects to Excel at once? Doing it project by project "
    "takes hours, and we need it every month.",
]

Ticket = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)]

hosted_specialists = {
    team: durable.agent_service(
        specialist, name=f"{team.capitalize()}SpecialistService", input_type=Ticket
    )
    for team, specialist in specialists.items()
}

routing = restate.Service(
    "RoutingService",
    description="Finds the team that owns a support ticket and answers it as that team.",
)


class RoutingRequest(BaseModel):
    """A support ticket, in the customer's words."""

    model_config = ConfigDict(extra="forbid")

    ticket: Ticket = EXAMPLE_TICKETS[0]


class RoutingResponse(BaseModel):
    """Which team was chosen and why, and what it answers."""

    route: Route
    reply: Reply


@routing.handler()
async def run(ctx: restate.Context, request: RoutingRequest) -> RoutingResponse:
    """Choose the team for the ticket and let its specialist answer."""
    # 1. Classify.
    route = (await classifier.run(request.ticket)).output

    # 2. The chosen specialist answers. After a crash the choice stands: it is in the journal.
    reply = (await specialists[route.team].run(request.ticket)).output

    # 3. The answer, with the decision that led to it.
    return RoutingResponse(route=route, reply=reply)


@routing.handler()
async def run_hosted(ctx: restate.Context, request: RoutingRequest) -> RoutingResponse:
    """Choose the team for the ticket and call its specialist, who may be hosted anywhere."""
    # 1. Classify.
    route = (await classifier.run(request.ticket)).output

    # 2. The chosen specialist answers, in an invocation of its own.
    reply = await ctx.service_call(hosted_specialists[route.team].run, arg=request.ticket)

    # 3. The answer, with the decision that led to it.
    return RoutingResponse(route=route, reply=reply)
