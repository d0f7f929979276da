"""`make bench`: what durability costs, ours beside others, interleaved in one run, as medians.

Each subject is served by a worker of its own behind one real restate-server. A round measures every
subject once, so a slow moment of the machine hits all of them. CPU is the worker's process time.
"""

import argparse
import asyncio
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
from rich.console import Console

from durable._collector import Collector
from durable.server import RestateServer
from durable.worker import Worker
from tests.bench.instructions import counting

NO_OP, NO_OP_WAITING = "no-op base", "no-op base, waits 4 ms a step"
SUBJECTS = (
    "plain agent",
    NO_OP,
    NO_OP_WAITING,
    "bare ctx.run",
    "ours",
    "peer",
    "peer (fixed)",
)
Figures = dict[str, dict[str, list[float]]]

SHORT, LONG = "1 1 0", "21 1 0"
"""Prompts of runs with 3 and with 43 steps: the difference is 40 steps."""

STEPS_BETWEEN = 40
PARALLEL = "1 8 0.4"
"""One round of 8 tools at once, 0.4 s each."""

HUNDRED = "33 2 0"
"""A run with 100 steps."""

CONCURRENCY = 32
RUNS_COUNTED = 4


class Subject:
    """One way to host the agent, in a worker of its own."""

    def __init__(self, http: httpx2.AsyncClient, server: RestateServer, worker: Worker) -> None:
        self._http = http
        self._server = server
        self._worker = worker

    async def register(self) -> None:
        """Make the server send the next calls to this subject's worker."""
        await self._server.register(self._worker.url)

    async def run(self, prompt: str) -> None:
        """Run the agent once."""
        answer = await self._http.post("/Bench/run", json=prompt)
        answer.raise_for_status()

    async def cpu(self, work: Callable[[], Awaitable[object]]) -> float:
        """Return the CPU seconds that the worker spends on `work`."""
        before = (await self._http.post("/Bench/cpu")).raise_for_status().json()
        await work()
        return (await self._http.post("/Bench/cpu")).raise_for_status().json() - before


async def measure(subject: Subject, figures: dict[str, list[float]]) -> None:
    """Measure one subject once."""

    async def sequence(prompt: str, runs: int) -> None:
        for _ in range(runs):
            await subject.run(prompt)

    async def together(runs: int) -> None:
        slots = asyncio.Semaphore(CONCURRENCY)

        async def one() -> None:
            async with slots:
                await subject.run(SHORT)

        await asyncio.gather(*[one() for _ in range(runs)])

    short = await subject.cpu(lambda: sequence(SHORT, 8)) / 8
    long = await subject.cpu(lambda: sequence(LONG, 8)) / 8
    figures["CPU ms per step"].append((long - short) / STEPS_BETWEEN * 1000)
    figures["CPU ms per 3-step run, 32 at once"].append(
        await subject.cpu(lambda: together(128)) / 128 * 1000
    )
    began = time.perf_counter()
    await subject.run(PARALLEL)
    figures["wall s, 8 tools of 0.4 s"].append(time.perf_counter() - began)


def table(figures: Figures) -> str:
    """Write the medians as a markdown table, with ratios to what they should be near."""
    names = list(next(iter(figures.values())))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    median = {
        subject: {name: statistics.median(values) for name, values in of.items()}
        for subject, of in figures.items()
    }
    lines += [
        f"| {subject} | " + " | ".join(f"{of[name]:.2f}" for name in names) + " |"
        for subject, of in median.items()
    ]
    wall = names[-1]
    for name in names[:-1]:
        for base in (NO_OP, NO_OP_WAITING):
            floor = median[base][name] + median["bare ctx.run"][name]
            lines.append(
                f"\n{name}: ours / ({base} + bare ctx.run) = {median['ours'][name] / floor:.2f}"
            )
    lines.append(
        f"\n{wall}: ours / plain agent = {median['ours'][wall] / median['plain agent'][wall]:.2f}"
    )
    return "\n".join(lines)


