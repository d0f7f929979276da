"""What `durable dev` and `durable server` do: run everything locally until Ctrl-C.

edit a file -> worker restarts on the same port -> registered again -> open invocations go on in it
"""

import asyncio
import os
import re
import signal
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from watchfiles import PythonFilter, awatch  # pyright: ignore[reportUnknownVariableType]

from durable._collector import Collector
from durable._curl import curl
from durable._process import ProcessError, ServerError, WorkerError, why_not_free
from durable.server import VERSION, RestateServer
from durable.worker import EXIT_NO_APP, Worker

INGRESS_PORT, ADMIN_PORT, WORKER_PORT = 8080, 9070, 9080  # the ports Restate's documentation uses


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How to run the server."""

    data: Path | None
    """Where it keeps its data; `None` for data that is deleted at the end."""

    ingress_port: int | None = None
    """The port for calls to services; `None` for the usual one, or a free one when that is taken."""

    admin_port: int | None = None
    """The port of the admin API and the UI, likewise."""

    always_replay: bool = False
    """Whether each wait suspends the invocation."""

    def server(self, env: Mapping[str, str] | None = None) -> RestateServer:
        """Return the server with these options, and with settings from `env`."""
        return RestateServer(
            data_dir=self.data,
            env=env,
            ingress_port=self.ingress_port or _if_free(INGRESS_PORT),
            admin_port=self.admin_port or _if_free(ADMIN_PORT),
            always_replay=self.always_replay,
        )


def until_interrupted(main: Coroutine[Any, Any, None]) -> None:
    """Run `main` until it ends or the process is asked to stop, which lets it clean up."""
    asyncio.run(_cancelled_by_signals(main))


async def run_server(options: ServerOptions) -> None:
    """Run the server alone.

    Raises:
        ServerError: When it does not start, or ends by itself.
    """
    console = _console()
    async with options.server() as server:
        _print_addresses(console, server)
        while True:
            await asyncio.sleep(0.5)
            _check(server)


async def run_dev(
    app: str, options: ServerOptions, *, data: Path, port: int | None, reload: bool
) -> None:
    """Run the server and the worker for `app`, restarting the worker when code changes.

    The spans of both are collected in `data`, where `durable trace` finds them.

    Raises:
        ServerError: When the server does not start, or ends by itself.
        WorkerError: When the worker does not start and no change of the code could mend that.
    """
    console = _console()
    _ignored_by_git(data)
    with Collector(spans_file(data)) as collector:
        tracing = {"RESTATE_TRACING_ENDPOINT": collector.url}
        async with options.server(None if _traces_elsewhere() else tracing) as server:
            _print_addresses(console, server, spans=collector.file)
            worker = Worker(
                app,
                # The same at each start: invocations that wait in the data belong to the worker's address.
                port=port or _if_free(WORKER_PORT),
                # For the commands that the app prints.
                env={
                    "RESTATE_INGRESS_URL": os.environ.get("RESTATE_INGRESS_URL", server.ingress_url)
                },
                otlp_endpoint=collector.url,
            )
            development = _Development(console=console, server=server, worker=worker)
            try:
                if not await development.bring_up() and (not reload or not _mendable(worker)):
                    raise WorkerError(f"`durable dev {app}` could not start: see above.")
                await (development.follow_changes() if reload else development.watch_over())
            finally:
                await worker.stop(grace=1.0)


def spans_file(data: Path) -> Path:
    """Return where `durable dev` collects spans."""
    return data / "spans.jsonl"


def _ignored_by_git(data: Path) -> None:
    data.mkdir(parents=True, exist_ok=True)
    (data / ".gitignore").write_text("*\n")


def _traces_elsewhere() -> bool:
    """Whether the environment sends restate-server's spans somewhere."""
    return any(re.fullmatch(r"RESTATE_TRACING_\w*ENDPOINT", name) for name in os.environ)


