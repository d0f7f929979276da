"""The client without a server: what it is made of, what it sends again, and what answers mean."""

import inspect
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx2
import pytest
import restate
from pydantic_ai.exceptions import UsageLimitExceeded, UserError
from restate import TerminalError

from durable import client as dc
from durable._errors import step_failure
from durable.client import Client, Handle, Session, SyncClient, SyncSession
from durable.client._exchange import Attempt, Exchange, Pause, Request, exchange
from durable.client._targets import target

ID = "inv_18jYkUAxwZWm2Wk5xVuX0a1G0B2kZJqh2R"


class TestTheTwoClients:
    @pytest.mark.parametrize(("one", "other"), [(Client, SyncClient), (Session, SyncSession)])
    def test_say_the_same(self, one: type[Any], other: type[Any]) -> None:
        """Same methods, same parameters."""
        renamed = {"aclose": "close"}
        methods = {renamed.get(name, name): it for name, it in public(one).items()}
        assert methods.keys() == public(other).keys()
        for name, method in methods.items():
            other_method = public(other)[name]
            assert parameters(method) == parameters(other_method), name
            assert summary(method) == summary(other_method), name

    @pytest.mark.parametrize("client", [Client, SyncClient])
    @pytest.mark.parametrize(
        ("url", "options", "fault"),
        [
            ("localhost:8080", {}, "`ingress_url` must be like 'http://localhost:8080'"),
            ("http://", {}, "`ingress_url` must be like"),
            ("http://host:port", {}, "`ingress_url` is no URL"),
            ("http://a:canary@host", {}, "`ingress_url` must hold no credentials"),
            ("ftp://a:canary@host", {}, "must be like"),
            ("http://host", {"admin_url": "host:9070"}, "`admin_url` must be like"),
            ("http://host", {"retries": -1}, "`retries` must not be negative"),
            ("http://host", {"timeout": timedelta(0)}, "`timeout` must be positive"),
            ("http://host", {"token": "canary\n"}, "`token` and `headers` must be printable ASCII"),
            ("http://host", {"headers": {"ü": "canary"}}, "must be printable ASCII"),
            ("x", {"retries": -1, "timeout": timedelta(-1)}, "retries.*timeout.*ingress_url"),
        ],
    )
    def test_bad_configuration(
        self, client: Callable[..., Any], url: str, options: dict[str, Any], fault: str
    ) -> None:
        """All that is wrong, in one message without secrets."""
        with pytest.raises(UserError, match=fault) as error:
            client(url, **options)
        assert "canary" not in str(error.value)

    def test_repr(self) -> None:
        """Addresses and nothing secret."""
        client = SyncClient("http://host/base", admin_url="https://admin", token="canary")
        assert repr(client) == "SyncClient('http://host/base', 'https://admin')"
        assert "canary" not in repr(vars(client))
        client.close()

    @pytest.mark.parametrize(
        ("url", "trusted"),
        [
            ("http://localhost", False),
            ("http://restate.localhost", False),
            ("http://127.0.0.9:1", False),
            ("http://[::1]:1", False),
            ("https://restate.cloud", True),
            ("http://10.0.0.1", True),
        ],
    )
    def test_only_others_go_through_proxies(self, url: str, trusted: bool) -> None:
        """A proxy of the environment never gets what goes to this machine."""
        with SyncClient(url) as client:
            options = client._server.http_options(httpx2.URL(url))
            assert options["trust_env"] is trusted


def public(type_: type[Any]) -> dict[str, Any]:
    """The methods that are no secret."""
    return {
        name: it
        for name, it in vars(type_).items()
        if inspect.isfunction(it) and (name == "__init__" or not name.startswith("_"))
        if type_ not in {Session, SyncSession} or name != "__init__"
    }


def summary(method: Callable[..., Any]) -> str:
    """The first line of the docstring."""
    return (method.__doc__ or "").partition("\n")[0]


