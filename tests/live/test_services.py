"""`services:app` as it is deployed: in a process of its own, with a provider of models."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest

import services
from durable._process import free_ports, http_status
from durable.server import RestateServer
from durable.worker import Worker
from services.chaining import EXAMPLE_PROMPTS, EXAMPLE_TEXT, CallChainingResponse
from services.routing import EXAMPLE_TICKETS, RoutingResponse
from tests.live.hosting import Ingress, http_client
from tests.live.providers import Answer, Provider, filled, provider

pytestmark = pytest.mark.live

CHECKOUT = Path(services.__file__).parent.parent


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One event loop for the module, in which its worker lives."""
    return "asyncio"


@dataclass
class App:
    """`services:app`, served by a worker and registered."""

    ingress: Ingress
    provider: Provider


@asynccontextmanager
async def serving(server: RestateServer, provider: Provider) -> AsyncGenerator[App]:
    """Serve `services:app` the way `durable dev` and `python -m services` do."""
    async with Worker("services:app", cwd=CHECKOUT, env=provider.env) as worker:
        await server.register(worker.url)
        async with http_client() as http:
            yield App(Ingress(server, http), provider)


@pytest.fixture(scope="module")
async def app(server: RestateServer) -> AsyncGenerator[App]:
    """The app with a model that always answers validly."""
    with provider(filled) as api:
        async with serving(server, api) as app:
            yield app


# What a caller gets


async def test_chaining_with_its_defaults(app: App) -> None:
    """`{}` applies the four example prompts, each to the result of the one before."""
    before = len(app.provider.requests)
    answer = await app.ingress.call("CallChainingService/run", {})
    response = CallChainingResponse.model_validate(answer)
    assert [step.prompt for step in response.steps] == EXAMPLE_PROMPTS
    texts = [f"text {before + number}" for number in (1, 2, 3, 4)]
    assert [step.result for step in response.steps] == texts
    assert response.text == texts[-1]
    asked = [str(request["messages"]) for request in app.provider.requests[before:]]
    assert len(asked) == 4
    for request, given in zip(asked, ["Q3 performance summary", *texts], strict=False):
        assert given in request
    assert (
        await app.ingress.steps("CallChainingService")
        == ["chaining-transformer__model.request"] * 4
    )


async def test_routing_with_its_defaults(app: App) -> None:
    """`{}` routes the example ticket and lets the chosen specialist answer."""
    before = len(app.provider.requests)
    answer = await app.ingress.call("RoutingService/run", {})
    response = RoutingResponse.model_validate(answer)
    assert response.route.team == "billing"
    assert response.reply.next_steps == [f"text {before + 2}"]
    assert len(app.provider.requests) == before + 2
    assert await app.ingress.steps("RoutingService") == [
        "routing-classifier__model.request",
        "routing-billing__model.request",
    ]


async def test_routing_to_a_specialist_hosted_elsewhere(app: App) -> None:
    """The specialist's request is a step of its own invocation."""
    before = len(app.provider.requests)
    answer = await app.ingress.call("RoutingService/run_hosted", {})
    assert RoutingResponse.model_validate(answer).reply.next_steps == [f"text {before + 2}"]
    assert await app.ingress.steps("RoutingService") == ["routing-classifier__model.request"]
    assert await app.ingress.steps("BillingSpecialistService") == ["routing-billing__model.request"]


@pytest.mark.parametrize(
    ("path", "requests"), [("CallChainingService/run", 4), ("RoutingService/run", 2)]
)
async def test_an_idempotency_key_executes_once(app: App, path: str, requests: int) -> None:
    """Two calls at once and one later with the same key: one execution, one answer for all."""
    before = len(app.provider.requests)
    headers = {"idempotency-key": uuid4().hex}
    answers = await asyncio.gather(*(app.ingress.call(path, {}, headers=headers) for _ in range(2)))
    answers.append(await app.ingress.call(path, {}, headers=headers))
    assert answers[1:] == answers[:-1]
    assert len(app.provider.requests) == before + requests


