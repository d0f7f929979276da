"""The real restate-server for live tests, in two modes."""

from collections.abc import Generator

import pytest

from durable.server import RestateServer
from tests.live.scripted import done


@pytest.fixture(scope="session", params=["normal", "always-replay"])
def server(request: pytest.FixtureRequest) -> Generator[RestateServer]:
    """A real server; in always-replay mode each wait is a suspension and a full replay."""
    with RestateServer(always_replay=request.param == "always-replay") as server:
        yield server


@pytest.fixture(autouse=True)
def _nothing_done() -> None:
    done.clear()
