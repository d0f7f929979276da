"""One operation of an agent, one `ctx.run` step.

Model requests, tool calls, MCP I/O, toolset discovery, event handlers and capability operations all
arrive here as a name and a body. On replay the journal answers and the body does not run.
"""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic_ai.durable_exec import DurableOperationId, JournalCallableOperationBackend
from restate import RunOptions
from restate.serde import Serde

from durable._context import restate_context


class JsonSerde(Serde[Any]):
    """Journals what the JSON codec made of a result. Unlike the SDK's, it stores `None` as `null`."""

    def serialize(self, obj: Any) -> bytes:
        return json.dumps(obj, ensure_ascii=False, separators=(",", ":")).encode()

    def deserialize(self, buf: bytes) -> Any:
        return json.loads(buf)


JSON_SERDE = JsonSerde()


class RestateOperationBackend(JournalCallableOperationBackend[RunOptions[Any]]):
    """Executes each operation as one journaled step of the current invocation."""

    async def execute(
        self,
        *,
        operation_id: DurableOperationId,
        name: str,
        body: Callable[[], Awaitable[object]],
        cache_key: tuple[object, ...],
        config: RunOptions[Any],
    ) -> object:
        """Run `body` as the step `name`, or return what the journal holds for it.

        Args:
            operation_id: Which operation it is.
            name: Name of the step in the journal: stored data, see the README's table.
            body: The work, with its result already reduced to JSON.
            cache_key: Not used: Restate's journal is positional.
            config: Retry options of the step.
        """
        del operation_id, cache_key

        async def step() -> object:
            return await body()

        return await restate_context().run_typed(name, step, config)
