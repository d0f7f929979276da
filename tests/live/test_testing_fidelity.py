"""The same handlers in memory and on the real server: same answers, same journals, same executions."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import restate
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_core import to_jsonable_python
from restate.exceptions import RetryableError

import durable
from durable.server import RestateServer
from durable.testing import InMemoryInvocation, Suspended, check_every_crash
from tests.live.hosting import PATIENCE, hosted
from tests.live.scripted import calls
from tests.live.scripted import done as executed

pytestmark = pytest.mark.live

FAST = restate.RunOptions[Any](max_attempts=3, initial_retry_interval=timedelta(milliseconds=10))


@dataclass(frozen=True)
class Scenario:
    """One request to one handler."""

    handler: Callable[..., Awaitable[Any]]
    path: str
    request: Any = None
    calls: dict[Any, Any] = field(default_factory=dict[Any, Any])
    key: str = ""
    ordered: bool = True
    """Whether the order of completions is the same everywhere: steps do not run beside each other."""


service = restate.Service("Same")
counter = restate.VirtualObject("SameObject")
workflow = restate.Workflow("SameWorkflow")
others = restate.Service("SameOthers")
SERVICES = (service, counter, workflow, others)

one_tool = Agent(calls("look"), name="one", capabilities=[durable.RestateDurability()])
parallel = Agent(calls(*["look"] * 3), name="many", capabilities=[durable.RestateDurability()])
inner = Agent(calls(), name="inner", capabilities=[durable.RestateDurability()])
outer = Agent(calls("orchestrate"), name="outer", capabilities=[durable.RestateDurability()])


@one_tool.tool_plain
@parallel.tool_plain
async def look() -> str:
    executed["look"] += 1
    return "seen"


@outer.tool_plain(metadata={"restate": False})
async def orchestrate() -> str:
    await asyncio.sleep(0.01)
    return (await inner.run("go")).output


async def step(name: str) -> str:
    executed[name] += 1
    return name


class Order(BaseModel):
    item: str
    amount: int


@others.handler()
async def price(ctx: restate.Context, order: Order) -> int:
    if order.amount > 9:
        raise restate.TerminalError("too many", status_code=418)
    return 3 * order.amount


@others.handler()
async def approve(ctx: restate.Context, awakeable: str) -> None:
    ctx.resolve_awakeable(awakeable, {"by": "someone"})


@service.handler()
async def agent(ctx: restate.Context, prompt: str) -> str:
    return (await one_tool.run(prompt)).output


@service.handler()
async def parallel_tools(ctx: restate.Context, prompt: str) -> str:
    return (await parallel.run(prompt)).output


@service.handler()
async def context_tool(ctx: restate.Context, prompt: str) -> str:
    return (await outer.run(prompt)).output


@service.handler()
async def timers(ctx: restate.Context) -> str:
    await asyncio.sleep(0.02)
    await ctx.sleep(timedelta(milliseconds=20), name="named")
    try:
        async with asyncio.timeout(0.05):
            await ctx.awakeable()[1]
    except TimeoutError:
        await ctx.run_typed("late", step, name="late")
    done = await asyncio.wait_for(ctx.run_typed("early", step, name="early"), PATIENCE)
    return f"timed out, {done}"


@service.handler()
async def retries(ctx: restate.Context) -> int:
    async def third_time() -> int:
        executed["third_time"] += 1
        if executed["third_time"] % 3:
            raise ValueError("not yet")
        return 7

    return await ctx.run_typed("third time", third_time, FAST)


@service.handler()
async def asked_to_wait(ctx: restate.Context) -> int:
    async def second_time() -> int:
        executed["second_time"] += 1
        if executed["second_time"] % 2:
            raise RetryableError("later", retry_after=timedelta(milliseconds=30))
        return 7

    return await ctx.run_typed("second time", second_time)


@service.handler()
async def exhausted(ctx: restate.Context) -> str:
    async def never() -> str:
        executed["never"] += 1
        raise ValueError("no way")

    await ctx.run_typed("before", step, name="before")
    return await ctx.run_typed("never", never, FAST)


@service.handler()
async def terminal(ctx: restate.Context, where: str) -> str:
    async def hopeless() -> str:
        raise restate.TerminalError("hopeless", status_code=422, metadata={"why": "because"})

    if where == "handler":
        raise restate.TerminalError("at once", status_code=409)
    try:
        return await ctx.run_typed("hopeless", hopeless)
    except restate.TerminalError as error:
        if where == "step":
            raise
        return f"{error.message} {error.status_code} {error.metadata}"


@service.handler()
async def order(ctx: restate.Context, order: Order) -> Order:
    return order


@service.handler()
async def calling(ctx: restate.Context, amount: int) -> str:
    handle = ctx.service_send(price, Order(item="a", amount=1))
    assert (await handle.invocation_id()).startswith("inv_")
    total = await ctx.service_call(price, Order(item="b", amount=amount))
    raw = await ctx.generic_call("SameOthers", "price", b'{"item": "c", "amount": 2}')
    return f"{total} {raw.decode()}"


@service.handler()
async def waiting(ctx: restate.Context) -> str:
    awakeable, answer = ctx.awakeable(type_hint=dict[str, str])
    ctx.service_send(approve, awakeable)
    return (await answer)["by"]


@service.handler()
async def gathering(ctx: restate.Context) -> list[str]:
    steps = [ctx.run_typed(name, step, name=name) for name in "abc"]
    await restate.gather(*steps)
    first = await asyncio.gather(*(ctx.run_typed(name, step, name=name) for name in "de"))
    return [await done for done in steps] + first


@service.handler()
async def selecting(ctx: restate.Context) -> str:
    match await restate.select(
        step=ctx.run_typed("fast", step, name="fast"), slow=ctx.sleep(timedelta(minutes=1))
    ):
        case ["step", value]:
            return f"won by {value}"
        case other:
            return f"{other}"


@service.handler()
async def cancelling(ctx: restate.Context) -> str:
    ctx.cancel_invocation(ctx.request().id)
    try:
        await ctx.sleep(timedelta(minutes=1))
    finally:
        await ctx.run_typed("clean up", step, name="clean up")
    return "not cancelled"


@counter.handler()
async def count(ctx: restate.ObjectContext, by: int) -> list[Any]:
    before = await ctx.get("count", type_hint=int)
    ctx.set("count", (before or 0) + by)
    ctx.set("other", {"a": [1]})
    keys = await ctx.state_keys()
    ctx.clear("other")
    after = [await ctx.get("count"), await ctx.get("other"), ctx.key()]
    ctx.clear_all()
    return [before, sorted(keys), *after, await ctx.state_keys()]


@workflow.main()
async def promising(ctx: restate.WorkflowContext) -> list[Any]:
    promise = ctx.promise("answer", type_hint=int)
    before = await promise.peek()
    await promise.resolve(42)
    try:
        await promise.resolve(43)
    except restate.TerminalError as error:
        refused = error.status_code
    else:
        refused = None
    return [before, await promise, refused]


def _price(order: Order) -> int:
    if order.amount > 9:
        raise restate.TerminalError("too many", status_code=418)
    return 3 * order.amount


SCENARIOS = [
    Scenario(agent, "Same/agent", "go"),
    Scenario(parallel_tools, "Same/parallel_tools", "go", ordered=False),
    Scenario(context_tool, "Same/context_tool", "go"),
    Scenario(timers, "Same/timers", ordered=False),
    Scenario(retries, "Same/retries"),
    Scenario(asked_to_wait, "Same/asked_to_wait"),
    Scenario(exhausted, "Same/exhausted"),
    Scenario(terminal, "Same/terminal", "handler"),
    Scenario(terminal, "Same/terminal", "step"),
    Scenario(terminal, "Same/terminal", "caught"),
    Scenario(order, "Same/order", {"item": "a", "amount": 1}),
    Scenario(order, "Same/order", {"item": "a"}),
    Scenario(order, "Same/order"),
    Scenario(order, "Same/order", b"{"),
    Scenario(calling, "Same/calling", 2, {price: _price}),
    Scenario(calling, "Same/calling", 10, {price: _price}),
    Scenario(waiting, "Same/waiting"),
    Scenario(gathering, "Same/gathering", ordered=False),
    Scenario(selecting, "Same/selecting"),
    Scenario(cancelling, "Same/cancelling", ordered=False),
    Scenario(count, "SameObject/key/count", 2, key="key"),
    Scenario(promising, "SameWorkflow/{id}/promising", key="id"),
]


def _id(scenario: Scenario) -> str:
    return f"{scenario.path}-{scenario.request}".replace("/", ".")


@dataclass
class Seen:
    """What a scenario led to."""

    status: int
    answer: Any
    journal: list[str]
    executed: dict[str, int]


async def drive(invocation: InMemoryInvocation[Any]) -> Any:
    """Run in memory; what the real server's other handlers would do is done here."""
    try:
        return await invocation.run()
    except Suspended as waits:
        (awakeable,) = waits.awakeables
        invocation.resolve_awakeable(awakeable, {"by": "someone"})
        return await invocation.run()


