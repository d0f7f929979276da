"""Sagas: which calls are undone, when, in which order, and what becomes of an undo that fails."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import count
from typing import Any

import pytest
import restate
from opentelemetry.sdk.trace import TracerProvider
from pydantic import BaseModel
from pydantic_ai import Agent, CallToolsNode, InstrumentationSettings, ModelRetry, RunContext
from pydantic_ai.capabilities import AbstractCapability, Instrumentation
from pydantic_ai.exceptions import RunCancelled, ToolFailed, UserError
from pydantic_ai.messages import ToolReturn
from pydantic_ai.models import Model
from pydantic_ai.tools import ToolDefinition
from pydantic_ai.toolsets import FunctionToolset
from pydantic_ai.usage import UsageLimits
from restate import TerminalError

import durable
from durable._sdk import ServerInvocationContext
from durable.testing import InMemoryInvocation, Suspended, check_every_crash
from tests.live.scripted import call, script

Context = RunContext[None]
TWICE = restate.RunOptions[Any](max_attempts=2, initial_retry_interval=timedelta(milliseconds=1))
IN_HANDLER: dict[str, Any] = {"restate": False}

_seeds = count()

log: list[str] = []
"""What happened, in order."""


@pytest.fixture(autouse=True)
def _nothing_happened() -> None:
    log.clear()


@dataclass
class Booking:
    """What a tool returns."""

    number: int


class Travel:
    """An agent that books a flight and a hotel, both of which can be cancelled, and cars, which fail for good."""

    def __init__(
        self,
        model: Model,
        *,
        name: str = "travel",
        extra: Sequence[AbstractCapability[None]] = (),
        **options: Any,
    ) -> None:
        self.saga = saga = durable.Saga[None](undo_run_options=TWICE)
        self.agent = agent = Agent(
            model,
            name=name,
            deps_type=type(None),
            capabilities=[durable.RestateDurability(tool_run_options=TWICE), saga, *extra],
            **options,
        )

        @agent.tool
        async def flight(ctx: Context, to: str, day: date = date(2026, 1, 1)) -> Booking:
            log.append(f"flight to {to}")
            return Booking(7)

        @saga.undo(flight)
        async def cancel_flight(ctx: Context, day: date, to: str, result: Booking) -> None:
            log.append(f"cancel flight {result.number} to {to} on {day}")

        @agent.tool_plain(name="hotel")
        def book_hotel(nights: int = 3) -> str:
            log.append("hotel")
            return "H"

        @saga.undo("hotel")
        def cancel_hotel(ctx: Context, *, nights: int, result: str) -> None:
            log.append(f"cancel hotel {result} of {nights} nights")

        @agent.tool_plain
        async def car() -> str:
            log.append("car")
            raise TerminalError("sold out", status_code=410)

    async def run(self, **options: Any) -> str:
        """Run the agent."""
        return (await self.agent.run("go", **options)).output


FLIGHT, HOTEL, CAR = call("flight", to="Rome"), call("hotel"), call("car")
BOOKED = ["flight to Rome", "hotel"]
CANCELLED = ["cancel hotel H of 3 nights", "cancel flight 7 to Rome on 2026-01-01"]


def hosted(run: Callable[[], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A handler that awaits `run`."""

    async def handler(ctx: restate.Context) -> Any:
        return await run()

    return restate.Service("Trips").handler()(handler)


def invocation_of(run: Callable[[], Awaitable[Any]]) -> InMemoryInvocation[Any]:
    """An invocation, with an id of its own, of a handler that awaits `run`."""
    return InMemoryInvocation(hosted(run), seed=next(_seeds))


async def until_logged(what: str) -> None:
    """Wait until it happened."""
    async with asyncio.timeout(10):
        while what not in log:  # noqa: ASYNC110 - a list has no event
            await asyncio.sleep(0.01)


async def failure_of(running: Awaitable[Any]) -> TerminalError:
    """What the caller gets."""
    with pytest.raises(TerminalError) as error:
        await running
    return error.value


# Order, arguments, keys


async def test_a_failed_run_is_undone_newest_first() -> None:
    """Each undo gets the arguments and the result of its call, once, whichever step a crash follows."""
    travel = Travel(script([FLIGHT], [HOTEL], [CAR]))
    invocation = invocation_of(travel.run)
    failure = await failure_of(invocation.run())
    assert (failure.status_code, failure.message) == (410, "sold out")
    assert log == [*BOOKED, "car", *CANCELLED]
    assert [entry.name for entry in invocation.stored][-2:] == [
        "travel__undo:hotel",
        "travel__undo:flight",
    ]
    await invocation.replay()
    await failure_of(check_every_crash(hosted(travel.run)))


