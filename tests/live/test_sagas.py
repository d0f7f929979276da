"""Sagas on the real server: failures, cancellations, kills in the middle of the undos, several runs."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
import restate
from fastmcp import Client
from pydantic import BaseModel
from pydantic_ai import Agent, RunContext
from pydantic_ai.exceptions import UsageLimitExceeded
from pydantic_ai.mcp import MCPToolset
from pydantic_ai.usage import UsageLimits
from restate import TerminalError

import durable
from durable.server import RestateServer
from durable.worker import Worker
from tests.live.hosting import PATIENCE, Ingress, hosted, http_client, serving
from tests.live.mcp_server import HTTPApp, Trace
from tests.live.saga_app import BOOKINGS
from tests.live.scripted import call, done, script

pytestmark = pytest.mark.live

TWICE = restate.RunOptions[Any](max_attempts=2, initial_retry_interval=timedelta(milliseconds=10))
IN_HANDLER: dict[str, Any] = {"restate": False}


class Booking(BaseModel):
    """What a tool returns."""

    what: str


class Travel:
    """An agent that books flights, hotels and cars; cars are sold out."""

    def __init__(self, model: Any, *, name: str = "travel", **options: Any) -> None:
        self.order: list[str] = []
        """The undos in the order they began."""
        self.saga = durable.Saga(undo_run_options=TWICE)
        self.agent = Agent(
            model,
            name=name,
            capabilities=[durable.RestateDurability(tool_run_options=TWICE), self.saga],
            **options,
        )
        for what in ("flight", "hotel", "car"):
            self._can_book(what)

    def _can_book(self, what: str) -> None:
        @self.agent.tool(name=what)
        async def book(ctx: RunContext, seats: int = 1) -> Booking:
            done[what] += 1
            if what == "car":
                raise TerminalError("sold out", status_code=410)
            return Booking(what=f"{seats} {what}")

        @self.saga.undo(what)
        async def undo(ctx: RunContext, seats: int, result: Booking) -> None:
            self.order.append(what)
            done[f"undo {seats} {result.what}"] += 1

    def service(self, name: str, **options: Any) -> restate.Service:
        """A service whose handler `run` runs the agent."""
        service = restate.Service(name)

        @service.handler()
        async def run(ctx: restate.Context) -> str:
            return (await self.agent.run("go", **options)).output

        return service


FLIGHT, HOTEL, CAR = call("flight", seats=2), call("hotel", seats=1), call("car")
BOOKED = {"flight": 1, "hotel": 1}
UNDONE = {"undo 2 2 flight": 1, "undo 1 1 hotel": 1}

# The end of a run


async def test_a_booking_that_fails_is_undone_newest_first(server: RestateServer) -> None:
    """Once each; the caller gets the error of the tool that failed."""
    travel = Travel(script([FLIGHT], [HOTEL], [CAR]))
    async with hosted(server, travel.service("Booking")) as ingress:
        response = await ingress.post("Booking/run")
        assert response.status_code == 410, response.text
        assert response.json()["message"] == "sold out"
        assert (await ingress.steps("Booking"))[-3:] == [
            "travel__function_toolset__<agent>.call_tool:car",
            "travel__undo:hotel",
            "travel__undo:flight",
        ]
    assert travel.order == ["hotel", "flight"]
    assert done == {"model": 3, **BOOKED, "car": 1, **UNDONE}


async def test_a_usage_limit_undoes_too(server: RestateServer) -> None:
    """A failure in handler code, after the last step; the handler may catch it and go on."""
    travel = Travel(script([FLIGHT], [HOTEL], [CAR]))
    service = restate.Service("Limited")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        try:
            return (await travel.agent.run("go", usage_limits=UsageLimits(request_limit=2))).output
        except UsageLimitExceeded:
            await ctx.run_typed("tell", tell)
            return "too expensive"

    async def tell() -> None:
        done["told"] += 1

    async with hosted(server, service) as ingress:
        assert await ingress.call("Limited/run") == "too expensive"
    assert travel.order == ["hotel", "flight"]
    assert done == {"model": 2, **BOOKED, **UNDONE, "told": 1}


async def test_a_timeout_of_the_run_undoes_too(server: RestateServer) -> None:
    """While it waits for a tool in handler code."""
    travel = Travel(script([FLIGHT], [call("wait")]))

    @travel.agent.tool_plain(metadata=IN_HANDLER)
    async def wait() -> None:
        await durable.restate_context().sleep(timedelta(days=1))

    async with hosted(server, travel.service("TimedOut", timeout=2)) as ingress:
        assert (await ingress.post("TimedOut/run")).status_code == 504
    assert done == {"model": 2, "flight": 1, "undo 2 2 flight": 1}


async def test_what_is_retried_undoes_nothing(server: RestateServer) -> None:
    """An exception in handler code and a step that fails once: the run ends well."""
    travel = Travel(script([FLIGHT], [call("flaky")], [call("crashing")], [HOTEL]))
    failures = {"flaky": [ConnectionError("once")], "crashing": [RuntimeError("once")]}

    @travel.agent.tool_plain
    async def flaky() -> str:
        for _ in range(len(failures["flaky"])):
            raise failures["flaky"].pop()
        return "worked"

    @travel.agent.tool_plain(metadata=IN_HANDLER)
    async def crashing() -> str:
        for _ in range(len(failures["crashing"])):
            raise failures["crashing"].pop()
        return "worked"

    async with hosted(server, travel.service("Retried")) as ingress:
        assert "hotel" in await ingress.call("Retried/run")
    assert done == {"model": 5, **BOOKED}


async def test_parallel_calls_are_undone(server: RestateServer) -> None:
    """In the reverse of the order in which they ended, which is not the one in which they began."""
    names = [f"book{number}" for number in range(6)]
    ended = {name: asyncio.Event() for name in names}
    saga = durable.Saga()
    agent = Agent(
        script([call(name) for name in names], [call("fail")]),
        name="parallel",
        capabilities=[durable.RestateDurability(), saga],
    )
    undone: list[str] = []

    def add(name: str, after: asyncio.Event | None) -> None:
        @agent.tool_plain(name=name)
        async def book() -> str:
            done[name] += 1
            if after is not None:
                await after.wait()
            ended[name].set()
            return name

        @saga.undo(name)
        async def undo(ctx: RunContext, result: str) -> None:
            undone.append(result)

    for name, next_name in zip(names, [*names[1:], None], strict=True):
        add(name, None if next_name is None else ended[next_name])

    @agent.tool_plain
    async def fail() -> None:
        raise TerminalError("no")

    service = restate.Service("ParallelSaga")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

    async with hosted(server, service) as ingress:
        assert (await ingress.post("ParallelSaga/run")).status_code == 500
    assert undone == names
    assert done == {"model": 2, **dict.fromkeys(names, 1)}


# Cancellations


async def test_a_cancellation_in_a_step_waits_for_it_and_undoes_it(server: RestateServer) -> None:
    """The journal has the cancellation before the step's result; the undo has the result."""
    travel = Travel(script([FLIGHT], [call("book")], [HOTEL]))
    began, release = asyncio.Event(), asyncio.Event()

    @travel.agent.tool_plain
    async def book() -> str:
        began.set()
        await release.wait()
        done["booked"] += 1
        return "B"

    @travel.saga.undo(book)
    async def unbook(ctx: RunContext, result: str) -> None:
        travel.order.append(f"unbook {result}")

    async with hosted(server, travel.service("CancelledSaga")) as ingress:
        posted = asyncio.create_task(ingress.post("CancelledSaga/run"))
        await began.wait()
        await ingress.cancel("CancelledSaga")
        await ingress.until(await signals(ingress, "CancelledSaga"), lambda rows: len(rows) == 1)
        release.set()
        response = await posted
        assert response.status_code == 409
        assert response.json()["message"] == "cancelled"
    assert travel.order == ["unbook B", "flight"]
    assert done == {"model": 2, "flight": 1, "booked": 1, "undo 2 2 flight": 1}


