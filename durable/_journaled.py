"""`durable.step`: makes a function of yours one journaled step."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar, cast, get_type_hints, overload

from pydantic import TypeAdapter
from pydantic_ai.exceptions import UserError

from durable._codec import stored_result
from durable._context import current_invocation
from durable._names import own_step
from durable._operation_backend import run_step
from durable._options import StepOptions

P = ParamSpec("P")
T = TypeVar("T")


@overload
def step(function: Callable[P, Awaitable[T]], /) -> Callable[P, Awaitable[T]]: ...
@overload
def step(function: Callable[P, T], /) -> Callable[P, Awaitable[T]]: ...
def step(function: Callable[P, Any], /) -> Callable[P, Awaitable[Any]]:
    """Make `function` one step where it is called in handler code, and itself everywhere else.

    For what PydanticAI calls in handler code, on every replay again: history processors, dynamic
    instructions, output validators, hooks. With `@durable.step` such a function is called once and its
    result is journaled, so it may have side effects, read clocks and use the network.

    Example:
        ```python
        @agent.output_validator
        @durable.step
        async def check(ctx: RunContext[Deps], output: str) -> str:
            await ctx.deps.audit.log(output)
            return output
        ```

    Args:
        function: Sync (it then runs in a thread) or async, with an annotated return type that Pydantic
            can serialize. Its name names the step: stored data.

    Raises:
        UserError: When the return type is not annotated.
    """
    hints = get_type_hints(function)
    if "return" not in hints:
        raise UserError(
            f"`{function.__name__}` has no return annotation. Its result is stored in the journal as "
            "that type: annotate it."
        )
    adapter = TypeAdapter[Any](hints["return"])

    async def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        if iscoroutinefunction(function):
            return await function(*args, **kwargs)
        return await asyncio.to_thread(function, *args, **kwargs)

    @wraps(function)
    async def journaled(*args: P.args, **kwargs: P.kwargs) -> Any:
        if current_invocation() is None:
            return await call(*args, **kwargs)

        async def body() -> Any:
            return adapter.dump_python(await call(*args, **kwargs), mode="json")

        result = await run_step(own_step(function.__name__), body, StepOptions())
        with stored_result():
            return adapter.validate_python(result)

    return cast(Callable[P, Awaitable[Any]], journaled)
