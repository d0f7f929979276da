"""The client against the real server: each thing it can do, and each way in which that can fail."""

import asyncio
import logging
import os
import signal
import ssl
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import httpx2
import pytest
import restate
from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.exceptions import UsageLimitExceeded, UserError
from pydantic_ai.messages import ModelResponse
from pydantic_ai.models.test import TestModel
from pydantic_ai.usage import UsageLimits
from restate.serde import BytesSerde

import durable
from durable import client as dc
from durable.__main__ import main
from durable.client import Client, Handle, SyncClient
from durable.server import RestateServer
from tests.live import fastapi_backend
from tests.live.hosting import PATIENCE, Ingress, hosted, http_client, serving
from tests.live.scripted import calls, done, script

pytestmark = pytest.mark.live

SOON = timedelta(milliseconds=200)


class Order(BaseModel):
    """What is ordered."""

    item: str
    amount: int = Field(default=1, alias="count")


class Receipt(BaseModel):
    """What it costs."""

    item: str
    price: int = Field(alias="total")


shop = restate.Service("Shop")


@shop.handler()
async def buy(ctx: restate.Context, order: Order) -> Receipt:
    async def charge() -> None:
        done[order.item] += 1

    await ctx.run_typed("charge", charge)
    return Receipt(item=order.item, total=order.amount * 3)


@shop.handler()
async def hello(ctx: restate.Context) -> str:
    return "hello"


@shop.handler()
async def several(ctx: restate.Context, items: list[str] | None = None) -> list[Receipt] | None:
    return None if items is None else [Receipt(item=item, total=1) for item in items]


@shop.handler(accept="image/png", input_serde=BytesSerde(), output_serde=BytesSerde())
async def shrink(ctx: restate.Context, image: bytes) -> bytes:
    return image[:2]


@shop.handler()
async def fail(ctx: restate.Context, status: int) -> str:
    raise restate.TerminalError("sold out", status_code=status, metadata={"until": "May"})


@shop.handler()
async def wait(ctx: restate.Context, name: str) -> str:
    """Wait for an awakeable between two steps."""
    id, resolved = ctx.awakeable(type_hint=str)

    async def tell() -> None:
        await told.put(id)

    async def count() -> None:
        done[name] += 1

    await ctx.run_typed("tell", tell)
    try:
        value = await resolved
    finally:
        await ctx.run_typed("after", count)
    return f"{name} {value}"


told: asyncio.Queue[str] = asyncio.Queue()
"""Ids of awakeables, and of what else waits."""


counter = restate.VirtualObject("Counter")


@counter.handler()
async def add(ctx: restate.ObjectContext, number: int) -> str:
    total = (await ctx.get("total", type_hint=int) or 0) + number
    ctx.set("total", total)
    return f"{ctx.key()}: {total}"


checkout = restate.Workflow("Checkout")


@checkout.main()
async def run(ctx: restate.WorkflowContext, order: Order) -> str:
    paid = await ctx.promise("paid", type_hint=str).value()
    return f"{order.item} {paid}"


@checkout.handler()
async def pay(ctx: restate.WorkflowSharedContext, card: str) -> None:
    await ctx.promise("paid", type_hint=str).resolve(card)


@checkout.handler()
async def bounce(ctx: restate.WorkflowSharedContext) -> None:
    await ctx.promise("paid", type_hint=str).reject("no money", 402)


@pytest.fixture
async def ingress(server: RestateServer) -> AsyncGenerator[Ingress]:
    """The services above, hosted."""
    global told
    told = asyncio.Queue()  # of this test's event loop
    async with hosted(server, shop, counter, checkout, durable.agent_run) as ingress:
        yield ingress


@pytest.fixture
async def client(ingress: Ingress) -> AsyncGenerator[Client]:
    """A client of that server; what a test leaves behind is ended."""
    async with client_of(ingress.server) as client:
        yield client
        for left in await client.invocations():
            if left.status != "completed":
                await client.kill(Handle.parse(left.id))


def client_of(server: RestateServer, **options: Any) -> Client:
    """A client that knows both addresses."""
    options.setdefault("admin_url", server.admin_url)
    options.setdefault("timeout", timedelta(seconds=20))
    return Client(options.pop("url", server.ingress_url), **options)


def some_key() -> str:
    """A key that no other test has."""
    return uuid4().hex


