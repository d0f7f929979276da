"""Hopeless errors end a run at once; passing ones are retried at the provider's pace."""

import asyncio
import logging
from datetime import timedelta
from email.utils import formatdate
from time import time

import pytest
import restate
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.capabilities import Hooks
from pydantic_ai.exceptions import (
    FallbackExceptionGroup,
    ModelAuthenticationError,
    ModelHTTPError,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
)
from pydantic_ai.messages import ModelResponse, TextPart
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.test import TestModel
from pydantic_ai.usage import UsageLimits

import durable
from durable.server import RestateServer
from tests.live.hosting import AT_MOST_TWICE, PATIENCE, after, agent_service, hosted
from tests.live.providers import Answer, provider
from tests.live.scripted import calls, done

pytestmark = pytest.mark.live

FAST = restate.RunOptions[object](max_attempts=3, initial_retry_interval=timedelta(milliseconds=10))


async def test_usage_limit_ends_at_once(server: RestateServer) -> None:
    """A limit is hit again on every replay: the caller gets 429 after one attempt."""
    agent = Agent(TestModel(), name="limited", capabilities=[durable.RestateDurability()])
    service = restate.Service("Limit")

    @agent.tool_plain
    def tool() -> str:
        return "called"

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        return (await agent.run("go", usage_limits=UsageLimits(request_limit=1))).output

    @service.handler()
    async def caught(ctx: restate.Context) -> str:
        try:
            return (await agent.run("go", usage_limits=UsageLimits(request_limit=1))).output
        except UsageLimitExceeded as error:
            return type(error).__name__

    async with hosted(server, service) as ingress:
        response = await ingress.post("Limit/run")
        assert response.status_code == 429
        assert "UsageLimitExceeded" in response.json()["message"]
        assert await ingress.retries("Limit") == 0
        assert await ingress.call("Limit/caught") == "UsageLimitExceeded"


async def test_wrong_key_ends_at_once_and_keeps_its_class(server: RestateServer) -> None:
    """One request is made; `except ModelAuthenticationError` works after a replay; nothing leaks."""
    seen: list[type] = []
    with provider([Answer("secret-body", status=401)]) as api:
        agent = Agent(api.model(), name="keyless", capabilities=[durable.RestateDurability()])
        service = restate.Service("Key")

        @service.handler()
        async def run(ctx: restate.Context) -> str:
            return (await agent.run("go")).output

        @service.handler()
        async def caught(ctx: restate.Context) -> str:
            with pytest.raises(ModelAuthenticationError) as caught:
                await agent.run("go")
            error = caught.value
            assert isinstance(error, ModelHTTPError)
            assert error.status_code == 401
            assert error.provider_error_code == "scripted_code"
            seen.append(type(error))
            await ctx.run_typed("after", after)  # in always-replay mode all is replayed here
            return f"{error}"

        async def after() -> None:
            pass

        async with hosted(server, service) as ingress:
            response = await ingress.post("Key/run")
            assert response.status_code == 502
            assert "answered 401 (scripted_code)" in response.json()["message"]
            assert len(api.times) == 1
            message = await ingress.call("Key/caught")
            assert len(api.times) == 2
            assert "secret-body" not in response.text + message
            journal = await server.query("SELECT * FROM sys_journal")
            assert "secret-body" not in str(journal)
            assert "canary-key" not in str(journal)
    assert set(seen) == {seen[0]}


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Answer(status=400), 502),
        (Answer(status=403), 502),
        (Answer(status=404), 502),
        (Answer(status=422), 502),
        (Answer(status=400, code="context_length_exceeded"), 413),
        (Answer(status=429, code="insufficient_quota"), 503),
        (Answer("", finish_reason="content_filter"), 422),
    ],
    ids=["400", "403", "404", "422", "context window", "quota", "content filter"],
)
async def test_hopeless_answers_end_the_run_at_once(
    server: RestateServer, answer: Answer, status: int
) -> None:
    """What the provider refuses it refuses again: one request, and a status that says why."""
    with provider([answer]) as api:
        agent = Agent(api.model(), name="refused", capabilities=[durable.RestateDurability()])
        async with hosted(server, agent_service("Refused", agent)) as ingress:
            response = await ingress.post("Refused/run")
            assert response.status_code == status, response.text
            assert await ingress.retries("Refused") == 0
        assert len(api.times) == 1


