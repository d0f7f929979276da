"""`RestateServer` and `Worker` for real."""

import asyncio
import os
import sys
import textwrap
from pathlib import Path

import pytest

from durable.server import RestateServer, ServerError, ServerStartError
from durable.worker import Worker, WorkerError
from tests.live.hosting import PATIENCE, http_client

pytestmark = pytest.mark.live

APP = """
    import os
    import restate

    greeter = restate.Service("Greeter")

    @greeter.handler()
    async def greet(ctx: restate.Context, name: str) -> str:
        return f"{os.environ.get('GREETING', 'hello')} {name}"

    counter = restate.VirtualObject("Counter")

    @counter.handler()
    async def add(ctx: restate.ObjectContext, value: int) -> int:
        total = (await ctx.get("total", type_hint=int) or 0) + value
        ctx.set("total", total)
        return total

    sleeper = restate.Service("Sleeper")

    @sleeper.handler()
    async def nap(ctx: restate.Context) -> str:
        async def step() -> str:
            import asyncio
            await asyncio.sleep(60)
            return "done"
        return await ctx.run_typed("step", step)

    app = restate.app([greeter, counter, sleeper])
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with `hosted:app`."""
    (tmp_path / "hosted.py").write_text(textwrap.dedent(APP))
    return tmp_path


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def call(server: RestateServer, path: str, body: object) -> object:
    async with http_client() as http:
        answer = await http.post(f"{server.ingress_url}/{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


def listening(pid: int) -> set[str]:
    """Return the addresses a process listens on, as the kernel shows them in hexadecimal."""
    inodes = {os.readlink(fd)[8:-1] for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    addresses: set[str] = set()
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].partition(":")[0])
    return addresses


async def test_throw_away_server() -> None:
    async with RestateServer() as server:
        assert server.running
        assert server.log_file.is_relative_to(server.data_dir)
        async with http_client() as http:
            ui = await http.get(server.ui_url, follow_redirects=True)
        assert ui.status_code == 200
        assert "<html" in ui.text.lower()
    assert gone(server.pid)
    assert not server.data_dir.exists()


def test_blocking_block_and_an_error_inside() -> None:
    with pytest.raises(ZeroDivisionError), RestateServer() as server:
        _ = 1 / 0
    assert gone(server.pid)
    assert not server.data_dir.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_listens_on_loopback_only(project: Path) -> None:
    async with (
        RestateServer() as server,
        Worker("hosted:app", cwd=project, log_file=project / "worker.log") as worker,
    ):
        assert listening(server.pid) == {"0100007F"}
        assert listening(worker.pid) == {"0100007F"}


async def test_register_call_crash_and_query(project: Path) -> None:
    """What is stored survives a crash of the server, and one of the worker."""
    async with (
        RestateServer() as server,
        Worker("hosted:app", cwd=project, log_file=project / "worker.log") as worker,
    ):
        assert await server.register(worker.url) == ["Counter", "Greeter", "Sleeper"]
        assert await asyncio.to_thread(server.register_sync, worker.url) == [
            "Counter",
            "Greeter",
            "Sleeper",
        ]
        assert await call(server, "Counter/a/add", 2) == 2

        ports, pid = (server.ingress_url, server.admin_url), server.pid
        await server.restart()
        assert gone(pid)
        assert (server.ingress_url, server.admin_url) == ports
        assert await call(server, "Counter/a/add", 3) == 5

        url, pid = worker.url, worker.pid
        worker.kill()
        assert gone(pid)
        assert worker.exit_code == -9
        await worker.restart()
        assert worker.url == url
        assert await call(server, "Counter/a/add", 4) == 9

        rows = await server.query("select target, status from sys_invocation")
        assert rows == [{"target": "Counter/a/add", "status": "completed"}] * 3
    assert gone(worker.pid)