async def signals(ingress: Ingress, service: str) -> str:
    """A query for the signals that the last invocation of `service` got."""
    invocation = await ingress.invocation(service)
    return (
        f"SELECT index FROM sys_journal WHERE id = '{invocation['id']}' "
        "AND entry_type = 'Notification: Signal'"
    )


async def test_a_second_cancellation_gives_up_the_step(server: RestateServer) -> None:
    """Its outcome is unknown then, and its undo runs without a result."""
    travel = Travel(script([FLIGHT], [call("hang")]))
    began = asyncio.Event()

    @travel.agent.tool_plain
    async def hang() -> str:
        began.set()
        await asyncio.sleep(3)
        return "never"

    @travel.saga.undo(hang)
    async def free(ctx: RunContext, result: str | None) -> None:
        travel.order.append(f"free {result}")

    async with hosted(server, travel.service("TwiceCancelled")) as ingress:
        posted = asyncio.create_task(ingress.post("TwiceCancelled/run"))
        await began.wait()
        for number in (1, 2):
            await ingress.cancel("TwiceCancelled")
            await ingress.until(
                await signals(ingress, "TwiceCancelled"), lambda rows, n=number: len(rows) == n
            )
        assert (await posted).status_code == 409
    assert travel.order == ["free None", "flight"]