async def in_memory(scenario: Scenario) -> Seen:
    executed.clear()
    invocation = InMemoryInvocation(
        scenario.handler, scenario.request, key=scenario.key, calls=scenario.calls
    )
    try:
        status, answer = 200, to_jsonable_python(await drive(invocation))
    except restate.TerminalError as error:
        status, answer = error.status_code, error.message
    counted = dict(executed)
    await invocation.replay()
    assert executed == counted, "A replay executes no step."
    return Seen(status, answer, invocation.journal, counted)


async def newest_journal(server: RestateServer, scenario: Scenario) -> list[str]:
    """The journal of the scenario's last invocation: the answer may come before all of it can be read."""
    service, *_, handler = scenario.path.split("/")
    newest = (
        f"SELECT id FROM sys_invocation WHERE target_service_name = '{service}' "
        f"AND target_handler_name = '{handler}' ORDER BY created_at DESC LIMIT 1"
    )
    journal: list[str] = []
    async with asyncio.timeout(PATIENCE):
        while not journal or (journal[0], journal[-1]) != ("Command: Input", "Command: Output"):
            rows = await server.query(
                f"SELECT entry_type, name FROM sys_journal WHERE id = ({newest}) ORDER BY index"
            )
            journal = [f"{row['entry_type']} {row.get('name') or ''}".rstrip() for row in rows]
    return journal


