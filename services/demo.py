"""The demo: the patterns on a real server, and a run that survives the kill of its worker.

    python -m services.demo [--keep] [PATTERN ...]

model ← counting proxy ← worker ⇄ restate-server ← requests
"""

import argparse
import asyncio
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from pydantic_ai.exceptions import UserError
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from rich.console import Console
from rich.pretty import Pretty

from agents.local_model import LocalModelError, LocalServer
from agents.models import LocalModel, configured_model
from durable.server import VERSION, RestateServer, ServerError
from durable.worker import Worker, WorkerError
from services._proof import JournaledStep, Proof, account, journaled_steps
from services._proxy import CountingProxy, counting_proxy
from services.chaining import CallChainingRequest, CallChainingResponse
from services.client import PATTERNS, ClientError, call

CHECKOUT = Path(__file__).parent.parent
LOGS = CHECKOUT / ".durable" / "demo"

CRASHED = "chaining"
"""The pattern whose worker is killed."""

COMPLETED_AT_KILL = 2
"""The worker is killed when this many steps of the run have their result."""

TIMEOUT = 300.0
"""Seconds for one run: restate-server would go on trying for much longer."""


class DemoError(Exception):
    """Something of what the demo shows did not hold."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What runs: the demo's processes and the proxy between worker and model."""

    console: Console
    proxy: CountingProxy
    server: RestateServer
    worker: Worker


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: The arguments, by default those of the command line.

    Returns:
        The exit code: 0 only when everything held.
    """
    parser = argparse.ArgumentParser(
        prog="python -m services.demo",
        description="Run the patterns on a real server, and kill the worker in the middle of a run.",
    )
    parser.add_argument("--keep", action="store_true", help="leave all running until Ctrl-C")
    parser.add_argument(
        "patterns", nargs="*", metavar="PATTERN", help=f"all, or some of {', '.join(PATTERNS)}"
    )
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.patterns) - PATTERNS.keys():
        parser.error(f"no such pattern: {', '.join(sorted(unknown))}")
    console = Console(highlight=False)
    try:
        asyncio.run(_demo(console, arguments.patterns or list(PATTERNS), keep=arguments.keep))
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print("interrupted; everything is stopped")
        return 130
    except (
        *(DemoError, ClientError, LocalModelError, UserError),
        *(ServerError, WorkerError, httpx2.HTTPError),
    ) as error:
        console.print(f"\nFailed: {error}", style="bold red", markup=False, soft_wrap=True)
        return 1
    return 0


async def _demo(console: Console, patterns: Sequence[str], *, keep: bool) -> None:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    _bypass_proxies()
    LOGS.mkdir(parents=True, exist_ok=True)
    async with _stack(console) as stack:
        for name in patterns:
            await _run_pattern(stack, name)
        if CRASHED in patterns:
            proof = await _crash(stack)
            console.rule("The proof")
            console.print(f"UI {stack.server.ui_url}\n")
            console.print(proof.table())
            console.print(proof.summary(), soft_wrap=True)
            if proof.problems:
                raise DemoError("; ".join(proof.problems))
            console.print("Survived: no completed step ran again.", style="bold green")
        if keep:
            await _until_interrupted(stack)


@asynccontextmanager
async def _stack(console: Console) -> AsyncGenerator[Stack]:
    """Start everything in order; all of it is stopped in reverse, whatever happens."""
    console.rule("Starting")
    async with AsyncExitStack() as running:
        model = configured_model()
        async with _stage(console, f"model {model.model_name}"):
            upstream = await _upstream(model, running)
        async with _stage(console, "counting proxy"):
            proxy = await running.enter_async_context(counting_proxy(upstream))
        # Without a spinner: a first installation of the server shows its own.
        async with _stage(console, f"restate-server {VERSION}", spinner=False):
            # In a directory of its own, with what the server puts beside its data and leaves there.
            scratch = running.enter_context(tempfile.TemporaryDirectory(prefix="demo-"))
            server = RestateServer(
                data_dir=Path(scratch),
                env={"TMPDIR": scratch},
                log_file=_new_log("restate-server"),
            )
            await running.enter_async_context(server)
        worker = Worker(
            "services:app",
            cwd=CHECKOUT,
            env={_base_url_variable(model): proxy.url, "RESTATE_INGRESS_URL": server.ingress_url},
            log_file=_new_log("worker"),
        )
        async with _stage(console, "worker services:app"):
            await running.enter_async_context(worker)
            await server.register(worker.url)
        try:
            yield Stack(console=console, proxy=proxy, server=server, worker=worker)
        except Exception:
            _print_logs(console)  # before the stop adds its own lines
            raise
        with console.status("stopping"):
            await running.aclose()


async def _upstream(model: Model, running: AsyncExitStack) -> str:
    """Return the base URL of the model's provider; the local model is started."""
    if not isinstance(model, LocalModel):
        assert model.base_url is not None
        return model.base_url
    if url := os.environ.get("AGENTS_LOCAL_URL"):
        return url
    local = LocalServer()
    running.callback(local.stop)
    await asyncio.to_thread(local.start)
    return local.url