async def bench(rounds: int, console: Console) -> None:
    """Run the benchmark and print the table."""
    figures: Figures = {name: defaultdict(list) for name in SUBJECTS}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(RestateServer())
        http = await stack.enter_async_context(
            httpx2.AsyncClient(base_url=server.ingress_url, timeout=120, trust_env=False)
        )
        subjects: dict[str, Subject] = {}
        for name in SUBJECTS:
            worker = Worker("tests.bench.app:app", env={"BENCH_SUBJECT": name})
            subjects[name] = Subject(http, server, await stack.enter_async_context(worker))
        for number in range(rounds + 1):
            for name, subject in subjects.items():
                await subject.register()
                # the first round warms up
                await measure(subject, figures[name] if number else defaultdict(list))
            console.print(f"round {number} of {rounds}" if number else "warmed up", style="dim")
    console.print(
        f"{environment()}; medians of {rounds} rounds\n\n{table(figures)}", highlight=False
    )


async def bench_tracing(rounds: int, console: Console) -> None:
    """Run what tracing costs, with Logfire's SDK and a collector on this machine, and print it."""
    with TemporaryDirectory() as folder, Collector(Path(folder) / "spans.jsonl") as collector:
        async with (
            RestateServer() as server,
            Worker("tests.bench.app:app") as plain,
            Worker("tests.bench.app:app", otlp_endpoint=collector.url) as traced,
            httpx2.AsyncClient(base_url=server.ingress_url, timeout=120, trust_env=False) as http,
        ):
            spent: dict[str, list[float]] = {"without": [], "with": []}
            for number in range(rounds + 1):
                for name, worker in zip(spent, (plain, traced), strict=True):
                    subject = Subject(http, server, worker)
                    await subject.register()
                    seconds = await subject.cpu(lambda of=subject: of.run(HUNDRED))
                    if number:  # the first round warms up
                        spent[name].append(seconds * 1000)
        spans = len(collector.spans())  # the worker has sent its last ones
    without, traced_run = (statistics.median(it) for it in spent.values())
    console.print(
        f"\n100-step run: {without:.0f} ms of CPU without tracing, {traced_run:.0f} ms with it "
        f"({traced_run / without:.2f} x, {spans // (rounds + 1)} spans a run, those that tell of a beginning included)"
    )


def environment() -> str:
    """Return the versions of what is measured."""
    versions = ", ".join(
        f"{p} {metadata.version(p)}" for p in ("restate-sdk", "pydantic-ai-slim", "hypercorn")
    )
    return f"Python {platform.python_version()}, {versions}"


async def count_instructions(console: Console) -> None:
    """Print how many instructions a step takes in each subject."""
    millions: dict[str, float] = {}
    async with (
        RestateServer() as server,
        httpx2.AsyncClient(base_url=server.ingress_url, timeout=600, trust_env=False) as http,
    ):

        async def runs(prompt: str) -> None:
            for _ in range(RUNS_COUNTED):
                (await http.post("/Bench/run", json=prompt)).raise_for_status()

        for name in SUBJECTS:
            async with counting(server, name) as count:
                await runs(LONG)  # warms up
                short, long = await count(lambda: runs(SHORT)), await count(lambda: runs(LONG))
            millions[name] = (long - short) / RUNS_COUNTED / STEPS_BETWEEN
            console.print(f"{name}: {millions[name]:.2f} million instructions per step")
    floor = millions[NO_OP] + millions["bare ctx.run"]
    console.print(f"\nours / ({NO_OP} + bare ctx.run) = {millions['ours'] / floor:.2f}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=bench.__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--only-tracing", action="store_true", help="leave out the comparison with others"
    )
    parser.add_argument(
        "--instructions", action="store_true", help="count instructions instead, with valgrind"
    )
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    if arguments.instructions:
        return asyncio.run(count_instructions(console))
    if not arguments.only_tracing:
        asyncio.run(bench(arguments.rounds, console))
    asyncio.run(bench_tracing(arguments.rounds, console))


main()