async def on_server(scenario: Scenario, server: RestateServer) -> Seen:
    executed.clear()
    async with hosted(server, *SERVICES) as ingress:
        path = scenario.path.format(id=f"{id(server)}")
        if isinstance(scenario.request, bytes):
            headers = {"content-type": "application/json"}
            response = await ingress.post(path, content=scenario.request, headers=headers)
        else:
            response = await ingress.post(path, scenario.request)
        answer: Any = response.json() if response.content else None
        if response.status_code != 200:
            answer = answer["message"]
        journal = await newest_journal(server, scenario)
    return Seen(response.status_code, answer, journal, dict(executed))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=_id)
async def test_same_in_memory_and_on_the_server(server: RestateServer, scenario: Scenario) -> None:
    """Answer or failure, journal and executions of steps are the same."""
    real, tested = await on_server(scenario, server), await in_memory(scenario)
    assert (tested.status, tested.answer) == (real.status, real.answer)
    assert tested.executed == real.executed
    assert commands(tested.journal) == commands(real.journal)
    if scenario.ordered:
        assert tested.journal == real.journal
    else:
        assert Counter(tested.journal) == Counter(real.journal)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=_id)
async def test_every_scenario_survives_every_crash(scenario: Scenario) -> None:
    """The helper for users, with what the other test shows to be the server's behaviour."""
    expected = await in_memory(scenario)
    crashed = check_every_crash(
        scenario.handler, scenario.request, key=scenario.key, calls=scenario.calls, drive=drive
    )
    if expected.status == 200:
        executed.clear()
        output = await crashed
        assert to_jsonable_python(output) == expected.answer
    else:
        with pytest.raises(restate.TerminalError) as caught:
            await crashed
        assert caught.value.status_code == expected.status


def commands(journal: Sequence[str]) -> list[str]:
    return [entry for entry in journal if entry.startswith("Command")]
