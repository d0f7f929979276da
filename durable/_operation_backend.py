"""One operation of an agent, one `ctx.run` step.

Model requests, tool calls, MCP I/O, toolset discovery, event handlers and capability operations all
arrive here as a name and a body. On replay the journal answers and the body does not run.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from pydantic_ai.durable_exec import DurableOperationId, JournalCallableOperationBackend
from pydantic_core import from_json, to_json
from restate import RunOptions, TerminalError
from restate.serde import BytesSerde

from durable._context import restate_context
from durable._errors import original_error, step_failure


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

        Raises:
            Exception: The original exception of a step that failed for good, also on replay.
            TerminalError: When the step's retries are used up, or its exception is not PydanticAI's.
        """
        del operation_id, cache_key

        async def step() -> bytes:
            try:
                result = await body()
            except Exception as error:
                raise step_failure(error, name) from error
            return to_json(result)

        try:
            journaled = await restate_context().run_typed(name, step, replace(config, serde=_BYTES))
        except TerminalError as failure:
            if (error := original_error(failure)) is not None:
                raise error from failure
            raise
        return from_json(journaled)


_BYTES = BytesSerde()
