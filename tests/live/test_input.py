"""Bad input is the caller's mistake: a 400 that names the field, at once."""

from typing import Any

import pytest
import restate
from pydantic import BaseModel, ConfigDict, Field

from durable.server import RestateServer
from tests.live.hosting import hosted

pytestmark = pytest.mark.live


class Request(BaseModel):
    """A request with everything that can be wrong."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field("hello", max_length=10)
    prompts: list[str] = Field(["one"], min_length=1)


def service() -> restate.Service:
    """A service that answers with what it got."""
    service = restate.Service("Input")

    @service.handler()
    async def run(ctx: restate.Context, request: Request) -> Request:
        return request

    return service


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"text": 5}, "`text`: Input should be a valid string"),
        ({"prompts": []}, "`prompts`: List should have at least 1 item"),
        ({"prompts": ["a", 7]}, "`prompts.1`: Input should be a valid string"),
        ({"promts": ["a"]}, "`promts`: Extra inputs are not permitted"),
        ([1, 2], "`body`: Input should be an object"),
        ({"text": "a" * 11, "prompts": []}, "`text`: String should have at most 10 characters"),
    ],
)
async def test_a_wrong_field_is_named(server: RestateServer, body: Any, names: str) -> None:
    """The caller learns which field is wrong, and the value is not echoed."""
    async with hosted(server, service()) as ingress:
        response = await ingress.post("Input/run", body)
        assert response.status_code == 400
        assert names in response.json()["message"]
        assert await ingress.retries("Input") == 0


async def test_too_large(server: RestateServer) -> None:
    """What is wrong only in its size is a 413 that names the limit."""
    async with hosted(server, service()) as ingress:
        response = await ingress.post("Input/run", {"text": "a" * 11})
        assert response.status_code == 413
        assert "`text`: String should have at most 10 characters" in response.json()["message"]


async def test_results_that_are_no_plain_json(server: RestateServer) -> None:
    """Models anywhere in a result are written; what cannot be written ends the call at once."""
    service = restate.Service("Output")

    @service.handler()
    async def models(ctx: restate.Context) -> Any:
        return [Request.model_validate({}), {"one": Request.model_validate({"text": "two"})}]

    @service.handler()
    async def nothing(ctx: restate.Context) -> Any:
        return object()

    async with hosted(server, service) as ingress:
        request = {"text": "hello", "prompts": ["one"]}
        expected = [request, {"one": {**request, "text": "two"}}]
        assert await ingress.call("Output/models") == expected
        response = await ingress.post("Output/nothing")
        assert response.status_code == 500
        assert "The result of `nothing`, a object, cannot be written" in response.json()["message"]
        assert await ingress.retries("Output") == 0


async def test_wrong_json(server: RestateServer) -> None:
    """A body that is no JSON is a 400 too."""
    async with hosted(server, service()) as ingress:
        response = await ingress.post(
            "Input/run", content=b'{"text": ', headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        assert "JSON" in response.json()["message"]


async def test_defaults_apply(server: RestateServer) -> None:
    """The defaults of the request model make an empty object a valid request."""
    async with hosted(server, service()) as ingress:
        assert await ingress.call("Input/run", {}) == {"text": "hello", "prompts": ["one"]}


async def test_an_empty_body(server: RestateServer) -> None:
    """The SDK would call the handler with `None`; the ingress refuses it when it can tell."""
    async with hosted(server, service()) as ingress:
        response = await ingress.post(
            "Input/run", content=b"", headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