async def test_a_cancellation_ends_a_wait_in_handler_code(server: RestateServer) -> None:
    """At once, however long it would take, and undoes what was done."""
    travel = Travel(script([FLIGHT, HOTEL], [call("wait")]))

    @travel.agent.tool_plain(metadata=IN_HANDLER)
    async def wait() -> None:
        await durable.restate_context().sleep(timedelta(days=1), name="long")

    async with hosted(server, travel.service("Waiting")) as ingress:
        posted = asyncio.create_task(ingress.post("Waiting/run"))
        await ingress.until(
            "SELECT id FROM sys_journal WHERE name = 'long'", lambda rows: len(rows) == 1
        )
        await ingress.cancel("Waiting")
        assert (await posted).status_code == 409
    assert sorted(travel.order) == ["flight", "hotel"]
    assert done == {"model": 2, **BOOKED, **UNDONE}


async def test_a_cancellation_does_not_stop_undos(server: RestateServer) -> None:
    """It comes in the middle of one: all run, once, and the run ends as it would have."""
    travel = Travel(script([FLIGHT], [call("book")], [HOTEL], [CAR]))
    began, release = asyncio.Event(), asyncio.Event()

    @travel.agent.tool_plain
    async def book() -> str:
        return "B"

    @travel.saga.undo(book)
    async def unbook(ctx: RunContext) -> None:
        done["unbook"] += 1
        began.set()
        await release.wait()

    async with hosted(server, travel.service("CancelledLate")) as ingress:
        posted = asyncio.create_task(ingress.post("CancelledLate/run"))
        await began.wait()
        await ingress.cancel("CancelledLate")
        await ingress.until(await signals(ingress, "CancelledLate"), lambda rows: len(rows) == 1)
        release.set()
        assert (await posted).status_code == 410
    assert done == {"model": 4, **BOOKED, "car": 1, "unbook": 1, **UNDONE}


# Undos that fail


async def test_an_undo_that_fails_for_good_is_told_to_the_caller(server: RestateServer) -> None:
    """After its retries, with the error of the run; the others ran."""
    travel = Travel(script([FLIGHT], [call("book")], [HOTEL], [CAR]))

    @travel.agent.tool_plain
    async def book() -> str:
        return "B"

    @travel.saga.undo(book)
    async def unbook(ctx: RunContext) -> None:
        done["unbook"] += 1
        raise ConnectionError("airline down")

    async with hosted(server, travel.service("FailingUndo")) as ingress:
        response = await ingress.post("FailingUndo/run")
        assert response.status_code == 410
        assert response.json()["message"].startswith("sold out\nNot undone: `book` (book): ")
        assert "airline down" in response.json()["message"]
    assert travel.order == ["hotel", "flight"]
    assert done == {"model": 4, **BOOKED, "car": 1, "unbook": 2, **UNDONE}


async def test_an_undo_of_a_tool_that_is_not_there_is_told_to_the_caller(
    server: RestateServer,
) -> None:
    """At once, not retried for ever."""
    travel = Travel(script([FLIGHT]))

    @travel.saga.undo("fligth")
    async def undo(ctx: RunContext) -> None: ...

    async with hosted(server, travel.service("Misspelt")) as ingress:
        response = await ingress.post("Misspelt/run")
        assert response.status_code == 500
        assert "`undo` undoes `fligth`, but the tools are" in response.json()["message"]
        assert await ingress.retries("Misspelt") == 0
    assert done == {}


# Other tools, other agents