async def test_parallel_calls_are_undone_in_reverse_order_of_their_ends() -> None:
    """The call that began first ends last, so it is undone first; on each replay too."""
    travel = Travel(script([call("slow"), call("quick")], [CAR]))
    quick_ended = asyncio.Event()

    @travel.agent.tool_plain
    async def slow() -> str:
        await quick_ended.wait()
        return "slow"

    @travel.agent.tool_plain(metadata=IN_HANDLER)
    async def quick() -> str:
        await durable.restate_context().run_typed("quick", nothing)
        quick_ended.set()
        return "quick"

    def undo(ctx: Context, result: str) -> None:
        log.append(result)

    travel.saga.undo(slow)(undo)
    travel.saga.undo(quick)(undo)
    invocation = invocation_of(travel.run)
    await failure_of(invocation.run())
    assert log == ["car", "slow", "quick"]
    await invocation.replay()
    await failure_of(check_every_crash(hosted(travel.run)))


async def nothing() -> None:
    """A step."""


async def test_keys_are_stable_over_retries_and_differ_from_the_calls() -> None:
    """In a handler and outside of one."""
    travel = Travel(script([call("pay")], [CAR]))

    @travel.agent.tool
    async def pay(ctx: Context) -> None:
        log.append(durable.idempotency_key(ctx))

    @travel.saga.undo(pay)
    async def refund(ctx: Context) -> None:
        log.append(durable.idempotency_key(ctx))
        if len(log) < 4:
            raise ConnectionError("down")

    await failure_of(invocation_of(travel.run).run())
    paid, _, *refunded = log
    assert len(refunded) == 2
    assert len({paid, *refunded}) == 2
    await failure_of(travel.run())
    assert len(set(log[-3:])) == 3


async def test_values_are_what_the_undo_has_annotated() -> None:
    """Models as arguments, `ToolReturn`, defaults, and classes that Pydantic does not know."""

    class Request(BaseModel):
        city: str

    class Opaque:
        """Pydantic does not know it."""

    travel = Travel(script([call("book", city="Rome")], [call("choose")], [CAR]))

    @travel.agent.tool_plain
    async def book(request: Request) -> ToolReturn[Any]:
        return ToolReturn(return_value={"number": 3}, content="Booked.")

    @travel.saga.undo(book)
    async def unbook(ctx: Context, request: Request, result: Booking) -> None:
        log.append(f"{request!r} {result} {ctx.tool_call_id}")

    @travel.agent.tool_plain
    async def choose() -> int:
        return 1

    @travel.saga.undo(choose)
    async def unchoose(ctx: Context, result: Opaque) -> None:
        log.append(repr(result))

    await failure_of(invocation_of(travel.run).run())
    assert log == ["car", "1", "Request(city='Rome') Booking(number=3) book"]


# When


async def test_a_run_that_ends_well_is_not_undone() -> None:
    """Nor when the handler fails afterwards."""
    travel = Travel(script([FLIGHT], [HOTEL]))

    async def run() -> None:
        await travel.run()
        raise TerminalError("too late")

    assert (await failure_of(invocation_of(run).run())).message == "too late"
    assert log == BOOKED


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"usage_limits": UsageLimits(request_limit=2)}, 429),
        ({"output_type": int}, 502),
        ({"timeout": 3600}, 504),
    ],
)
async def test_whatever_ends_the_run(options: dict[str, Any], status: int) -> None:
    """A usage limit, a model that never gives the output, the run's time: the caller gets its status."""
    travel = Travel(script([FLIGHT], [HOTEL], [call("sleep")]))

    @travel.agent.tool_plain(metadata=IN_HANDLER)
    async def sleep() -> None:
        await asyncio.sleep(7200 if "timeout" in options else 0)

    invocation = invocation_of(lambda: travel.run(**options))
    assert (await failure_of(invocation.run())).status_code == status
    assert log == [*BOOKED, *CANCELLED]
    await invocation.replay()


