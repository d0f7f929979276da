"""Instructions of a worker, counted by valgrind: other load on the machine does not change them."""

import asyncio
import os
import re
import shutil
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from durable._process import free_ports
from durable.server import RestateServer, ServerError

Count = Callable[[Callable[[], Awaitable[object]]], Awaitable[float]]
"""Counts the instructions that the worker executes for some work, in millions."""


@asynccontextmanager
async def counting(server: RestateServer, subject: str) -> AsyncGenerator[Count]:
    """Serve `subject` in a worker under callgrind, some fifty times slower than without."""
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not on PATH: install it, or leave out --instructions")
    [port] = free_ports(1)
    with TemporaryDirectory() as folder:
        worker = await asyncio.create_subprocess_exec(
            "valgrind",
            "--quiet",
            "--tool=callgrind",
            "--instr-atstart=no",
            f"--callgrind-out-file={folder}/counts",
            *(sys.executable, "-m", "durable", "serve", "tests.bench.app:app", "--port", str(port)),
            env={**os.environ, "BENCH_SUBJECT": subject},
            stderr=asyncio.subprocess.DEVNULL,
        )

        async def control(*options: str) -> None:
            process = await asyncio.create_subprocess_exec(
                "callgrind_control",
                *options,
                str(worker.pid),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            assert await process.wait() == 0

        async def count(work: Callable[[], Awaitable[object]]) -> float:
            await control("--instr=on", "--zero")
            await work()
            await control("--dump")
            return _take(Path(folder)) / 1e6

        try:
            await _register(server, f"http://127.0.0.1:{port}")
            yield count
        finally:
            worker.terminate()
            await worker.wait()


async def _register(server: RestateServer, url: str) -> None:
    async with asyncio.timeout(600):
        while True:
            try:
                await server.register(url)
                return
            except ServerError:
                await asyncio.sleep(1)


def _take(folder: Path) -> int:
    total = 0
    for dump in folder.glob("counts.*"):
        found = re.search(r"^(?:summary|totals): (\d+)", dump.read_text(), re.MULTILINE)
        assert found is not None
        total += int(found[1])
        dump.unlink()
    return total