class TestCalls:
    async def test_typed_input_and_output(self, client: Client) -> None:
        """Models, with aliases, lists and optional ones, no input, and bytes."""
        receipt = await client.call(buy, Order(item="tea", count=2))
        assert receipt == Receipt(item="tea", total=6)
        assert await client.call(hello) == "hello"
        assert await client.call(several, ["tea"]) == [Receipt(item="tea", total=1)]
        assert await client.call(several, None) is None
        assert await client.call(shrink, b"\x00\xff\x01") == b"\x00\xff"

    async def test_by_name(self, client: Client) -> None:
        """JSON in, JSON out."""
        answer = await client.call("Shop/buy", {"item": "tea", "count": 2})
        assert answer == {"item": "tea", "price": 6}
        assert await client.call("Shop/hello") == "hello"
        handle = await client.send("Shop/hello")
        assert await client.attach(handle) == "hello"

    @pytest.mark.parametrize("key", ["a", "a/b c?&#", "..", "ü"])
    async def test_keys_of_objects(self, client: Client, key: str) -> None:
        """A key may be anything."""
        key = key if key == ".." else key + some_key()
        before = await client.call(add, 0, key=key)
        total = int(before.removeprefix(f"{key}: "))
        assert await client.call("Counter/add", 3, key=key) == f"{key}: {total + 3}"

    async def test_workflows_run_once(self, client: Client) -> None:
        """Its key is its idempotency key: a second call gets what the first one gets."""
        key, order = some_key(), Order(item="tea")
        first = asyncio.create_task(client.call(run, order, key=key))
        handle = await client.send(run, order, key=key)
        second = asyncio.create_task(client.call(run, order, key=key))
        await client.call(pay, "card", key=key)
        assert [await first, await second, await client.attach(handle)] == ["tea card"] * 3
        assert await client.call(run, order, key=key) == "tea card"

    async def test_a_promise_is_rejected_through_its_workflow(self, client: Client) -> None:
        """The failure is that of the workflow, for everybody who calls it."""
        key, order = some_key(), Order(item="tea")
        await client.send(run, order, key=key)
        await client.call(bounce, key=key)
        with pytest.raises(dc.RunFailed, match="no money") as failed:
            await client.call(run, order, key=key)
        assert failed.value.status == 402

    async def test_idempotency_keys(self, client: Client) -> None:
        """One invocation per key; a derived key differs with the input, and for each handler."""
        item, key = some_key(), some_key()
        for _ in range(2):
            await client.call(buy, Order(item=item), idempotency_key=key)
        handles = [await client.send(buy, Order(item=item), idempotency_key=key) for _ in range(2)]
        assert handles[0] == handles[1]
        assert done[item] == 1
        for amount in (1, 1, 2):
            order = Order(item=item, count=amount)
            await client.call(buy, order, idempotency_key=dc.DERIVED)
        assert done[item] == 3

    async def test_agents(self, client: Client, server: RestateServer) -> None:
        """`AgentService.run` is a handler too."""
        agent = Agent(
            TestModel(custom_output_args={"item": "tea", "total": 4}),
            name="cashier",
            output_type=Receipt,
            capabilities=[durable.RestateDurability()],
        )
        service = durable.agent_service(agent, input_type=Order)
        async with hosted(server, service):
            receipt = await client.call(service.run, Order(item="tea"))
            assert receipt == Receipt(item="tea", total=4)
            with pytest.raises(dc.RejectedInput, match="`count`"):
                await client.call(service.run, {"item": "tea", "count": "many"})

    async def test_sessions(self, client: Client, server: RestateServer) -> None:
        """Typed, and the turn of one can be found."""
        agent = Agent(script(name="chat"), name="chat", capabilities=[durable.RestateDurability()])
        chat = durable.agent_session(agent)
        async with hosted(server, chat):
            session = client.session(chat, some_key(), str)
            key = some_key()
            assert await session.message("Hello!", idempotency_key=key) == "hello"
            assert await session.message("Hello!", idempotency_key=key) == "hello"
            assert [type(it) for it in await session.history()][-1] is ModelResponse
            status = await session.status()
            assert status.turns == 1
            assert status.invocation_id is not None
            assert (await client.status(Handle.parse(status.invocation_id))).target.startswith(
                "chat/"
            )
            with pytest.raises(dc.RejectedInput, match="the prompt is empty"):
                await session.message(" ")
            await session.clear()
            assert await client.session("chat", some_key(), str).history() == []


