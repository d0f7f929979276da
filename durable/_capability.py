"""`RestateDurability`: the capability that makes an ordinary PydanticAI agent durable on Restate."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, Self, cast

from pydantic_ai.agent import AbstractAgent, EventStreamHandler
from pydantic_ai.capabilities import (
    AgentNode,
    NodeResult,
    WrapModelRequestHandler,
    WrapOutputProcessHandler,
    WrapRunHandler,
)
from pydantic_ai.durable_exec import (
    BaseDurabilityCapability,
    DurabilityEngineSpec,
    DurableOperationId,
    RoleBasedOperationConfig,
    ToolsetCallToolId,
    ToolsetGetInstructionsId,
    ToolsetGetToolsId,
    ToolsetKind,
    ToolsetValidateToolArgumentsId,
    conversation_id_from_run_id,
    external_event_scope,
)
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelResponse
from pydantic_ai.models import Model, ModelRequestContext
from pydantic_ai.output import OutputContext
from pydantic_ai.run import AgentRunResult
from pydantic_ai.tools import AgentDepsT, RunContext
from pydantic_ai.toolsets import AbstractToolset, DynamicToolset, FunctionToolset, ToolsetTool
from pydantic_graph import End
from restate import RunOptions

from durable._agent_run import Inbox
from durable._approvals import RestateWaiter
from durable._codec import ResultCodec
from durable._context import Invocation, current_invocation
from durable._driver import InvocationCancelled
from durable._errors import not_serializable
from durable._identity import RunClock, current_run_clock
from durable._names import output_function, run_start_time
from durable._operation_backend import RestateOperationBackend, current_step, run_step
from durable._options import (
    DEFAULT_RUN_OPTIONS,
    StepOptions,
    check_run_options,
    tool_faults,
    tool_options,
)
from durable._outputs import OutputCodec, output_as_value, output_from_value
from durable._sdk import DurableModel, check_sdk_version
from durable._toolsets import RestateDynamicToolset, RestateMCPToolset

_live_model: ContextVar[Model | None] = ContextVar("durable.live_model", default=None)
"""The model instance of the request that is being made."""


@dataclass(init=False)
class RestateDurability(BaseDurabilityCapability[AgentDepsT]):
    """Makes an agent durable by journaling its work as steps of a Restate invocation.

    Run the agent in a handler that `durable.app` hosts: every model request and every tool call is one
    `ctx.run` step, so after a crash the run goes on where it stopped. Outside a handler, and inside
    a step, the capability is transparent and the agent is a plain agent.

    Example:
        ```python
        import restate
        from pydantic_ai import Agent

        import durable

        agent = Agent("openai:gpt-5-mini", name="poet", capabilities=[durable.RestateDurability()])
        poet = restate.Service("Poet")


        @poet.handler()
        async def write(ctx: restate.Context, topic: str) -> str:
            return (await agent.run(f"A haiku about {topic}")).output


        app = durable.app([poet])
        ```
    """

    engine_spec: ClassVar = DurabilityEngineSpec(
        engine_name="Restate",
        durable_unit_noun="run step",
        durable_container_noun="handler",
        codec=ResultCodec(),
        serialization_failure=not_serializable,
        # Function tools and factories hold no connection; an MCP session is opened by the first step
        # that needs it, so that connecting is retried and a replay needs no server.
        toolset_lifecycles={
            "function": "enter-never",
            "mcp": "enter-in-durable-unit",
            "dynamic": "enter-never",
        },
        # In any of PydanticAI's modes the driver keeps parallel tool calls in one order on every replay.
        sequential_tools_in_durable_context=False,
        tool_config_key="restate",
        cancellation_error_types=(InvocationCancelled,),
    )

    def __init__(
        self,
        *,
        models: Mapping[str, Model] | None = None,
        event_stream_handler: EventStreamHandler[AgentDepsT] | None = None,
        name: str | None = None,
        model_run_options: RunOptions[Any] | None = None,
        tool_run_options: RunOptions[Any] | None = None,
        mcp_run_options: RunOptions[Any] | None = None,
        event_run_options: RunOptions[Any] | None = None,
        capability_run_options: RunOptions[Any] | None = None,
    ) -> None:
        """Create the capability; it finds the agent's model, name and toolsets by itself.

        The options are those of `ctx.run` and decide about retries. With `max_attempts` or
        `max_duration`, a step that fails longer ends the run; with neither, the service's
        `invocation_retry_policy` decides, which pauses the invocation by default. Each replaces
        `durable.DEFAULT_RUN_OPTIONS` as a whole.

        Args:
            models: Further models by id, for `agent.run(model="id")` in a handler.
            event_stream_handler: Receives model events live, within the model request's step, and
                each tool event in a step of its own; not again on replay.
            name: Names the agent in the journal, default the agent's `name`. It is stored data: keep
                it for as long as an invocation may be in flight.
            model_run_options: Options for model requests.
            tool_run_options: Options for function tools and dynamic toolsets. A single tool overrides
                fields with `metadata={"restate": {"max_attempts": 3}}`, and may set `timeout` (seconds a
                try may take), `name` (in the step's name) and `at_most_once` (never begun twice: after a
                crash the model is told that the outcome is unknown). With `metadata={"restate": False}`
                it runs in handler code, without a step.
            mcp_run_options: Options for MCP servers.
            event_run_options: Options for tool events sent to the event stream handler.
            capability_run_options: Options for the durable operations of other capabilities.

        Raises:
            UserError: When an option is set that `RestateDurability` decides itself, or the installed
                restate-sdk is not one of the supported versions.
        """
        check_sdk_version()
        super().__init__(models=models, event_stream_handler=event_stream_handler, name=name)
        options = {
            "model_run_options": model_run_options,
            "tool_run_options": tool_run_options,
            "mcp_run_options": mcp_run_options,
            "event_run_options": event_run_options,
            "capability_run_options": capability_run_options,
        }
        check_run_options(options)
        self._faults: list[str] | None = (
            None  # what is wrong with the agent, while it is being bound
        )
        self._step_options = {
            role: StepOptions(run=given or DEFAULT_RUN_OPTIONS) for role, given in options.items()
        }

    @property
    def in_durable_context(self) -> bool:
        """Whether handler code is running: not inside a step, not outside a handler."""
        return current_invocation() is not None

    # Identity: what would differ on replay comes from the invocation and the journal

    def get_default_run_id(self) -> str | None:
        """Return the invocation's id and the number of the run in it, the same on every replay."""
        invocation = current_invocation()
        if invocation is None:
            return None
        return f"{invocation.context.request().id}:{next(invocation.run_numbers)}"

    def get_default_conversation_id(self, run_id: str) -> str | None:
        """Derive the conversation's id from the run's, which is the same on every replay."""
        return conversation_id_from_run_id(run_id) if self.in_durable_context else None

    async def get_run_start_time(self, run_id: str) -> datetime | None:
        """Return when the run's first attempt started, from the journal; read for `run(timeout=)`."""
        invocation = current_invocation()
        if invocation is None:
            return None

        async def nothing() -> None:
            pass

        await run_step(run_start_time(self.name), nothing, StepOptions())
        return invocation.now

    def get_run_clock(self) -> Callable[[], datetime] | None:
        """Return the journaled clock, against which `run(timeout=)` is measured."""
        invocation = current_invocation()
        if invocation is None:
            return None
        return lambda: invocation.now or datetime.now(UTC)

    async def wrap_run(
        self, ctx: RunContext[AgentDepsT], *, handler: WrapRunHandler
    ) -> AgentRunResult[Any]:
        """Keep the time of the run, for messages that are the same on every replay."""
        invocation = current_invocation()
        if invocation is None:
            return await handler()
        self._check_name(invocation)
        assert ctx.run_id is not None
        clock = RunClock(ctx.run_id, parent=current_run_clock.get())
        clock.leave_alone(ctx.messages)
        current_run_clock.set(clock)
        try:
            with external_event_scope(RestateWaiter(self.name, invocation.context)):
                result = await handler()
        except Exception:
            clock.stamp(ctx.messages, clock.now)
            raise
        finally:
            clock.ended = True
        clock.stamp(result.all_messages(), clock.now)
        return result

    def _check_name(self, invocation: Invocation) -> None:
        if invocation.agents.setdefault(self.name, self._agent) is not self._agent:
            raise UserError(
                f"Two agents named {self.name!r} ran in one invocation. The name identifies an agent's "
                "steps in the journal: give each agent a `name` of its own."
            )

    async def wrap_model_request(
        self,
        ctx: RunContext[AgentDepsT],
        *,
        request_context: ModelRequestContext,
        handler: WrapModelRequestHandler,
    ) -> ModelResponse:
        """Journal the request, and stamp the messages it was made of with journaled times."""
        clock = current_run_clock.get()
        if not self.in_durable_context or clock is None:
            return await super().wrap_model_request(
                ctx, request_context=request_context, handler=handler
            )
        before = clock.now
        response = await super().wrap_model_request(
            ctx, request_context=request_context, handler=handler
        )
        clock.stamp(ctx.messages, before or clock.started)
        return response

    # Steering: messages from outside are taken where the next operation is decided

    async def before_model_request(
        self, ctx: RunContext[AgentDepsT], request_context: ModelRequestContext
    ) -> ModelRequestContext:
        """Give the model what `durable.agent_run` brought meanwhile."""
        await self._take_messages(ctx)
        return await super().before_model_request(ctx, request_context)

    async def after_node_run(
        self,
        ctx: RunContext[AgentDepsT],
        *,
        node: "AgentNode[AgentDepsT]",
        result: "NodeResult[AgentDepsT]",
    ) -> "NodeResult[AgentDepsT]":
        """Go on with the run when a message came with the last response."""
        if isinstance(result, End):
            await self._take_messages(ctx)
        return await super().after_node_run(ctx, node=node, result=result)

    async def _take_messages(self, ctx: RunContext[AgentDepsT]) -> None:
        invocation, clock = current_invocation(), current_run_clock.get()
        if invocation is None or clock is None or not clock.outermost:
            return
        invocation.inbox = invocation.inbox or Inbox(invocation.context)
        for message in await invocation.inbox.take():
            content = [message.content] if isinstance(message.content, str) else message.content
            ctx.enqueue(*content, priority=message.priority)

    # Outputs: a function that takes the output is called once

    async def wrap_output_process(
        self,
        ctx: RunContext[AgentDepsT],
        *,
        output_context: OutputContext,
        output: Any,
        handler: WrapOutputProcessHandler,
    ) -> Any:
        """Call an output function, and the output validators after it, in one step."""
        adapter = None
        if output_context.has_function and self.in_durable_context and not ctx.partial_output:
            adapter = self._output_codec.adapter(output_context.function_name)
        if adapter is None:
            return await handler(output)
        name = output_function(self.name, output_context.function_name)
        value = await run_step(
            name,
            lambda: output_as_value(lambda: handler(output), adapter),
            self._step_options["tool_run_options"],
        )
        return output_from_value(cast("dict[str, Any]", value), adapter)

    # Models: any instance can be used, because steps run in this process

    async def _build_durable_model(
        self, ctx: RunContext[AgentDepsT], request_context: ModelRequestContext
    ) -> DurableModel:
        _live_model.set(request_context.model)
        return await super()._build_durable_model(ctx, request_context)

    def _find_model_id(self, model: Model) -> str | None:
        try:
            return super()._find_model_id(model)
        except UserError:  # not registered, such as `override(model=TestModel())`
            return model.model_id

    async def _resolve_model_for_request(
        self, model_id: str | None, run_context: RunContext[AgentDepsT]
    ) -> Model:
        live = _live_model.get()
        if (
            live is not None
            and live.model_id == model_id
            and model_id not in self._models_by_id
            and self._resolved_request_model(live) is None
        ):
            return live
        return await super()._resolve_model_for_request(model_id, run_context)

    # Usage: what agents inside a tool's step used is journaled with the step

    @contextmanager
    def _tool_run_context_scope(
        self, ctx: RunContext[AgentDepsT]
    ) -> Generator[RunContext[AgentDepsT]]:
        step = current_step.get()
        if step is None:
            with super()._tool_run_context_scope(ctx) as durable_ctx:
                yield durable_ctx
            return
        before = copy(ctx.usage)
        with super()._tool_run_context_scope(replace(ctx, usage=copy(before))) as durable_ctx:
            yield durable_ctx
        used = durable_ctx.usage - before
        step.usage = used if used.has_values() else None

    # Construction: all that is wrong is said in one message

    def _bind_for_agent(self, agent: AbstractAgent[AgentDepsT, Any]) -> Self:
        try:
            return super()._bind_for_agent(agent)
        except UserError as error:
            if self.name or agent.name:
                raise
            named = copy(self)
            named.name = "unnamed"
            try:
                named._bind_for_agent(agent)
            except UserError as other:
                raise UserError(f"{error}\n{other}") from None
            raise

    def _bind_to_agent(self, agent: AbstractAgent[AgentDepsT, Any]) -> None:
        self._faults = faults = list[str]()
        super()._bind_to_agent(agent)
        self._faults = None
        try:
            self._output_codec = OutputCodec(agent.output_type)
        except UserError as error:
            faults.append(str(error))
        if faults:
            raise UserError("\n".join(dict.fromkeys(faults)))

    def _wrap_and_register_leaf(
        self, ts: AbstractToolset[AgentDepsT]
    ) -> AbstractToolset[AgentDepsT]:
        faults: list[str] = []
        if isinstance(ts, FunctionToolset):
            for name, tool in ts.tools.items():
                faults += tool_faults(name, (tool.metadata or {}).get("restate"))
        if self._faults is None:
            if faults:
                raise UserError("\n".join(faults))
            return super()._wrap_and_register_leaf(ts)
        self._faults += faults
        try:
            return super()._wrap_and_register_leaf(ts)
        except UserError as error:
            self._faults.append(str(error))
            return ts

    def get_durable_operation_backend(self) -> RestateOperationBackend:
        """Return the backend that turns this agent's operations into steps."""
        options = self._step_options
        return RestateOperationBackend(
            agent_name=self.name,
            default_model_id=self.default_model_id,
            config=RoleBasedOperationConfig(
                model=options["model_run_options"],
                event=options["event_run_options"],
                capability=options["capability_run_options"],
                tool=options["tool_run_options"],
                resolve_tool=self._tool_options,
            ),
        )

    def get_wrapper_toolset(
        self, toolset: AbstractToolset[AgentDepsT]
    ) -> AbstractToolset[AgentDepsT] | None:
        """Replace the toolsets by durable ones, those given at run time or added later too."""
        if not self.in_durable_context:
            return super().get_wrapper_toolset(toolset)
        run = copy(self)
        run._toolsets_by_id = dict(self._toolsets_by_id)
        return toolset.visit_and_replace(run._wrap_and_register_leaf)

    def _build_mcp_toolset(self, toolset: Any) -> RestateMCPToolset[AgentDepsT]:
        return RestateMCPToolset(super()._build_mcp_toolset(toolset))

    def _build_dynamic_toolset(
        self, toolset: DynamicToolset[AgentDepsT]
    ) -> RestateDynamicToolset[AgentDepsT]:
        return RestateDynamicToolset(super()._build_dynamic_toolset(toolset))

    def _tool_options(
        self, operation_id: DurableOperationId, tool: object | None, tool_name: str
    ) -> StepOptions | Literal[False]:
        assert isinstance(
            operation_id,
            ToolsetCallToolId
            | ToolsetValidateToolArgumentsId
            | ToolsetGetToolsId
            | ToolsetGetInstructionsId,
        )
        kind: ToolsetKind = getattr(operation_id, "toolset_kind", "mcp")
        base = self._step_options["mcp_run_options" if kind == "mcp" else "tool_run_options"]
        return tool_options(cast("ToolsetTool[Any] | None", tool), tool_name, base=base)