async def test_a_run_that_is_left_is_undone() -> None:
    """Like a cancelled one: it will not go on."""
    travel = Travel(script([FLIGHT], [HOTEL]))

    async def leave() -> str:
        async with travel.agent.iter("go") as run:
            async for node in run:
                if isinstance(node, CallToolsNode) and run.usage.requests == 2:
                    break
        return "left"

    assert await check_every_crash(hosted(leave)) == "left"
    assert set(log) == {"flight to Rome", CANCELLED[1]}


async def test_a_handler_that_waits_no_longer_cancels_the_run() -> None:
    """`asyncio.timeout` around the run; the handler goes on."""
    travel = Travel(script([FLIGHT], [call("sleep")]))

    @travel.agent.tool_plain(metadata=IN_HANDLER)
    async def sleep() -> None:
        await asyncio.sleep(7200)

    async def run() -> str:
        with suppress(TimeoutError):
            async with asyncio.timeout(60):
                await travel.run()
        log.append("goes on")
        return "late"

    assert await invocation_of(run).run() == "late"
    assert log == ["flight to Rome", CANCELLED[1], "goes on"]


async def test_what_ends_only_the_attempt_undoes_nothing() -> None:
    """An exception in handler code that Restate retries, and a suspension."""
    travel = Travel(script([FLIGHT], [call("ask")], [HOTEL]))
    failures = iter([RuntimeError("once")])

    @travel.agent.tool_plain(metadata=IN_HANDLER)
    async def ask() -> str:
        for failure in failures:
            raise failure
        _, answer = durable.restate_context().awakeable(type_hint=str)
        return await answer

    invocation = invocation_of(travel.run)
    with pytest.raises(Suspended) as suspended:
        await invocation.run()
    assert log == ["flight to Rome"]
    invocation.resolve_awakeable(suspended.value.awakeables[0], "go on")
    assert await invocation.run() == "hotel=H"
    assert log == BOOKED


async def test_code_that_ends_with_its_attempt_undoes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A `finally` that cancels a task is no end of it then: no step is even created."""
    travel = Travel(script([FLIGHT]))
    created: list[str] = []
    create = ServerInvocationContext.run_typed

    def run_typed(self: Any, name: str, *arguments: Any, **options: Any) -> Any:
        created.append(name)
        return create(self, name, *arguments, **options)

    monkeypatch.setattr(ServerInvocationContext, "run_typed", run_typed)

    async def run() -> None:
        answers = [durable.restate_context().awakeable(type_hint=str)[1] for _ in range(2)]
        booked = asyncio.Event()

        async def wait() -> None:
            async with durable.saga():
                await travel.run()
                booked.set()
                await answers[0]

        async def watch() -> None:
            await booked.wait()
            try:
                await answers[1]
            finally:
                waiting.cancel()

        waiting = asyncio.create_task(wait())
        await asyncio.gather(waiting, asyncio.create_task(watch()))

    with pytest.raises(Suspended):
        await invocation_of(run).run()
    assert log == ["flight to Rome"]
    assert not [name for name in created if "undo" in name]


# Which calls


@pytest.mark.parametrize("error", [ModelRetry("full"), ToolFailed("full")])
async def test_a_tool_that_says_it_did_nothing_is_not_undone(error: Exception) -> None:
    """The model is told; what it does instead is undone."""
    travel = Travel(script([call("book", "1")], [call("book", "2")], [CAR]))
    errors = iter([error])

    @travel.agent.tool_plain
    async def book() -> str:
        for it in errors:
            raise it
        return "booked"

    @travel.saga.undo(book)
    async def unbook(ctx: Context, result: str | None) -> None:
        log.append(f"unbook {ctx.tool_call_id} {result}")

    await failure_of(invocation_of(travel.run).run())
    assert log == ["car", "unbook 2 booked"]


@pytest.mark.parametrize("at_most_once", [True, False])
async def test_an_unknown_outcome_is_undone_without_a_result(at_most_once: bool) -> None:
    """By undos that can do without; `flight` fails in the same way, but its undo needs the booking."""
    model = script([FLIGHT], [call("pay", amount=5)], [CAR])
    travel = Travel(model)

    async def pay(amount: int) -> str:
        log.append("pay")
        raise ConnectionError("reset")

    options = {"restate": {"at_most_once": True}} if at_most_once else None
    travel.agent.tool_plain(metadata=options)(pay)

    @travel.saga.undo(pay)
    async def refund(ctx: Context, amount: int, result: str | None) -> None:
        log.append(f"refund {amount} {result}")

    await failure_of(invocation_of(travel.run).run())
    tries = ["pay", "car"] if at_most_once else ["pay", "pay"]
    assert log == ["flight to Rome", *tries, "refund 5 None", CANCELLED[1]]


async def test_an_undo_that_needs_the_result_runs_for_completed_calls_only() -> None:
    """The tool's own exception is what the run ends with."""
    travel = Travel(script([call("book")]))

    @travel.agent.tool_plain
    async def book() -> Booking:
        raise ConnectionError("down")

    @travel.saga.undo(book)
    async def unbook(ctx: Context, result: Booking) -> None:
        log.append("unbook")

    failure = await failure_of(invocation_of(travel.run).run())
    assert "down" in failure.message
    assert "Not undone" not in failure.message
    assert log == []


