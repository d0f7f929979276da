"""`durable.testing`: handlers without a server, in virtual time, with a crash at every step."""

import asyncio
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from time import monotonic
from typing import Any

import pytest
import restate
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.capabilities import ProcessHistory
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart
from pydantic_ai.models.test import TestModel
from restate.exceptions import RetryableError
from restate.serde import BytesSerde

import durable
from durable.testing import (
    InMemoryInvocation,
    JournalMismatch,
    StillFailing,
    Suspended,
    check_every_crash,
)

service = restate.Service("Trips")
payments = restate.Service("Payments")
account = restate.VirtualObject("Account")
workflow = restate.Workflow("Approval")

done: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def _nothing_done() -> None:
    done.clear()


async def step(name: str) -> str:
    done[name] += 1
    return f"{name} done"


class Trip(BaseModel):
    city: str
    nights: int = 1


@payments.handler()
async def charge(ctx: restate.Context, trip: Trip) -> str:
    raise NotImplementedError


@account.handler()
async def deposit(ctx: restate.ObjectContext, amount: int) -> int:
    before = await ctx.get("balance", type_hint=int)
    ctx.set("balance", (before or 0) + amount)
    return (before or 0) + amount


@account.handler(state_preload=False)
async def balance(ctx: restate.ObjectContext) -> list[Any]:
    return [await ctx.state_keys(), await ctx.get("balance"), await ctx.get("no")]


@service.handler()
async def book(ctx: restate.Context, trip: Trip) -> str:
    await ctx.run_typed("reserve", step, name="reserve")
    receipt = await ctx.service_call(charge, trip)
    await ctx.run_typed("mail", step, name="mail")
    return f"{trip.city}: {receipt}"


async def test_what_a_test_of_a_handler_looks_like() -> None:
    """Output, operations and their values, and a replay that changes nothing."""
    invocation = InMemoryInvocation(book, {"city": "Rome"}, calls={charge: "receipt-1"})
    assert await invocation.run() == "Rome: receipt-1"
    assert [(entry.kind, entry.name, entry.value) for entry in invocation.stored] == [
        ("Run", "reserve", "reserve done"),
        ("Call", "Payments/charge", "receipt-1"),
        ("Run", "mail", "mail done"),
    ]
    assert invocation.stored[1].request == {"city": "Rome", "nights": 1}
    assert invocation.invoked == ["reserve", "mail"]
    await invocation.replay()
    assert invocation.invoked == []
    assert await invocation.run() == "Rome: receipt-1"
    assert done == {"reserve": 1, "mail": 1}


async def test_a_crash_loses_nothing_that_was_completed() -> None:
    """After the crash the handler goes on from the journal."""
    invocation = InMemoryInvocation(book, Trip(city="Rome"), calls={charge: "receipt-1"})
    await invocation.run_until_crash(after=1)
    assert [entry.name for entry in invocation.stored] == ["reserve"]
    assert await invocation.run() == "Rome: receipt-1"
    assert invocation.invoked == ["mail"]
    assert done == invocation.executions == {"reserve": 1, "mail": 1}


async def test_nothing_of_a_crashed_attempt_goes_on() -> None:
    """Steps beside the last one are cut off; handler code does not see their end."""

    @service.handler("cut")
    async def cut(ctx: restate.Context) -> list[str]:
        return list(await asyncio.gather(ctx.run_typed("a", quick), ctx.run_typed("b", slow)))

    async def quick() -> str:
        return "a"

    async def slow() -> str:
        done["begun"] += 1
        await asyncio.sleep(0.02)
        done["ended"] += 1
        return "b"

    invocation = InMemoryInvocation(cut)
    await invocation.run_until_crash(after=1)
    await asyncio.sleep(0.05)
    assert done == {"begun": 1}
    assert [entry.done for entry in invocation.stored] == [True, False]
    assert await invocation.run() == ["a", "b"]
    assert done == {"begun": 2, "ended": 1}
    with pytest.raises(AssertionError, match="ended after 2 steps, before the crash after 3"):
        await InMemoryInvocation(cut).run_until_crash(after=3)


async def test_check_every_crash() -> None:
    """One undisturbed run and one per step; the number of executions shows it."""

    def pay(trip: Trip) -> str:
        return f"receipt for {trip.nights}"

    calls = {charge: pay}
    assert await check_every_crash(book, Trip(city="Rome"), calls=calls) == "Rome: receipt for 1"
    assert done == {"reserve": 3, "mail": 3}


