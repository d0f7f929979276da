"""Serves an application in a process of its own, over HTTP/2, the way Restate calls it.

`Worker` starts and stops that process, `serve` is what runs inside it.
"""

import asyncio
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from hypercorn.asyncio import serve as serve_asgi  # pyright: ignore[reportUnknownVariableType]
from hypercorn.config import Config
from restate.server import install_shutdown_hook

from durable._logfire import send_spans_to
from durable._process import (
    HOST,
    ChildProcess,
    Pauses,
    WorkerError,
    free_ports,
    http_status,
    wait_async,
    why_not_free,
)

EXIT_NO_APP = 2
"""The exit code of a worker whose `MODULE:APP` does not name an application."""

__all__ = ["AppNotFoundError", "EXIT_NO_APP", "Worker", "WorkerError", "serve"]


class Worker:
    """A process that serves `MODULE:APP` and lives as long as its `async with` block.

    Args:
        app: What to serve, as `module:attribute`: an ASGI application.
        port: The port on loopback, by default a free one.
        cwd: The directory to import the module from, by default the current one.
        env: More environment variables for the process.
        otlp_endpoint: A collector that gets the application's spans too.
        log_file: Where its output is appended, by default the output of this process.
        start_timeout: How many seconds it may take until it answers.
    """

    url: str
    """Where the application answers; what `RestateServer.register` takes."""

    def __init__(
        self,
        app: str,
        *,
        port: int | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        otlp_endpoint: str | None = None,
        log_file: Path | None = None,
        start_timeout: float = 60.0,
    ) -> None:
        self._app = app
        self._port = port
        self._cwd = cwd
        self._env = dict(env or {})
        self._otlp_endpoint = otlp_endpoint
        self._start_timeout = start_timeout
        self._process = ChildProcess(
            f"the worker for {app!r}", error=WorkerError, log_file=log_file and log_file.absolute()
        )

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the worker's process runs."""
        return self._process.running

    @property
    def exit_code(self) -> int | None:
        """What the worker exited with, `None` while it runs or before it started."""
        return self._process.exit_code

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the worker and wait until it answers; the port stays the same from then on.

        Raises:
            WorkerError: When the port is taken, or the worker exits or does not answer in time.
        """
        await wait_async(self._starting())

    async def stop(self, *, grace: float = 5.0) -> None:
        """Let requests finish for `grace` seconds, then kill the worker."""
        await wait_async(self._process.stopping(grace=grace))

    def kill(self) -> None:
        """End the worker with SIGKILL, as a crash would, and wait until it is gone."""
        self._process.kill()

    async def restart(self) -> None:
        """Stop the worker if it runs, and start it on the same port.

        Raises:
            WorkerError: As `start` does.
        """
        await self.stop()
        await self.start()

    def _starting(self) -> Pauses:
        if self._port is None:
            [self._port] = free_ports(1)
        port = self._port
        _require_free(port)
        self.url = f"http://{HOST}:{port}"
        spans = [] if self._otlp_endpoint is None else ["--otlp-endpoint", self._otlp_endpoint]
        return self._process.starting(
            [sys.executable, "-m", "durable", "serve", self._app, "--port", str(port), *spans],
            env={**os.environ, **self._env},
            cwd=self._cwd,
            ready=lambda: http_status(port, "/health") is not None,
            timeout=self._start_timeout,
            hint="Its output says why.",
        )


class AppNotFoundError(WorkerError):
    """`MODULE:APP` does not name an application."""


def serve(app: str, *, port: int, otlp_endpoint: str | None = None) -> None:
    """Serve `MODULE:APP` on loopback in this process, until SIGINT or SIGTERM.

    Args:
        app: What to serve, as `module:attribute`.
        port: The port.
        otlp_endpoint: A collector that gets the application's spans, beside what the application has set up.

    Raises:
        AppNotFoundError: When `app` does not name an ASGI application.
        WorkerError: When the port is taken.
    """
    _require_free(port)
    config = Config()
    config.bind = [f"{HOST}:{port}"]
    config.loglevel = "ERROR"  # its warning that the SDK has no lifespan events is no news
    # Restate multiplexes all invocations over few connections and keeps those open: neither the
    # number of streams nor the age of a connection is a reason to turn an invocation away.
    unlimited = 2**31 - 1
    config.h2_max_concurrent_streams = unlimited
    config.keep_alive_max_requests = unlimited
    config.keep_alive_timeout = unlimited
    config.graceful_timeout = 3.0
    served = load_app(app)
    if otlp_endpoint is not None:
        send_spans_to(otlp_endpoint)
    asyncio.run(_serve(served, config))


def _require_free(port: int) -> None:
    if (reason := why_not_free(port)) is not None:
        raise WorkerError(
            f"The worker cannot use port {port}: {reason}. Stop what listens there, or give "
            "another port."
        )


async def _serve(app: Any, config: Config) -> None:
    stop = asyncio.Event()
    _quiet_when(stop)
    # Through the SDK because its ASGI app takes SIGTERM over at the first request, to suspend what
    # runs; hypercorn alone would not hear of it again and never end.
    for number in (signal.SIGTERM, signal.SIGINT):
        install_shutdown_hook(asyncio.get_running_loop(), stop.set, number)
    await serve_asgi(app, config, shutdown_trigger=stop.wait, mode="asgi")


def _quiet_when(stop: asyncio.Event) -> None:
    """Log no more errors once the worker stops: what it cuts off then is no news, Restate tries it again."""

    def is_news(record: logging.LogRecord) -> bool:
        return record.exc_info is None or not stop.is_set()

    for name in ("hypercorn.error", "restate.server", "asyncio"):
        logging.getLogger(name).addFilter(is_news)
    warnings.filterwarnings("ignore", "coroutine 'TCPServer._idle_timeout' was never awaited")


def load_app(app: str) -> Any:
    """Import `MODULE:APP` from the current directory.

    Raises:
        AppNotFoundError: When it does not name something callable. What the module itself raises
            when it is imported passes through.
    """
    module_name, colon, path = app.partition(":")
    if not module_name or not colon or not path:
        raise AppNotFoundError(f"{app!r} is not `MODULE:APP`, for example `services:app`.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only the named module or its package: one that the module imports is an error inside it.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise AppNotFoundError(
            f"There is no module {error.name!r} to get {app!r} from; it is looked for in "
            f"{os.getcwd()} and in the environment."
        ) from None
    for name in path.split("."):
        if not hasattr(found, name):
            raise AppNotFoundError(f"The module {module_name!r} has no {path!r}.")
        found = getattr(found, name)
    if not callable(found):
        raise AppNotFoundError(
            f"{app!r} is not an ASGI application but a {type(found).__name__}; build one with "
            "`durable.app([...services])`."
        )
    return found