# Cancellations


async def test_a_cancellation_waits_for_the_call_in_a_step() -> None:
    """So the undo has its result, and does not run beside it."""
    travel = Travel(script([FLIGHT], [call("book")], [HOTEL]))

    @travel.agent.tool_plain
    async def book() -> int:
        invocation.cancel()
        await asyncio.sleep(0.05)
        log.append("booked")
        return 3

    @travel.saga.undo(book)
    async def unbook(ctx: Context, result: int) -> None:
        log.append(f"unbook {result}")

    async def run() -> str:
        try:
            return await travel.run()
        except TerminalError as cancelled:
            messages = RunCancelled.from_cancellation(cancelled)
            assert messages is not None
            log.append(f"{len(messages.all_messages())} messages")
            raise

    invocation = invocation_of(run)
    failure = await failure_of(invocation.run())
    assert (failure.status_code, failure.message) == (409, "cancelled")
    assert log == ["flight to Rome", "booked", "unbook 3", CANCELLED[1], "5 messages"]
    await invocation.replay()


async def test_a_cancellation_wins_over_what_the_step_says_then() -> None:
    """The run does not go on because the tool asks the model to try again."""
    travel = Travel(script([FLIGHT], [call("book")], [HOTEL]))

    @travel.agent.tool_plain
    async def book() -> int:
        invocation.cancel()
        await asyncio.sleep(0.05)
        raise ModelRetry("full")

    @travel.saga.undo(book)
    async def unbook(ctx: Context) -> None:
        log.append("unbook")

    invocation = invocation_of(travel.run)
    assert (await failure_of(invocation.run())).status_code == 409
    assert log == ["flight to Rome", CANCELLED[1]]
    await invocation.replay()


async def test_a_second_cancellation_does_not_wait() -> None:
    """For a call that hangs: its outcome is unknown then."""
    travel = Travel(script([FLIGHT], [call("hang")]))

    @travel.agent.tool_plain
    async def hang() -> None:
        invocation.cancel()
        await asyncio.sleep(0.05)
        invocation.cancel()
        await asyncio.sleep(3600)

    @travel.saga.undo(hang)
    async def free(ctx: Context) -> None:
        log.append("free")

    invocation = invocation_of(travel.run)
    assert (await failure_of(invocation.run())).status_code == 409
    assert log == ["flight to Rome", "free", CANCELLED[1]]


async def test_a_cancellation_reaches_tools_in_handler_code() -> None:
    """They wait for days, so they are not waited for; what they did is unknown."""
    travel = Travel(script([HOTEL], [call("wait")]))

    @travel.agent.tool_plain(metadata=IN_HANDLER)
    async def wait() -> None:
        await durable.restate_context().run_typed("notify", cancel)
        await durable.restate_context().sleep(timedelta(days=1))

    async def cancel() -> None:
        invocation.cancel()

    @travel.saga.undo(wait)
    async def stop_waiting(ctx: Context, result: None) -> None:
        log.append("stop waiting")

    invocation = invocation_of(travel.run)
    assert (await failure_of(invocation.run())).status_code == 409
    assert log == ["hotel", "stop waiting", CANCELLED[0]]


async def test_a_cancellation_reaches_steps_of_a_delegate() -> None:
    """Those that cannot be undone, though the tool that delegates can."""
    inner = Travel(script([call("hang")]), name="inner")
    outer = Travel(script([FLIGHT], [call("ask")]), name="outer")
    delegating(outer, inner.run, metadata=IN_HANDLER)

    @inner.agent.tool_plain
    async def hang() -> None:
        invocation.cancel()
        await asyncio.sleep(3600)

    invocation = invocation_of(outer.run)
    assert (await failure_of(invocation.run())).status_code == 409
    assert log == ["flight to Rome", "unask None", CANCELLED[1]]


