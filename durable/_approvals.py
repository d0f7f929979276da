"""Waiting for people and other systems inside a run, for as long as it takes.

Two ways, both with an awakeable per wait, so that a waiting invocation suspends and holds no memory:

- PydanticAI's own `wait_for_external_event`, and with it `RequestInput` and `AskUser`: `RestateWaiter` is
  the engine's part of it. The token is the awakeable's id; whoever has it resolves the awakeable over the ingress.
- `Approvals`: each deferred call waits by itself, is listed and answered through `durable.agent_run`, with a
  time limit and a second reviewer.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, Literal, cast

from pydantic import JsonValue, ValidationError
from pydantic_ai.capabilities import AbstractCapability, WrapToolExecuteHandler
from pydantic_ai.durable_exec import ExternalEventError, ExternalEventWaiter
from pydantic_ai.exceptions import ToolFailed, UserError
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.tools import (
    AgentDepsT,
    DeferredToolRequests,
    DeferredToolResults,
    RunContext,
    ToolApproved,
    ToolDefinition,
    ToolDenied,
)
from restate import Context, TerminalError
from restate.serde import JsonSerde, Serde

from durable import _agent_run
from durable._agent_run import ANSWER, AnswerLetter, Approve, Closing, Deny, PendingCall, Supply
from durable._context import Invocation, current_invocation
from durable._driver import InvocationCancelled
from durable._errors import gives_up
from durable._names import external_event, notification
from durable._operation_backend import run_step
from durable._options import StepOptions
from durable._telemetry import Wait
from durable._tracing import waiting

_JSON: Serde[JsonValue] = JsonSerde()

Notifier = Callable[[PendingCall], Awaitable[None] | None]
"""Tells a reviewer that a call waits; sync (it then runs in a thread) or async. It is called in a step."""


class RestateWaiter(ExternalEventWaiter):
    """Waits for external events of one agent's runs: the resume token is the id of an awakeable."""

    def __init__(self, agent: str, context: Context) -> None:
        """Create the waiter for runs of `agent` in the handler that received `context`."""
        self._agent = agent
        self._context = context

    async def wait(
        self,
        name: str,
        *,
        ask: Callable[[str], Awaitable[JsonValue]],
        timeout: timedelta | None,  # noqa: ASYNC109 - PydanticAI's signature
    ) -> JsonValue:
        """Call `ask` in a step, and wait until somebody resolves or rejects the awakeable.

        Raises:
            ExternalEventError: When the time is up, or the awakeable was rejected.
        """
        token, answered = self._context.awakeable(serde=_JSON)
        limit = None if timeout is None else timeout.total_seconds()
        try:
            with waiting(Wait(f"wait for an external event: {name}")):
                async with asyncio.timeout(limit):
                    step = external_event(self._agent, name)
                    answer = await run_step(step, lambda: ask(token), StepOptions())
                    return await answered if answer is None else cast(JsonValue, answer)
        except TimeoutError:
            raise ExternalEventError(f"No resolution arrived within {timeout}.") from None
        except InvocationCancelled:
            raise
        except TerminalError as rejection:
            raise ExternalEventError(rejection.message) from rejection


def print_answer_command(call: PendingCall) -> None:
    """Print what waits, and the curl command that answers it, to standard error."""
    print(  # noqa: T201 - that is what it is for
        f"{call.agent} waits: {call.tool_name}({call.args}). Answer with\n  {call.answer_command()}",
        file=sys.stderr,
        flush=True,
    )


