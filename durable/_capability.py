"""`RestateDurability`: the capability that makes an ordinary PydanticAI agent durable on Restate."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Literal, cast

from pydantic_ai.agent import EventStreamHandler
from pydantic_ai.durable_exec import (
    JSON_CODEC,
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
)
from pydantic_ai.exceptions import UserError
from pydantic_ai.models import Model
from pydantic_ai.tools import AgentDepsT
from pydantic_ai.toolsets import AbstractToolset, DynamicToolset, ToolsetTool
from restate import RunOptions

from durable._context import current_invocation
from durable._errors import not_serializable
from durable._operation_backend import RestateOperationBackend
from durable._sdk import check_sdk_version
from durable._toolsets import RestateDynamicToolset, RestateMCPToolset

DEFAULT_RUN_OPTIONS = RunOptions[Any](
    max_duration=timedelta(minutes=10),
    initial_retry_interval=timedelta(milliseconds=500),
    max_retry_interval=timedelta(seconds=30),
    retry_interval_factor=2.0,
)
"""Retries of a step unless options say otherwise: with growing pauses, for ten minutes at most."""

_RETRY_FIELDS = frozenset(
    {
        "max_attempts",
        "max_duration",
        "initial_retry_interval",
        "max_retry_interval",
        "retry_interval_factor",
    }
)


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
        codec=JSON_CODEC,
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
                fields with `metadata={"restate": {"max_attempts": 3}}`; with
                `metadata={"restate": False}` it runs in handler code, without a step.
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
        _check_run_options(options)
        self._run_options = {key: value or DEFAULT_RUN_OPTIONS for key, value in options.items()}

    @property
    def in_durable_context(self) -> bool:
        """Whether handler code is running: not inside a step, not outside a handler."""
        return current_invocation() is not None

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

        async def now() -> str:
            return datetime.now(UTC).isoformat()

        started = invocation.context.run_typed(
            f"{self.name}__run_start_time", now, RunOptions(type_hint=str)
        )
        return datetime.fromisoformat(await started)

    def get_durable_operation_backend(self) -> RestateOperationBackend:
        """Return the backend that turns this agent's operations into steps."""
        options = self._run_options
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
    ) -> RunOptions[Any] | Literal[False]:
        assert isinstance(
            operation_id,
            ToolsetCallToolId
            | ToolsetValidateToolArgumentsId
            | ToolsetGetToolsId
            | ToolsetGetInstructionsId,
        )
        kind: ToolsetKind = getattr(operation_id, "toolset_kind", "mcp")
        base = self._run_options["mcp_run_options" if kind == "mcp" else "tool_run_options"]
        return tool_run_options(cast("ToolsetTool[Any] | None", tool), tool_name, base=base)


def tool_run_options(
    tool: ToolsetTool[Any] | None, tool_name: str, *, base: RunOptions[Any]
) -> RunOptions[Any] | Literal[False]:
    """Merge a tool's `metadata={"restate": ...}` into the options of its role.

    Returns:
        The options, or `False` for a tool that runs in handler code.

    Raises:
        UserError: When the metadata is neither `False` nor a dict of known options.
    """
    own: object = (tool.tool_def.metadata or {}).get("restate") if tool is not None else None
    if own is None:
        return base
    if own is False:
        return False
    if not isinstance(own, dict):
        raise UserError(
            f'Tool {tool_name!r}: `metadata["restate"]` is a dict of options or `False`, '
            f"not {type(own).__name__}."
        )
    overrides = cast("dict[str, Any]", own)
    if unknown := sorted(overrides.keys() - _RETRY_FIELDS):
        raise UserError(
            f'Tool {tool_name!r}: unknown options in `metadata["restate"]`: {", ".join(unknown)}. '
            f"Known are {', '.join(sorted(_RETRY_FIELDS))}."
        )
    return replace(base, **overrides)


def _check_run_options(options: Mapping[str, RunOptions[Any] | None]) -> None:
    """Reject what would be ignored, all of it in one message."""
    defaults = RunOptions[Any]()
    faults = [
        f"`{key}` sets `{field.name}`"
        for key, value in options.items()
        if value is not None
        for field in fields(value)
        if field.name not in _RETRY_FIELDS
        and getattr(value, field.name) is not getattr(defaults, field.name)
    ]
    if faults:
        raise UserError(
            f"{'; '.join(faults)}: only retries can be set ({', '.join(sorted(_RETRY_FIELDS))}); "
            "results are stored as PydanticAI encodes them."
        )