async def test_check_every_crash_finds_what_is_not_durable() -> None:
    """Memory of the process is lost in a crash; here it decides about steps, there about the output."""
    memory: list[str] = []

    @service.handler("forgetful")
    async def forgetful(ctx: restate.Context, what: str) -> int:
        await ctx.run_typed("remember", remember)
        if what == "steps":
            await ctx.run_typed(f"step {len(memory)}", step, name="")
        return len(memory)

    async def remember() -> None:
        memory.append("x")

    invocation = InMemoryInvocation(forgetful, "output")
    assert await invocation.run() == 1
    memory.clear()
    with pytest.raises(JournalMismatch, match="handler return"):
        await invocation.replay()
    memory.clear()
    with pytest.raises(AssertionError, match="With a crash after step 1 the handler ends with 2"):
        await check_every_crash(forgetful, "output")
    memory.clear()
    with pytest.raises(AssertionError, match="With a crash after step 1"):
        await check_every_crash(forgetful, "steps")


@pytest.mark.parametrize(
    ("first", "replay", "message"),
    [
        ("ab", "ac", "mismatch"),
        ("ab", "a", "mismatch"),
        ("a", "ab", "mismatch"),
        ("ab", "as", "mismatch"),
    ],
)
async def test_replay_names_the_first_difference(first: str, replay: str, message: str) -> None:
    """Another step, a missing one, one more, and a sleep instead of a step."""
    program = first

    @service.handler(f"program {first} {replay}")
    async def run(ctx: restate.Context) -> None:
        for name in program:
            if name == "s":
                await ctx.sleep(timedelta(seconds=1))
            else:
                await ctx.run_typed(name, step, name=name)

    invocation = InMemoryInvocation(run)
    await invocation.run()
    await invocation.replay()
    program = replay
    with pytest.raises(JournalMismatch, match=message):
        await invocation.replay()


async def test_replay_executes_no_step() -> None:
    """A step that was begun but not awaited to its end must not be awaited in the replay."""
    patient = False

    @service.handler("impatient")
    async def impatient(ctx: restate.Context) -> str:
        hanging = ctx.run_typed("hang", hang)
        try:
            await asyncio.wait_for(hanging, None if patient else 0.01)
        except TimeoutError:
            return "gave up"
        return "waited"

    async def hang() -> None:
        done["hang"] += 1
        await asyncio.Event().wait()

    invocation = InMemoryInvocation(impatient)
    assert await invocation.run() == "gave up"
    await invocation.replay()
    patient = True
    with pytest.raises(JournalMismatch):
        await invocation.replay()
    assert done == {"hang": 1}


async def test_sleeps_take_no_time_and_end_in_due_order() -> None:
    """The clock jumps to the next timer, also over the timers made after an earlier jump."""

    @service.handler("sleeps")
    async def sleeps(ctx: restate.Context) -> list[str]:
        woken: list[str] = []

        async def sleep(name: str, *hours: int) -> None:
            for each in hours:
                await ctx.sleep(timedelta(hours=each))
            woken.append(name)

        await asyncio.gather(sleep("third", 12), sleep("first", 10), sleep("second", 5, 6))
        await asyncio.sleep(1e6)
        return woken

    began = monotonic()
    invocation = InMemoryInvocation(sleeps)
    assert await invocation.run() == ["first", "second", "third"]
    assert monotonic() - began < 1
    await invocation.replay()


async def test_time_passes_as_outside_while_a_step_runs() -> None:
    """So a timeout hits a step that takes too long, and only that."""

    @service.handler("timeouts")
    async def timeouts(ctx: restate.Context, limit: float) -> str:
        try:
            async with asyncio.timeout(limit):
                return await ctx.run_typed("slow", slow)
        except TimeoutError:
            return "timed out"

    async def slow() -> str:
        await asyncio.sleep(0.05)
        return "in time"

    assert await InMemoryInvocation(timeouts, 60).run() == "in time"
    assert await InMemoryInvocation(timeouts, 0.01).run() == "timed out"


async def test_a_test_may_give_up_waiting() -> None:
    """Cancelling `run` ends the attempt; a later one goes on from the journal."""
    release = asyncio.Event()

    @service.handler("hangs")
    async def hangs(ctx: restate.Context) -> str:
        await ctx.run_typed("a", step, name="a")
        return await ctx.run_typed("hang", hang)

    async def hang() -> str:
        await release.wait()
        done["hang"] += 1
        return "released"

    invocation = InMemoryInvocation(hangs)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await invocation.run()
    release.set()
    await asyncio.sleep(0)
    assert done == {"a": 1}
    assert await invocation.run() == "released"
    assert done == {"a": 1, "hang": 1}


