"""Toolsets that hold a connection for the length of a run, such as MCP servers.

The first step that needs the connection opens it, so it lives on the host loop, but it is handler code
that leaves the toolset when the run ends. Leaving is therefore handed to the host loop and not waited
for: it creates no operation, and nothing in the handler depends on it.
"""

from typing import Any

from pydantic_ai.tools import AgentDepsT

from durable._context import current_invocation
from durable._sdk import DurableDynamicToolset, DurableMCPToolset, DurableToolsetBase


class _ClosedOnHost(DurableToolsetBase[AgentDepsT]):
    async def __aexit__(self, *args: Any) -> bool | None:
        invocation = current_invocation()
        if invocation is None or self._run_held is None:
            return await super().__aexit__(*args)
        invocation.run_on_host(self._run_held.aclose(*args))
        return None


class RestateMCPToolset(_ClosedOnHost[AgentDepsT], DurableMCPToolset[AgentDepsT]):
    """PydanticAI's durable MCP toolset, with its session closed on the host loop."""

    def __init__(self, toolset: DurableMCPToolset[AgentDepsT]) -> None:
        """Take over all that PydanticAI set up on `toolset`."""
        vars(self).update(vars(toolset))


class RestateDynamicToolset(_ClosedOnHost[AgentDepsT], DurableDynamicToolset[AgentDepsT]):
    """PydanticAI's durable dynamic toolset, with what it holds for the run closed on the host loop."""

    def __init__(self, toolset: DurableDynamicToolset[AgentDepsT]) -> None:
        """Take over all that PydanticAI set up on `toolset`."""
        vars(self).update(vars(toolset))
