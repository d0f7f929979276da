"""Routing: typed decisions, typed replies, the request's bounds."""

from typing import get_args

import pytest
from pydantic import ValidationError
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.profiles import ModelProfile

from agents.routing import Reply, Route, Team, classifier, specialists
from services.routing import EXAMPLE_TICKETS, RoutingRequest

PROFILE = ModelProfile(supports_json_schema_output=True, default_structured_output_mode="native")


async def test_the_decision_is_typed() -> None:
    """The classifier is given the ticket and answers with a `Route`."""

    def decide(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        route = Route(reasoning="It is about money.", team="billing")
        return ModelResponse(parts=[TextPart(route.model_dump_json())])

    with classifier.override(model=FunctionModel(decide, profile=PROFILE)):
        result = await classifier.run(EXAMPLE_TICKETS[1])
    assert result.output.team == "billing"


async def test_a_decision_for_no_team_is_an_error() -> None:
    """The model is told what is wrong and asked again, then the run ends."""
    asked: list[int] = []

    def decide(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        asked.append(len(messages))
        return ModelResponse(parts=[TextPart('{"reasoning": "?", "team": "sales"}')])

    with (
        classifier.override(model=FunctionModel(decide, profile=PROFILE)),
        pytest.raises(UnexpectedModelBehavior),
    ):
        await classifier.run("hi")
    assert asked == [1, 3]


@pytest.mark.parametrize("team", get_args(Team))
async def test_every_team_has_a_specialist_of_its_own(team: Team) -> None:
    """With a name of its own, which is part of its steps' names, and a typed reply."""
    specialist = specialists[team]
    assert specialist.name == f"routing-{team}"
    with specialist.override(model=TestModel()):
        result = await specialist.run("hi")
    assert isinstance(result.output, Reply)


def test_the_reasoning_comes_before_the_decision() -> None:
    """In the schema, and so in what the model writes."""
    assert list(Route.model_json_schema()["properties"]) == ["reasoning", "team"]


def test_the_example_request_is_the_first_ticket() -> None:
    """`{}` is a whole request, so the playground works without typing."""
    assert RoutingRequest.model_validate_json("{}").ticket == EXAMPLE_TICKETS[0]
    assert len(EXAMPLE_TICKETS) == 3


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"ticket": ""}', "ticket"),
        ('{"ticket": " \\n"}', "ticket"),
        ('{"ticket": 5}', "ticket"),
        ('{"tickets": "a"}', "tickets"),
    ],
)
def test_bad_input_names_the_field(body: str, field: str) -> None:
    """`durable.app` turns this into a 400."""
    with pytest.raises(ValidationError) as error:
        RoutingRequest.model_validate_json(body)
    assert error.value.errors()[0]["loc"] == (field,)