async def test_a_failing_tool_is_waited_for_by_those_beside_it() -> None:
    """A tool ends the run while another is under way: that one is finished, and undone."""
    travel = Travel(script([call("slow"), CAR]))

    @travel.agent.tool_plain
    async def slow() -> str:
        await until_logged("car")
        await asyncio.sleep(0.05)
        log.append("slow")
        return "done"

    @travel.saga.undo(slow)
    async def unslow(ctx: Context, result: str) -> None:
        log.append(f"undo {result}")

    invocation = invocation_of(travel.run)
    assert (await failure_of(invocation.run())).status_code == 410
    assert log == ["car", "slow", "undo done"]
    await invocation.replay()


async def test_a_run_that_cancels_itself_waits_for_the_call_in_a_step() -> None:
    """As for a cancellation from outside."""
    travel = Travel(script([call("book"), call("stop")]))
    began, stopped = asyncio.Event(), asyncio.Event()

    @travel.agent.tool_plain
    async def book() -> str:
        began.set()
        await stopped.wait()
        await asyncio.sleep(0.05)
        log.append("booked")
        return "B"

    @travel.agent.tool(metadata=IN_HANDLER)
    async def stop(ctx: Context) -> None:
        await durable.restate_context().run_typed("began", until_began)
        ctx.cancel()
        stopped.set()

    async def until_began() -> None:
        await began.wait()

    @travel.saga.undo(book)
    async def unbook(ctx: Context, result: str) -> None:
        log.append(f"unbook {result}")

    invocation = invocation_of(travel.run)
    assert (await failure_of(invocation.run())).status_code == 409
    assert log == ["booked", "unbook B"]
    await invocation.replay()


async def test_cancellations_do_not_stop_undos() -> None:
    """However many come while they run."""
    travel = Travel(script([FLIGHT], [HOTEL], [call("book")], [CAR]))

    @travel.agent.tool_plain
    async def book() -> str:
        return "B"

    @travel.saga.undo(book)
    async def unbook(ctx: Context) -> None:
        for _ in range(2):
            invocation.cancel()
            await asyncio.sleep(0.02)
        log.append("unbook")

    invocation = invocation_of(travel.run)
    assert (await failure_of(invocation.run())).status_code == 410
    assert log == [*BOOKED, "car", "unbook", *CANCELLED]
    await invocation.replay()


# Undos that fail


async def test_an_undo_that_fails_is_reported_and_the_others_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To the caller, on the error, and in the log; its retries are bounded."""
    travel = Travel(script([FLIGHT], [call("book")], [HOTEL], [CAR]))

    @travel.agent.tool_plain
    async def book() -> str:
        return "B"

    @travel.saga.undo(book)
    async def unbook(ctx: Context) -> None:
        log.append("unbook")
        raise ConnectionError("down")

    async def run() -> None:
        try:
            await travel.run()
        except TerminalError as error:
            log.extend(error.__notes__)
            raise

    invocation = invocation_of(run)
    failure = await failure_of(invocation.run())
    note = "Not undone: `book` (book): TerminalError: ConnectionError('down')"
    assert (failure.status_code, failure.message) == (410, f"sold out\n{note}")
    cancelled = [CANCELLED[0], "unbook", "unbook", CANCELLED[1], note]
    assert log == [*BOOKED, "car", *cancelled]
    await invocation.replay()
    assert caplog.messages.count(note) == 1


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"usage_limits": UsageLimits(request_limit=2)}, 429),
        ({"timeout": 3600}, 504),
    ],
)
async def test_failed_undos_are_told_beside_any_error(options: dict[str, Any], status: int) -> None:
    """Its status stays."""
    travel = Travel(script([call("book")], [call("sleep")], [HOTEL]))

    @travel.agent.tool_plain
    async def book() -> int:
        return 1

    @travel.agent.tool_plain(metadata=IN_HANDLER)
    async def sleep() -> None:
        await asyncio.sleep(7200 if "timeout" in options else 0)

    @travel.saga.undo(book)
    async def unbook(ctx: Context, result: Booking) -> None:
        raise NotImplementedError

    failure = await failure_of(invocation_of(lambda: travel.run(**options)).run())
    assert failure.status_code == status
    assert "Not undone: `book` (book): UserError: `unbook` does not take this `result`" in (
        failure.message
    )


async def test_what_an_undo_says_is_hidden_as_the_agents_content_is() -> None:
    """Error messages hold what the agent's instrumentation must not record."""
    settings = InstrumentationSettings(tracer_provider=TracerProvider(), include_content=False)
    travel = Travel(script([call("book")], [CAR]), extra=[Instrumentation(settings=settings)])

    @travel.agent.tool_plain
    async def book() -> int:
        return 1

    @travel.saga.undo(book)
    async def unbook(ctx: Context) -> None:
        raise ConnectionError("secret")

    message = (await failure_of(invocation_of(travel.run).run())).message
    assert "Not undone: `book` (book): TerminalError: ConnectionError (message hidden)" in message