class TestRuns:
    """What happens to a run after it was sent."""

    async def test_stored_and_found_again(self, client: Client, server: RestateServer) -> None:
        """Another client reads the handle, waits, and gets the typed output."""
        stored = str(await client.send(buy, Order(item="tea", count=5)))
        async with client_of(server) as other:
            receipt = await other.attach(Handle.parse(stored, buy))
            assert receipt.price == 15
            assert await other.output(Handle.parse(stored, buy)) == receipt
            assert await other.attach(Handle.parse(f"{stored}\n")) == {"item": "tea", "price": 15}

    async def test_awakeables(self, client: Client) -> None:
        """Resolved and rejected; before that there is no output, and a wait may end early."""
        handle = await client.send(wait, "tea")
        with pytest.raises(dc.NotReady):
            await client.output(handle)
        with pytest.raises(dc.Timeout) as late:
            await client.attach(handle, timeout=SOON)
        assert isinstance(late.value, TimeoutError)
        await client.resolve_awakeable(await told.get(), "now")
        assert await client.attach(handle) == "tea now"

        handle = await client.send(wait, "coffee")
        await client.reject_awakeable(await told.get(), "never – too late")
        with pytest.raises(dc.RunFailed, match="never – too late"):
            await client.attach(handle)
        with pytest.raises(dc.RejectedInput, match="bad awakeable id"):
            await client.resolve_awakeable("sign_1x/../x")

    async def test_a_timeout_leaves_the_run_alone(self, client: Client) -> None:
        """The caller with the same key gets its output later."""
        key, name = some_key(), some_key()
        with pytest.raises(dc.Timeout, match=r"within 0.2 s"):
            await client.call(wait, name, idempotency_key=key, timeout=SOON)
        await client.resolve_awakeable(await told.get(), "now")
        assert await client.call(wait, name, idempotency_key=key) == f"{name} now"
        assert done[name] == 1

    async def test_delays(self, client: Client) -> None:
        """It waits for its time, and can be called off."""
        handle = await client.send(buy, Order(item="tea"), delay=timedelta(hours=1))
        status = await client.status(handle)
        assert status.status == "scheduled"
        assert status.scheduled_start_at is not None
        assert status.scheduled_start_at - status.created_at >= timedelta(minutes=59)
        await client.cancel(handle)
        with pytest.raises(dc.NotFound):
            await client.attach(handle)
        soon = await client.send(hello, delay=timedelta(milliseconds=1))
        assert await client.attach(soon) == "hello"

    async def test_cancel_and_kill(self, client: Client) -> None:
        """Code that is cancelled cleans up, code that is killed does not."""
        for end, name, cleaned_up in (
            (client.cancel, some_key(), 1),
            (client.stop, some_key(), 1),
            (client.kill, some_key(), 0),
        ):
            handle = await client.send(wait, name)
            await told.get()
            await end(handle)
            with pytest.raises(dc.RunFailed) as failed:
                await client.attach(handle)
            assert failed.value.status == 409
            assert done[name] == cleaned_up
            status = await client.status(handle)
            assert (status.status, status.result) == ("completed", "failure")
            assert status.failure is not None

    async def test_paused_runs_are_resumed(self, client: Client, server: RestateServer) -> None:
        """What could not go on goes on when its cause is gone."""
        once = restate.InvocationRetryPolicy(max_attempts=1, on_max_attempts="pause")
        service = restate.Service("Broken", invocation_retry_policy=once)

        @service.handler()
        async def work(ctx: restate.Context) -> str:
            if not done["repaired"]:
                raise RuntimeError("broken")
            return "done"

        async with hosted(server, service) as ingress:
            handle = await client.send(work)
            await ingress.until(
                f"SELECT status FROM sys_invocation WHERE id = '{handle}'",
                lambda rows: rows[0]["status"] == "paused",
            )
            [paused] = await client.invocations(service="Broken", status="paused")
            assert paused == await client.status(handle)
            done["repaired"] += 1
            await client.resume(handle)
            assert await client.attach(handle) == "done"
            with pytest.raises(dc.Conflict, match="cannot be resumed"):
                await client.resume(handle)
        assert await client.invocations(service="it's none") == []

    async def test_restart_from_a_step(self, client: Client, server: RestateServer) -> None:
        """What came before the step is taken over, the rest is done again; only after the end, and of known steps."""
        agent = Agent(
            calls("look", "read"), name="clerk", capabilities=[durable.RestateDurability()]
        )

        @agent.tool_plain
        async def look() -> str:
            done["look"] += 1
            return "seen"

        @agent.tool_plain
        async def read() -> str:
            done["read"] += 1
            return "known"

        service = durable.agent_service(agent)
        async with hosted(server, service):
            handle = await client.send(service.run, "go")
            answer = await client.attach(handle)
            steps = await client.steps(handle)
            request, *tools, last = steps
            assert request.name == last.name == "clerk__model.request"
            assert {it.name.rpartition(":")[2] for it in tools} == {"look", "read"}
            assert all(it.status == "completed" and it.ended_at for it in steps)
            assert done == {"model": 2, "look": 1, "read": 1}

            again = await client.restart_from(handle, last)
            assert await client.attach(again) == answer
            assert (await client.status(again)).restarted_from == str(handle)
            assert done == {"model": 3, "look": 1, "read": 1}

            again = await client.restart_from(handle, tools[1].name)
            assert await client.attach(again) == answer
            assert done["look"] + done["read"] == 3
            assert done["model"] == 4

            for step, problem in (
                ("clerk__model.request", "more than one step"),
                ("nothing", "no step 'nothing'.*clerk__model.request"),
            ):
                with pytest.raises(dc.RejectedInput, match=problem):
                    await client.restart_from(handle, step)

    async def test_only_what_has_ended_is_restarted(self, client: Client) -> None:
        """And no workflow."""
        handle = await client.send(wait, "tea")
        id = await told.get()
        async for step in client.progress(handle):
            if step.name == "tell":
                break
        with pytest.raises(dc.Conflict, match="still running"):
            await client.restart_from(handle, "tell")
        await client.resolve_awakeable(id, "now")
        await client.attach(handle)

    async def test_progress(self, client: Client) -> None:
        """Steps come while the run is under way, and the iteration ends with it."""
        handle = await client.send(wait, "tea")
        seen: list[tuple[str, str]] = []
        async for step in client.progress(handle, interval=timedelta(milliseconds=20)):
            seen.append((step.name, step.status))
            if (step.name, step.status) == ("tell", "completed"):
                assert (await client.status(handle)).status != "completed"
                await client.resolve_awakeable(await told.get(), "now")
        finished = [name for name, status in seen if status == "completed"]
        assert finished == ["tell", "after"]
        assert len(seen) == len(set(seen))

    async def test_payloads(self, client: Client, server: RestateServer) -> None:
        """What went in and came out, as bytes, where a run ended well and its journal is there."""
        handle = await client.send(buy, Order(item="tea"))
        receipt = await client.attach(handle)
        payloads = await client.payloads(handle)
        assert Order.model_validate_json(payloads.input) == Order(item="tea")
        assert Receipt.model_validate_json(payloads.output, by_name=True) == receipt

        waits, failed = await client.send(wait, "tea"), await client.send(fail, 402)
        with pytest.raises(dc.NotReady, match="has not ended yet"):
            await client.payloads(waits)
        with pytest.raises(dc.RunFailed):
            await client.attach(failed)
        with pytest.raises(dc.Conflict, match="it failed"):
            await client.payloads(failed)

        forgetful = restate.Service("Forgetful", journal_retention=timedelta(0))

        @forgetful.handler()
        async def forget(ctx: restate.Context) -> str:
            return "what?"

        async with hosted(server, forgetful):
            forgotten = await client.send(forget, idempotency_key=some_key())
            assert await client.attach(forgotten) == "what?"
            with pytest.raises(dc.NotFound, match="is gone: the server keeps it"):
                await client.payloads(forgotten)

    async def test_failed_steps(self, client: Client, server: RestateServer) -> None:
        """Are told as such."""
        service = restate.Service("Steps")

        async def no() -> None:
            raise restate.TerminalError("no")

        @service.handler()
        async def work(ctx: restate.Context) -> None:
            await ctx.run_typed("no", no)

        async with hosted(server, service):
            handle = await client.send(work)
            with pytest.raises(dc.RunFailed, match="no"):
                await client.attach(handle)
            [step] = await client.steps(handle)
            assert (step.name, step.status) == ("no", "failed")