@pytest.mark.parametrize(
    ("service", "body", "names"),
    [
        ("CallChainingService", b'{"text": ', "JSON"),
        ("CallChainingService", b'{"text": 5}', "`text`"),
        ("CallChainingService", b'{"text": "  "}', "`text`"),
        ("CallChainingService", b'{"prompts": []}', "`prompts`"),
        ("CallChainingService", b'{"prompts": "one"}', "`prompts`"),
        ("CallChainingService", b'{"prompts": ["ok", ""]}', "`prompts.1`"),
        ("CallChainingService", b'{"promts": ["typo"]}', "`promts`"),
        ("RoutingService", b"[]", "`body`"),
        ("RoutingService", b'{"ticket": null}', "`ticket`"),
        ("RoutingService", b'{"ticket": ""}', "`ticket`"),
        ("RoutingService", b'{"ticket": "help", "team": "billing"}', "`team`"),
        ("BillingSpecialistService", b'" "', "at least 1 character"),
    ],
)
async def test_bad_input_is_named_at_once(app: App, service: str, body: bytes, names: str) -> None:
    """A 400 that names the field, without a retry and without asking the model."""
    before = len(app.provider.requests)
    headers = {"content-type": "application/json"}
    response = await app.ingress.post(f"{service}/run", content=body, headers=headers)
    assert response.status_code == 400
    assert names in response.json()["message"]
    assert await app.ingress.retries(service) == 0
    assert len(app.provider.requests) == before


async def test_schemas_are_published(app: App) -> None:
    """What a caller may send and will get is in the services' OpenAPI, with the defaults."""
    for service, request, defaults, response in [
        (
            "CallChainingService",
            "CallChainingRequest",
            {"text": EXAMPLE_TEXT, "prompts": EXAMPLE_PROMPTS},
            {"steps", "text"},
        ),
        ("RoutingService", "RoutingRequest", {"ticket": EXAMPLE_TICKETS[0]}, {"route", "reply"}),
    ]:
        answer = await app.ingress.http.get(
            f"{app.ingress.server.admin_url}/services/{service}/openapi"
        )
        assert answer.status_code == 200, answer.text
        document = answer.json()
        assert any(path.endswith(f"/{service}/run") for path in document["paths"])
        schemas = list(objects(document))
        sent = [it for it in schemas if it.get("title") == request]
        assert sent
        for schema in sent:  # one per handler that takes it
            assert {name: it["default"] for name, it in schema["properties"].items()} == defaults
            assert schema["additionalProperties"] is False
        assert any(set(it["properties"]) == response for it in schemas)


def objects(document: object) -> Generator[dict[str, Any]]:
    """Yield every schema of an object in a JSON document."""
    if isinstance(document, dict):
        found = cast("dict[str, Any]", document)
        if isinstance(found.get("properties"), dict):
            yield found
        for value in found.values():
            yield from objects(value)
    elif isinstance(document, list):
        for item in cast("list[object]", document):
            yield from objects(item)


async def test_a_model_that_never_answers_validly(server: RestateServer) -> None:
    """The invocation ends with a clear error; restate-server does not go on trying."""
    with provider([Answer("I would rather talk about something else.")]) as api:
        async with serving(server, api) as app:
            for service in ("RoutingService", "CallChainingService"):
                before = len(api.requests)
                response = await app.ingress.post(f"{service}/run", {})
                assert response.status_code == 502
                assert "Exceeded maximum output retries" in response.json()["message"]
                assert len(api.requests) == before + 2
                assert await app.ingress.retries(service) == 0


@pytest.mark.parametrize("handler", ["run", "run_hosted"])
async def test_a_route_that_there_is_not(server: RestateServer, handler: str) -> None:
    """The model is asked again, then the run ends with a clear error; no specialist is called."""
    with provider([Answer('{"reasoning": "?", "team": "sales"}')]) as api:
        async with serving(server, api) as app:
            response = await app.ingress.post(f"RoutingService/{handler}", {})
            assert response.status_code == 502
            expected = "`team`: Input should be 'billing', 'account', 'technical' or 'product'"
            assert response.json()["message"].endswith(f"retries (1); {expected}")
            assert len(api.requests) == 2
            assert await app.ingress.retries("RoutingService") == 0


async def test_a_bare_hypercorn_serves_it(server: RestateServer, tmp_path: Path) -> None:
    """`hypercorn services:app` is all that a deployment needs."""
    [port] = free_ports(1)
    with provider(filled) as api, (tmp_path / "log").open("wb") as log:
        command = ["-m", "hypercorn", "--bind", f"127.0.0.1:{port}", "services:app"]
        worker = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            cwd=CHECKOUT,
            env={**os.environ, **api.env},
            stdout=log,
            stderr=log,
            start_new_session=True,  # hypercorn's own worker is a child of it
        )
        try:
            for _ in range(600):
                if worker.returncode is not None or http_status(port, "/health"):
                    break
                await asyncio.sleep(0.05)
            await server.register(f"http://127.0.0.1:{port}")
            async with http_client() as http:
                answer = await Ingress(server, http).call("RoutingService/run", {})
        finally:
            os.killpg(worker.pid, signal.SIGKILL)
            await worker.wait()
    assert RoutingResponse.model_validate(answer).route.team == "billing"
    assert "Traceback" not in (tmp_path / "log").read_text()
