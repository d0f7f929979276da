"""Hosted tools without a server: what the model is offered, what is refused, and crashes at every step."""

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Annotated, Any

import pytest
import restate
from pydantic import BaseModel, Field, RootModel
from pydantic_ai import Agent, RunContext
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.tools import ToolDefinition
from pydantic_ai.usage import RunUsage
from restate import Context, ObjectContext, TerminalError
from restate.serde import JsonSerde, Serde

import durable
from durable._hosted_handlers import from_description, from_function
from durable.testing import InMemoryInvocation, check_every_crash


class Day(BaseModel):
    """A day off."""

    day: date = Field(alias="on", description="The day.")
    reason: str = "holiday"


class Upper(Serde[str]):
    """A serde that only its own handlers understand."""

    def deserialize(self, buf: bytes) -> str:
        return buf.decode().lower()

    def serialize(self, obj: str | None) -> bytes:
        return (obj or "").upper().encode()


staff = restate.Service("Staff")
desks = restate.VirtualObject("Desks")
tree = restate.Workflow("Trees")


@staff.handler()
async def take_off(ctx: Context, day: Day) -> Day:
    """Take a day off."""
    return day


@staff.handler()
async def days_left(ctx: Context, year: Annotated[int, Field(ge=2000)]) -> int:
    """Count the days that are left.

    Args:
        year: The calendar year.
        person: Whose days.
    """
    return year


@staff.handler()
async def ping(ctx: Context) -> None:
    """Say hello."""


@staff.handler(name="optional")
async def optional_day(ctx: Context, day: Day | None) -> str:
    return str(day)


@staff.handler(input_serde=Upper(), output_serde=Upper())
async def shout(ctx: Context, text: str) -> str:
    """Shout."""
    return text


@staff.handler(input_serde=JsonSerde[Any](), output_serde=JsonSerde[Any]())
async def anything(ctx: Context, value: Any) -> Any:
    """Take what comes."""
    return value


@desks.handler()
async def book(ctx: ObjectContext, day: Day) -> str:
    """Book a desk.

    Args:
        day: When.
        desk: The number on the desk.
    """
    return ctx.key()


@tree.main()
async def plant(ctx: restate.WorkflowContext) -> None:
    """Plant a tree."""


def context(deps: Any = None) -> RunContext[Any]:
    """The context of a run that does not take place."""
    return RunContext(deps=deps, model=TestModel(), usage=RunUsage())


async def definition(
    tool: durable.HostedTool | Callable[..., Any],
) -> ToolDefinition:
    """What the model is offered for a handler."""
    [offered] = (await durable.HostedToolset[Any](tool, id="t").get_tools(context())).values()
    return offered.tool_def


# What the model is offered


async def test_a_models_fields_are_the_parameters() -> None:
    """With their descriptions and defaults; the key comes first, described by the docstring."""
    plain = await definition(take_off)
    assert plain.name == "take_off"
    assert plain.description == "Take a day off."
    assert plain.parameters_json_schema["properties"] == {
        "on": {"type": "string", "format": "date", "description": "The day."},
        "reason": {"type": "string", "default": "holiday"},
    }
    assert plain.return_schema is not None
    assert plain.return_schema["description"] == "A day off."
    keyed = await definition(durable.HostedTool(book, key="desk", name="book_desk"))
    assert keyed.name == "book_desk"
    assert keyed.description == "Book a desk."
    assert list(keyed.parameters_json_schema["properties"]) == ["desk", "on", "reason"]
    assert keyed.parameters_json_schema["properties"]["desk"] == {
        "type": "string",
        "minLength": 1,
        "description": "The number on the desk.",
    }
    assert keyed.parameters_json_schema["required"] == ["desk", "on"]


async def test_other_types_are_one_parameter() -> None:
    """It is named as the handler names it; no input, no parameter."""
    year = (await definition(days_left)).parameters_json_schema
    assert year["properties"] == {
        "year": {"type": "integer", "minimum": 2000, "description": "The calendar year."}
    }
    assert year["required"] == ["year"]
    assert (await definition(ping)).parameters_json_schema["properties"] == {}
    tree = await definition(durable.HostedTool(plant, key=durable.idempotency_key))
    assert tree.parameters_json_schema["properties"] == {}
    assert (await definition(anything)).parameters_json_schema["properties"] == {"value": {}}