class TestPeople:
    async def test_pending_and_answer(self, client: Client, server: RestateServer) -> None:
        """Each answer once, and only those that fit."""
        agent = Agent(
            calls("refund"),
            name="refunds",
            capabilities=[
                durable.RestateDurability(),
                durable.Approvals(notify=lambda call: told.put_nowait(call.id)),
            ],
        )

        @agent.tool_plain(requires_approval=True)
        async def refund() -> str:
            done["refund"] += 1
            return "refunded"

        service = durable.agent_service(agent)
        async with hosted(server, service, durable.agent_run):
            handle = await client.send(service.run, "go")
            await told.get()
            [call] = await client.pending(handle)
            assert call.tool_name == "refund"
            with pytest.raises(dc.NotFound, match="No call 'x'"):
                await client.answer(handle, durable.Approve(call="x"))
            await client.answer(handle, durable.Approve(call=call.id, answered_by="ada"))
            with pytest.raises(dc.Conflict, match="was answered"):
                await client.answer(handle, durable.Deny(call=call.id))
            assert await client.attach(handle) == "refund=refunded"
            assert await client.pending(handle) == []

    async def test_steer(self, client: Client, server: RestateServer) -> None:
        """A message is in the next request; what has ended takes none."""
        agent = Agent(calls("look"), name="steered", capabilities=[durable.RestateDurability()])
        go = asyncio.Event()

        @agent.tool_plain
        async def look() -> str:
            told.put_nowait("looking")
            await go.wait()
            return "seen"

        service = durable.agent_service(agent)
        async with hosted(server, service, durable.agent_run) as ingress:
            handle = await client.send(service.run, "go")
            await told.get()
            steering = asyncio.create_task(client.steer(handle, "Be quick."))
            signals = "SELECT id FROM sys_journal WHERE entry_type = 'Notification: Signal'"
            await ingress.until(f"{signals} AND id = '{handle}'", bool)
            go.set()
            await steering
            assert await client.attach(handle) == "look=seen"
            with pytest.raises(dc.Conflict, match="ended before it could take the message"):
                await client.steer(handle, durable.SteeringMessage(content="Too late."))