async def test_retries_take_no_time_and_end() -> None:
    """Options bound the tries, delays asked for pass at once, and the failure is the server's."""
    options = restate.RunOptions[str](max_attempts=3, initial_retry_interval=timedelta(hours=1))
    limit = restate.RunOptions[str](
        max_duration=timedelta(hours=3), initial_retry_interval=timedelta(hours=1)
    )

    @service.handler("retries")
    async def retries(ctx: restate.Context, what: str) -> str:
        if what == "duration":
            return await ctx.run_typed("fail", fail, limit)
        return await ctx.run_typed("fail", asked if what == "asked" else fail, options)

    async def fail() -> str:
        done["fail"] += 1
        raise ValueError("broken")

    async def asked() -> str:
        done["asked"] += 1
        if done["asked"] < 3:
            raise RetryableError("later", retry_after=timedelta(days=1))
        return "third time"

    invocation = InMemoryInvocation(retries, "fail")
    with pytest.raises(restate.TerminalError, match="broken") as caught:
        await invocation.run()
    assert caught.value.status_code == 500
    assert invocation.executions == {"fail": 3}
    failure = invocation.stored[0].failure
    assert failure is not None
    assert "broken" in failure.message
    assert await InMemoryInvocation(retries, "asked").run() == "third time"
    with pytest.raises(restate.TerminalError):
        await InMemoryInvocation(retries, "duration").run()
    assert 1000 < done["fail"] < 1100  # every ten seconds, the SDK's longest pause by default


async def test_a_handler_that_keeps_failing_is_given_up() -> None:
    """Restate would pause it: the test gets the exception itself as the cause."""

    @service.handler("broken")
    async def broken(ctx: restate.Context) -> None:
        await ctx.run_typed("a", step, name="a")
        raise KeyError("typo")

    @service.handler("stuck")
    async def stuck(ctx: restate.Context) -> None:
        await ctx.run_typed("fail", fail)

    async def fail() -> None:
        done["fail"] += 1
        raise KeyError("wrong")

    with pytest.raises(StillFailing, match=r"failed 70 times.*wrong"):
        await InMemoryInvocation(stuck).run()
    assert done == {"fail": 70}
    done.clear()
    with pytest.raises(StillFailing, match="typo") as caught:
        await InMemoryInvocation(broken, max_attempts=3).run()
    assert isinstance(caught.value.__cause__, KeyError)
    assert done == {"a": 1}


async def test_awakeables_promises_and_signals_come_from_the_test() -> None:
    """The invocation says what it waits for, and goes on when it has it."""

    @workflow.main()
    async def approval(ctx: restate.WorkflowContext, what: str) -> Any:
        await ctx.run_typed("ask", step, name="ask")
        if what == "awakeable":
            return await ctx.awakeable(type_hint=dict[str, int])[1]
        if what == "signal":
            return await ctx.signal("go", type_hint=dict[str, int])
        return await ctx.promise("answer", type_hint=dict[str, int])

    async def suspended(what: str) -> tuple[InMemoryInvocation[Any], Suspended]:
        invocation = InMemoryInvocation(approval, what, key="a")
        with pytest.raises(Suspended, match=f"The invocation waits for {what}") as caught:
            await invocation.run()
        await invocation.replay()
        return invocation, caught.value

    for error in (None, "no"):
        by_awakeable, waits = await suspended("awakeable")
        by_promise, promise = await suspended("promise")
        by_signal, signal = await suspended("signal")
        (awakeable,) = waits.awakeables
        assert (promise.promises, signal.signals) == (["answer"], ["go"])
        if error is None:
            by_awakeable.resolve_awakeable(awakeable, {"yes": 1})
            by_promise.resolve_promise("answer", {"yes": 1})
            by_signal.resolve_signal("go", {"yes": 1})
        else:
            by_awakeable.reject_awakeable(awakeable, error, status_code=403)
            by_promise.reject_promise("answer", error, status_code=403)
            by_signal.reject_signal("go", error, status_code=403)
        for invocation in (by_awakeable, by_promise, by_signal):
            if error is None:
                assert await invocation.run() == {"yes": 1}
            else:
                with pytest.raises(restate.TerminalError, match=error) as caught:
                    await invocation.run()
                assert caught.value.status_code == 403
            assert invocation.invoked == []
            await invocation.replay()
        with pytest.raises(UserError, match="already completed"):
            by_promise.resolve_promise("answer")
        with pytest.raises(UserError, match="not an awakeable of this invocation"):
            InMemoryInvocation(approval, "", key="b").resolve_awakeable(awakeable)