class Team(BaseModel):
    """People and their people."""

    lead: str
    teams: list["Team"] = []


class Scores(RootModel[dict[str, int]]):
    """Points by name."""


@desks.handler()
async def seat(ctx: ObjectContext, team: Team) -> None: ...


@desks.handler()
async def score(ctx: ObjectContext, scores: Scores) -> None: ...


@desks.handler()
async def seat_all(ctx: ObjectContext, teams: list[Team]) -> None: ...


@pytest.mark.parametrize(
    ("handler", "parameters", "arguments", "sent"),
    [
        (seat, ["lead", "teams"], {"lead": "a", "teams": [{"lead": "b"}]}, None),
        (score, [], {"ada": 1}, b'{"ada":1}'),
        (seat_all, ["teams"], {"teams": [{"lead": "a"}]}, b'[{"lead":"a","teams":[]}]'),
    ],
)
async def test_nested_and_open_types(
    handler: Any, parameters: list[str], arguments: dict[str, Any], sent: bytes | None
) -> None:
    """Recursive models have their fields as parameters, too; the key is beside them."""
    keyed = await definition(durable.HostedTool(handler, key="floor"))
    assert list(keyed.parameters_json_schema["properties"]) == ["floor", *parameters]
    encoded = from_function(handler, "floor").encode(arguments)
    assert encoded == (sent or Team.model_validate(arguments).model_dump_json().encode())


@pytest.mark.parametrize(
    ("schema", "arguments", "sent"),
    [
        (None, {}, b""),
        ({}, {"input": 3}, b"3"),
        ({"type": "object"}, {"input": {"a": 1}}, b'{"a":1}'),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, {"a": 1}, b'{"a":1}'),
        (
            {"$ref": "#/definitions/T", "definitions": {"T": {"type": "null"}}},
            {"input": None},
            b"null",
        ),
        # what cannot be checked here is left to the handler
        ({"type": "string", "pattern": r"\p{L}"}, {"input": "x"}, b'"x"'),
        ({"$ref": "http://127.0.0.1:9/schema"}, {"input": "x"}, b'"x"'),
    ],
)
def test_schemas_of_the_server(schema: Any, arguments: dict[str, Any], sent: bytes) -> None:
    """Objects become parameters, anything else one parameter; nothing is fetched from elsewhere."""
    handler = {"documentation": None, "public": True, "input": schema, "output": None}
    service = {"name": "S", "keyed": False, "handlers": {"h": handler}}
    assert from_description(service, "h").encode(arguments) == sent


# What is refused


def test_all_faults_are_in_one_message() -> None:
    """At construction."""

    async def no_handler(ctx: Context) -> None: ...

    with pytest.raises(UserError) as error:
        durable.HostedToolset(
            no_handler,
            durable.HostedTool(days_left, key="person"),
            book,
            durable.HostedTool(book, key="on", name="b"),
            durable.HostedTool(book, key="the desk", name="c"),
            durable.HostedTool(ping, delay=timedelta(seconds=-1), timeout=0),
            ping,
            durable.HostedTool(shout, name="ping"),
            "Warehouse/a/b",
            durable.HostedTool("Warehouse", name="w"),
            "Warehouse",
            id="t",
        )
    assert str(error.value).removeprefix("HostedToolset 't': ").split("; ") == [
        "`no_handler` is not a handler: decorate it with `@service.handler()`, or make it an ordinary tool",
        "the `key` 'the desk' cannot be the name of an argument",
        "`delay` must not be negative, got datetime.timedelta(days=-1, seconds=86399)",
        "`timeout` must be positive, got 0",
        "`timeout` has no effect on what is sent",
        '\'Warehouse/a/b\' is neither "Service" nor "Service/handler"',
        "'Warehouse' may have several handlers, so it cannot have a `name`",
        "handlers given by name are looked up in the server: give `admin_url`",
        "`Staff/days_left` belongs to a service, which has no keys: leave `key` out",
        '`Desks/book` needs a key: `HostedTool(..., key="…")` names the argument that is the key',
        "`Staff/ping` and `Staff/shout` are both named `ping`: give one another `name`.",
    ]


