"""Sagas: tools declare how they are undone, and a run that does not end well undoes what it did.

A call is recorded where it reaches its toolset, under the name that the model sees, whatever the tool is: a
step, handler code, an MCP server's tool, another service. Undos run when their run has ended, the newest call
first, each in a step of its own.

**Invariant: a call is recorded once it may have had its effect, and undone only if the invocation goes on, or
ends, without its run.** So what merely ends an attempt (a suspension, a crash, an exception that Restate
retries) undoes nothing: the next attempt goes on with what was done. And a call in a step is waited for when
its run is cancelled: an undo beside it might come too early, and could not have its result.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import count
from operator import attrgetter
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import anyio
from pydantic import ValidationError
from pydantic_ai.capabilities import AbstractCapability, CapabilityOrdering, WrapRunHandler
from pydantic_ai.exceptions import (
    ApprovalRequired,
    CallDeferred,
    ModelRetry,
    ToolFailed,
    UserError,
)
from pydantic_ai.messages import ToolReturn
from pydantic_ai.run import AgentRunResult
from pydantic_ai.tools import AgentDepsT, RunContext
from pydantic_ai.toolsets import AbstractToolset, FunctionToolset, ToolsetTool, WrapperToolset
from restate import RunOptions, TerminalError
from restate.logging import RestateLoggingFilter

from durable._capability import RestateDurability
from durable._context import Invocation, current_invocation
from durable._driver import hold_back
from durable._errors import NOT_UNDONE, describe, gives_up, original_error
from durable._names import undo as undo_step
from durable._operation_backend import (
    FinishedCall,
    Step,
    current_step,
    finished_call,
    idempotency_key,
    run_step,
)
from durable._options import StepOptions, check_run_options
from durable._undos import Undo

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)
logger.addFilter(RestateLoggingFilter())  # says things once, not on every replay

_NOT_DONE = (ModelRetry, ToolFailed, ApprovalRequired, CallDeferred, ValidationError)
"""With these a tool says that it did nothing."""


class Saga(AbstractCapability[AgentDepsT]):
    """Undoes what an agent's tools did when the run does not end well.

    When a run fails for good or is cancelled, the undos of its completed tool calls run, the newest call
    first, and then the run raises its error. Each undo is a journaled step: it runs at least once whatever
    crashes, and not again when it is completed. An undo that fails for good does not stop the others; it is
    logged, and named in a note on the error and in the message that the caller gets.

    When a run is undone:

    - It is, after an error that ends an invocation (a usage limit, used up retries of a step or of the model,
      `run(timeout=...)`, a `TerminalError`), after a cancellation, and when an iteration over it is left.
    - It is not, after what only ends an attempt: a suspension, a crash, an exception that Restate retries.
      Nor is it when it ended well and the handler fails later. A `durable.saga()` around it undoes it when the
      handler gives up: catches such an exception, for instance, and raises a `TerminalError` in its place.

    Which calls are undone:

    - Those whose tool returned.
    - Not those of a tool that says it did nothing, with `ModelRetry` or `ToolFailed`.
    - After any other end of a call nobody knows what it did: used up retries, a lost at-most-once call, a tool
      that was cancelled in handler code. It is undone with `None` as the result, if the undo's `result`
      accepts `None`, or the undo takes no result.

    A cancellation waits for calls in steps, so that they can be undone; a second one does not. Tools in handler
    code and hosted tools are cancelled at once.

    What a run did that a tool started in handler code (`metadata={"restate": False}`) and that ended well
    becomes part of the tool's own run, if both agents have a `Saga`: all calls are undone together, newest
    first. A run inside a step belongs to the step: once it ended well, only the tool's undo can undo it.

    Outside a Restate handler and inside a step, undos are plain calls, without retries, and a cancellation
    does not wait for tools.

    Example:
        ```python
        saga = durable.Saga[Deps]()
        agent = Agent(
            "openai:gpt-5-mini",
            name="travel",
            deps_type=Deps,
            capabilities=[durable.RestateDurability(), saga],
        )


        @agent.tool
        async def book_flight(ctx: RunContext[Deps], flight: str) -> Booking:
            return await ctx.deps.airline.book(flight, key=durable.idempotency_key(ctx))


        @saga.undo(book_flight)
        async def cancel_flight(ctx: RunContext[Deps], result: Booking) -> None:
            await ctx.deps.airline.cancel(result.number, key=durable.idempotency_key(ctx))
        ```
    """

    def __init__(self, *, undo_run_options: RunOptions[Any] | None = None) -> None:
        """Create the saga of one agent.

        Args:
            undo_run_options: Retries of undos, default `durable.DEFAULT_RUN_OPTIONS`.

        Raises:
            UserError: When another option than those about retries is set.
        """
        check_run_options({"undo_run_options": undo_run_options})
        self._options = StepOptions(run=undo_run_options) if undo_run_options else StepOptions()
        self._undos: dict[str, Undo] = {}
        self._checked: set[str] = set()

    def undo(
        self, tool: Callable[..., Any] | str
    ) -> Callable[
        [Callable[Concatenate[RunContext[AgentDepsT], P], T]],
        Callable[Concatenate[RunContext[AgentDepsT], P], T],
    ]:
        """Declare the function that undoes calls of `tool`; it is sync (then it runs in a thread) or async.

        Its first parameter is the call's `RunContext`. The others are named after what they take: an argument
        of the call, as validated, or `result`, what the tool returned. What they take is validated as their
        annotation says.

        `durable.idempotency_key(ctx)` is the same on each try of the undo, and not the call's. To find what a
        call of unknown outcome did, let the tool name it by `ctx.run_id` and `ctx.tool_call_id`, which the
        undo's context has too.

        Args:
            tool: The tool's function, or the name that the model knows the tool by.

        Raises:
            UserError: When the function cannot undo the tool. Where that depends on the agent's tools, the
                first run raises it.
        """
        name = tool if isinstance(tool, str) else tool.__name__

        def register(
            function: Callable[Concatenate[RunContext[AgentDepsT], P], T],
        ) -> Callable[Concatenate[RunContext[AgentDepsT], P], T]:
            undo = Undo(function, tool)
            faults = list(undo.faults)
            if name in self._undos:
                faults.append(f"`{self._undos[name].name}` undoes it already")
            if faults:
                raise UserError(f"`{undo.name}` cannot undo `{name}`: {'; '.join(faults)}.")
            self._undos[name] = undo
            return function

        return register

    def get_ordering(self) -> CapabilityOrdering:
        """Require `RestateDurability`, which names the agent in the journal."""
        return CapabilityOrdering(requires=[RestateDurability])

    async def wrap_run(
        self, ctx: RunContext[AgentDepsT], *, handler: WrapRunHandler
    ) -> AgentRunResult[Any]:
        """Undo what the run did when it does not end well."""
        async with saga():
            return await handler()

    def get_wrapper_toolset(
        self, toolset: AbstractToolset[AgentDepsT]
    ) -> AbstractToolset[AgentDepsT]:
        """Record the calls of tools that can be undone."""
        return _RecordingToolset(toolset, self._undos, self._checked, self._options)


@asynccontextmanager
async def saga() -> AsyncGenerator[None]:
    """Undo the runs inside the block together when the block does not end well.

    When an error that ends the invocation, or a cancellation, leaves the block, what was done in it by agents
    that have a `Saga` is undone, the newest call first. (A run that fails for good has undone its own by then.)
    Blocks may be nested. Start runs beside each other in an `asyncio.TaskGroup`: what `asyncio.gather` leaves
    behind when one fails goes on after the block.

    Example:
        ```python
        @trips.handler()
        async def book(ctx: restate.Context, trip: Trip) -> str:
            async with durable.saga():
                await travel.run(f"Book a flight to {trip.city}.")
                await ctx.service_call(charge, trip)  # if it fails for good, the flight is cancelled
            return "booked"
        ```
    """
    invocation, outer = current_invocation(), _recording.get()
    if outer is not None and outer.invocation is not invocation:
        outer = None  # of the handler around this step
    recording = _Recording(invocation, count() if outer is None else outer.numbers)
    token = _recording.set(recording)
    try:
        yield
    except (Exception, asyncio.CancelledError) as error:
        if recording.is_over(error):
            await _to_its_end(recording.undo(error))
            recording.calls.clear()
        raise
    finally:
        _recording.reset(token)
        if outer is not None:
            outer.calls += recording.calls


@dataclass
class _Recording:
    """What was done in a run or block, for as long as it can be undone."""

    invocation: Invocation | None
    """The invocation whose handler code it is, `None` outside a handler and inside a step."""

    numbers: Iterator[int]
    """Numbers calls in the order they ended."""

    calls: "list[_Call]" = field(default_factory=list["_Call"])

    _under_way: dict[asyncio.Future[None], asyncio.Task[Any]] = field(
        default_factory=dict[asyncio.Future[None], asyncio.Task[Any]]
    )
    """The ends of the calls that have not ended, and their tasks."""

    @contextmanager
    def call_under_way(self) -> Generator[None]:
        """Know of a call until it has ended."""
        end, task = asyncio.get_running_loop().create_future(), asyncio.current_task()
        assert task is not None
        self._under_way[end] = task
        try:
            yield
        finally:
            del self._under_way[end]
            end.set_result(None)

    def add(self, call: "_Call", result: Any) -> None:
        """Record that `call` has ended."""
        if isinstance(result, ToolReturn):
            result = cast("ToolReturn[Any]", result).return_value
        self.calls.append(replace(call, number=next(self.numbers), result=result))

    def is_over(self, error: BaseException) -> bool:
        """Whether the run is over with `error`, and not just the attempt."""
        return self.invocation is None or gives_up(error)

    async def undo(self, error: BaseException) -> None:
        """Undo all calls, and note on `error` which could not be undone."""
        hold_back.set(_ignore)
        if under_way := dict(self._under_way):  # PydanticAI would cancel them, but later
            for task in under_way.values():
                task.cancel()
            await asyncio.wait(under_way)
        for call in sorted(self.calls, key=attrgetter("number"), reverse=True):
            try:
                await call.undo()
            except Exception as failure:  # noqa: BLE001 - reported, and the others are undone
                note = f"{NOT_UNDONE}`{call.tool}` ({call.ctx.tool_call_id}): {describe(failure)}"
                logger.error(note)
                error.add_note(note)


_recording: ContextVar[_Recording | None] = ContextVar("durable.saga", default=None)
"""Where the calls of the running code are recorded."""


def _ignore(cancellation: BaseException) -> None:
    """Hold a cancellation back for good: what it would end is being undone."""


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for `work` even if the waiting task is cancelled."""
    task = asyncio.ensure_future(work)
    with anyio.CancelScope(shield=True):  # anyio would cancel again in each turn of the loop
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
    task.result()


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A tool call that may have had its effect."""

    tool: str
    undoing: Undo
    step: str
    options: StepOptions
    key: str
    ctx: RunContext[Any]
    args: dict[str, Any]
    result: Any = None
    number: int = 0

    async def undo(self) -> None:
        async def body() -> None:
            await self.undoing(self.ctx, self.args, self.result)

        if current_invocation() is not None:
            await run_step(self.step, body, self.options, caller=self.ctx)
        else:
            current_step.set(Step(key=self.key))
            await body()


@dataclass
class _RecordingToolset(WrapperToolset[AgentDepsT]):
    """Records the calls that can be undone."""

    undos: dict[str, Undo]
    checked: set[str]
    options: StepOptions

    async def get_tools(self, ctx: RunContext[AgentDepsT]) -> dict[str, ToolsetTool[AgentDepsT]]:
        """Return the tools, and check the undos that were not checked before.

        Raises:
            UserError: When one does not fit its tool, or there is no such tool.
        """
        tools = await super().get_tools(ctx)
        unchecked = {name: it for name, it in self.undos.items() if name not in self.checked}
        if unchecked and (faults := self._faults(unchecked, tools)):
            raise UserError(f"The saga does not fit the agent: {'; '.join(faults)}.")
        self.checked.update(unchecked.keys() & tools.keys())
        return tools

    def _faults(self, undos: dict[str, Undo], tools: dict[str, ToolsetTool[Any]]) -> list[str]:
        functions: set[str] = set()  # also those that their `prepare` hides for now

        def collect(leaf: AbstractToolset[AgentDepsT]) -> None:
            if isinstance(leaf, FunctionToolset):
                functions.update(leaf.tools)

        self.apply(collect)
        faults: list[str] = []
        for name, undo in undos.items():
            if name in tools:
                faults += undo.misfits(tools[name], complete=name in functions)
            elif name not in functions:
                known = ", ".join(f"`{it}`" for it in sorted(tools)) or "none"
                faults.append(f"`{undo.name}` undoes `{name}`, but the tools are {known}")
        return faults

    async def call_tool(
        self,
        name: str,
        tool_args: dict[str, Any],
        ctx: RunContext[AgentDepsT],
        tool: ToolsetTool[AgentDepsT],
    ) -> Any:
        """Call the tool, and record the call if it can be undone."""
        undo, recording = self.undos.get(name), _recording.get()
        assert recording is not None
        with recording.call_under_way():
            if undo is None:
                return await super().call_tool(name, tool_args, ctx, tool)
            call = _Call(
                tool=name,
                undoing=undo,
                step=undo_step(_agent_name(ctx), name),
                options=self.options,
                key=f"{idempotency_key(ctx)}:undo",
                ctx=replace(ctx, pending_messages=None),
                args=tool_args,
            )
            held = FinishedCall((ctx.run_id, ctx.tool_call_id))
            token = finished_call.set(held)
            try:
                result = await super().call_tool(name, tool_args, ctx, tool)
            except (Exception, asyncio.CancelledError) as error:
                if undo.takes_unknown and not _says_not_done(error):
                    recording.add(call, None)
                if held.cancellation is not None:
                    raise held.cancellation from None
                raise
            finally:
                finished_call.reset(token)
            recording.add(call, result)
            if held.cancellation is not None:
                raise held.cancellation
            return result


def _says_not_done(error: BaseException) -> bool:
    """Whether the tool itself says so, and not a step that failed, such as that of a lost at-most-once call."""
    failure = error.__cause__
    lost = isinstance(failure, TerminalError) and original_error(failure) is not None
    return isinstance(error, _NOT_DONE) and not lost


def _agent_name(ctx: RunContext[Any]) -> str:
    names: list[str] = []

    def collect(leaf: AbstractCapability[Any]) -> None:
        if isinstance(leaf, RestateDurability):
            names.append(leaf.name)

    assert ctx.root_capability is not None
    ctx.root_capability.apply(collect)
    return names[0]
