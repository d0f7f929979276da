"""`durable trace` prints runs of a real server, from spans and from journals."""

import asyncio
import re
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from durable.__main__ import main
from durable._collector import Collector
from durable._dev import spans_file
from durable._process import free_ports
from durable.server import RestateServer
from durable.worker import Worker
from tests.live.hosting import PATIENCE, Ingress, http_client
from tests.live.providers import Answer, provider
from tests.live.test_approvals import start
from tests.live.test_traces import expected

pytestmark = pytest.mark.live

TIME = re.compile(r"(?<![\w.])(?:<1|\d+(?:\.\d)?) (?:ms|s)(?: \d+ \w+)?\b")


class Hosted:
    """A worker whose spans, and the server's, are collected as `durable dev` does it."""

    def __init__(
        self, ingress: Ingress, collector: Collector, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.ingress = ingress
        self.folder = collector.file.parent
        self._collector = collector
        self._capsys = capsys

    async def run(self, handler: str) -> str:
        """Run a handler to its end, until its last spans are there, and return the invocation's id."""
        invocation = await start(self.ingress, f"Traced/{handler}")
        url = f"{self.ingress.server.ingress_url}/restate/invocation/{invocation}/attach"
        await self.ingress.http.get(url)
        await self.collected(f"invocation-end Traced/{handler}")
        await self.collected(f"Traced/{handler}", pending=False)
        return invocation

    async def collected(self, name: str, *, pending: bool | None = None) -> None:
        """Wait until such a span of the last run is there."""
        async with asyncio.timeout(PATIENCE):
            while not any(  # noqa: ASYNC110 - another process sends
                it.name == name and pending in {None, it.pending} for it in self._collector.spans()
            ):
                await asyncio.sleep(0.05)

    def trace(self, invocation: str, *options: str) -> str:
        """Return what the command prints, with each time as `T`, and without when each began."""
        usual = ["--admin", self.ingress.server.admin_url, "--data", str(self.folder)]
        assert main(["trace", invocation, *usual, *options]) == 0
        lines = TIME.sub("T", self._capsys.readouterr().out).replace("  at T", "").splitlines()
        return "\n".join(line.rstrip() for line in lines)

    def error(self, invocation: str, *options: str) -> str:
        """Return what it says when it fails."""
        assert main(["trace", invocation, "--data", str(self.folder), *options]) == 1
        return self._capsys.readouterr().err


@pytest.fixture
async def hosted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> AsyncGenerator[Hosted]:
    answers = [Answer(status=500), Answer("done")]
    with Collector(spans_file(tmp_path)) as collector, provider(answers) as api:
        env = {
            "TRACED_COLLECTOR": collector.url,
            "TRACED_FOLDER": str(tmp_path),
            "TRACED_PROCESSORS": "none",
            "OPENAI_API_KEY": "key",
            **api.env,
        }
        settings = {"RESTATE_TRACING_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "50"}
        async with (
            RestateServer(env=settings) as server,
            Worker(
                "tests.live.traced_app:app",
                env=env,
                otlp_endpoint=collector.url,
                log_file=tmp_path / "log",
            ) as worker,
            http_client() as http,
        ):
            await server.register(worker.url)
            yield Hosted(Ingress(server, http), collector, capsys)


async def test_spans(hosted: Hosted) -> None:
    """The server's attempts, the run, and its steps with tokens and results."""
    assert hosted.trace(await hosted.run("plain")) == expected("""\
Traced/plain  success  T
ingress Traced/plain  T
└── invocation-start Traced/plain  T
    └── invocation-attempt Traced/plain  T
        └── Traced/plain  T
            └── invoke_agent plain  T  103 → 5 tokens  → work=worked
                ├── chat model  T  51 → 2 tokens  → work()
                ├── execute_tool work  T  → worked
                │   └── inside work  T
                └── chat model  T  52 → 3 tokens  → work=worked
""")


async def test_journals(hosted: Hosted) -> None:
    """Without spans: the steps of the run, and the runs that it called."""
    lines = hosted.trace(await hosted.run("delegating"), "--journal").splitlines()
    assert "\n".join(re.sub(r", used=.*", "", line) for line in lines) == expected("""\
Traced/delegating  success  T
Traced/delegating  T  → inner=work=worked
├── delegating__model.request  T  51 → 5 tokens  → inner(prompt="dig")
├── call Delegated/delegate  T
│   └── Delegated/delegate  T  → output="work=worked"
│       ├── inner__model.request  T  51 → 2 tokens  → work()
│       ├── inner__function_toolset__<agent>.call_tool:work  T  → worked
│       └── inner__model.request  T  52 → 3 tokens  → work=worked
└── delegating__model.request  T  52 → 6 tokens  → inner=work=worked
""")


async def test_a_run_that_sends_others(hosted: Hosted) -> None:
    """What it waited for lies under it; what it has sent is named."""
    invocation = await start(hosted.ingress, "Traced/relay", "plain")
    await hosted.collected("invocation-end Traced/relay")
    shown = hosted.trace(invocation, "--journal")
    assert re.sub(r"inv_1\w+", "ID", shown) == expected("""\
Traced/relay  success  T
Traced/relay  T  → work=worked
├── call Traced/plain  T
│   └── Traced/plain  T  → work=worked
│       ├── plain__model.request  T  51 → 2 tokens  → work()
│       ├── plain__function_toolset__<agent>.call_tool:work  T  → worked
│       └── plain__model.request  T  52 → 3 tokens  → work=worked
└── send Traced/metrics  ID
""")


async def test_tries_that_failed(hosted: Hosted) -> None:
    """They lie under what was tried, with the error."""
    invocation = await hosted.run("failing")
    assert hosted.trace(invocation) == expected("""\
Traced/failing  success  T
ingress Traced/failing  T
└── invocation-start Traced/failing  T
    ├── invocation-attempt Traced/failing  T  transient failure
    └── invocation-attempt Traced/failing  T
        └── Traced/failing  T
            └── invoke_agent failing  T  3 → 5 tokens  → done
                └── chat scripted  T  3 → 5 tokens  → done
                    └── failed try: failing__model.request  T  ModelServerError: model `scripted` answered 500 (scripted_code)
""")
    assert hosted.trace(invocation, "--journal") == expected("""\
Traced/failing  success  T
Traced/failing  T  → done
└── failing__model.request  T  3 → 5 tokens  → done
    └── failed try  503: ModelServerError: model `scripted` answered 500 (scripted_code)
""")


async def test_a_run_that_failed(hosted: Hosted) -> None:
    """Which tool did it, and what the model was told before."""
    invocation = await hosted.run("secret")
    assert hosted.trace(invocation, "--journal") == expected("""\
Traced/secret  failure  T
[500] RuntimeError('canary-failure')
Traced/secret  T
├── secret__model.request  T  51 → 5 tokens  → leak(secret="canary-arguments")
├── secret__function_toolset__<agent>.call_tool:leak  T  → canary-result
│   └── failed try  500: RuntimeError('canary-exception')
├── secret__model.request  T  52 → 7 tokens  → repeat()
├── secret__function_toolset__<agent>.call_tool:repeat  T  model retry  → canary-retry
├── secret__model.request  T  56 → 9 tokens  → fail()
└── secret__function_toolset__<agent>.call_tool:fail  500: RuntimeError('canary-failure')
""")


async def test_under_way(hosted: Hosted) -> None:
    """A run that waits: what it has done, and what it is at."""
    invocation = await start(hosted.ingress, "Traced/approval")
    await hosted.collected("wait for a person: refund")
    assert hosted.trace(invocation) == expected("""\
Traced/approval  running  T
Traced/approval  under way for T
└── invoke_agent approval  under way for T
    ├── chat model  T  51 → 2 tokens  → refund()
    └── wait for a person: refund  under way for T
""")
    assert hosted.trace(invocation, "--journal") == expected("""\
Traced/approval  running  T
Traced/approval  under way for T
├── approval__model.request  T  51 → 2 tokens  → refund()
└── approval__notify:refund  T
""")


async def test_the_server_is_away(hosted: Hosted) -> None:
    """Spans are on this machine; what only the server knows is an error."""
    invocation = await hosted.run("plain")
    [port] = free_ports(1)
    nobody = ["--admin", f"http://127.0.0.1:{port}"]
    shown = hosted.trace(invocation, *nobody)
    assert shown.startswith(f"{invocation}, of which the server does not tell: Restate's admin API")
    assert "\ningress Traced/plain" in shown
    assert "admin API does not answer" in hosted.error(invocation, "--journal", *nobody)


async def test_whole_contents_and_a_picture(hosted: Hosted) -> None:
    invocation = await hosted.run("parallel")
    picture = hosted.folder / "trace.svg"
    assert "\n".join(
        hosted.trace(invocation, "--full", "--svg", str(picture)).splitlines()[5:13]
    ) == expected("""\
            └── invoke_agent parallel  T  105 → 15 tokens
                → work=worked; rest=rested; work=worked
                ├── chat model  T  51 → 6 tokens
                │   → work(); rest(); work()
                ├── execute_tool rest  T
                │   → rested
                │   ├── resting
                │   └── sleep  T
""")
    drawn = picture.read_text()
    assert "rest=rested" in drawn
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")


async def test_unknown_invocations(hosted: Hosted) -> None:
    """They are named."""
    admin = ["--admin", hosted.ingress.server.admin_url]
    unknown = "inv_1cph5zgAHIcJ0Gm8lxgArJE43N0hH9gRoz"
    assert f"There is no invocation {unknown}" in hosted.error(unknown, *admin)
    assert "'inv_none' is not the id of an invocation" in hosted.error("inv_none", *admin)