def _base_url_variable(model: Model) -> str:
    if isinstance(model, LocalModel):
        return "AGENTS_LOCAL_URL"
    return "ANTHROPIC_BASE_URL" if isinstance(model, AnthropicModel) else "OPENAI_BASE_URL"


async def _run_pattern(stack: Stack, name: str) -> None:
    """Call a pattern with its examples, as any HTTP client would."""
    pattern = PATTERNS[name]
    with httpx2.Client(base_url=stack.server.ingress_url, timeout=None) as client:
        for number, request in enumerate(pattern.examples, start=1):
            path = f"{pattern.service}/{pattern.handler}"
            stack.console.rule(f"{name}: {path}, example {number}")
            stack.console.print(Pretty(request))
            asked, started = len(stack.proxy.requests), time.monotonic()
            with stack.console.status("waiting for the agents"):
                async with _time_limit(path):
                    response = await asyncio.to_thread(call, client, pattern, request)
            stack.console.print(Pretty(response))
            stack.console.print(
                f"{time.monotonic() - started:.1f} s, "
                f"{len(stack.proxy.requests) - asked} model requests",
                style="dim",
            )


async def _crash(stack: Stack) -> Proof:
    """Kill the worker in the middle of a run, let the run finish, and account for it."""
    console, server, worker, proxy = stack.console, stack.server, stack.worker, stack.proxy
    console.rule("The crash")
    request = CallChainingRequest()
    first = len(proxy.requests)
    async with httpx2.AsyncClient(base_url=server.ingress_url, timeout=None) as http:
        sent = await http.post(
            "/CallChainingService/run/send",
            json=request.model_dump(),
            # An invocation with a key can be attached to by its id.
            headers={"idempotency-key": "crash"},
        )
        _check(sent)
        invocation = str(sent.json()["invocationId"])
        console.print(f"run {invocation}")

        async with _stage(console, f"{COMPLETED_AT_KILL} of {len(request.prompts)} steps"):
            async with _time_limit(invocation):
                await _until_completed(server, invocation, steps=COMPLETED_AT_KILL)
        killed = worker.pid
        worker.kill()
        console.print(f"  kill -9 of the worker, process {killed}", style="bold red")
        at_kill = await _final_journal(server, invocation)
        restarted = len(proxy.requests)

        async with _stage(console, "worker again"):
            await worker.restart()
        async with _stage(console, "the run's result"), _time_limit(invocation):
            answer = await http.get(f"/restate/invocation/{invocation}/attach")
        _check(answer)
    console.print(Pretty(CallChainingResponse.model_validate_json(answer.content).text))
    return account(
        at_kill=at_kill,
        at_end=await _journal(server, invocation),
        before=proxy.requests[first:restarted],
        after=proxy.requests[restarted:],
        expected=len(request.prompts),
    )