async def test_check_every_crash_drives_what_waits() -> None:
    """`drive` settles what the handler waits for, in each of the runs."""

    @service.handler("waits")
    async def waits(ctx: restate.Context) -> str:
        await ctx.run_typed("before", step, name="before")
        answer = await ctx.awakeable(type_hint=str)[1]
        return answer + await ctx.run_typed("after", step, name="after")

    async def drive(invocation: InMemoryInvocation[str]) -> str:
        with pytest.raises(Suspended) as caught:
            await invocation.run()
        invocation.resolve_awakeable(caught.value.awakeables[0], "yes, ")
        return await invocation.run()

    assert await check_every_crash(waits, drive=drive) == "yes, after done"
    assert done == {"before": 3, "after": 3}


async def test_calls_are_answered_by_stubs() -> None:
    """Values, functions sync and async, with the key for objects; sends are only recorded."""

    @service.handler("caller")
    async def caller(ctx: restate.Context) -> list[Any]:
        ctx.service_send(charge, Trip(city="Oslo"), send_delay=timedelta(days=1))
        receipt = await ctx.service_call(charge, Trip(city="Rome"))
        balance = await ctx.object_call(deposit, "me", 5)
        return [receipt, balance, (await ctx.generic_call("Raw", "call", b"x")).decode()]

    async def pay(trip: Trip) -> str:
        if trip.city == "Atlantis":
            raise restate.TerminalError("no such city", status_code=404)
        return f"paid {trip.city}"

    def broken(trip: Trip) -> float:
        return trip.nights / 0

    def put(key: str, amount: int) -> int:
        return len(key) + amount

    calls = {charge: pay, deposit: put, "Raw/call": b"raw"}
    invocation = InMemoryInvocation(caller, calls=calls)
    assert await invocation.run() == ["paid Rome", 7, "raw"]
    assert invocation.stored[0].request == {"city": "Oslo", "nights": 1}
    await invocation.replay()
    with pytest.raises(
        UserError, match=r'calls `Payments/charge`.*`calls=\{"Payments/charge": answer'
    ):
        await InMemoryInvocation(caller).run()
    with pytest.raises(restate.TerminalError, match="no such city") as caught:
        await InMemoryInvocation(book, Trip(city="Atlantis"), calls=calls).run()
    assert caught.value.status_code == 404
    with pytest.raises(ZeroDivisionError):  # a fault of the test is not the handler's
        await InMemoryInvocation(book, Trip(city="Rome"), calls={charge: broken}).run()


async def test_state_is_given_and_read() -> None:
    """Eager or lazy, as the handler has it."""
    invocation = InMemoryInvocation(deposit, 5, key="me", state={"balance": 10})
    assert await invocation.run() == 15
    assert invocation.state == {"balance": 15}
    assert [(entry.kind, entry.request, entry.value) for entry in invocation.stored] == [
        ("GetEagerState", None, 10),
        ("SetState", 15, None),
    ]
    await invocation.replay()
    lazy = InMemoryInvocation(balance, key="me", state={"balance": 10})
    assert await lazy.run() == [["balance"], 10, None]
    assert [entry.kind for entry in lazy.stored] == [
        "GetLazyStateKeys",
        "GetLazyState",
        "GetLazyState",
    ]
    assert [entry.value for entry in lazy.stored] == [["balance"], 10, None]


async def test_bad_input_is_the_caller_s_error() -> None:
    """Input is validated as behind the ingress."""
    for request in ({"nights": 2}, b"{"):
        with pytest.raises(restate.TerminalError) as caught:
            await InMemoryInvocation(book, request).run()
        assert caught.value.status_code == 400


async def test_identity_is_the_same_every_time() -> None:
    """Id, random numbers and headers; another seed gives others."""

    @service.handler("identity")
    async def identity(ctx: restate.Context) -> list[Any]:
        request = ctx.request()
        return [request.id, str(ctx.uuid()), ctx.random().random(), request.headers["tenant"]]

    def invocation(seed: int = 0) -> InMemoryInvocation[list[Any]]:
        return InMemoryInvocation(identity, headers={"tenant": "t"}, seed=seed)

    first = invocation()
    output = await first.run()
    assert output == await invocation().run()
    assert [output[0], output[3]] == [first.id, "t"]
    other = await invocation(seed=1).run()
    assert not set(output[:3]) & set(other[:3])


