"""Kills the worker of `services:app` between two steps of a run, and tells what was asked again."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import services
from durable.server import RestateServer
from durable.worker import Worker
from tests.live.hosting import Ingress, http_client
from tests.live.providers import Answer, provider

CHECKOUT = Path(services.__file__).parent.parent

Output = Callable[[str, str], BaseModel]
"""Makes the model's output from the name of the output type and the prompt."""


class HeldModel:
    """A provider's model that answers so many requests and holds the others until it is released."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._left = 0
        self.answered: Counter[str] = Counter()
        self.holding = threading.Event()
        """Set while there is a request that waits."""

    def hold(self, *, after: int) -> None:
        """Answer `after` requests, hold the next ones."""
        self._left = after
        self._released = threading.Event()
        self.holding.clear()
        self.answered = Counter()

    def release(self) -> Counter[str]:
        """Answer all requests from now on; return which were answered until now.

        Those that are held get their answer, but nobody is there to receive it any more.
        """
        with self._lock:
            before = self.answered
            self.answered = Counter()
            self._left = 1000
        self._released.set()
        return before

    def __call__(self, request: dict[str, Any], number: int) -> Answer:
        name = request["response_format"]["json_schema"]["name"]
        prompt = request["messages"][-1]["content"]
        with self._lock:
            held = self._left == 0
            if not held:
                self._left -= 1
                self.answered[prompt] += 1
        if held:
            self.holding.set()
            self._released.wait(60)
        return Answer(self._output(name, prompt).model_dump_json())


@dataclass(frozen=True)
class Killed:
    """A run whose worker was killed."""

    response: Any
    """What the caller got in the end."""

    before: Counter[str]
    """The prompts that were answered before the kill; their steps were complete."""

    after: Counter[str]
    """The prompts that the next worker asked."""


async def killed_runs(
    server: RestateServer, path: Callable[[int], str], body: Any, output: Output, *, steps: int
) -> AsyncGenerator[Killed]:
    """Run a handler once per step, with the worker killed before that step and after all others.

    Args:
        server: The server.
        path: Makes the path of the handler from the number of completed steps.
        body: The request.
        output: Makes the model's outputs.
        steps: How many model requests a run has.

    Yields:
        What became of the runs, from the one that was killed before its first step to the one that
        was killed before its last.
    """
    completions = (
        "SELECT id FROM sys_journal WHERE entry_type = 'Notification: Run' AND id IN (SELECT id FROM "
        f"sys_invocation WHERE target_service_name = '{path(0).partition('/')[0]}')"
    )
    model = HeldModel(output)
    with provider(model) as api:
        async with (
            Worker("services:app", cwd=CHECKOUT, env=api.env) as worker,
            http_client() as http,
        ):
            ingress = Ingress(server, http)
            await server.register(worker.url)
            for completed in range(steps):
                model.hold(after=completed)
                expected = len(await server.query(completions)) + completed
                call = asyncio.create_task(ingress.post(path(completed), body))
                assert await asyncio.to_thread(model.holding.wait, 30)
                await ingress.until(completions, lambda rows, n=expected: len(rows) == n)
                worker.kill()
                before = model.release()
                await worker.start()
                response = await call
                assert response.status_code == 200, response.text
                assert before.total() == completed
                yield Killed(json.loads(response.content), before, model.answered)