async def test_hosted_tools_and_mcp_tools_are_undone_by_name(
    server: RestateServer, tmp_path: Path
) -> None:
    """Newest first, with the arguments that the model gave and the result it got."""
    trace = Trace(tmp_path / "trace")
    shop = restate.Service("SagaShop")

    @shop.handler()
    async def order(ctx: restate.Context, item: Booking) -> Booking:
        return item

    async with serving(HTTPApp(trace)) as url:
        client = Client(f"{url}/mcp", init_timeout=PATIENCE)
        travel = Travel(
            script([call("add", a=1, b=2)], [call("order", what="tent")], [CAR]),
            toolsets=[
                durable.HostedToolset(order, id="shop"),
                MCPToolset(client, id="numbers"),
            ],
        )

        @travel.saga.undo("add")
        async def subtract(ctx: RunContext, a: int, result: int) -> None:
            travel.order.append(f"subtract {a} from {result}")

        @travel.saga.undo("order")
        async def send_back(ctx: RunContext, what: str, result: Booking) -> None:
            travel.order.append(f"send back {what} {result.what}")

        async with hosted(server, shop, travel.service("Mixed")) as ingress:
            response = await ingress.post("Mixed/run")
            assert response.status_code == 410, response.text
    assert travel.order == ["send back tent tent", "subtract 1 from 3"]


async def test_runs_and_calls_of_a_handler_are_undone_together(server: RestateServer) -> None:
    """A run, the delegate of another run, then a call that fails for good: newest first over all."""
    first = Travel(script([FLIGHT]), name="first")
    inner = Travel(script([HOTEL]), name="inner")
    outer = Travel(script([call("ask")]), name="outer")
    payments, service = restate.Service("SagaPayments"), restate.Service("Together")
    order: list[str] = []
    first.order = inner.order = order

    @outer.agent.tool_plain(metadata=IN_HANDLER)
    async def ask() -> str:
        return (await inner.agent.run("go")).output

    @outer.saga.undo(ask)
    async def unask(ctx: RunContext, result: str) -> None:
        order.append("ask")

    @payments.handler()
    async def charge(ctx: restate.Context) -> None:
        raise TerminalError("declined", status_code=402)

    @service.handler()
    async def run(ctx: restate.Context) -> None:
        async with durable.saga():
            await first.agent.run("go")
            await outer.agent.run("go")
            await ctx.service_call(charge, arg=None)

    async with hosted(server, payments, service) as ingress:
        assert (await ingress.post("Together/run")).status_code == 402
        assert [name for name in await ingress.steps("Together") if "undo" in name] == [
            "outer__undo:ask",
            "inner__undo:hotel",
            "first__undo:flight",
        ]
    assert order == ["ask", "hotel", "flight"]
    assert done == {"model": 6, **BOOKED, **UNDONE}


# Kills


async def test_a_kill_in_the_middle_of_the_undos(server: RestateServer, tmp_path: Path) -> None:
    """The undo that was completed does not run again, the one that was under way does."""
    async with killed_in(server, tmp_path, "book", during="undo:hotel") as response:
        assert response.status_code == 410
        assert response.json()["message"] == "sold out"
    tries = {step: 1 for name in BOOKINGS for step in (name, f"undo:{name}")}
    assert events(tmp_path, "end") == tries
    assert events(tmp_path, "begin") == {**tries, "undo:hotel": 2}


async def test_a_payment_that_was_lost_is_refunded(server: RestateServer, tmp_path: Path) -> None:
    """An at-most-once tool whose worker was killed: it is not called again, but it may have paid."""
    async with killed_in(server, tmp_path, "pay_and_fail", during="pay") as response:
        assert response.status_code == 410
    assert events(tmp_path, "begin") == {"pay": 1, "refund:None": 1}
    assert events(tmp_path, "end") == {"refund:None": 1}


@asynccontextmanager
async def killed_in(
    server: RestateServer, directory: Path, handler: str, *, during: str
) -> AsyncGenerator[httpx2.Response]:
    """Call a handler of `saga_app`, kill its worker while a step runs, and start another one."""
    env = {"CRASH_TRACE": str(directory / "trace"), "SAGA_RELEASE": str(directory / "release")}
    async with (
        Worker("tests.live.saga_app:app", env=env, log_file=directory / "log") as worker,
        http_client() as http,
    ):
        await server.register(worker.url)
        posted = asyncio.create_task(Ingress(server, http).post(f"Sagas/{handler}"))
        async with asyncio.timeout(PATIENCE):
            while during not in events(directory, "begin"):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)
        worker.kill()
        (directory / "release").touch()
        await worker.start()
        yield await posted


def events(directory: Path, event: str) -> Counter[str]:
    """Count the steps that left such an event."""
    file = directory / "trace"
    lines = file.read_text().splitlines() if file.exists() else []
    return Counter(line.split()[2] for line in lines if line.endswith(f" {event}"))
