"""An application that runs programs which are data: `test_determinism` generates them.

A program is a tree of nodes. `Node.run` interprets it in handler code and returns a nested result;
`Node.claims` walks that result and says which step of the program each value must come from. A step
returns a token, its label (where it stands in the program) and a random number drawn in its body, so
a value that went to the wrong branch or comes from a repeated execution shows.

What happens is appended to the file `DETERMINISM_TRACE`, which survives a kill:

    {pid} {root} begin {token} {ordered failures}    a step's body starts
    {pid} {root} fail {token}                        and fails, as the program orders
    {pid} {root} end {token}                         or ends
    {pid} {root} see {invocation} {attempt} {path} {digest}   handler code gets a node's result
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import anyio
import restate
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from restate import RestateDurableFuture, RunOptions, TerminalError

import durable

SOON: dict[str, Any] = {
    "initial_retry_interval": timedelta(milliseconds=2),
    "retry_interval_factor": 1.0,
}
"""Retries of failing steps: at once, and for as long as it takes."""

Claim = tuple[str, str]
"""A label, and the token that stands in the result where the step of that label belongs."""


class OrderedFailure(Exception):
    """A passing failure that the program ordered."""


@dataclass(frozen=True)
class Scope:
    """The attempt that handler code runs in."""

    ctx: restate.Context
    root: str
    attempt: str = field(default_factory=lambda: secrets.token_hex(4))

    def see(self, path: str, value: Any) -> None:
        """Record what handler code got: the same things in the same order in each attempt."""
        digest = sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
        trace(self.root, "see", self.ctx.request().id, self.attempt, path, digest)


def trace(root: str, *words: object) -> None:
    """Append a line in one write, so that a kill loses none and parallel writers mix none."""
    line = " ".join(map(str, (os.getpid(), root, *words))) + "\n"
    _append(Path(os.environ["DETERMINISM_TRACE"]), line.encode())


def _append(path: Path, data: bytes) -> int:
    """Append `data` and return the size of the file."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(file, data)
        return os.fstat(file).st_size
    finally:
        os.close(file)


def _ordered_to_fail(root: str, label: str, failures: int) -> bool:
    """Return whether this execution is one of the first `failures`, counted across processes."""
    if not failures:
        return False
    counter = Path(f"{os.environ['DETERMINISM_TRACE']}.{root}.{label.replace('/', '_')}")
    return _append(counter, b"x") <= failures


@contextmanager
def _body(root: str, label: str, failures: int) -> Generator[str]:
    """Trace a step's body around its work, and draw its token."""
    token = f"{label}#{secrets.token_hex(4)}"
    trace(root, "begin", token, failures)
    yield token
    if _ordered_to_fail(root, label, failures):
        trace(root, "fail", token)
        raise OrderedFailure(token)
    trace(root, "end", token)


async def execute(root: str, label: str, ms: int, failures: int = 0) -> str:
    """Be the body of a step."""
    with _body(root, label, failures) as token:
        await asyncio.sleep(ms / 1000)
    return token


def execute_in_thread(root: str, label: str, ms: int, failures: int = 0) -> str:
    """Be the body of a step that blocks."""
    with _body(root, label, failures) as token:
        time.sleep(ms / 1000)
    return token


class Base(BaseModel):
    """A node of a program."""

    async def run(self, path: str, scope: Scope) -> Any:
        """Interpret the node in handler code."""
        raise NotImplementedError

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        """Check the shape of `value`, the node's result, and say where its tokens belong."""
        raise NotImplementedError


async def interpret(node: Base, path: str, scope: Scope) -> Any:
    """Run `node` and record what came out."""
    try:
        value = await node.run(path, scope)
    except TerminalError as error:
        scope.see(path, error.message)
        raise
    scope.see(path, value)
    return value


# Leaves