async def _until_completed(server: RestateServer, invocation: str, *, steps: int) -> None:
    completed = 0
    while completed < steps:
        await asyncio.sleep(0.1)
        completed = sum(bool(step.results) for step in await _journal(server, invocation))


async def _final_journal(server: RestateServer, invocation: str) -> list[JournaledStep]:
    """Return the journal that the dead worker left, once the server has taken all of it in."""
    async with _time_limit(invocation):
        status = "running"
        while status == "running":
            await asyncio.sleep(0.05)
            status = await _status(server, invocation)
    if status == "completed":
        raise DemoError("the run had ended before its worker could be killed: run the demo again")
    # What the worker sent last may be on the way from the server's log to its tables.
    journal = await _journal(server, invocation)
    while True:
        await asyncio.sleep(0.2)
        if (later := await _journal(server, invocation)) == journal:
            return journal
        journal = later


async def _journal(server: RestateServer, invocation: str) -> list[JournaledStep]:
    return journaled_steps(
        await server.query(
            "SELECT entry_type, name, raw, entry_lite_json FROM sys_journal "
            f"WHERE id = '{invocation}' ORDER BY index"
        )
    )


async def _status(server: RestateServer, invocation: str) -> str:
    [row] = await server.query(f"SELECT status FROM sys_invocation WHERE id = '{invocation}'")
    return str(row["status"])


def _check(answer: httpx2.Response) -> None:
    if not answer.is_success:
        raise DemoError(f"{answer.url.path} answered {answer.status_code}: {answer.text}")


async def _until_interrupted(stack: Stack) -> None:
    stack.console.print(f"\nUI       {stack.server.ui_url}\ningress  {stack.server.ingress_url}")
    for pattern in PATTERNS.values():
        body = shlex.quote(pattern.examples[-1].model_dump_json())
        stack.console.print(
            f"curl {stack.server.ingress_url}{pattern.path('my-run')} "
            f"-H 'content-type: application/json' -d {body}",
            soft_wrap=True,
            markup=False,
        )
    stack.console.print("All of it runs until Ctrl-C.", style="bold")
    try:
        running = True
        while running:
            await asyncio.sleep(0.5)
            running = stack.server.running and stack.worker.running
    except asyncio.CancelledError:
        return  # how it is meant to end: everything is stopped, and the demo succeeded
    raise DemoError("restate-server or the worker ended by itself")


@asynccontextmanager
async def _stage(console: Console, title: str, *, spinner: bool = True) -> AsyncGenerator[None]:
    """Show what is waited for, and then how long it took."""
    started = time.monotonic()
    async with AsyncExitStack() as shown:
        if spinner:
            shown.enter_context(console.status(title))
        yield
    console.print(f"  {title:<40} {time.monotonic() - started:5.1f} s")


@asynccontextmanager
async def _time_limit(what: str) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(TIMEOUT):
            yield
    except TimeoutError:
        raise DemoError(f"{what} did not get that far in {TIMEOUT:g} s") from None


def _bypass_proxies() -> None:
    """Keep requests to loopback off the proxy that the environment may name, here and in the worker."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    bypassed = ",".join(filter(None, [known, "127.0.0.1", "localhost"]))
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = bypassed


def _new_log(name: str) -> Path:
    log = LOGS / f"{name}.log"
    log.unlink(missing_ok=True)
    return log


def _print_logs(console: Console) -> None:
    worker = LOGS / "worker.log"
    lines = worker.read_text(errors="replace").splitlines()[-20:] or ["(nothing)"]
    console.print("\nThe worker's last log lines:", style="bold")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    for log in (worker, LOGS / "restate-server.log"):
        console.print(f"log: {log.relative_to(CHECKOUT)}", style="dim", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