class TestErrors:
    @pytest.mark.parametrize("status", [402, 404, 409, 500, 503])
    async def test_of_a_handler(self, client: Client, status: int) -> None:
        """With status, message, metadata and the invocation; whoever asks."""
        handle = await client.send(fail, status)
        with pytest.raises(dc.RunFailed) as attached:
            await client.attach(handle)
        with pytest.raises(dc.RunFailed) as looked:
            await client.output(handle)
        with pytest.raises(dc.RunFailed) as called:
            await client.call(fail, status)
        for error in (attached.value, looked.value, called.value):
            assert (error.status, error.message) == (status, "sold out")
            assert error.metadata == {"until": "May"}
            assert error.error_type is None
            assert str(error) == f"sold out ({status}, {error.invocation_id})"
        assert attached.value.invocation_id == looked.value.invocation_id == str(handle)

    async def test_of_an_agent(self, client: Client, server: RestateServer) -> None:
        """The class of the original error, by name, and the error itself as the cause."""
        agent = Agent(calls("look"), name="limited", capabilities=[durable.RestateDurability()])

        @agent.tool_plain
        async def look() -> str:
            return "seen"

        service = restate.Service("Limited")

        @service.handler()
        async def work(ctx: restate.Context) -> str:
            return (await agent.run("go", usage_limits=UsageLimits(request_limit=1))).output

        async with hosted(server, service):
            with pytest.raises(dc.RunFailed, match="request_limit of 1") as failed:
                await client.call(work)
        assert failed.value.error_type == "UsageLimitExceeded"
        assert failed.value.status == 429
        assert isinstance(failed.value.__cause__, UsageLimitExceeded)

    async def test_rejected_input(self, client: Client) -> None:
        """Found before it is sent where the type is known, else by the handler."""
        order: Any = {"item": "tea", "count": "secret"}
        with pytest.raises(dc.RejectedInput, match="`count`: Input should be a valid int") as here:
            await client.call(buy, order)
        assert "secret" not in str(here.value)
        with pytest.raises(dc.RejectedInput, match="`count`: Input should be a valid int") as there:
            await client.call("Shop/buy", order)
        assert (here.value.status, there.value.status) == (None, 400)
        assert isinstance(there.value, ValueError)

    @pytest.mark.parametrize(
        ("handler", "options", "error", "message"),
        [
            ("Shop/sell", {}, dc.NotFound, "the handler 'sell' was not found"),
            ("Bakery/buy", {}, dc.NotFound, "service 'Bakery' not found"),
            ("Counter/add", {}, dc.RejectedInput, "bad path"),
            (add, {}, dc.RejectedInput, "`Counter/add` needs a key"),
            (add, {"key": ""}, dc.RejectedInput, "`Counter/add` needs a key"),
            (hello, {"key": "k"}, dc.RejectedInput, "`Shop/hello` belongs to a service"),
            (hello, {"idempotency_key": ""}, dc.RejectedInput, "idempotency key '' cannot"),
            (hello, {"idempotency_key": "a\nb"}, dc.RejectedInput, "must be printable ASCII"),
            (run, {"key": "k", "idempotency_key": "k"}, dc.RejectedInput, "workflow"),
            ("AgentRun/inv/ask", {}, dc.RejectedInput, "write `Service/handler`"),
            ("Shop", {}, dc.RejectedInput, "'Shop' does not name a handler"),
            ("AgentRun/ask", {"key": "k"}, dc.RejectedInput, "not public"),
            (some_key, {}, UserError, "`some_key` is not a handler"),
        ],
    )
    async def test_of_the_call_itself(
        self,
        client: Client,
        handler: Any,
        options: dict[str, Any],
        error: type[Exception],
        message: str,
    ) -> None:
        """Each says what is wrong."""
        with pytest.raises(error, match=message):
            await client.call(handler, None, **options)

    async def test_unknown_invocations(self, client: Client) -> None:
        """There is none, or it could be none."""
        handle = Handle.parse("inv_18jYkUAxwZWm2Wk5xVuX0a1G0B2kZJqh2R")
        asking: list[Callable[[Handle[Any]], Awaitable[object]]] = [
            client.attach,
            client.output,
            client.status,
            client.steps,
            client.cancel,
            client.kill,
            client.resume,
            lambda handle: client.restart_from(handle, "x"),
            lambda handle: client.steer(handle, "x"),
            lambda handle: client.answer(handle, durable.Approve(call="x")),
            lambda handle: anext(client.progress(handle)),
        ]
        for ask in asking:
            with pytest.raises(dc.NotFound):
                await ask(handle)
        with pytest.raises(dc.RejectedInput, match="begins with `inv_1`"):
            Handle.parse("x' OR 1=1")

    async def test_another_version(self, client: Client, server: RestateServer) -> None:
        """What does not fit the type says so, without the value."""
        old = restate.Service("Shop2", metadata={"version": "old"})
        new = restate.Service("Shop2")

        @old.handler("buy")
        async def old_buy(ctx: restate.Context, order: Order) -> Receipt:
            raise NotImplementedError

        @new.handler("buy")
        async def new_buy(ctx: restate.Context, order: Order) -> dict[str, str]:
            return {"item": order.item, "price": "secret"}

        async with hosted(server, new):
            with pytest.raises(dc.UnexpectedOutput, match=r"`Shop2/buy`.*`price`") as error:
                await client.call(old_buy, Order(item="tea"))
            assert "secret" not in str(error.value)

    async def test_without_an_admin_url(self, ingress: Ingress) -> None:
        """What needs it says so; the rest works."""
        async with Client(ingress.server.ingress_url) as client:
            handle = await client.send(hello)
            assert await client.attach(handle) == "hello"
            with pytest.raises(UserError, match="admin_url="):
                await client.status(handle)


