"""The real restate-server as a subprocess, for development, demos and tests.

The server is found or installed (`RESTATE_SERVER_BINARY`, the user's cache, PATH, npm), listens on
loopback only, and is gone when its block ends, whatever happened inside.

    async with RestateServer() as server:
        await server.register("http://127.0.0.1:9080")
        print(server.ingress_url, server.ui_url)
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import httpx2

from durable._install import VERSION, server_binary
from durable._process import (
    HOST,
    ChildProcess,
    Pauses,
    ServerError,
    ServerInstallError,
    ServerStartError,
    free_ports,
    http_status,
    wait,
    wait_async,
    why_not_free,
)

__all__ = ["RestateServer", "ServerError", "ServerInstallError", "ServerStartError", "VERSION"]

REGISTER_TIMEOUT = 10.0
"""How many seconds a deployment that is registered may take until it answers."""

# The server asks GitHub for a newer version at each start, which no setting turns off. Without a
# network that fails, harmlessly, and would be the first error in the log of every failed start.
_DEFAULTS = {"RESTATE_LOG_FILTER": "warn,restate=info,octocrab=off"}

_PORT_TAKEN = "RT0004"  # restate-server's error code
_UNREACHABLE = "META0003"  # the admin API's error code for a deployment that does not answer


class RestateServer:
    """A restate-server that lives as long as its `with` or `async with` block.

    Settings of the server in the environment (`RESTATE_...`) apply unless an option decides them.

    Args:
        data_dir: Where the server keeps its data, which is there again at the next start. `None`
            uses a temporary directory that is deleted at the end.
        always_replay: Suspend an invocation whenever it waits, so that every step is replayed: finds
            code that is not deterministic.
        partitions: How many partitions a new data directory gets.
        env: More settings for the server; they win over all others.
        log_file: Where the server's log is appended, by default a file in the data directory.
        ingress_port: The port that takes calls to services, by default a free one.
        admin_port: The port of the admin API and the UI, by default a free one.
        start_timeout: How many seconds the server may take until it is healthy.
    """

    ingress_url: str
    """Where services are called: `{ingress_url}/Service/handler`."""

    admin_url: str
    """The admin API."""

    ui_url: str
    """The web UI."""

    data_dir: Path
    """Where the server keeps its data."""

    log_file: Path
    """The server's log."""

    def __init__(
        self,
        *,
        data_dir: Path | None = None,
        always_replay: bool = False,
        partitions: int = 1,
        env: Mapping[str, str] | None = None,
        log_file: Path | None = None,
        ingress_port: int | None = None,
        admin_port: int | None = None,
        start_timeout: float = 30.0,
    ) -> None:
        self._given_data_dir = data_dir
        self._always_replay = always_replay
        self._partitions = partitions
        self._env = dict(env or {})
        self._given_log_file = log_file
        self._given_ports = {"ingress": ingress_port, "admin": admin_port}
        self._start_timeout = start_timeout

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server's process runs."""
        return self._process.running

    def __enter__(self) -> Self:
        wait(self._starting())
        return self

    def __exit__(self, *_: object) -> None:
        wait(self._stopping())

    async def __aenter__(self) -> Self:
        await wait_async(self._starting())
        return self

    async def __aexit__(self, *_: object) -> None:
        await wait_async(self._stopping())

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash would; its data stays for `restart`."""
        self._process.kill()

    async def restart(self) -> None:
        """Kill the server and start it again on the same data and ports.

        Raises:
            ServerStartError: When it does not become healthy.
        """
        self.kill()
        await wait_async(self._launching())

    async def register(self, uri: str, *, force: bool = True) -> list[str]:
        """Register the deployment that answers at `uri`, and return the names of its services.

        A deployment that does not answer yet is given ten seconds.

        Args:
            uri: The base URL of the application that hosts the services.
            force: Replace what is registered at this URL.

        Raises:
            ServerError: When the deployment does not answer or the server refuses it.
        """
        deadline = time.monotonic() + REGISTER_TIMEOUT
        while True:
            answer = await self._admin("/deployments", {"uri": uri, "force": force})
            if not answer.is_error:
                return sorted(service["name"] for service in answer.json()["services"])
            if _UNREACHABLE not in answer.text or time.monotonic() > deadline:
                raise ServerError(
                    f"restate-server could not register {uri!r}: {_message(answer)} Check that the "
                    "application runs there, over HTTP/2, and that its services are valid."
                )
            await asyncio.sleep(0.1)

    def register_sync(self, uri: str, *, force: bool = True) -> list[str]:
        """Do what `register` does, for code without an event loop."""
        return asyncio.run(self.register(uri, force=force))

    async def query(self, sql: str) -> list[dict[str, Any]]:
        """Return the rows of `sql` on the server's tables (`sys_invocation`, `sys_journal`, ...).

        Raises:
            ServerError: When the server refuses the query.
        """
        answer = await self._admin("/query", {"query": sql})
        if answer.is_error:
            raise ServerError(f"restate-server refused the query: {_message(answer)}")
        return cast(list[dict[str, Any]], answer.json()["rows"])

    async def services(self) -> list[dict[str, Any]]:
        """Return the registered services as the admin API describes them, handlers and schemas too.

        Raises:
            ServerError: When the server does not answer as it should.
        """
        answer = await self._admin("/services")
        if answer.is_error:
            raise ServerError(f"restate-server did not list its services: {_message(answer)}")
        return cast(list[dict[str, Any]], answer.json()["services"])

    async def _admin(self, path: str, body: Any = None) -> httpx2.Response:
        # trust_env: a proxy from the environment must not get requests to loopback
        async with httpx2.AsyncClient(base_url=self.admin_url, trust_env=False, timeout=30) as http:
            try:
                return await http.request(
                    "GET" if body is None else "POST",
                    path,
                    json=body,
                    headers={"accept": "application/json"},
                )
            except httpx2.TransportError as error:
                raise ServerError(
                    f"restate-server's admin API at {self.admin_url} does not answer "
                    f"({error!r}); its log is {self.log_file}."
                ) from error

    def _starting(self) -> Pauses:
        binary = server_binary()  # blocks while it installs: nothing else could be done meanwhile
        if self._given_data_dir is None:
            self.data_dir = Path(tempfile.mkdtemp(prefix="restate-"))
        else:
            self.data_dir = self._given_data_dir.absolute()
        try:
            self._scratch_dir = self.data_dir / "tmp"
            self._scratch_dir.mkdir(parents=True, exist_ok=True)
            self.log_file = (
                self._given_log_file or self.data_dir / "restate-server.log"
            ).absolute()
            self._command = [str(binary), "--no-logo", "--base-dir", str(self.data_dir)]
            self._process = ChildProcess(
                "restate-server", error=ServerStartError, log_file=self.log_file
            )
            yield from self._launching_on_free_ports()
        except BaseException:
            self._delete_throw_away_data()
            raise

    def _stopping(self) -> Pauses:
        try:
            yield from self._process.stopping(grace=5.0)
        finally:
            shutil.rmtree(self._scratch_dir, ignore_errors=True)
            self._delete_throw_away_data()

    def _launching_on_free_ports(self) -> Pauses:
        attempts = 3
        for attempt in range(1, attempts + 1):
            self._choose_ports()
            try:
                return (yield from self._launching())
            except ServerStartError:
                # Another process can take a free port before the server does: choose again.
                if attempt == attempts or _PORT_TAKEN not in self._process.output():
                    raise

    def _launching(self) -> Pauses:
        return self._process.starting(
            self._command,
            env=self._environment(),
            cwd=self.data_dir,
            ready=lambda: (
                http_status(self._ingress_port, "/restate/health") == 200
                and http_status(self._admin_port, "/health") == 200
                and http_status(
                    self._admin_port, "/query", {"query": "SELECT count(*) FROM sys_invocation"}
                )
                == 200
            ),
            timeout=self._start_timeout,
            hint="Look at its log for the cause; a data directory serves one server at a time, and "
            "`start_timeout` gives a slow machine more time.",
        )

    def _choose_ports(self) -> None:
        for role, port in self._given_ports.items():
            if port is not None and (reason := why_not_free(port)) is not None:
                raise ServerStartError(
                    f"restate-server cannot use port {port} for its {role}: {reason}. Stop what "
                    f"listens there, or give another `{role}_port` (`None` takes a free one)."
                )
        ingress, admin, self._node_port = free_ports(3)
        self._ingress_port = self._given_ports["ingress"] or ingress
        self._admin_port = self._given_ports["admin"] or admin
        self.ingress_url = f"http://{HOST}:{self._ingress_port}"
        self.admin_url = f"http://{HOST}:{self._admin_port}"
        self.ui_url = f"{self.admin_url}/ui/"

    def _environment(self) -> dict[str, str]:
        no_proxy = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST, "localhost"]
        settings = {
            "RESTATE_DISABLE_TELEMETRY": "true",
            "TMPDIR": str(self._scratch_dir),  # the server leaves directories there
            # Data belongs to a node by name; the default is the host's, which changes.
            "RESTATE_NODE_NAME": "durable",
            "RESTATE_LISTEN_MODE": "tcp",
            "RESTATE_BIND_IP": HOST,
            "RESTATE_BIND_ADDRESS": f"{HOST}:{self._node_port}",
            "RESTATE_ADVERTISED_ADDRESS": f"http://{HOST}:{self._node_port}/",
            "RESTATE_INGRESS__BIND_ADDRESS": f"{HOST}:{self._ingress_port}",
            "RESTATE_ADMIN__BIND_ADDRESS": f"{HOST}:{self._admin_port}",
            "RESTATE_DEFAULT_NUM_PARTITIONS": str(self._partitions),
            "RESTATE_SHUTDOWN_TIMEOUT": "3s",
            # The small footprint that the SDK's own test harness uses.
            "RESTATE_ROCKSDB_TOTAL_MEMORY_SIZE": "32 MB",
            "RESTATE_WORKER__INVOKER__IN_MEMORY_QUEUE_LENGTH_LIMIT": "64",
            "RESTATE_LOG_FORMAT": "compact",
            "RESTATE_LOG_DISABLE_ANSI_CODES": "true",
            # The server calls deployments through the environment's proxy otherwise.
            "NO_PROXY": ",".join(filter(None, no_proxy)),
        }
        if self._always_replay:
            settings["RESTATE_WORKER__INVOKER__INACTIVITY_TIMEOUT"] = "0s"
        return {**_DEFAULTS, **os.environ, **settings, **self._env}

    def _delete_throw_away_data(self) -> None:
        if self._given_data_dir is None:
            shutil.rmtree(self.data_dir, ignore_errors=True)


def _message(answer: httpx2.Response) -> str:
    try:
        message = cast(str, answer.json()["message"])
    except (ValueError, LookupError, TypeError):
        message = f"HTTP {answer.status_code} {answer.text}"
    return message if message.endswith(".") else f"{message}."