@pytest.mark.parametrize(
    ("status", "date"), [(429, False), (429, True), (503, False), (529, False)]
)
async def test_rate_limit_waits_as_long_as_asked(
    server: RestateServer, status: int, date: bool
) -> None:
    """`Retry-After`, in seconds or as a date, is a delay of the server's, then the run goes on."""
    after = formatdate(time() + 3, usegmt=True) if date else "1"
    limited = Answer("slow down", status=status, headers={"retry-after": after})
    with provider([limited, Answer("finally")]) as api:
        agent = Agent(api.model(), name="patient", capabilities=[durable.RestateDurability()])
        service = agent_service("Patient", agent)

        async with hosted(server, service) as ingress:
            assert await ingress.call("Patient/run") == "finally"
        first, second = api.times
        assert second - first >= 1


async def test_lost_connections_are_retried(server: RestateServer) -> None:
    """A provider that drops the connection is asked again."""
    with provider([Answer(status=0), Answer(status=0), Answer("connected")]) as api:
        agent = Agent(
            api.model(),
            name="lost",
            capabilities=[durable.RestateDurability(model_run_options=FAST)],
        )
        async with hosted(server, agent_service("Lost", agent)) as ingress:
            assert await ingress.call("Lost/run") == "connected"
        assert len(api.times) == 3


async def test_server_errors_are_retried_until_the_options_say_no(server: RestateServer) -> None:
    """A 500 is tried again; the attempts used up end the run with the step's error."""
    with provider([Answer(status=500), Answer(status=503), Answer("up again")]) as api:
        agent = Agent(
            api.model(),
            name="flaky",
            capabilities=[durable.RestateDurability(model_run_options=FAST)],
        )
        service = restate.Service("Flaky")

        @service.handler()
        async def run(ctx: restate.Context) -> str:
            return (await agent.run("go")).output

        async with hosted(server, service) as ingress:
            assert await ingress.call("Flaky/run") == "up again"
            assert len(api.times) == 3
    with provider([Answer(status=500)]) as api:
        agent = Agent(
            api.model(),
            name="down",
            capabilities=[durable.RestateDurability(model_run_options=FAST)],
        )
        service = restate.Service("Down")

        @service.handler()
        async def down(ctx: restate.Context) -> str:
            return (await agent.run("go")).output

        async with hosted(server, service) as ingress:
            response = await ingress.post("Down/down")
            assert response.status_code >= 500
            assert "answered 500" in response.json()["message"]
            assert len(api.times) == 3


async def test_hooks_see_the_error_of_a_request(server: RestateServer) -> None:
    """`on_model_request_error` gets the provider's error in its own class, and may answer instead."""
    hooks = Hooks[object]()
    seen: list[Exception] = []

    @hooks.on.model_request_error
    async def recover(
        ctx: RunContext, *, request_context: ModelRequestContext, error: Exception
    ) -> ModelResponse:
        seen.append(error)
        return ModelResponse(parts=[TextPart("from the hook")])

    with provider([Answer(status=401)]) as api:
        agent = Agent(
            api.model(), name="recovering", capabilities=[hooks, durable.RestateDurability()]
        )
        async with hosted(server, agent_service("Recovering", agent)) as ingress:
            assert await ingress.call("Recovering/run") == "from the hook"
            assert await ingress.retries("Recovering") == 0
        assert len(api.times) == 1
    for error in seen:
        assert isinstance(error, ModelAuthenticationError)
        assert isinstance(error, ModelHTTPError)


async def test_all_models_rejecting_ends_at_once(server: RestateServer) -> None:
    """`FallbackModel` is one step; its group of errors ends the run if no model may recover."""
    with provider([Answer(status=401)]) as api:
        model = FallbackModel(api.model(), api.model())
        agent = Agent(model, name="fallback", capabilities=[durable.RestateDurability()])
        service = restate.Service("Fallback")

        @service.handler()
        async def run(ctx: restate.Context) -> list[str]:
            try:
                return [(await agent.run("go")).output]
            except FallbackExceptionGroup as group:
                return [type(error).__name__ for error in group.exceptions]

        async with hosted(server, service) as ingress:
            assert await ingress.call("Fallback/run") == ["ModelAuthenticationError"] * 2
            assert len(api.times) == 2


async def test_output_that_never_validates_ends_the_run(server: RestateServer) -> None:
    """A model that never produces valid output is a clear 502, not an endless retry."""

    class Number(BaseModel):
        value: int

    with provider([Answer("no number")]) as api:
        agent = Agent(
            api.model(),
            name="never",
            output_type=Number,
            capabilities=[durable.RestateDurability()],
        )
        service = restate.Service("Never")

        @service.handler()
        async def run(ctx: restate.Context) -> int:
            return (await agent.run("go")).output.value

        async with hosted(server, service) as ingress:
            response = await ingress.post("Never/run")
            assert response.status_code == 502
            assert "Exceeded maximum output retries" in response.json()["message"]