def test_types_without_a_schema_are_refused() -> None:
    """And so is a key that is not text."""

    class Opaque:
        pass

    class Numbered(BaseModel):
        number: float

    service = restate.VirtualObject("Opaque")

    @service.handler()
    async def take(ctx: ObjectContext, what: Opaque) -> None: ...

    @service.handler()
    async def number(ctx: ObjectContext, what: Numbered) -> None: ...

    with pytest.raises(UserError) as error:
        durable.HostedToolset(
            durable.HostedTool(take, key="which"), durable.HostedTool(number, key="number"), id="t"
        )
    assert "`Opaque/take` has no types with a JSON schema: Unable to generate" in str(error.value)
    assert "the key of `Opaque/number` is text, which its argument `number` is not" in str(
        error.value
    )


# Running


def agent_that_calls(tool: Any, *calls: dict[str, Any], name: str) -> Agent[Any, str]:
    """An agent that calls a tool with the arguments, one after the other, and says what it got."""

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        turn = sum(isinstance(message, ModelResponse) for message in messages)
        if turn < len(calls):
            return ModelResponse(parts=[ToolCallPart(name, calls[turn], tool_call_id=str(turn))])
        parts = [part for message in messages for part in message.parts]
        returned = [it.model_response_str() for it in parts if isinstance(it, ToolReturnPart)]
        return ModelResponse(parts=[TextPart(f"told {'; '.join(returned)}")])

    return Agent(
        FunctionModel(respond),
        name="a",
        toolsets=[durable.HostedToolset[Any](tool, id="t")],
        capabilities=[durable.RestateDurability()],
    )


def handler_of(agent: Agent[Any, str]) -> Any:
    """A handler that runs the agent."""
    service = restate.Service("Runs")

    @service.handler()
    async def run(ctx: Context) -> str:
        return (await agent.run("go", deps="deps")).output

    return run


@pytest.mark.parametrize(
    ("tool", "arguments", "request_", "response", "told"),
    [
        (take_off, {"on": "2026-12-24"}, {"on": "2026-12-24", "reason": "holiday"}, None, ""),
        (days_left, {"year": 2026}, 2026, 12, "12"),
        (ping, {}, None, None, ""),
        (optional_day, {"day": None}, None, "x", "x"),
        (anything, {"value": [1, {"a": None}]}, [1, {"a": None}], "x", "x"),
    ],
)
async def test_what_the_handler_receives(
    tool: Any, arguments: dict[str, Any], request_: Any, response: Any, told: str
) -> None:
    """What the model wrote, in the form that the handler's own type reads."""
    received: list[Any] = []

    def stub(request: Any) -> Any:
        received.append(request)
        return response

    name = "optional" if tool is optional_day else tool.__name__
    run = handler_of(agent_that_calls(tool, arguments, name=name))
    invocation = InMemoryInvocation(run, calls={f"Staff/{name}": stub})
    assert await invocation.run() == f"told {told}"
    assert received == [request_]
    await invocation.replay()


async def test_handlers_with_a_serde_of_their_own() -> None:
    """The request is written with it, and the response read."""
    requests: list[Any] = []

    def stub(request: Any) -> bytes:
        requests.append(request)
        return b"AND GONE"

    run = handler_of(agent_that_calls(shout, {"text": "here"}, name="shout"))
    invocation = InMemoryInvocation(run, calls={shout: stub})
    assert await invocation.run() == "told and gone"
    assert requests == ["here"]