def parameters(method: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults."""
    return [(it.name, it.kind, it.default) for it in inspect.signature(method).parameters.values()]


class TestHandles:
    def test_text(self) -> None:
        """What is stored is the id; the handler is no part of it."""
        handle = Handle.parse(f" {ID}\n", hello)
        assert str(handle) == ID
        assert handle == Handle.parse(ID)
        assert pickle.loads(pickle.dumps(Handle[Any](ID))) == handle
        assert repr(handle) == f"Handle(invocation_id='{ID}')"

    @pytest.mark.parametrize("text", ["", "inv_1short", "sign_1" + ID, f"{ID}' OR 1=1", f"{ID}/x"])
    def test_what_is_none(self, text: str) -> None:
        """Nothing else gets into paths and queries."""
        with pytest.raises(dc.RejectedInput, match="is not the id of an invocation"):
            Handle.parse(text)


service = restate.Service("Service")


@service.handler()
async def hello(ctx: restate.Context) -> str:
    """Greet."""
    return "hello"


class Unknown:
    """What Pydantic knows nothing of."""


def test_types_that_pydantic_does_not_know() -> None:
    """Say so when the handler is first used."""
    other = restate.Service("Other")

    @other.handler()
    async def work(ctx: restate.Context, input: Unknown) -> None: ...

    with pytest.raises(UserError, match=r"`Other/work` has types that Pydantic does not know"):
        target(work)


class TestExchanges:
    """Requests, and what comes back, one after the other."""

    request = Request(method="POST", path=("Service", "hello"))
    once = Request(method="POST", path=("Service", "hello"), repeatable=False)
    broken = httpx2.ReadError("broken")

    def test_broken_connections(self) -> None:
        """Are tried again after growing pauses, as often as it was said."""
        asking = exchange(self.request, seconds=None, retries=3)
        pauses: list[float] = []
        assert isinstance(next(asking), Attempt)
        for _ in range(3):
            pause = asking.send(self.broken)
            assert isinstance(pause, Pause)
            pauses.append(pause.seconds)
            assert isinstance(asking.send(None), Attempt)
        assert pauses == [0.1, 0.2, 0.4]
        with pytest.raises(dc.Unreachable, match="ReadError broken"):
            asking.send(self.broken)

    @pytest.mark.parametrize("answer", [broken, httpx2.Response(503), httpx2.Response(502)])
    def test_what_is_not_safe_is_not_sent_again(self, answer: Any) -> None:
        """It may have been done."""
        with pytest.raises(dc.Unreachable, match="an `idempotency_key` prevents that"):
            ended(exchange(self.once, seconds=None, retries=3), answer)

    def test_time_is_up(self) -> None:
        """A connection that is not made is another thing."""
        with pytest.raises(dc.Timeout, match=r"within 5 s"):
            ended(exchange(self.request, seconds=5, retries=3), httpx2.ReadTimeout("late"))
        with pytest.raises(dc.Unreachable):
            ended(exchange(self.request, seconds=5, retries=0), httpx2.ConnectTimeout("none"))

    def test_time_that_is_left(self) -> None:
        """A limit holds for all attempts together, and for the connection too."""
        asking = exchange(self.request, seconds=5, retries=1)
        first = next(asking)
        assert isinstance(first, Attempt)
        assert first.timeout.read is not None
        assert first.timeout.connect == first.timeout.read <= 5
        asking.send(self.broken)
        second = asking.send(None)
        assert isinstance(second, Attempt)
        assert second.timeout.read is not None
        assert second.timeout.read < first.timeout.read
        unlimited = next(exchange(self.request, seconds=None, retries=0))
        assert isinstance(unlimited, Attempt)
        assert (unlimited.timeout.read, unlimited.timeout.connect) == (None, 10)

    def test_a_large_body_that_breaks_the_connection(self) -> None:
        """Is named as the possible cause: restate-server closes the connection on it."""
        large = Request(method="POST", path=("S", "h"), body=b"x" * 2**25)
        with pytest.raises(dc.Unreachable, match="33,554,432 bytes are more than it takes"):
            ended(exchange(large, seconds=None, retries=0), self.broken)

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (302, dc.ClientError),
            (400, dc.RejectedInput),
            (401, dc.ClientError),
            (403, dc.ClientError),
            (404, dc.NotFound),
            (409, dc.Conflict),
            (413, dc.RejectedInput),
            (470, dc.NotReady),
            (500, dc.ClientError),
        ],
    )
    @pytest.mark.parametrize("content", [b'{"message": "why"}', b"<h1>No</h1>", b'"no"', b"\xff"])
    def test_answers_that_are_no_run_s(
        self, status: int, error: type[Exception], content: bytes
    ) -> None:
        """By status, whoever made the body."""
        with pytest.raises(error) as raised:
            ended(
                exchange(self.request, seconds=None, retries=0),
                httpx2.Response(status, content=content),
            )
        assert raised.type is error
        assert isinstance(raised.value, dc.ClientError)
        assert raised.value.status == status

    @pytest.mark.parametrize("status", [400, 413, 422, 429, 503])
    def test_errors_of_agents(self, status: int) -> None:
        """Are the run's, whatever their status."""
        failure = step_failure(UsageLimitExceeded("too much"))
        assert isinstance(failure, TerminalError)
        answer = httpx2.Response(
            status,
            json={"message": "no", "metadata": failure.metadata},
            headers={"x-restate-error-source": "invocation", "x-restate-id": ID},
        )
        with pytest.raises(dc.RunFailed) as raised:
            ended(exchange(self.request, seconds=None, retries=0), answer)
        assert raised.value.error_type == "UsageLimitExceeded"
        assert isinstance(raised.value.__cause__, UsageLimitExceeded)
        again = pickle.loads(pickle.dumps(raised.value))
        assert (str(again), again.error_type) == (str(raised.value), "UsageLimitExceeded")

    @pytest.mark.parametrize(
        ("segment", "quoted"),
        [("a b/c?d#e", "a%20b%2Fc%3Fd%23e"), ("..", "%2E%2E"), (".", "%2E"), ("a.b", "a.b")],
    )
    def test_paths(self, segment: str, quoted: str) -> None:
        """A segment stays one."""
        assert Request(method="GET", path=("S", segment)).url == f"S/{quoted}"


def ended(asking: Exchange[httpx2.Response], answer: Any) -> None:
    """Give the same answer to each attempt, until the exchange ends."""
    next_ = next(asking)
    while True:
        next_ = asking.send(answer if isinstance(next_, Attempt) else None)
