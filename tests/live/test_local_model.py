"""The real local LLM: typed answers, several at once, gone with its owner."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest

from agents.local_model import LocalModelError, LocalServer
from agents.models import LocalModel
from agents.routing import Reply, Route, classifier, specialists
from services.routing import EXAMPLE_TICKETS
from tests.live.hosting import PATIENCE

pytestmark = pytest.mark.live

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer() as server:
        yield server


@pytest.fixture
async def model(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LocalModel]:
    monkeypatch.setenv("AGENTS_LOCAL_URL", server.url)
    async with LocalModel() as model:
        yield model


async def test_four_decisions_at_once_are_well_formed(model: LocalModel) -> None:
    """Four slots; each answer fits the type, whatever the model makes of the ticket."""
    with classifier.override(model=model):
        runs = [classifier.run(ticket) for ticket in [*EXAMPLE_TICKETS, "Hello?"]]
        results = await asyncio.gather(*runs)
    assert all(isinstance(result.output, Route) for result in results)


async def test_a_reply_is_well_formed(model: LocalModel) -> None:
    """The longest answer of the two patterns ends within its tokens."""
    with specialists["billing"].override(model=model):
        result = await specialists["billing"].run(EXAMPLE_TICKETS[1])
    assert isinstance(result.output, Reply)


def test_a_taken_port_is_an_error_with_advice(server: LocalServer) -> None:
    """It names the port, and what to do without the local model."""
    port = httpx2.URL(server.url).port
    assert port is not None
    with pytest.raises(LocalModelError, match=f"is port {port} taken") as error:
        LocalServer(port=port).start()
    assert "OPENAI_API_KEY" in str(error.value)


def test_it_stops_with_its_owner(tmp_path: Path) -> None:
    """Also when the owner is killed and cannot clean up."""
    code = (
        "import time\n"
        "from agents.local_model import shared_url\n"
        "print(shared_url(), flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "AGENTS_LOCAL_URL"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        try:
            assert owner.stdout is not None
            url = owner.stdout.readline().strip()
            assert httpx2.get(f"{url}/models", timeout=PATIENCE).status_code == 200
        finally:
            owner.send_signal(signal.SIGKILL)
            owner.wait()
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            httpx2.get(f"{url}/models", timeout=PATIENCE)
        except httpx2.TransportError:
            return
        time.sleep(0.1)
    pytest.fail(f"The model still answers at {url} after its owner was killed.")


def test_stopping_twice_and_starting_again(server: LocalServer) -> None:
    """`stop` is safe to repeat, and a stopped server can be started again."""
    other = LocalServer()
    other.stop()
    other.start()
    assert other.running
    other.stop()
    other.stop()
    assert not other.running
    assert server.running