class TestConnections:
    async def test_broken_ones(self, ingress: Ingress) -> None:
        """A call with a key is sent again and executed once; without one it is not sent again."""
        key, item = some_key(), some_key()
        async with passing_on(ingress.server.ingress_url, drops=2) as url:
            async with client_of(ingress.server, url=url) as client:
                receipt = await client.call(buy, Order(item=item), idempotency_key=key)
                assert receipt.price == 3
        assert done[item] == 1
        async with passing_on(ingress.server.ingress_url, drops=1) as url:
            async with client_of(ingress.server, url=url) as client:
                with pytest.raises(dc.Unreachable, match="an `idempotency_key` prevents that"):
                    await client.call(buy, Order(item=some_key()))
        async with passing_on(ingress.server.ingress_url, drops=9) as url:
            async with client_of(ingress.server, url=url, retries=1) as client:
                with pytest.raises(dc.Unreachable, match="does not answer") as error:
                    await client.call(hello, idempotency_key=key)
        assert isinstance(error.value, ConnectionError)

    async def test_nobody_there(self) -> None:
        """Says which address."""
        async with Client("http://127.0.0.1:1", admin_url="http://127.0.0.1:1", retries=0) as none:
            with pytest.raises(dc.Unreachable, match=r"ingress does not answer.*`ingress_url`"):
                await none.call(hello)
            with pytest.raises(dc.Unreachable, match=r"admin API does not answer.*`admin_url`"):
                await none.invocations()

    async def test_proxies_of_the_environment(
        self, ingress: Ingress, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Do not get what goes to loopback."""
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        async with client_of(ingress.server) as client:
            assert await client.call(hello) == "hello"

    async def test_token_headers_and_base_path(
        self, ingress: Ingress, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A gateway that wants a token gets it; nothing that can be read holds it."""
        caplog.set_level(logging.DEBUG)
        canary = "canary-1234"
        gateway = Gateway(ingress.server.ingress_url, token=canary)
        async with serving(gateway) as url:
            async with client_of(ingress.server, url=f"{url}/api/v1/", token=canary) as client:
                # sent again until the gateway listens
                assert await client.call(hello, idempotency_key=some_key()) == "hello"
                assert await client.call("Counter/add", 1, key="..")
                gateway.down = 1
                assert await client.call(hello, idempotency_key=some_key()) == "hello"
                gateway.down = 1
                with pytest.raises(dc.Unreachable, match="HTTP 503") as down:
                    await client.call(hello)
                seen = [repr(client), repr(vars(client)), *map(str, vars(client).values())]
                handle = await client.send("Shop/hello", idempotency_key=some_key())
                seen += [repr(handle), str(handle)]
            async with client_of(
                ingress.server, url=url, headers={"authorization": f"Basic {canary}"}
            ) as client:
                with pytest.raises(dc.ClientError, match="credentials are refused") as refused:
                    await client.call(hello)
                seen.append(repr(client))
        for error in (down.value, refused.value):
            seen += [repr(error), str(error), repr(vars(error)), repr(error.__cause__)]
        assert canary not in "".join([*seen, caplog.text])

    async def test_tls(self, ingress: Ingress, tmp_path: Path) -> None:
        """A certificate of one's own is trusted where `verify` says so."""
        certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        await anyio.run_process(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
            + ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext"]
            + ["subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        )
        trusting = ssl.create_default_context(cafile=str(certificate))
        own = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        own.load_cert_chain(certificate, key)
        async with passing_on(ingress.server.ingress_url, tls=own) as url:
            async with client_of(ingress.server, url=url, verify=trusting) as client:
                assert await client.call(hello) == "hello"
            async with client_of(ingress.server, url=url, retries=0) as client:
                with pytest.raises(dc.Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                    await client.call(hello)


class Gateway:
    """Passes on to the ingress what comes to `/api/v1`, if it has the token."""

    def __init__(self, ingress_url: str, *, token: str | None = None) -> None:
        self._ingress_url = ingress_url
        self._token = token
        self.down = 0
        """How many requests it answers with 503."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = b""
        more = True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        status, kind, content = 404, "text/html", b"<h1>No</h1>"
        restates: list[tuple[bytes, bytes]] = []
        path = (scope["raw_path"] or b"").decode()
        if self._token and headers.get("authorization") != f"Bearer {self._token}":
            status = 401
        elif self.down:
            self.down -= 1
            status = 503
        elif path.startswith("/api/v1/"):
            url = f"{self._ingress_url}{path.removeprefix('/api/v1')}"
            for name in ("host", "authorization"):
                headers.pop(name, None)
            async with http_client() as http:
                passed = await http.post(url, content=body, headers=headers)
            status, kind, content = passed.status_code, "application/json", passed.content
            restates = [it for it in passed.headers.raw if it[0].startswith(b"x-restate")]
        sent = [(b"content-type", kind.encode()), *restates]
        await send({"type": "http.response.start", "status": status, "headers": sent})
        await send({"type": "http.response.body", "body": content})


@asynccontextmanager
async def passing_on(
    url: str, *, drops: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncGenerator[str]:
    """A way to the server that loses the answers on the first connections, or speaks TLS."""
    to = httpx2.URL(url)
    left = drops

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        upstream, up = await asyncio.open_connection(to.host, to.port)
        try:
            if left > 0:
                left -= 1
                up.write(await reader.read(2**16))
                await upstream.read(1)  # it was executed, and nobody is told
                return
            await asyncio.wait(
                [
                    asyncio.create_task(copy(reader, up)),
                    asyncio.create_task(copy(upstream, writer)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            writer.close()
            up.close()

    async with await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=tls) as listening:
        port = listening.sockets[0].getsockname()[1]
        yield f"http{'s' if tls else ''}://127.0.0.1:{port}"


async def test_the_sync_client(ingress: Ingress, server: RestateServer) -> None:
    """Everything that the other one does, without an event loop."""
    agent = Agent(
        calls("refund"),
        name="payer",
        capabilities=[
            durable.RestateDurability(),
            durable.Approvals(notify=lambda call: told.put_nowait(call.id)),
        ],
    )
    loop = asyncio.get_running_loop()

    @agent.tool_plain(requires_approval=True)
    async def refund() -> str:
        return "refunded"

    def next_told() -> str:
        return asyncio.run_coroutine_threadsafe(told.get(), loop).result(20)

    def work() -> None:
        with SyncClient(
            server.ingress_url, admin_url=server.admin_url, timeout=timedelta(seconds=20)
        ) as client:
            assert client.call(buy, Order(item="tea")).price == 3
            assert client.call("Counter/add", 1, key=some_key()).endswith(": 1")
            handle = client.send(wait, "tea", idempotency_key=some_key())
            id = next_told()
            with pytest.raises(dc.NotReady):
                client.output(handle)
            with pytest.raises(dc.Timeout):
                client.attach(handle, timeout=SOON)
            assert client.status(handle).target == "Shop/wait"
            assert any(it.id == str(handle) for it in client.invocations(service="Shop"))
            client.resolve_awakeable(id, "now")
            assert client.attach(handle) == client.output(handle) == "tea now"
            assert client.payloads(handle) == dc.Payloads(b'"tea"', b'"tea now"')
            progress = client.progress(handle, interval=timedelta(milliseconds=20))
            assert [step.name for step in progress] == ["tell", "after"]
            again = client.restart_from(handle, client.steps(handle)[-1])
            assert client.attach(again) == "tea now"
            for end in (client.cancel, client.stop, client.kill):
                handle = client.send(wait, "tea")
                client_id = next_told()
                end(handle)
                with pytest.raises(dc.RunFailed):
                    client.attach(handle)
                client.reject_awakeable(client_id, "too late")
            with pytest.raises(dc.Conflict):
                client.resume(handle)
            with pytest.raises(dc.Conflict):
                client.steer(handle, "x")

            run = client.send(service.run, "go")
            next_told()
            [call] = client.pending(run)
            client.answer(run, durable.Approve(call=call.id))
            assert client.attach(run) == "refund=refunded"

            session = client.session(chat, some_key(), str)
            assert session.message("Hello!") == "hello"
            assert len(session.history()) == 2
            assert session.status().turns == 1
            session.clear()

    service = durable.agent_service(agent)
    talker = Agent(script(), name="talker", capabilities=[durable.RestateDurability()])
    chat = durable.agent_session(talker)
    async with hosted(server, service, chat, durable.agent_run):
        await asyncio.to_thread(work)


async def test_from_fastapi(server: RestateServer) -> None:
    """A backend that knows only the handler function, in strict types, calls the agent."""
    async with serving(fastapi_backend.services) as agents:
        await server.register(agents)
        app = fastapi_backend.backend(server.ingress_url)
        async with serving(app) as url, http_client(base_url=url) as http:
            reply = {"text": "We look into it.", "urgent": False}
            ticket = {"text": "It is broken."}
            async with asyncio.timeout(PATIENCE):
                while True:
                    with suppress(httpx2.ConnectError):  # until it listens
                        answer = await http.post("/tickets", json=ticket)
                        break
            assert answer.json() == reply
            number = some_key()
            runs = [(await http.put(f"/tickets/{number}", json=ticket)).json() for _ in "ab"]
            assert runs[0] == runs[1]
            async with asyncio.timeout(PATIENCE):
                while True:
                    answer = await http.get(f"/replies/{runs[0]}")
                    if answer.status_code != 202:
                        break
                    await asyncio.sleep(0.02)
            assert answer.json() == reply
            assert (await http.post("/tickets", json={"text": ""})).status_code == 422
            assert (await http.get("/replies/nothing")).status_code == 503


class TestCommands:
    async def test_runs(
        self, client: Client, server: RestateServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One line per invocation, with the whole id and what became of it."""
        failed, waits = await client.send(fail, 402), await client.send(wait, "tea")
        await told.get()
        with pytest.raises(dc.RunFailed):
            await client.attach(failed)

        async def lines(*arguments: str) -> list[str]:
            command = ["runs", "--admin", server.admin_url, *arguments]
            assert await asyncio.to_thread(main, command) == 0
            return capsys.readouterr().out.splitlines()

        listed = {line.split()[0]: line for line in await lines("--service", "Shop")}
        assert "failure" in listed[str(failed)]
        assert listed[str(failed)].rstrip().endswith("[402] sold out")
        assert "Shop/wait" in listed[str(waits)]
        assert len(await lines("--limit", "1")) == 2
        assert not any(str(waits) in line for line in await lines("--status", "completed"))
        assert await lines("--service", "Nobody") == ["No invocation fits."]

    async def test_watch(
        self,
        client: Client,
        server: RestateServer,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The steps are there while the run waits; the exit code tells how it ended."""
        monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
        monkeypatch.setenv("RESTATE_ADMIN_URL", server.admin_url)
        handle = await client.send(wait, "tea")
        watching = asyncio.create_task(asyncio.to_thread(main, ["watch", str(handle)]))
        shown = ""
        async with asyncio.timeout(PATIENCE):
            while "tell" not in shown:
                await asyncio.sleep(0.02)
                shown += capsys.readouterr().out
        assert "after" not in shown
        await client.resolve_awakeable(await told.get(), "now")
        assert await watching == 0
        assert "after" in capsys.readouterr().out

        failed = await client.send(fail, 402)
        assert await asyncio.to_thread(main, ["watch", str(failed)]) == 1
        assert "[402] sold out" in capsys.readouterr().out

    async def test_watching_is_given_up(self, client: Client, server: RestateServer) -> None:
        """The exit code is the one of SIGINT, and not that of a run that ended well; the run goes on."""
        handle = await client.send(wait, "tea")
        # the child would inherit that a shell has SIGINT ignored, as it does for what it runs in the background
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        watching = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "durable", "watch", str(handle), "--admin", server.admin_url],
            env={**os.environ, "FORCE_COLOR": "1"},
            stdout=asyncio.subprocess.PIPE,
        )
        signal.signal(signal.SIGINT, before)
        try:
            assert watching.stdout is not None
            await asyncio.wait_for(watching.stdout.readuntil(b"tell"), PATIENCE)
            watching.send_signal(signal.SIGINT)
            await asyncio.wait_for(watching.communicate(), PATIENCE)
        finally:
            if watching.returncode is None:
                watching.kill()
                await watching.wait()
        assert watching.returncode == 130
        await client.resolve_awakeable(await told.get(), "now")
        await client.attach(handle)

    async def test_errors(self, ingress: Ingress, capsys: pytest.CaptureFixture[str]) -> None:
        """One line each."""
        unknown = "inv_18jYkUAxwZWm2Wk5xVuX0a1G0B2kZJqh2R"
        admin = ingress.server.admin_url
        for arguments, message in (
            (["watch", "--admin", admin, unknown], f"There is no invocation {unknown}"),
            (["watch", "--admin", admin, "x"], "'x' is not the id of an invocation"),
            (["runs", "--admin", "nowhere"], "`admin_url` must be like 'http://"),
            (["runs", "--admin", admin, "--limit", "0"], "`limit` must be positive"),
        ):
            assert await asyncio.to_thread(main, arguments) == 1
            [line] = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ")
            assert message in line