async def test_an_undo_cannot_talk_to_the_run() -> None:
    """It is over."""
    travel = Travel(script([call("book")], [CAR]))

    @travel.agent.tool_plain
    async def book() -> int:
        return 1

    @travel.saga.undo(book)
    async def unbook(ctx: Context) -> None:
        ctx.enqueue("and another thing")

    assert "Not undone" in (await failure_of(invocation_of(travel.run).run())).message


# Several runs


def delegating(travel: Travel, delegate: Callable[[], Awaitable[str]], **options: Any) -> None:
    """Give `travel` a tool that calls another agent."""

    async def ask() -> str:
        return await delegate()

    travel.agent.tool_plain(**options)(ask)

    @travel.saga.undo("ask")
    async def unask(ctx: Context, result: str | None) -> None:
        log.append(f"unask {result}")


async def test_a_delegate_that_ended_well_is_undone_with_the_run() -> None:
    """In the order of all calls."""
    inner = Travel(script([HOTEL]), name="inner")
    outer = Travel(script([FLIGHT], [call("ask")], [CAR]), name="outer")
    delegating(outer, inner.run, metadata=IN_HANDLER)
    invocation = invocation_of(outer.run)
    await failure_of(invocation.run())
    assert log == [*BOOKED, "car", "unask hotel=H", *CANCELLED]
    assert [entry.name for entry in invocation.stored][-3:] == [
        "outer__undo:ask",
        "inner__undo:hotel",
        "outer__undo:flight",
    ]
    await invocation.replay()


async def test_a_delegate_that_fails_undoes_itself() -> None:
    """First, then the run it failed in."""
    inner = Travel(script([HOTEL], [CAR]), name="inner")
    outer = Travel(script([FLIGHT], [call("ask")]), name="outer")
    delegating(outer, inner.run, metadata=IN_HANDLER)
    await failure_of(invocation_of(outer.run).run())
    assert log == [*BOOKED, "car", CANCELLED[0], "unask None", CANCELLED[1]]


async def test_a_delegate_under_way_ends_before_its_run_is_undone() -> None:
    """The run's time is up: the delegate undoes itself first."""
    inner = Travel(script([HOTEL], [call("sleep")]), name="inner")
    outer = Travel(script([FLIGHT], [call("ask")]), name="outer")
    delegating(outer, inner.run, metadata=IN_HANDLER)

    @inner.agent.tool_plain(metadata=IN_HANDLER)
    async def sleep() -> None:
        await asyncio.sleep(7200)

    invocation = invocation_of(lambda: outer.run(timeout=3600))
    assert (await failure_of(invocation.run())).status_code == 504
    assert log == [*BOOKED, CANCELLED[0], "unask None", CANCELLED[1]]
    await invocation.replay()


async def test_a_delegate_in_a_step_belongs_to_the_step() -> None:
    """Its undos run there when it fails; when it ended well, the tool's undo is what there is."""
    inner = Travel(script([HOTEL]), name="inner")
    failing = Travel(script([HOTEL], [CAR]), name="failing")
    outer = Travel(script([call("ask")], [CAR]), name="outer")
    delegating(outer, inner.run)

    @outer.agent.tool_plain
    async def car_of_another() -> str:
        return await failing.run()

    await failure_of(invocation_of(outer.run).run())
    assert log == ["hotel", "car", "unask hotel=H"]
    log.clear()
    outer = Travel(script([call("ask")]), name="outer")
    delegating(outer, failing.run)
    await failure_of(invocation_of(outer.run).run())
    assert log == ["hotel", "car", CANCELLED[0], "unask None"]


