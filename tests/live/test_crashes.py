"""Workers and servers are killed; what was completed before is not done again."""

import asyncio
import random
from collections import Counter, defaultdict
from pathlib import Path

import httpx2
import pytest

from durable.server import RestateServer
from durable.worker import Worker
from tests.live.crash_app import ROUNDS, STEPS
from tests.live.hosting import PATIENCE, http_client
from tests.live.tracing import Step, completed_steps

pytestmark = pytest.mark.live

EXPECTED = " ".join(name for names in ROUNDS for name in names)


async def test_completed_steps_are_not_done_again(tmp_path: Path) -> None:
    """200 runs with parallel tools, the worker killed again and again at random moments.

    After each kill the journal is read while no worker lives, so it says exactly what was complete.
    None of it may be executed by a later worker, and no worker executes anything twice.
    """
    runs, kills = 200, 6
    trace = tmp_path / "trace"
    env = {"CRASH_TRACE": str(trace)}
    killed: list[tuple[int, set[Step]]] = []
    async with (
        RestateServer() as server,
        Worker("tests.live.crash_app:app", env=env, log_file=tmp_path / "log") as worker,
        httpx2.AsyncClient(base_url=server.ingress_url, timeout=120, trust_env=False) as http,
    ):
        await server.register(worker.url)

        async def call(delay: float) -> str:
            await asyncio.sleep(delay)
            return (await http.post("/Crash/run")).raise_for_status().json()

        calls = [asyncio.create_task(call(random.uniform(0, 12))) for _ in range(runs)]
        for _ in range(kills):
            await asyncio.sleep(random.uniform(0.3, 1.0))
            worker.kill()
            pid = worker.pid
            await asyncio.sleep(0.3)  # the server takes in what the worker sent before it died
            killed.append((pid, await completed_steps(server)))
            await worker.start()
        assert await asyncio.gather(*calls) == [EXPECTED] * runs
        assert len(await completed_steps(server)) == runs * STEPS

    executions: defaultdict[Step, list[int]] = defaultdict(list)
    ended: Counter[Step] = Counter()
    for line in trace.read_text().splitlines():
        pid, invocation, step, event = line.split()
        if event == "begin":
            executions[invocation, step].append(int(pid))
        else:
            ended[invocation, step] += 1
    order = {pid: number for number, (pid, _) in enumerate(killed)}
    assert len(executions) == runs * STEPS
    for step, pids in executions.items():
        assert len(set(pids)) == len(pids), f"{step} ran twice in one worker"
        assert ended[step] >= 1
        for number, (_, completed) in enumerate(killed):
            late = [pid for pid in pids if order.get(pid, len(killed)) > number]
            assert not (step in completed and late), f"{step} was complete and ran again"
    assert any(len(pids) > 1 for pids in executions.values()), (
        "no kill hit a step: nothing was tested"
    )


async def test_a_run_survives_the_death_of_the_server(tmp_path: Path) -> None:
    """Killed and restarted on its data, the server finishes what it had accepted."""
    env = {"CRASH_TRACE": str(tmp_path / "trace")}
    async with (
        RestateServer(data_dir=tmp_path / "data") as server,
        Worker("tests.live.crash_app:app", env=env, log_file=tmp_path / "log") as worker,
        http_client() as http,
    ):
        await server.register(worker.url)
        key = {"idempotency-key": "once"}
        await http.post(f"{server.ingress_url}/Crash/run/send", headers=key)
        await asyncio.sleep(0.08)
        await server.restart()
        answer = await http.post(f"{server.ingress_url}/Crash/run", headers=key)
        assert answer.json() == EXPECTED
    ends = Counter(
        line.split()[2] for line in (tmp_path / "trace").read_text().splitlines() if "end" in line
    )
    assert ends.keys() == {f"model.request.{n}" for n in range(3)} | set(EXPECTED.split())


async def test_an_idempotency_key_executes_once(tmp_path: Path) -> None:
    """The same call with the same key twice: one execution, one answer."""
    env = {"CRASH_TRACE": str(tmp_path / "trace")}
    async with (
        RestateServer() as server,
        Worker("tests.live.crash_app:app", env=env, log_file=tmp_path / "log") as worker,
        http_client(base_url=server.ingress_url) as http,
    ):
        await server.register(worker.url)
        key = {"idempotency-key": "once"}
        first = await http.post("/Crash/run", headers=key)
        second = await http.post("/Crash/run", headers=key)
        assert first.json() == second.json() == EXPECTED
    lines = (tmp_path / "trace").read_text().splitlines()
    assert len([line for line in lines if line.endswith("begin")]) == STEPS


async def test_an_at_most_once_tool_is_not_begun_again(tmp_path: Path) -> None:
    """Killed in the middle of the call: it is not repeated, and the model is told why."""
    trace = tmp_path / "trace"
    env = {"CRASH_TRACE": str(trace), "CRASH_PAY_SECONDS": "30"}
    async with (
        RestateServer() as server,
        Worker("tests.live.crash_app:app", env=env, log_file=tmp_path / "log") as worker,
        http_client(base_url=server.ingress_url) as http,
    ):
        await server.register(worker.url)
        call = asyncio.create_task(http.post("/Crash/pay_once"))
        async with asyncio.timeout(PATIENCE):
            while not trace.exists():  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.05)
        worker.kill()
        await worker.start()
        answer = await call
        assert "its outcome is unknown" in answer.json()
    assert [line.split()[2:] for line in trace.read_text().splitlines()] == [["pay", "begin"]]
