"""Output functions: called once, in a step, with their result journaled as its declared type.

PydanticAI calls an output function when the model has produced the final output, in handler code. The
function may do anything (send the mail, hand over to another agent), so it must not run again on
replay. Output validators run in the same step, after it.
"""

from collections.abc import Awaitable, Callable, Iterator
from inspect import isfunction, ismethod
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_ai.exceptions import ModelRetry, ToolRetryError, UserError
from pydantic_ai.output import NativeOutput, PromptedOutput, TextOutput, ToolOutput

from durable._codec import stored_result


def output_functions(output_type: object) -> Iterator[Callable[..., Any]]:
    """Yield the functions in an agent's `output_type`, inside markers, lists and unions too."""
    if isfunction(output_type) or ismethod(output_type):
        yield output_type
    elif isinstance(output_type, (list, tuple)):
        for member in cast("list[object]", output_type):
            yield from output_functions(member)
    elif get_origin(output_type) in (Union, UnionType):
        for member in get_args(output_type):
            yield from output_functions(member)
    elif isinstance(output_type, ToolOutput):
        yield from output_functions(cast("ToolOutput[Any]", output_type).output)
    elif isinstance(output_type, TextOutput):
        yield from output_functions(cast("TextOutput[Any]", output_type).output_function)
    elif isinstance(output_type, (NativeOutput, PromptedOutput)):
        yield from output_functions(cast("NativeOutput[Any]", output_type).outputs)


class OutputCodec:
    """Stores what an agent's output functions return."""

    def __init__(self, output_type: object) -> None:
        """Find the functions and the types they return.

        Args:
            output_type: The agent's.

        Raises:
            UserError: When a function's return type is not annotated.
        """
        self._adapters: dict[str, TypeAdapter[Any]] = {}
        for function in output_functions(output_type):
            hints = get_type_hints(function)
            if "return" not in hints:
                raise UserError(
                    f"The output function `{function.__name__}` has no return annotation. Its result is "
                    "stored in the journal as that type: annotate it."
                )
            self._adapters[function.__name__] = TypeAdapter(hints["return"])

    def adapter(self, function: str | None) -> TypeAdapter[Any] | None:
        """Return how to store what `function` returns; with one function, its name is not needed."""
        if function is None and len(self._adapters) == 1:
            return next(iter(self._adapters.values()))
        return self._adapters.get(function or "")


async def output_as_value(
    call: Callable[[], Awaitable[Any]], adapter: TypeAdapter[Any]
) -> dict[str, Any]:
    """Call the function in a step; that the model shall try again is a value like any other."""
    try:
        return {"output": adapter.dump_python(await call(), mode="json")}
    except ToolRetryError as retry:
        content = retry.tool_retry.content
        return {"retry": content if isinstance(content, str) else str(retry)}
    except ModelRetry as retry:
        return {"retry": retry.message}
    except ValidationError as error:
        return {"retry": str(error)}


def output_from_value(value: dict[str, Any], adapter: TypeAdapter[Any]) -> Any:
    """Return the output, or raise what makes the model try again."""
    if "retry" in value:
        raise ModelRetry(value["retry"])
    with stored_result():
        return adapter.validate_python(value["output"])
