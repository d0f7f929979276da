"""`RestateDurability`: the capability that makes an ordinary PydanticAI agent durable on Restate."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from pydantic_ai.agent import EventStreamHandler
from pydantic_ai.durable_exec import (
    JSON_CODEC,
    BaseDurabilityCapability,
    DurabilityEngineSpec,
    RoleBasedOperationConfig,
    conversation_id_from_run_id,
)
from pydantic_ai.models import Model
from pydantic_ai.tools import AgentDepsT
from restate import RunOptions

from durable._context import current_invocation
from durable._operation_backend import JSON_SERDE, RestateOperationBackend


@dataclass(init=False)
class RestateDurability(BaseDurabilityCapability[AgentDepsT]):
    """Runs an agent durably inside a Restate handler."""

    engine_spec: ClassVar = DurabilityEngineSpec(
        engine_name="Restate",
        durable_unit_noun="run step",
        durable_container_noun="handler",
        codec=JSON_CODEC,
        toolset_lifecycles={
            "function": "enter-never",
            "mcp": "enter-in-durable-unit",
            "dynamic": "enter-never",
        },
        sequential_tools_in_durable_context=True,
        unsupported_runtime_toolset_kinds=frozenset({"function", "mcp", "dynamic"}),
        tool_config_key="restate",
    )

    def __init__(
        self,
        *,
        models: Mapping[str, Model] | None = None,
        event_stream_handler: EventStreamHandler[AgentDepsT] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(models=models, event_stream_handler=event_stream_handler, name=name)

    @property
    def in_durable_context(self) -> bool:
        """Whether handler code is running: not inside a step, not outside a handler."""
        return current_invocation() is not None

    def get_durable_operation_backend(self) -> RestateOperationBackend:
        """Return the backend that turns this agent's operations into steps."""
        options = RunOptions[Any](serde=JSON_SERDE)
        return RestateOperationBackend(
            agent_name=self.name,
            default_model_id=self.default_model_id,
            config=RoleBasedOperationConfig(model=options, event=options, capability=options, tool=options),
        )
