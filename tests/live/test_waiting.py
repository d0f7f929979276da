"""Runs that wait for people outlive everything, and hold nothing meanwhile."""

import asyncio
import gc
from collections.abc import Awaitable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest

import durable
from durable import _agent_run
from durable._driver import Driver
from durable.server import RestateServer
from durable.worker import Worker
from tests.live.hosting import Ingress, hosted, http_client
from tests.live.scripted import done
from tests.live.test_approvals import answer, end, pending, refunds, start

pytestmark = pytest.mark.live

WAITING = 1000
T = TypeVar("T")


async def in_turns(work: Sequence[Awaitable[T]]) -> list[T]:
    """Await all of `work`, not too much of it at once."""
    slots = asyncio.Semaphore(50)

    async def one(awaitable: Awaitable[T]) -> T:
        async with slots:
            return await awaitable

    return await asyncio.gather(*map(one, work))


async def test_worker_and_server_are_killed_between_question_and_answer(tmp_path: Path) -> None:
    """The question is not asked again, the answers are taken, each tool is called once."""
    trace = tmp_path / "trace"
    async with (
        RestateServer() as server,
        Worker("tests.live.waiting_app:app", env={"WAITING_TRACE": str(trace)}) as worker,
        http_client() as http,
    ):
        ingress = Ingress(server, http)
        await server.register(worker.url)
        invocation = await start(ingress, "Waiting/run")
        asked = "SELECT id FROM sys_journal WHERE entry_type = 'Notification: Run' AND "
        await ingress.until(f"{asked} id = '{invocation}'", lambda rows: len(rows) == 3)
        first, second = await pending(ingress, invocation)
        for one in (first, second):
            worker.kill()
            await server.restart()
            await worker.start()
            assert one.id in {waiting.id for waiting in await pending(ingress, invocation)}
            response = await answer(ingress, invocation, call=one.id, decision="approve")
            assert response.status_code == 200, response.text
        assert await end(ingress, invocation) == "refund=A; refund=B"
    assert sorted(trace.read_text().splitlines()) == ["ask A", "ask B", "refund A", "refund B"]


async def test_the_time_is_up_while_the_worker_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that was taken before the run could see the end of the time counts."""
    monkeypatch.setattr(_agent_run, "PATIENCE", timedelta(seconds=0.2))
    trace = tmp_path / "trace"
    env = {"WAITING_TRACE": str(trace), "WAITING_TIMEOUT": "2"}
    async with (
        RestateServer() as server,
        Worker("tests.live.waiting_app:app", env=env) as worker,
    ):
        await server.register(worker.url)
        async with hosted(server, durable.agent_run) as ingress:  # which stays up
            invocation = await start(ingress, "Waiting/run")
            asked = "SELECT id FROM sys_journal WHERE entry_type = 'Notification: Run' AND "
            await ingress.until(f"{asked} id = '{invocation}'", lambda rows: len(rows) == 3)
            worker.kill()
            up = f"SELECT id FROM sys_journal WHERE id = '{invocation}' AND entry_type = 'Notification: Sleep'"
            await ingress.until(up, lambda rows: len(rows) == 2)
            [first, _] = await pending(ingress, invocation)
            taken = await answer(ingress, invocation, call=first.id, decision="approve")
            assert taken.status_code == 200
            await worker.start()
            assert await end(ingress, invocation) == (
                f"refund={first.args['order']}; refund=Nobody answered within 0:00:02."
            )
    assert trace.read_text().splitlines()[-1] == "refund A"


@pytest.mark.timeout(600)
async def test_a_thousand_sessions_wait_at_once() -> None:
    """None of them is in the worker's memory, and each goes on when it is answered."""
    told: list[durable.PendingCall] = []

    async def notify(pending: durable.PendingCall) -> None:
        told.append(pending)

    sessions = durable.agent_session(refunds(durable.Approvals(notify=notify)))
    quickly = {"RESTATE_WORKER__INVOKER__INACTIVITY_TIMEOUT": "1s"}
    async with (
        RestateServer(env=quickly) as server,
        hosted(server, sessions, durable.agent_run) as ingress,
    ):
        paths = [f"refunds/{number}/message" for number in range(WAITING)]
        invocations = await in_turns([start(ingress, path, {"prompt": "go"}) for path in paths])
        suspended = "SELECT id FROM sys_invocation WHERE status = 'suspended'"
        await ingress.until(suspended, lambda rows: len(rows) == WAITING, within=300)
        gc.collect()
        assert not [one for one in gc.get_objects() if isinstance(one, Driver)]
        assert len({pending.id for pending in told}) == len(told) == WAITING
        await in_turns(
            [
                answer(ingress, pending.invocation_id, call=pending.id, decision="approve")
                for pending in told
            ]
        )
        answers = await in_turns([end(ingress, invocation) for invocation in invocations])
        assert answers == ["refund=A 10"] * WAITING
    assert done == {"model": 2 * WAITING, "A": WAITING}