async def test_a_result_that_cannot_be_stored_ends_the_run(server: RestateServer) -> None:
    """The message names the step and says what can be stored."""
    agent = Agent(TestModel(), name="odd", capabilities=[durable.RestateDurability()])
    service = agent_service("Odd", agent)

    @agent.tool_plain
    def tool() -> object:
        return object()

    async with hosted(server, service) as ingress:
        response = await ingress.post("Odd/run")
        assert response.status_code == 500
        assert "cannot be stored in the journal" in response.json()["message"]
        assert "call_tool:tool" in response.json()["message"]


async def test_a_failing_tool_does_not_hurt_its_siblings(server: RestateServer) -> None:
    """The failing tool is retried; the slower one beside it is neither cut off nor repeated."""
    agent = Agent(
        TestModel(),
        name="siblings",
        capabilities=[durable.RestateDurability(tool_run_options=FAST)],
    )
    service = agent_service("Siblings", agent)

    @agent.tool_plain
    async def fails_once() -> str:
        done["fails_once"] += 1
        if done["fails_once"] == 1:
            raise RuntimeError("passing")
        return "ok"

    @agent.tool_plain
    async def slow() -> str:
        await asyncio.sleep(0.3)
        done["slow"] += 1
        return "ok"

    async with hosted(server, service) as ingress:
        await ingress.call("Siblings/run")
    assert done == {"fails_once": 2, "slow": 1}


async def test_unexpected_output_is_the_original_class(server: RestateServer) -> None:
    """What PydanticAI raises in handler code reaches the handler unchanged."""
    agent = Agent(TestModel(), name="odd-tool", capabilities=[durable.RestateDurability()])
    service = restate.Service("Original")

    @agent.tool_plain(retries=0)
    def tool() -> str:
        raise ModelRetry("again")

    @service.handler()
    async def run(ctx: restate.Context) -> str:
        with pytest.raises(UnexpectedModelBehavior, match="exceeded max retries"):
            await agent.run("go")
        return "caught"

    async with hosted(server, service) as ingress:
        assert await ingress.call("Original/run") == "caught"


async def test_used_up_retries_let_the_others_begin(server: RestateServer) -> None:
    """A step that is given up does not end the attempt: what its failure held back goes on."""
    service = restate.Service("GivenUp")

    async def fails() -> str:
        raise RuntimeError("always")

    async def works() -> str:
        return "worked"

    @service.handler()
    async def run(ctx: restate.Context) -> list[str]:
        async def give_up() -> str:
            with pytest.raises(restate.TerminalError):
                await ctx.run_typed("fails", fails, restate.RunOptions(max_attempts=1))
            return await ctx.run_typed("after", works)

        async def go_on() -> str:
            await asyncio.sleep(0.01)
            return await ctx.run_typed("beside", works)

        return list(await asyncio.gather(give_up(), go_on()))

    async with hosted(server, service) as ingress:
        assert await ingress.call("GivenUp/run") == ["worked", "worked"]


class Panic(BaseException):
    """What libraries written in Rust raise, for instance."""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (SystemExit, 2),
        (Panic, "lost"),
        (asyncio.CancelledError, ""),
        (StopIteration, ""),
        (OSError, "\udc80.txt"),
    ],
    ids=lambda it: it.__name__ if isinstance(it, type) else "",
)
async def test_any_exception_ends_what_raised_it(
    server: RestateServer, kind: type[BaseException], said: object, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no `Exception`, or has no text that can be sent, leaves nobody waiting and the worker alive."""
    # its tracebacks hold the text as it is, which pytest-xdist cannot send either
    caplog.set_level(logging.CRITICAL, logger="restate.server")

    def tool() -> None:
        raise kind(said)  # a new one each time: its traceback would keep the run in memory

    service = restate.Service("Raising", invocation_retry_policy=AT_MOST_TWICE)
    agent = Agent(
        calls("tool"),
        name="raising",
        tools=[tool],
        capabilities=[durable.RestateDurability(tool_run_options=FAST)],
    )

    @service.handler()
    async def in_tool(ctx: restate.Context) -> str:
        return (await agent.run("go")).output

    @service.handler()
    async def in_step(ctx: restate.Context) -> None:
        await ctx.run_typed("step", tool, FAST)

    @service.handler()
    async def in_handler(ctx: restate.Context) -> None:
        await ctx.run_typed("step", after)
        tool()

    @service.handler()
    async def terminal(ctx: restate.Context) -> None:
        raise restate.TerminalError(str(said))

    async with hosted(server, service) as ingress:
        for handler in ("in_tool", "in_step", "in_handler", "terminal"):
            async with asyncio.timeout(PATIENCE):
                response = await ingress.post(f"Raising/{handler}")
            assert response.status_code == 500, handler
            if kind in (Panic, OSError):
                shown = str(said).encode(errors="backslashreplace").decode()
                assert shown in response.json()["message"]