async def test_persistent_data_is_there_again_on_other_ports(project: Path) -> None:
    data = project / "data"
    async with Worker("hosted:app", cwd=project, log_file=project / "worker.log") as worker:
        for total in (1, 2):
            async with RestateServer(data_dir=data) as server:
                if total == 1:
                    await server.register(worker.url)
                assert await call(server, "Counter/a/add", 1) == total
    assert (data / "restate-server.log").read_text().count("Starting Restate Server") == 2


async def test_one_data_directory_serves_one_server(tmp_path: Path) -> None:
    async with RestateServer(data_dir=tmp_path):
        with pytest.raises(ServerStartError, match="serves one server at a time"):
            async with RestateServer(data_dir=tmp_path, log_file=tmp_path / "second.log"):
                pytest.fail("two servers on the same data")


async def test_errors_of_the_admin_api(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("durable.server.REGISTER_TIMEOUT", 0.5)
    async with RestateServer() as server:
        with pytest.raises(ServerError, match=r"could not register 'http://127.0.0.1:9'.*refused"):
            await server.register("http://127.0.0.1:9")
        with pytest.raises(ServerError, match=r"refused the query: .*bogus"):
            await server.query("select bogus")
        server.kill()
        with pytest.raises(ServerError, match="does not answer"):
            await server.query("select 1")


async def test_register_waits_for_a_worker_that_starts_later(project: Path) -> None:
    worker = Worker("hosted:app", cwd=project, log_file=project / "worker.log")
    async with RestateServer() as server, worker:
        url = worker.url
        worker.kill()
        registering = asyncio.ensure_future(server.register(url))
        await worker.start()
        assert "Greeter" in await registering


async def test_proxies_of_the_environment_play_no_part(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with (
        RestateServer() as server,
        Worker("hosted:app", cwd=project, log_file=project / "worker.log") as worker,
    ):
        await server.register(worker.url)
        assert await call(server, "Greeter/greet", "you") == "hello you"


async def until_in_step(server: RestateServer) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await server.query("SELECT id FROM sys_invocation WHERE status = 'running'"):  # noqa: ASYNC110 - another process runs it
            await asyncio.sleep(0.05)


class TestWorker:
    async def test_environment_and_quick_end_with_a_step_in_flight(self, project: Path) -> None:
        worker = Worker(
            "hosted:app", cwd=project, env={"GREETING": "hi"}, log_file=project / "worker.log"
        )
        async with RestateServer() as server:
            async with worker:
                await server.register(worker.url)
                assert await call(server, "Greeter/greet", "you") == "hi you"
                async with http_client() as http:
                    await http.post(f"{server.ingress_url}/Sleeper/nap/send")
                await until_in_step(server)
                started = asyncio.get_running_loop().time()
            # the step would take 60
            assert asyncio.get_running_loop().time() - started < 30
            assert gone(worker.pid)

    async def test_an_early_exit_quotes_the_log(self, tmp_path: Path) -> None:
        (tmp_path / "broken.py").write_text("raise RuntimeError('no database')")
        worker = Worker("broken:app", cwd=tmp_path, log_file=tmp_path / "worker.log")
        with pytest.raises(WorkerError) as error:
            await worker.start()
        assert "the worker for 'broken:app' exited with code 1" in str(error.value)
        assert str(error.value).endswith("RuntimeError: no database")

    async def test_not_an_app(self, tmp_path: Path) -> None:
        worker = Worker("missing_module:app", cwd=tmp_path, log_file=tmp_path / "worker.log")
        with pytest.raises(WorkerError, match="exited with code 2"):
            await worker.start()
        assert len((tmp_path / "worker.log").read_text().splitlines()) == 1


async def test_a_worker_stops_quietly(project: Path, tmp_path: Path) -> None:
    """Although a step is cut off, and restate-server keeps its connection open."""
    log = tmp_path / "log"
    async with (
        RestateServer() as server,
        Worker("hosted:app", cwd=project, log_file=log) as worker,
        http_client(base_url=server.ingress_url) as http,
    ):
        await server.register(worker.url)
        await http.post("/Sleeper/nap/send")
        await until_in_step(server)
        await worker.stop()
    assert "Traceback" not in log.read_text()