async def test_a_block_undoes_the_runs_that_ended_well() -> None:
    """With what the handler does after them, and across nested blocks."""
    first, second = Travel(script([FLIGHT]), name="first"), Travel(script([HOTEL]), name="second")

    async def run() -> None:
        async with durable.saga():
            await first.run()
            async with durable.saga():
                await second.run()
            await durable.restate_context().run_typed("pay", nothing)
            raise TerminalError("declined", status_code=402)

    invocation = invocation_of(run)
    assert (await failure_of(invocation.run())).status_code == 402
    assert log == [*BOOKED, *CANCELLED]
    await failure_of(check_every_crash(hosted(run)))


async def test_a_block_that_ends_well_or_is_retried_undoes_nothing() -> None:
    """An exception that Restate retries is not the end."""
    travel = Travel(script([FLIGHT]))
    failures = iter([RuntimeError("once")])

    async def run() -> str:
        async with durable.saga():
            await travel.run()
            for failure in failures:
                raise failure
        return "booked"

    assert await invocation_of(run).run() == "booked"
    assert log == ["flight to Rome"]


async def test_a_run_that_the_handler_gives_up_is_undone_by_the_block() -> None:
    """Restate would have retried its exception; the handler ends it for good."""
    travel = Travel(script([FLIGHT], [call("crash")]))

    @travel.agent.tool_plain(metadata=IN_HANDLER)
    async def crash() -> None:
        raise RuntimeError("bug")

    async def run() -> None:
        async with durable.saga():
            try:
                await travel.run()
            except RuntimeError as error:
                raise TerminalError(str(error), status_code=400) from error

    assert (await failure_of(invocation_of(run).run())).status_code == 400
    assert log == ["flight to Rome", CANCELLED[1]]


async def test_runs_beside_each_other_in_a_block() -> None:
    """One fails for good: it undoes itself, its task group cancels the other, all is undone."""
    first = Travel(script([HOTEL], [call("sleep")]), name="first")
    second = Travel(script([FLIGHT], [CAR]), name="second")

    @first.agent.tool_plain(metadata=IN_HANDLER)
    async def sleep() -> None:
        await asyncio.sleep(3600)

    async def run() -> None:
        async with durable.saga(), asyncio.TaskGroup() as group:
            group.create_task(first.run())
            group.create_task(second.run())

    invocation = invocation_of(run)
    failure = await failure_of(invocation.run())
    assert failure.status_code == 410
    assert sorted(log) == sorted([*BOOKED, "car", *CANCELLED])
    await invocation.replay()


# Outside a handler


async def test_outside_a_handler_undos_are_plain_calls() -> None:
    """After any exception; those that fail are noted on it."""
    travel = Travel(script([FLIGHT], [HOTEL], [call("fail")]))

    @travel.agent.tool_plain
    async def fail() -> None:
        raise KeyError("bug")

    @travel.saga.undo(fail)
    async def unfail(ctx: Context) -> None:
        raise ConnectionError("down")

    with pytest.raises(KeyError) as error:
        await travel.run()
    assert log == [*BOOKED, *CANCELLED]
    assert error.value.__notes__ == ["Not undone: `fail` (fail): ConnectionError: down"]


async def test_outside_a_handler_a_cancellation_reaches_the_tool() -> None:
    """And does not reach the undos."""
    travel = Travel(script([FLIGHT], [call("hang")]))

    @travel.agent.tool_plain
    async def hang() -> None:
        log.append("hangs")
        await asyncio.sleep(3600)

    @travel.saga.undo(hang)
    async def free(ctx: Context) -> None:
        run.cancel()
        await asyncio.sleep(0.01)
        log.append("free")

    run = asyncio.create_task(travel.run())
    await until_logged("hangs")
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert log == ["flight to Rome", "hangs", "free", CANCELLED[1]]


async def test_outside_a_handler_a_block_works_too() -> None:
    """As in one."""
    travel = Travel(script([FLIGHT]))

    async def run() -> None:
        async with durable.saga():
            await travel.run()
            raise ValueError("declined")

    with pytest.raises(ValueError, match="declined"):
        await run()
    assert log == ["flight to Rome", CANCELLED[1]]


# Mistakes