class _Development:
    """One worker that is replaced when code changes, and what was told about its services."""

    def __init__(self, *, console: Console, server: RestateServer, worker: Worker) -> None:
        self._console = console
        self._server = server
        self._worker = worker
        self._serving = False
        self._shown: list[str] = []

    async def bring_up(self) -> bool:
        """Start or replace the worker and register it; tell what is wrong if that fails."""
        try:
            await self._worker.stop(grace=1.0)
            await self._worker.start()
            names = await self._server.register(self._worker.url)
            services = [it for it in await self._server.services() if it["name"] in names]
        except ProcessError as error:
            _check(self._server)
            self._console.print(f"error: {error}", style="red", markup=False)
            self._serving = False
        else:
            self._serving = True
            self._show(services)
        return self._serving

    async def follow_changes(self) -> None:
        """Replace the worker at every change below the current directory."""
        # Timeouts are reported too, to notice when the server or the worker ends by itself.
        changes = awatch(
            Path.cwd(), watch_filter=_CodeFilter(), rust_timeout=500, yield_on_timeout=True
        )
        async for changed in changes:
            if changed:
                names = ", ".join(sorted({Path(path).name for _, path in changed}))
                self._console.print(f"{names} changed, restarting", style="dim", markup=False)
                if not await self.bring_up():
                    self._console.print("waiting for the next change", style="dim")
            else:
                self._notice_ends(say="waiting for the next change")

    async def watch_over(self) -> None:
        """Wait until the server or the worker ends by itself."""
        while self._serving:
            await asyncio.sleep(0.5)
            self._notice_ends(say="stopping")
        raise WorkerError(f"The worker exited with code {self._worker.exit_code}.")

    def _notice_ends(self, *, say: str) -> None:
        _check(self._server)
        if self._serving and not self._worker.running:
            self._serving = False
            code = self._worker.exit_code
            self._console.print(f"the worker exited with code {code}, {say}", style="red")

    def _show(self, services: Sequence[Mapping[str, Any]]) -> None:
        lines = list(_describe(services, ingress_url=self._server.ingress_url))
        if lines == self._shown:
            self._console.print("ready", style="green")
            return
        self._shown = lines
        for line in lines:
            self._console.print(line, markup=False, style="" if line.startswith(" ") else "bold")


class _CodeFilter(PythonFilter):
    """Python files, except those of environments and of data."""

    ignore_dirs = (*PythonFilter.ignore_dirs, ".durable", "venv")


def _mendable(worker: Worker) -> bool:
    """Whether a worker that could not be served may do better after an edit of the code."""
    return worker.running or worker.exit_code not in (None, EXIT_NO_APP)


async def _cancelled_by_signals(main: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(main)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _if_free(port: int) -> int | None:
    return port if why_not_free(port) is None else None


def _check(server: RestateServer) -> None:
    if not server.running:
        raise ServerError(f"restate-server ended by itself; its log is {server.log_file}.")


def _print_addresses(console: Console, server: RestateServer, *, spans: Path | None = None) -> None:
    console.print(f"restate-server {VERSION}", style="bold")
    for name, value in (
        ("ingress", server.ingress_url),
        ("admin", server.admin_url),
        ("UI", server.ui_url),
        ("log", server.log_file),
        (
            "spans",
            spans and f"{spans}, shown by: durable trace INVOCATION{_options(server, spans)}",
        ),
    ):
        if value is not None:
            console.print(f"  {name:<8} {value}", markup=False)


def _options(server: RestateServer, spans: Path) -> str:
    """Return what the client's commands have to be told about ports and places that are not the usual ones."""
    admin = "" if server.admin_url.endswith(f":{ADMIN_PORT}") else f" --admin {server.admin_url}"
    data = "" if spans.parent == Path(".durable") else f" --data {spans.parent}"
    return admin + data


def _describe(services: Sequence[Mapping[str, Any]], *, ingress_url: str) -> Iterator[str]:
    """List the services, each with a line per public handler that can be pasted into a shell."""
    # The admin API lists them in no particular order.
    for service in sorted(services, key=itemgetter("name")):
        yield f"{service['name']} ({service['ty']})"
        handlers = [it for it in service["handlers"] if it.get("public", True)]
        for handler in sorted(handlers, key=itemgetter("name")):
            yield f"  {curl(service, handler, ingress_url=ingress_url)}"