class Step(Base):
    """A `ctx.run` step."""

    op: Literal["step"] = "step"
    ms: int = 0
    failures: int = 0
    ending: Literal["value", "terminal", "exhausted"] = "value"
    threaded: bool = False

    def start(self, path: str, scope: Scope) -> RestateDurableFuture[str]:
        """Create the step without waiting for it."""
        exhausted = self.ending == "exhausted"
        failures = 10_000 if exhausted else self.failures
        options = RunOptions[str](type_hint=str, max_attempts=2 if exhausted else None, **SOON)

        async def body() -> str:
            token = await execute(scope.root, path, self.ms, failures)
            if self.ending == "terminal":
                raise TerminalError(token)
            return token

        def threaded_body() -> str:
            return execute_in_thread(scope.root, path, self.ms, failures)

        in_thread = self.threaded and self.ending != "terminal"
        return scope.ctx.run_typed(path, threaded_body if in_thread else body, options)

    async def run(self, path: str, scope: Scope) -> Any:
        return await self.start(path, scope)

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        yield path, value


class Sleep(Base):
    """A durable timer."""

    op: Literal["sleep"] = "sleep"
    ms: int = 0
    how: Literal["asyncio", "ctx"] = "asyncio"

    def start(self, path: str, scope: Scope) -> RestateDurableFuture[Any]:
        """Create the timer without waiting for it."""
        return scope.ctx.sleep(timedelta(milliseconds=self.ms))

    async def run(self, path: str, scope: Scope) -> Any:
        if self.how == "asyncio":
            await asyncio.sleep(self.ms / 1000)
        else:
            await self.start(path, scope)

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        assert value is None
        return iter(())


class Spin(Base):
    """A path through memory, this many turns of the loop long."""

    op: Literal["spin"] = "spin"
    turns: int = 0

    async def run(self, path: str, scope: Scope) -> Any:
        for _ in range(self.turns):
            await asyncio.sleep(0)

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        assert value is None
        return iter(())


class Call(Base):
    """A call to another handler, which runs `body` in an invocation of its own."""

    op: Literal["call"] = "call"
    body: Node

    def start(self, path: str, scope: Scope) -> RestateDurableFuture[Any]:
        """Make the call without waiting for the answer."""
        request = Request(root=scope.root, path=f"{path}/c", node=self.body)
        return scope.ctx.service_call(call, request)

    async def run(self, path: str, scope: Scope) -> Any:
        return await self.start(path, scope)

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        yield from self.body.claims(f"{path}/c", value)


# Composition


class Sequence(Base):
    """One after the other."""

    op: Literal["sequence"] = "sequence"
    parts: list[Node]

    async def run(self, path: str, scope: Scope) -> Any:
        return [await interpret(part, f"{path}.{n}", scope) for n, part in enumerate(self.parts)]

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        for n, (part, result) in enumerate(zip(self.parts, value, strict=True)):
            yield from part.claims(f"{path}.{n}", result)


class Group(Base):
    """Beside each other in tasks; when one fails, the others are cancelled or go on unheeded."""

    op: Literal["group"] = "group"
    how: Literal["gather", "task group", "anyio", "wait"] = "gather"
    parts: list[Node]

    async def run(self, path: str, scope: Scope) -> Any:
        parts: list[Coroutine[Any, Any, Any]] = [
            interpret(part, f"{path}.{n}", scope) for n, part in enumerate(self.parts)
        ]
        try:
            return await _GROUPS[self.how](parts)
        except BaseExceptionGroup as group:
            raise _first(group) from None

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        return Sequence(parts=self.parts).claims(path, value)


async def _task_group(parts: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(part) for part in parts]
    return [task.result() for task in tasks]