def test_mistakes_in_the_function_are_told_at_once() -> None:
    """All of them in one message."""
    travel = Travel(script())

    async def book(flight: str, result: int) -> None: ...

    with pytest.raises(UserError) as error:

        @travel.saga.undo(book)  # pyright: ignore[reportArgumentType]
        async def unbook(ctx: str, seat: int, result: int, *args: Any, **options: Any) -> None: ...

    assert str(error.value) == (
        "`unbook` cannot undo `book`: its first parameter is not annotated as the call's `RunContext`; "
        "nothing can be given to `*args: Any`, `**options: Any` by name; it takes `seat`, which is neither an "
        "argument of the tool nor `result`; `result` would be both an argument of the tool and what it returned."
    )
    with pytest.raises(UserError, match="`again` cannot undo `hotel`: `cancel_hotel` undoes it"):

        @travel.saga.undo("hotel")
        async def again(ctx: Context) -> None: ...

    with pytest.raises(UserError, match="its first parameter is not annotated"):

        @travel.saga.undo("car")  # pyright: ignore[reportArgumentType]
        async def none() -> None: ...


async def test_undos_that_fit_no_tool_end_the_first_run_before_it_asks_the_model() -> None:
    """All of them in one message, with a status that says whose mistake it is."""
    travel = Travel(script([FLIGHT]))

    @travel.agent.tool_plain(metadata={"restate": {"at_most_once": True}})
    async def pay() -> str:
        return "paid"

    async def search(city: str, nights: int = 1) -> str:
        return city

    @travel.agent.toolset(id="made")
    def made(ctx: Context) -> FunctionToolset[None]:
        return FunctionToolset([search])

    @travel.saga.undo(pay)
    async def refund(ctx: Context, result: str) -> None: ...

    @travel.saga.undo("serch")
    async def unsearch(ctx: Context) -> None: ...

    @travel.saga.undo("search")
    async def forget(ctx: Context, town: str, nights: int) -> None: ...

    invocation = invocation_of(travel.run)
    failure = await failure_of(invocation.run())
    assert failure.status_code == 500
    for fault in (
        "`refund` cannot undo `pay`: the outcome of an at-most-once tool may be unknown, so its `result` must",
        "`unsearch` undoes `serch`, but the tools are `car`, `flight`, `hotel`, `pay`, `search`",
        "`forget` cannot undo `search`: it takes `town`, which is neither",
        "`forget` cannot undo `search`: the argument `nights` is optional, so give it a default",
    ):
        assert fault in failure.message
    assert [entry.name for entry in invocation.stored] == [
        "travel__dynamic_toolset__made.get_tools"
    ]


async def test_a_tool_that_is_hidden_for_now_is_no_mistake() -> None:
    """Its `prepare` shows it later; in toolsets, too, and by another name."""
    travel = Travel(script([HOTEL], [call("my_search", city="Rome")], [CAR]), toolsets=[])

    async def later(ctx: RunContext[Any], tool: ToolDefinition) -> ToolDefinition | None:
        return tool if ctx.run_step > 1 else None

    async def secret() -> str:
        return ""

    travel.agent.tool_plain(prepare=later)(secret)

    @travel.saga.undo(secret)
    async def unsecret(ctx: Context) -> None: ...

    async def search(city: str, nights: int = 1) -> str:
        return f"{nights} in {city}"

    @travel.saga.undo("my_search")
    async def unsearch(ctx: Context, city: str, result: str, nights: int = 0) -> None:
        log.append(f"unsearch {city} {nights} {result}")

    prefixed = FunctionToolset[None]([search], id="search").prefixed("my")
    failure = await failure_of(invocation_of(lambda: travel.run(toolsets=[prefixed])).run())
    assert failure.message == "sold out"
    assert log == ["hotel", "car", "unsearch Rome 1 1 in Rome", CANCELLED[0]]


async def test_arguments_of_dynamic_toolsets_are_converted() -> None:
    """There the run has them as JSON."""
    travel = Travel(script([call("book", day="2026-02-01")], [CAR]))

    async def book(day: date) -> Booking:
        return Booking(day.month)

    @travel.agent.toolset(id="made")
    def made(ctx: Context) -> FunctionToolset[None]:
        return FunctionToolset([book])

    @travel.saga.undo(book)
    async def unbook(ctx: Context, day: date, result: Booking) -> None:
        log.append(f"{day!r} {result}")

    await failure_of(invocation_of(travel.run).run())
    assert log == ["car", "datetime.date(2026, 2, 1) Booking(number=2)"]


def test_a_saga_is_of_no_use_alone() -> None:
    """It journals under the agent's name."""
    with pytest.raises(UserError, match="`Saga` requires `RestateDurability`"):
        Agent(script(), name="alone", capabilities=[durable.Saga()])
    with pytest.raises(UserError, match="`undo_run_options` sets `type_hint`"):
        durable.Saga[None](undo_run_options=restate.RunOptions(type_hint=str))
