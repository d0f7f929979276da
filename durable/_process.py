"""Child processes that are ready when they say so and never outlive their parent.

restate-server and the worker are both started, awaited, stopped and killed the same way, from
blocking and from async code alike. What takes time is therefore written once, as a generator that
yields how long to pause: `wait` drives it with `time.sleep`, `wait_async` with `asyncio.sleep`. Both
close the generator when they are interrupted or cancelled, and closing it kills the child.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path

HOST = "127.0.0.1"

Pauses = Generator[float]


# ProcessError
# ├── ServerError
# │   ├── ServerInstallError
# │   └── ServerStartError
# └── WorkerError
class ProcessError(RuntimeError):
    """A process this library runs failed, or could not be started."""


class ServerError(ProcessError):
    """restate-server refused a request, or could not be installed or started."""


class ServerInstallError(ServerError):
    """restate-server was not found and could not be installed."""


class ServerStartError(ServerError):
    """restate-server did not start."""


class WorkerError(ProcessError):
    """The process that serves an application did not start."""


def wait(pauses: Pauses) -> None:
    """Run `pauses` to its end, blocking."""
    with closing(pauses):
        for pause in pauses:
            time.sleep(pause)


async def wait_async(pauses: Pauses) -> None:
    """Run `pauses` to its end on the event loop."""
    with closing(pauses):
        for pause in pauses:
            await asyncio.sleep(pause)


class ChildProcess:
    """One command, in its own session, with its output in a log file or on the terminal.

    Its own session because Ctrl-C goes to every process of the terminal's group: the parent alone
    decides in which order things stop.
    """

    def __init__(self, name: str, *, error: type[ProcessError], log_file: Path | None) -> None:
        self.name = name
        self._error = error
        self._log_file = log_file
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id, of the last process when it has ended."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """What the process exited with, `None` while it runs."""
        return self._process.poll() if self._process else None

    def starting(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path | None,
        ready: Callable[[], bool],
        timeout: float,
        hint: str,
    ) -> Pauses:
        """Start `command` and wait until `ready`; no process is left if that fails."""
        self._spawn(command, env=env, cwd=cwd)
        deadline = time.monotonic() + timeout
        try:
            while not ready():
                if self.exit_code is not None:
                    raise self._failure(f"exited with code {self.exit_code} while it started", hint)
                if time.monotonic() > deadline:
                    raise self._failure(f"was not ready after {timeout:g} seconds", hint)
                yield 0.03
        except BaseException:
            self.kill()
            raise

    def stopping(self, *, grace: float) -> Pauses:
        """Ask the process to end, and kill it after `grace` seconds or when the wait is cut short."""
        if self._process is None or not self.running:
            return
        self._process.terminate()
        deadline = time.monotonic() + grace
        try:
            while self.running and time.monotonic() < deadline:
                yield 0.01
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process, and what it started, with SIGKILL and wait until it is gone."""
        if self._process is not None and self.running:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def output(self) -> str:
        """Return what the process wrote to its log file since it was started."""
        if self._log_file is None:
            return ""
        with self._log_file.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _spawn(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None) -> None:
        assert not self.running, f"{self.name} is running already"
        with ExitStack() as stack:
            log = None
            if self._log_file is not None:
                self._log_file.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(self._log_file.open("ab"))
                self._log_start = log.tell()
            self._process = subprocess.Popen(
                _bound_to_parent(command),
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log and subprocess.STDOUT,
                start_new_session=True,
            )

    def _failure(self, what: str, hint: str) -> ProcessError:
        self.kill()
        last = self.output().strip().splitlines()[-20:]
        log = "\n".join([f"\nIts last log lines ({self._log_file}):", *last]) if last else ""
        return self._error(f"{self.name} {what}. {hint}{log}")


_EXEC_BOUND_TO_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def _bound_to_parent(command: Sequence[str]) -> list[str]:
    """Have Linux end `command` with this process, also when this process is killed with SIGKILL.

    A tiny interpreter asks for it and then becomes the command: `preexec_fn` would run Python
    between fork and exec, which can deadlock in a process with threads. The kernel watches the
    thread that forked, so only what the main thread starts is bound.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return list(command)
    return [sys.executable, "-ISc", _EXEC_BOUND_TO_PARENT, str(os.getpid()), *command]


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on; all are held until the last is known, so they differ."""
    with ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_server((HOST, 0), backlog=1)) for _ in range(count)
        ]
        return [taken.getsockname()[1] for taken in sockets]


def why_not_free(port: int) -> str | None:
    """Return why `port` cannot be listened on, `None` when it can."""
    try:
        socket.create_server((HOST, port)).close()
    except (OSError, OverflowError) as error:
        return str(error)
    return None


def http_status(port: int, path: str, body: object = None) -> int | None:
    """Return the status of `path` on this machine, `None` when nothing answers.

    Args:
        port: The port on loopback.
        path: What is asked for: by GET, or by POST with a `body`.
        body: Sent as JSON.
    """
    # http.client, because it ignores the proxies of the environment and needs no event loop
    connection = HTTPConnection(HOST, port, timeout=1)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        return connection.getresponse().status
    except (OSError, HTTPException):
        return None
    finally:
        connection.close()