async def test_a_result_of_another_type_ends_the_run() -> None:
    """It is not the model's mistake, and asking again would change nothing."""
    run = handler_of(agent_that_calls(take_off, {"on": "2026-12-24"}, name="take_off"))
    with pytest.raises(TerminalError, match="`Staff/take_off` returned what does not fit") as error:
        await InMemoryInvocation(run, calls={"Staff/take_off": {"on": "never"}}).run()
    assert error.value.status_code == 500


async def test_the_model_corrects_its_arguments() -> None:
    """It is told what is wrong with them; the handler is called once."""
    requests: list[Any] = []

    def stub(key: str, request: Any) -> str:
        requests.append((key, request.day))
        return "booked"

    agent = agent_that_calls(
        durable.HostedTool(book, key="desk", timeout=60),
        {"desk": "", "on": "2026-12-24"},
        {"desk": 7, "on": "2026-12-24"},
        name="book",
    )
    invocation = InMemoryInvocation(handler_of(agent), calls={book: stub})
    told = 'told {"error":"`desk` must say which `Desks` the call is for."}; booked'
    assert await invocation.run() == told
    assert requests == [("7", date(2026, 12, 24))]


async def test_a_crash_at_every_step() -> None:
    """The call is in the journal: it is never made again, whatever the run loses."""

    def desk(key: str, request: Day) -> str:
        return f"desk {key}"

    keyed = durable.HostedTool(book, key="desk")
    agent = agent_that_calls(
        keyed, {"desk": "1", "on": "2026-12-24"}, {"desk": "2", "on": "2026-12-24"}, name="book"
    )
    await check_every_crash(handler_of(agent), calls={book: desk})


async def test_a_key_function_that_finds_none() -> None:
    """An empty key would be somebody's, too."""
    tool = durable.HostedTool(book, key=lambda ctx: "")
    run = handler_of(agent_that_calls(tool, {"on": "2026-12-24"}, name="book"))
    with pytest.raises(TerminalError, match="The function for the key of `Desks` returned ''"):
        await InMemoryInvocation(run).run()


# Outside a handler


async def test_outside_a_handler_an_ingress_is_needed() -> None:
    """It says what to do."""
    agent = agent_that_calls(ping, {}, name="ping")
    with pytest.raises(UserError, match=r"`ping` is called by a handler .*ingress_url"):
        await agent.run("go")


@contextmanager
def answering(status: int, body: bytes = b"", seen: list[str] | None = None) -> Generator[str]:
    """A server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if seen is not None:
                seen.append(f"{self.path} {self.headers['authorization']}")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (401, UserError, "The service `Secret` cannot be looked up: HTTP 401"),
        (503, ConnectionError, "The service `Secret` cannot be looked up: HTTP 503"),
        (404, UserError, "the server knows no service `Secret`: register what hosts it"),
    ],
)
async def test_an_admin_api_that_does_not_help(
    status: int, error: type[Exception], message: str
) -> None:
    """What will not change is an error at once, the rest is retried in a handler."""
    seen: list[str] = []
    with answering(status, seen=seen) as url:
        toolset = durable.HostedToolset[Any](
            "Secret", id="t", admin_url=url, headers={"authorization": "Bearer token"}
        )
        with pytest.raises(error, match=message):
            await toolset.for_run(context())
    assert seen == ["/services/Secret Bearer token"]


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (404, b'{"message":"no such service","source":"ingress"}', UserError, "no such service"),
        (502, b"<html>", ConnectionError, "`Staff/ping` cannot be called: HTTP 502"),
    ],
)
async def test_an_ingress_that_does_not_help(
    status: int, body: bytes, error: type[Exception], message: str
) -> None:
    """The model is not bothered with it."""
    with answering(status, body) as url:
        toolset = durable.HostedToolset[Any](ping, id="t", ingress_url=url)
        agent = Agent(TestModel(), toolsets=[toolset])
        with pytest.raises(error, match=message):
            await agent.run("go")


async def test_nobody_answers() -> None:
    """The address is in the error."""
    with answering(200) as url:
        pass
    with pytest.raises(ConnectionError, match=f"Restate does not answer at {url}services/Secret"):
        await durable.HostedToolset[Any]("Secret", id="t", admin_url=url).for_run(context())