@dataclass
class Approvals(AbstractCapability[AgentDepsT]):
    """Resolves tool calls that need approval, or a result from outside, inside the run.

    Each call waits by itself: the reviewer is told in a step, the invocation suspends, and the run goes on
    when somebody answers through `durable.agent_run`, which the app has to host. Calls that wait at the same
    time can be answered in any order. Outside a Restate handler it leaves the calls alone, so the run
    ends with `DeferredToolRequests` as PydanticAI does.

    Example:
        ```python
        agent = Agent(
            "openai:gpt-5-mini",
            name="refunds",
            capabilities=[
                durable.RestateDurability(),
                durable.Approvals(timeout=timedelta(days=1)),
            ],
        )


        @agent.tool_plain(requires_approval=True)
        async def refund(order: str, amount: float) -> str: ...


        app = durable.app([service, durable.agent_run])
        ```
    """

    notify: Notifier = print_answer_command
    """Tells the reviewer. A failure is retried as that of any step."""

    timeout: timedelta | None = None
    """How long each reviewer has, `None` for ever."""

    on_timeout: Literal["deny", "approve"] = "deny"
    """What happens when nobody has answered. A call that waits for a result fails in either case."""

    escalate_to: Notifier | None = None
    """Tells a second reviewer when the first let the time pass; either may answer from then on."""

    _supplied: dict[str, JsonValue] = field(
        default_factory=dict[str, JsonValue], init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Check what was given.

        Raises:
            UserError: When the time limit is not positive, or an option needs one that is missing.
        """
        faults: list[str] = []
        if self.timeout is not None and self.timeout <= timedelta(0):
            faults.append(f"`timeout` must be positive, got {self.timeout!r}")
        if self.timeout is None and (self.escalate_to or self.on_timeout != "deny"):
            faults.append("`escalate_to` and `on_timeout` need a `timeout`")
        if faults:
            raise UserError(f"{'; '.join(faults)}.")

    async def for_run(self, ctx: RunContext[AgentDepsT]) -> "Approvals[AgentDepsT]":
        """Keep the supplied results of each run to itself."""
        return replace(self)

    async def before_run(self, ctx: RunContext[AgentDepsT]) -> None:
        """Refuse to start in an app that could not take answers.

        Raises:
            UserError: When the app does not host `durable.agent_run`.
        """
        invocation = current_invocation()
        if invocation is not None and _agent_run.agent_run.name not in invocation.services:
            raise UserError(
                "`Approvals` takes its answers through `durable.agent_run`, which this app does not host. "
                "Add it: `durable.app([..., durable.agent_run])`."
            )

    async def handle_deferred_tool_calls(
        self, ctx: RunContext[AgentDepsT], *, requests: DeferredToolRequests
    ) -> DeferredToolResults | None:
        """Wait for the answers to all calls, beside each other."""
        invocation = current_invocation()
        if invocation is None:
            return None
        calls = [*requests.approvals, *requests.calls]
        asking = [
            asyncio.ensure_future(self._ask(invocation, ctx, requests, call)) for call in calls
        ]
        try:
            answers = await asyncio.gather(*asking)
        finally:  # where one fails, the others do not wait any more
            for one in asking:
                one.cancel()
            await asyncio.wait(asking)
        results = DeferredToolResults()
        for call, answer in zip(calls, answers, strict=True):
            id = call.tool_call_id
            if answer.answered_by is not None:
                results.answered_by[id] = answer.answered_by
            if call in requests.approvals:
                results.approvals[id] = self._approval(id, answer)
            else:
                results.calls[id] = (
                    answer.result
                    if isinstance(answer, Supply)
                    else ToolFailed(getattr(answer, "reason", "No result came in time."))
                )
        return results

    def _approval(self, id: str, answer: Approve | Deny | Supply) -> ToolApproved | ToolDenied:
        if isinstance(answer, Deny):
            return ToolDenied(answer.reason)
        if isinstance(answer, Supply):
            self._supplied[id] = answer.result
            return ToolApproved()
        return ToolApproved(override_args=answer.args)

    async def wrap_tool_execute(
        self,
        ctx: RunContext[AgentDepsT],
        *,
        call: ToolCallPart,
        tool_def: ToolDefinition,
        args: dict[str, Any],
        handler: WrapToolExecuteHandler,
    ) -> Any:
        """Take a supplied result in the place of the call."""
        id = call.tool_call_id
        return self._supplied.pop(id) if id in self._supplied else await handler(args)

    async def _ask(
        self,
        invocation: Invocation,
        ctx: RunContext[AgentDepsT],
        requests: DeferredToolRequests,
        call: ToolCallPart,
    ) -> Approve | Deny | Supply:
        restate = invocation.context
        agent = (ctx.agent.name if ctx.agent is not None else None) or "agent"
        id, answered = restate.awakeable(serde=ANSWER)
        tool = ctx.tools.get(call.tool_name)
        now = invocation.now or datetime.fromtimestamp(await restate.time(), UTC)
        pending = PendingCall(
            id=id,
            invocation_id=restate.request().id,
            agent=agent,
            kind=requests.kind(call.tool_call_id),
            tool_name=call.tool_name,
            tool_call_id=call.tool_call_id,
            args=call.args_as_dict(),
            parameters=tool.parameters_json_schema if tool is not None else {},
            metadata=requests.metadata.get(call.tool_call_id, {}),
            asked_at=now,
            expires_at=None if self.timeout is None else now + self.timeout,
        )

        await restate.object_call(_agent_run.ask, key=pending.invocation_id, arg=pending)
        try:
            with waiting(Wait(f"wait for a person: {call.tool_name}")):
                return await self._answer(restate, pending, answered)
        except (Exception, asyncio.CancelledError) as error:
            if gives_up(error):
                closing = Closing(call=id, why="ended with its run")
                restate.object_send(_agent_run.close, key=pending.invocation_id, arg=closing)
            raise

    async def _answer(
        self, context: Context, pending: PendingCall, answered: Awaitable[AnswerLetter]
    ) -> Approve | Deny | Supply:
        """Tell one reviewer after the other, and wait until one answers or all have let the time pass."""
        answer = asyncio.ensure_future(_read(context, pending, answered))
        try:
            for number, notifier in enumerate(filter(None, [self.notify, self.escalate_to])):
                if number and pending.expires_at is not None and self.timeout is not None:
                    later = pending.expires_at + self.timeout
                    pending = pending.model_copy(update={"expires_at": later})
                    await context.object_call(_agent_run.ask, pending.invocation_id, pending)
                name = notification(pending.agent, pending.tool_name)
                tell = partial(_tell, notifier, pending)
                await run_step(name, tell, StepOptions())
                limit = None if self.timeout is None else self.timeout.total_seconds()
                await asyncio.wait([answer], timeout=limit)
                if answer.done():
                    return answer.result()
            # an answer that `agent_run` took before counts, although the run has not got it yet
            closing = Closing(call=pending.id, why="was not answered in time")
            if await context.object_call(_agent_run.close, key=pending.invocation_id, arg=closing):
                return self._unanswered(pending)
            return await answer
        finally:
            answer.cancel()

    def _unanswered(self, call: PendingCall) -> Approve | Deny:
        if self.on_timeout == "approve":
            return Approve(call=call.id)
        return Deny(call=call.id, reason=f"Nobody answered within {self.timeout}.")


async def _read(
    context: Context, call: PendingCall, answered: Awaitable[AnswerLetter]
) -> Approve | Deny | Supply:
    """Wait for the answer and sign for it."""
    try:
        letter = await answered
    except InvocationCancelled:
        raise
    # who completes the awakeable itself, past `agent_run`, can do no more than deny the call
    except TerminalError as rejection:
        why, reason = "was rejected", rejection.message
    except ValidationError:
        why = "got an answer that could not be read"
        reason = "The answer could not be read: give it to `AgentRun/answer`."
    else:
        context.resolve_awakeable(letter.receipt, None)
        return letter.answer.root
    closing = Closing(call=call.id, why=why)
    context.object_send(_agent_run.close, key=call.invocation_id, arg=closing)
    return Deny(call=call.id, reason=reason)


async def _tell(notifier: Notifier, pending: PendingCall) -> None:
    if iscoroutinefunction(notifier):
        await notifier(pending)
    else:
        await asyncio.to_thread(notifier, pending)
