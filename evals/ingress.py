"""Runs cases as invocations of the real services, each at most once, however often the suite is started.

A run's idempotency key is made of the experiment, the case and the number of the repeat. When the suite is
killed and started again with the same experiment and data directory, what is finished is answered from the
server's storage, and what was under way goes on where it stopped.

Results and journals are kept for a day, which is Restate's default: an experiment can be continued for as long.

The trace of a case goes out with its call, and the spans of the services come back through a collector on this machine.
Those that were lost with a killed worker are made of the journal.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Iterable
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
from opentelemetry import propagate
from pydantic import BaseModel
from pydantic_ai.exceptions import UserError
from pydantic_evals.evaluators import EvaluatorContext
from pydantic_evals.otel import SpanTree

from durable.server import RestateServer
from durable.testing import Collector
from durable.worker import Worker
from evals.activity import completed_tree, journal_tree
from evals.patterns import EVAL_PATTERNS
from services.client import ClientError, Pattern, call
from services.human_in_the_loop import HumanInTheLoopStatus

CHECKOUT = Path(__file__).parent.parent

_SPANS_ARRIVE = 3.0
"""Seconds to wait for spans after a run has ended."""

TIMEOUT = 1800.0
"""Seconds for one run: one that restate-server pauses would never end."""


@dataclass(kw_only=True)
class IngressRunner:
    """Calls the services behind an ingress, and reads what ran from their journals."""

    experiment: str
    ingress_url: str
    admin_url: str

    collector: Collector | None = None
    """Has the spans of the services, where this process hosts them."""

    _began: datetime = field(default_factory=lambda: datetime.now(UTC))

    unreachable: list[str] = field(default_factory=list[str])
    """Why calls got no answer: then there is nothing to say about the cases."""

    async def check(self, patterns: Iterable[str]) -> None:
        """Look whether ingress and admin API answer, and know the services of the patterns.

        Raises:
            UserError: They do not.
        """
        async with self._http() as http:
            for url in (f"{self.ingress_url}/restate/health", f"{self.admin_url}/health"):
                try:
                    (await http.get(url)).raise_for_status()
                except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                    raise UserError(
                        f"No answer from {url} ({type(error).__name__}: {error}). Is restate-server running "
                        "there? Without `--ingress`, the suite starts one, with the services."
                    ) from error
            for service in sorted({EVAL_PATTERNS[name].client.service for name in patterns}):
                if (await http.get(f"{self.admin_url}/services/{service}")).status_code == 404:
                    raise UserError(
                        f"No `{service}` is registered at {self.admin_url}: serve the services with "
                        "`durable dev services:app`, or leave `--ingress` out."
                    )

    async def run(self, pattern: str, request: BaseModel, *, run: str) -> BaseModel:
        """Invoke the service, or get what it answered under the same key."""
        with self._noting():
            return await asyncio.to_thread(self._call, pattern, request, self._key(pattern, run))

    @contextmanager
    def _noting(self) -> Generator[None]:
        """Note that nobody answers. A run that takes too long is a case that failed."""
        try:
            yield
        except (ClientError, httpx2.TransportError) as error:
            cause = error.__cause__ if isinstance(error, ClientError) else error
            late = isinstance(cause, httpx2.ReadTimeout)
            if isinstance(cause, httpx2.TransportError) and not late:
                self.unreachable.append(
                    f"No answer from the ingress or the admin API ({type(cause).__name__}: {cause})."
                )
            raise

    def _call(self, pattern: str, request: BaseModel, key: str) -> BaseModel:
        headers: dict[str, str] = {}
        propagate.inject(headers)  # the spans of the services belong to the case
        with httpx2.Client(
            base_url=self.ingress_url,
            headers=headers,
            timeout=httpx2.Timeout(TIMEOUT, connect=5),
            trust_env=False,
        ) as http:
            client = self._client(http, pattern, request, key)
            body = EVAL_PATTERNS[pattern].request(request)
            return call(http, client, body, idempotency_key=key)

    def _client(
        self, http: httpx2.Client, pattern: str, inputs: BaseModel, key: str
    ) -> Pattern[Any]:
        """Return the pattern with the reviews that its run has not had yet."""
        client, reviews = EVAL_PATTERNS[pattern].client, EVAL_PATTERNS[pattern].reviews(inputs)
        if not reviews:
            return client
        status = HumanInTheLoopStatus.model_validate_json(
            http.post(client.path(key, "status")).raise_for_status().content
        )
        given = len(status.rounds) - (status.status == "waiting")
        return replace(client, reviews=reviews[given:])

    async def observe(
        self, pattern: str, context: EvaluatorContext[Any, Any, Any], *, run: str
    ) -> EvaluatorContext[Any, Any, Any]:
        """Take spans and duration from the journals of the run and of what it called."""
        with self._noting():
            return await self._observe(
                EVAL_PATTERNS[pattern].client, context, self._key(pattern, run)
            )

    async def _observe(
        self, client: Pattern[Any], context: EvaluatorContext[Any, Any, Any], key: str
    ) -> EvaluatorContext[Any, Any, Any]:
        [invocation] = await self._query(
            "SELECT id, created_at, completed_at FROM sys_invocation WHERE target_service_name = "
            f"'{client.service}' AND target_handler_name = '{client.handler}' "
            f"AND (idempotency_key = '{key}' OR target_service_key = '{key}')"
        )
        called = await self._query(
            f"SELECT id FROM sys_invocation WHERE invoked_by_id = '{invocation['id']}'"
        )
        ids = ", ".join(f"'{it['id']}'" for it in [invocation, *called])
        rows = await self._query(
            "SELECT id, index, entry_type, name, raw, entry_lite_json FROM sys_journal "
            f"WHERE id IN ({ids}) ORDER BY id, index"
        )
        ended, began = (
            datetime.fromisoformat(invocation[f"{it}_at"]) for it in ("completed", "created")
        )
        tree = journal_tree(rows)
        if self.collector is not None:
            # what ended before this process began has sent all that it ever will
            seconds = _SPANS_ARRIVE if ended > self._began else 0.0
            tree = await _collected(
                self.collector, tree, {it["id"] for it in [invocation, *called]}, seconds
            )
        return replace(context, _span_tree=tree, duration=(ended - began).total_seconds())

    def _key(self, pattern: str, run: str) -> str:
        return f"{self.experiment}.{pattern}.{run}"

    async def _query(self, sql: str) -> list[dict[str, Any]]:
        async with self._http() as http:
            answer = await http.post(
                f"{self.admin_url}/query",
                json={"query": sql},
                headers={"accept": "application/json"},
            )
            return answer.raise_for_status().json()["rows"]

    def _http(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(timeout=30, trust_env=False)


async def _collected(
    collector: Collector, journal: SpanTree, invocations: set[str], seconds: float
) -> SpanTree:
    """Wait for the spans of these invocations, so long at most, and complete them from the journal."""
    give_up = time.monotonic() + seconds
    while True:
        tree, missing = completed_tree(
            await asyncio.to_thread(collector.spans), journal, invocations
        )
        if not missing or time.monotonic() > give_up:
            return tree
        await asyncio.sleep(0.1)


@asynccontextmanager
async def hosted(experiment: str, *, data_dir: Path) -> AsyncGenerator[IngressRunner]:
    """Start restate-server on the data of earlier runs, and a worker with the services.

    Args:
        experiment: The name of the experiment.
        data_dir: Where the server keeps its data.

    Raises:
        WorkerError: The worker does not start; one that dies later is started again.
    """
    # Restate calls what is under way at the address where it began: the worker has to come back there.
    remembered = data_dir / "worker-port"
    port, log = _read_port(remembered), data_dir / "worker.log"
    try:
        with Collector(data_dir / "spans" / f"{experiment}.jsonl") as collector:
            env = {
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.url}/v1/traces",
                "OTEL_BSP_SCHEDULE_DELAY": "100",  # milliseconds
            }
            async with (
                RestateServer(data_dir=data_dir / "restate") as server,
                Worker(
                    "evals.worker:app", port=port, cwd=CHECKOUT, env=env, log_file=log
                ) as worker,
                asyncio.TaskGroup() as group,
            ):
                remembered.write_text(worker.url.rpartition(":")[2])
                await server.register(worker.url)
                keeping = group.create_task(_keep(worker))
                yield IngressRunner(
                    experiment=experiment,
                    ingress_url=server.ingress_url,
                    admin_url=server.admin_url,
                    collector=collector,
                )
                keeping.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _keep(worker: Worker) -> None:
    while True:
        await asyncio.sleep(0.5)
        if not worker.running:
            await worker.start()


def _read_port(remembered: Path) -> int | None:
    remembered.parent.mkdir(parents=True, exist_ok=True)
    return int(remembered.read_text()) if remembered.exists() else None