async def test_values_go_through_their_serdes() -> None:
    """What JSON loses is lost; bytes stay bytes."""

    @service.handler("types")
    async def types(ctx: restate.Context) -> list[Any]:
        pair: Any = await ctx.run("pair", lambda: (1, 2), type_hint=None)
        raw = await ctx.run("raw", lambda: b"\xff", serde=BytesSerde())
        return [pair, list(raw)]

    invocation = InMemoryInvocation(types)
    assert await invocation.run() == [[1, 2], [255]]
    assert [entry.value for entry in invocation.stored] == [[1, 2], b"\xff"]


async def test_cancel_lets_the_handler_clean_up() -> None:
    """A cancelled invocation fails with 409, after the steps of its `finally`."""

    @service.handler("cancelled")
    async def cancelled(ctx: restate.Context) -> str:
        try:
            return await ctx.awakeable(type_hint=str)[1]
        finally:
            await ctx.run_typed("clean up", step, name="clean up")

    invocation = InMemoryInvocation(cancelled)
    with pytest.raises(Suspended):
        await invocation.run()
    invocation.cancel()
    with pytest.raises(restate.TerminalError, match="cancelled") as caught:
        await invocation.run()
    assert caught.value.status_code == 409
    assert done == {"clean up": 1}
    await invocation.replay()


async def test_a_call_can_be_cancelled() -> None:
    """The callee's stub ends, and the caller gets the failure."""

    @service.handler("cancels")
    async def cancels(ctx: restate.Context) -> str:
        call = ctx.service_call(charge, Trip(city="Rome"))
        await call.cancel_invocation()
        return await call

    async def never(trip: Trip) -> str:
        await asyncio.Event().wait()
        return ""

    with pytest.raises(restate.TerminalError, match="cancelled"):
        await InMemoryInvocation(cancels, calls={charge: never}).run()


async def test_what_cannot_be_says_so() -> None:
    """A function that is no handler, and operations that are not supported."""

    @service.handler("attaches")
    async def attaches(ctx: restate.Context) -> None:
        await ctx.attach_invocation("inv_1")

    with pytest.raises(NotImplementedError, match="`AttachInvocation` is not supported"):
        await InMemoryInvocation(attaches).run()
    with pytest.raises(UserError, match=r"is not a handler: decorate it"):
        InMemoryInvocation(step)


async def test_agents_are_durable_in_memory() -> None:
    """An agent's requests and tools are steps, done once over all crashes."""
    agent = Agent(TestModel(), name="helper", capabilities=[durable.RestateDurability()])

    @agent.tool_plain
    async def look() -> str:
        done["look"] += 1
        return "seen"

    @service.handler("agentic")
    async def agentic(ctx: restate.Context, prompt: str) -> str:
        return (await agent.run(prompt)).output

    invocation = InMemoryInvocation(agentic, "go")
    assert await invocation.run() == '{"look":"seen"}'
    names = [entry.name for entry in invocation.stored]
    assert names[0] == names[2] == "helper__model.request"
    assert await check_every_crash(agentic, "go") == '{"look":"seen"}'
    assert done == {"look": 5}


def test_needs_no_test_dependencies() -> None:
    """Importing it imports no pytest."""
    code = "import sys, durable.testing; sys.exit('pytest' in sys.modules or 'hypothesis' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_messages_of_a_history_processor_have_journaled_times() -> None:
    """State that is set from them is the same on every replay."""

    async def shorten(messages: list[ModelMessage]) -> list[ModelMessage]:
        return [ModelRequest(parts=[UserPromptPart("summary")]), messages[-1]]

    shortening = Agent(
        TestModel(),
        name="shortening",
        capabilities=[ProcessHistory(shorten), durable.RestateDurability()],
    )

    memory = restate.VirtualObject("Memory")

    @memory.handler()
    async def remember(ctx: restate.ObjectContext) -> None:
        result = await shortening.run("go")
        ctx.set("messages", result.all_messages_json(), serde=BytesSerde())

    invocation = InMemoryInvocation(remember, key="k")
    await invocation.run()
    await invocation.replay()