async def _anyio_task_group(parts: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    results: dict[int, Any] = {}

    async def keep(n: int, part: Coroutine[Any, Any, Any]) -> None:
        results[n] = await part

    async with anyio.create_task_group() as group:
        for n, part in enumerate(parts):
            group.start_soon(keep, n, part)
    return [results[n] for n in range(len(parts))]


async def _wait(parts: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    tasks = [asyncio.create_task(part) for part in parts]
    await asyncio.wait(tasks)
    return [task.result() for task in tasks]


async def _gather(parts: list[Coroutine[Any, Any, Any]]) -> list[Any]:
    return await asyncio.gather(*parts)


_GROUPS: dict[str, Callable[[list[Coroutine[Any, Any, Any]]], Awaitable[list[Any]]]] = {
    "gather": _gather,
    "task group": _task_group,
    "anyio": _anyio_task_group,
    "wait": _wait,
}


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    first = group.exceptions[0]
    return _first(cast(Any, first)) if isinstance(first, BaseExceptionGroup) else first


class Futures(Base):
    """Durable futures of the SDK, created at once and combined by it."""

    op: Literal["futures"] = "futures"
    how: Literal["gather", "select", "as_completed"] = "gather"
    parts: list[Annotated[Step | Sleep | Call, Field(discriminator="op")]]

    async def run(self, path: str, scope: Scope) -> Any:
        futures = [part.start(f"{path}.{n}", scope) for n, part in enumerate(self.parts)]
        if self.how == "gather":
            await restate.gather(*futures)
            return dict([await self._get(n, futures) for n in range(len(futures))])
        if self.how == "select":
            winner, value = await restate.select(**{str(n): f for n, f in enumerate(futures)})
            return {winner: value}
        results: dict[str, Any] = {}
        async for future in restate.as_completed(*futures):
            n, value = await self._get(futures.index(future), futures)
            results[n] = value
            scope.see(f"{path}.{n}", value)
        return results

    async def _get(self, n: int, futures: list[RestateDurableFuture[Any]]) -> tuple[str, Any]:
        return str(n), await futures[n]

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        assert len(value) == (1 if self.how == "select" else len(self.parts))
        for n, result in value.items():
            yield from self.parts[int(n)].claims(f"{path}.{n}", result)


class Limit(Base):
    """A time limit: `body` is cancelled when it takes longer."""

    op: Literal["limit"] = "limit"
    how: Literal["timeout", "wait_for"] = "timeout"
    ms: int = 0
    body: Node

    async def run(self, path: str, scope: Scope) -> Any:
        body = interpret(self.body, f"{path}.0", scope)
        try:
            if self.how == "wait_for":
                return [await asyncio.wait_for(body, self.ms / 1000)]
            async with asyncio.timeout(self.ms / 1000):
                return [await body]
        except TimeoutError:
            return "timed out"

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        if value != "timed out":
            [result] = value
            yield from self.body.claims(f"{path}.0", result)


class Race(Base):
    """The first of the parts to end wins, the others are cancelled."""

    op: Literal["race"] = "race"
    parts: list[Node]

    async def run(self, path: str, scope: Scope) -> Any:
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(interpret(part, f"{path}.{n}", scope))
            for n, part in enumerate(self.parts)
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            winner = next(n for n, task in enumerate(tasks) if task.done())
            return [winner, tasks[winner].result()]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        n, result = cast("tuple[int, Any]", value)
        yield from self.parts[n].claims(f"{path}.{n}", result)


class Try(Base):
    """Goes on after a terminal failure of `body`."""

    op: Literal["try"] = "try"
    body: Node

    async def run(self, path: str, scope: Scope) -> Any:
        try:
            return [await interpret(self.body, f"{path}.0", scope)]
        except TerminalError as error:
            return {"caught": error.message}

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        if isinstance(value, list):
            [result] = cast(list[Any], value)
            yield from self.body.claims(f"{path}.0", result)
        else:
            assert f"{path}.0" in value["caught"]


class Guard(Base):
    """Compensates in a step of its own when `body` is cancelled, as sagas do."""

    op: Literal["guard"] = "guard"
    body: Node
    compensation: Step

    async def run(self, path: str, scope: Scope) -> Any:
        try:
            return await interpret(self.body, f"{path}.0", scope)
        except asyncio.CancelledError:
            await interpret(self.compensation, f"{path}.1", scope)
            raise

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        return self.body.claims(f"{path}.0", value)


# Agents


class Look(BaseModel):
    """A tool that is a step."""

    tool: Literal["look"] = "look"
    ms: int = 0
    failures: int = 0
    retries: int = 0
    threaded: bool = False

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        yield f"{path}~{self.retries}", value


class Delegate(BaseModel):
    """A tool that is a step and runs a plain agent inside it."""

    tool: Literal["delegate"] = "delegate"
    agent: AgentRun
    retries: Literal[0] = 0

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        yield f"{path}~0", value["token"]
        yield from self.agent.claims(f"{path}/d", value["inner"])


class Orchestrate(BaseModel):
    """A tool in handler code: several steps, timers, calls, durable sub-agents."""

    tool: Literal["orchestrate"] = "orchestrate"
    body: Node
    retries: int = 0

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        yield from self.body.claims(f"{path}~{self.retries}", value)


ToolUse = Annotated[Look | Delegate | Orchestrate, Field(discriminator="tool")]


class AgentRun(Base):
    """A run of an agent whose model calls the tools of a round at once, round after round."""

    op: Literal["agent"] = "agent"
    agent: int = 0
    rounds: list[list[ToolUse]]
    ms: int = 0
    failures: int = 0

    async def run(self, path: str, scope: Scope) -> Any:
        value, messages = await run_agent(self, path, scope)
        scope.see(f"{path}/messages", messages)
        return value

    def claims(self, path: str, value: Any) -> Iterator[Claim]:
        # a round with retries takes as many more requests
        requests = [1 + max((use.retries for use in uses), default=0) for uses in self.rounds]
        yield f"{path}/m{sum(requests)}", value["answer"]
        returned = value["returned"]
        assert len(returned) == sum(map(len, self.rounds))
        for n, uses in enumerate(self.rounds):
            for k, use in enumerate(uses):
                yield from cast(Look, use).claims(f"{path}/t{n}.{k}", returned[f"{n}.{k}"])


Node = Annotated[
    Step | Sleep | Spin | Call | Sequence | Group | Futures | Limit | Race | Try | Guard | AgentRun,
    Field(discriminator="op"),
]


@dataclass(frozen=True)
class Job:
    """What the tools of an agent run get as `deps`."""

    run: AgentRun
    path: str
    scope: Scope

    def use(self, call: str) -> Any:
        """Return the use of a tool that the program has at `{round}.{index}`."""
        round_, index = map(int, call.split("."))
        return self.run.rounds[round_][index]


class Prompt(BaseModel):
    """What the scripted model gets as the user's prompt."""

    root: str
    path: str
    run: AgentRun


async def run_agent(run: AgentRun, path: str, scope: Scope) -> tuple[Any, str]:
    """Run an agent of the pool, and return its output and all its messages."""
    prompt = Prompt(root=scope.root, path=path, run=run).model_dump_json()
    result = await AGENTS[run.agent].run(prompt, deps=Job(run, path, scope))
    return json.loads(result.output), result.all_messages_json().decode()


async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Call the tools of the round until all have returned, then say what they returned."""
    prompt = _prompt(messages)
    calls = [part for m in messages for part in m.parts if isinstance(part, ToolCallPart)]
    returned = {
        part.tool_call_id.split("~")[0]: part.content
        for message in messages
        if isinstance(message, ModelRequest)
        for part in message.parts
        if isinstance(part, ToolReturnPart) and part.outcome == "success"
    }
    number = sum(isinstance(message, ModelResponse) for message in messages)
    failures = prompt.run.failures if number == 0 else 0
    token = await execute(prompt.root, f"{prompt.path}/m{number}", prompt.run.ms, failures)
    for n, uses in enumerate(prompt.run.rounds):
        parts: list[ToolCallPart] = []
        for k, use in enumerate(uses):
            if (call := f"{n}.{k}") not in returned:
                again = sum(c.tool_call_id.split("~")[0] == call for c in calls)
                args = {"call": call, "again": again, "asked_by": token}
                name = "look_in_thread" if isinstance(use, Look) and use.threaded else use.tool
                parts.append(ToolCallPart(name, args, tool_call_id=f"{call}~{again}"))
        if parts:
            return ModelResponse(parts=list(parts))
    return ModelResponse(
        parts=[TextPart(json.dumps({"answer": token, "returned": returned}, sort_keys=True))]
    )


def _prompt(messages: list[ModelMessage]) -> Prompt:
    [content] = [p.content for p in messages[0].parts if isinstance(p, UserPromptPart)]
    assert isinstance(content, str)
    return Prompt.model_validate_json(content)


async def look(ctx: RunContext[Job], call: str, again: int, asked_by: str) -> str:
    """Do one thing, or ask the model to try again."""
    use: Look = ctx.deps.use(call)
    label = f"{ctx.deps.path}/t{call}~{again}"
    failures = use.failures if again == 0 else 0
    token = await execute(ctx.deps.scope.root, label, use.ms, failures)
    if again < use.retries:
        raise ModelRetry(token)
    return token


def look_in_thread(ctx: RunContext[Job], call: str, again: int, asked_by: str) -> str:
    """Do one thing that blocks, or ask the model to try again."""
    use: Look = ctx.deps.use(call)
    label = f"{ctx.deps.path}/t{call}~{again}"
    failures = use.failures if again == 0 else 0
    token = execute_in_thread(ctx.deps.scope.root, label, use.ms, failures)
    if again < use.retries:
        raise ModelRetry(token)
    return token


async def delegate(ctx: RunContext[Job], call: str, again: int, asked_by: str) -> Any:
    """Ask another agent, inside this step."""
    use: Delegate = ctx.deps.use(call)
    path = f"{ctx.deps.path}/t{call}"
    token = await execute(ctx.deps.scope.root, f"{path}~{again}", 0)
    inner, _messages = await run_agent(use.agent, f"{path}/d", ctx.deps.scope)
    return {"token": token, "inner": inner}


async def orchestrate(ctx: RunContext[Job], call: str, again: int, asked_by: str) -> Any:
    """Run a part of the program in handler code."""
    use: Orchestrate = ctx.deps.use(call)
    path = f"{ctx.deps.path}/t{call}~{again}"
    value = await interpret(use.body, path, ctx.deps.scope)
    if again < use.retries:
        raise ModelRetry(path)
    return value


def _agent(name: str) -> Agent[Job, str]:
    options = durable.RestateDurability[Job](
        model_run_options=RunOptions(**SOON), tool_run_options=RunOptions(**SOON)
    )
    agent = Agent(
        FunctionModel(respond), name=name, deps_type=Job, retries=99, capabilities=[options]
    )
    agent.tool(look)
    agent.tool(look_in_thread)
    agent.tool(delegate)
    agent.tool(metadata={"restate": False})(orchestrate)
    return agent


AGENTS = [_agent(name) for name in ("ada", "bob", "cyd")]

# Handlers


class Request(BaseModel):
    """A program, or a part of one that runs in an invocation of its own."""

    root: str
    path: str = "p"
    node: Node


programs = restate.Service(
    "Programs",
    invocation_retry_policy=restate.InvocationRetryPolicy(
        initial_interval=timedelta(milliseconds=50),
        exponentiation_factor=1.5,
        max_interval=timedelta(seconds=1),
        max_attempts=100,
        on_max_attempts="kill",  # what cannot succeed must not hang
    ),
)


@programs.handler()
async def run(ctx: restate.Context, request: Request) -> Any:
    """Run a program; a terminal failure is its result."""
    return await interpret(Try(body=request.node), request.path, Scope(ctx, request.root))


@programs.handler()
async def call(ctx: restate.Context, request: Request) -> Any:
    """Run a part of a program; a terminal failure is the caller's."""
    return await interpret(request.node, request.path, Scope(ctx, request.root))


_numbers = count()


def fresh_root() -> str:
    """Name a program's run."""
    return f"r{next(_numbers)}-{secrets.token_hex(3)}"


app = durable.app([programs])
