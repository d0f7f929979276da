"""Example client: posts each pattern's example inputs to Restate and prints the typed answers.

    python -m services.client routing --ingress http://127.0.0.1:8080 --idempotency-key demo-1

With the same idempotency key the second call executes nothing and gets the first one's answers. A
workflow or virtual object is called under a key of its own; there the idempotency key is that key.

Where a run waits for a person, the client plays that person.
"""

import argparse
import secrets
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.pretty import Pretty

from services.chaining import CallChainingRequest, CallChainingResponse
from services.evaluator_optimizer import EvaluatorOptimizerRequest, EvaluatorOptimizerResponse
from services.human_in_the_loop import (
    EXAMPLE_REVIEWS,
    Feedback,
    HumanInTheLoopRequest,
    HumanInTheLoopResponse,
)
from services.orchestrator_workers import OrchestratorWorkersRequest, OrchestratorWorkersResponse
from services.parallelization import (
    ParallelizationRequest,
    ParallelizationResponse,
    RunToolsRequest,
    RunToolsResponse,
)
from services.routing import EXAMPLE_TICKETS, RoutingRequest, RoutingResponse

DEFAULT_INGRESS = "http://127.0.0.1:8080"

ResponseT = TypeVar("ResponseT", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Pattern(Generic[ResponseT]):
    """One agent pattern as a client sees it."""

    service: str
    """Name of the Restate service."""

    examples: Sequence[BaseModel]
    """Requests to try it with."""

    response_type: type[ResponseT]
    """What the service answers."""

    handler: str = "run"
    """Name of the handler."""

    kind: Literal["service", "object", "workflow"] = "service"
    """Calls of objects and workflows have a key; a workflow's `run` executes once per key."""

    reviews: Sequence[Feedback] = ()
    """What a person answers while the handler runs, one after the other."""

    def path(self, key: str, handler: str | None = None) -> str:
        """Return the path of the handler, or another one, at the ingress; a service's has no key in it."""
        keyed = self.service if self.kind == "service" else f"{self.service}/{quote(key, safe='')}"
        return f"/{keyed}/{handler or self.handler}"


PATTERNS: dict[str, Pattern[Any]] = {
    "chaining": Pattern(
        service="CallChainingService",
        examples=[CallChainingRequest()],
        response_type=CallChainingResponse,
    ),
    "routing": Pattern(
        service="RoutingService",
        examples=[RoutingRequest(ticket=ticket) for ticket in EXAMPLE_TICKETS],
        response_type=RoutingResponse,
    ),
    "hosted-routing": Pattern(
        service="RoutingService",
        handler="run_hosted",
        examples=[RoutingRequest(ticket=EXAMPLE_TICKETS[1])],
        response_type=RoutingResponse,
    ),
    "parallelization": Pattern(
        service="ParallelizationService",
        kind="workflow",
        examples=[ParallelizationRequest()],
        response_type=ParallelizationResponse,
    ),
    "parallel-tools": Pattern(
        service="ParallelizationService",
        kind="workflow",
        handler="run_tools",
        examples=[RunToolsRequest()],
        response_type=RunToolsResponse,
    ),
    "orchestrator-workers": Pattern(
        service="OrchestratorWorkersService",
        examples=[OrchestratorWorkersRequest()],
        response_type=OrchestratorWorkersResponse,
    ),
    "evaluator-optimizer": Pattern(
        service="EvaluatorOptimizerService",
        examples=[EvaluatorOptimizerRequest()],
        response_type=EvaluatorOptimizerResponse,
    ),
    "human-in-the-loop": Pattern(
        service="HumanInTheLoopService",
        kind="object",
        handler="run_with_promise",
        examples=[HumanInTheLoopRequest()],
        response_type=HumanInTheLoopResponse,
        reviews=EXAMPLE_REVIEWS,
    ),
}


class ClientError(Exception):
    """A call that did not work; the message is for the person at the terminal."""


def call(
    client: httpx2.Client,
    pattern: Pattern[ResponseT],
    request: BaseModel,
    *,
    idempotency_key: str | None = None,
) -> ResponseT:
    """Run `pattern` on `request` and wait for its answer.

    Args:
        client: A client whose base URL is the ingress.
        pattern: What to run.
        request: One of the pattern's requests.
        idempotency_key: Calls with the same key execute once; all of them get the same answer.

    Returns:
        The answer, as the pattern's response type.

    Raises:
        ClientError: The ingress is not reachable, or answered with an error.
    """
    headers = {"content-type": "application/json"}
    once_per_key = pattern.kind == "workflow" and pattern.handler == "run"
    if idempotency_key is not None and not once_per_key:
        headers["idempotency-key"] = idempotency_key
    key = idempotency_key or secrets.token_hex(8)
    path = pattern.path(key)
    try:
        with _reviewing(client, pattern, key):
            answer = client.post(path, content=request.model_dump_json(), headers=headers)
        if answer.status_code == 409 and once_per_key and idempotency_key is not None:
            # It was called before: its outcome, now or when it is there.
            answer = client.get(
                f"/restate/workflow/{pattern.service}/{quote(idempotency_key, safe='')}/attach"
            )
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        raise ClientError(
            f"No answer from the ingress at {client.base_url} ({type(error).__name__}: {error}). "
            "Is restate-server running? `durable dev services:app` starts it with the services."
        ) from error
    if not answer.is_success:
        raise ClientError(f"{path} answered {answer.status_code}: {_error_message(answer)}")
    try:
        return pattern.response_type.model_validate_json(answer.content)
    except ValidationError as error:
        raise ClientError(f"{path} answered something else than it should: {error}") from error


@contextmanager
def _reviewing(client: httpx2.Client, pattern: Pattern[Any], key: str) -> Generator[None]:
    """Judge the drafts of the run that is called meanwhile, as a person with `curl` would."""
    over = threading.Event()

    def review() -> None:
        for feedback in pattern.reviews:
            waiting = False
            while not waiting and not over.wait(0.2):
                waiting = client.post(pattern.path(key, "status")).json().get("review") is not None
            if waiting:
                client.post(
                    pattern.path(key, "feedback"),
                    content=feedback.model_dump_json(),
                    headers={"content-type": "application/json"},
                )

    with ThreadPoolExecutor(1) as person:
        person.submit(review)
        try:
            yield
        finally:
            over.set()


def _error_message(answer: httpx2.Response) -> str:
    """Return Restate's message; whatever else is between here and there answers in its own way."""
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text.strip() or "(no message)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m services.client`.

    Args:
        argv: The arguments, by default those of the command line.

    Returns:
        The exit code: 0 when every example was answered.
    """
    parser = argparse.ArgumentParser(
        prog="python -m services.client", description="Run the patterns on their example inputs."
    )
    parser.add_argument("pattern", nargs="?", choices=sorted(PATTERNS), help="default: all of them")
    parser.add_argument(
        "--ingress", default=DEFAULT_INGRESS, metavar="URL", help="default: %(default)s"
    )
    parser.add_argument(
        "--idempotency-key", metavar="KEY", help="execute each example at most once under this key"
    )
    arguments = parser.parse_args(argv)
    names = [arguments.pattern] if arguments.pattern else list(PATTERNS)
    console = Console()
    # No read timeout: an agent may take minutes, and a durable one as long as it wants.
    timeout = httpx2.Timeout(None, connect=5)
    try:
        with httpx2.Client(base_url=arguments.ingress, timeout=timeout) as client:
            for name in names:
                _run_examples(client, name, key=arguments.idempotency_key, console=console)
    except ClientError as error:
        Console(stderr=True).print(f"Error: {error}", style="red", markup=False, highlight=False)
        return 1
    return 0


def _run_examples(client: httpx2.Client, name: str, *, key: str | None, console: Console) -> None:
    pattern = PATTERNS[name]
    for number, request in enumerate(pattern.examples, start=1):
        console.rule(f"{pattern.service}/{pattern.handler}, example {number}")
        console.print(Pretty(request))
        started = time.perf_counter()
        with console.status("waiting for the agents"):
            response = call(
                client,
                pattern,
                request,
                idempotency_key=f"{key}-{name}-{number}" if key is not None else None,
            )
        seconds = time.perf_counter() - started
        console.print(Pretty(response))
        console.print(f"{seconds:.1f} s", style="dim")


if __name__ == "__main__":
    sys.exit(main())
