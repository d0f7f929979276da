"""The undo of a tool: a function, what it takes of the call, and whether it fits the tool."""

import asyncio
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter, iscoroutinefunction, signature
from typing import Any, cast, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_ai.exceptions import UserError
from pydantic_ai.tools import RunContext
from pydantic_ai.toolsets import ToolsetTool

from durable._options import StepOptions, tool_options

_RESULT = "result"
"""The parameter that takes what the tool returned."""

_NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


class Undo:
    """A function that undoes the calls of a tool."""

    def __init__(self, function: Callable[..., Any], tool: Callable[..., Any] | str) -> None:
        """Look at the function.

        Args:
            function: Takes the call's `RunContext`, and what its other parameters are named after.
            tool: The tool's function, or its name.
        """
        self.name = function.__name__
        self.faults: list[str] = []
        """What is wrong with the function, whatever the agent's tools are."""
        self._function = function
        self._by_name = isinstance(tool, str)
        parameters = list(signature(function).parameters.values())
        hints = get_type_hints(function, include_extras=True)
        ctx = hints.get(parameters[0].name) if parameters else None
        if (get_origin(ctx) or ctx) is not RunContext:
            self.faults.append("its first parameter is not annotated as the call's `RunContext`")
        if unnamed := [f"`{it}`" for it in parameters[1:] if it.kind not in _NAMED]:
            self.faults.append(f"nothing can be given to {', '.join(unnamed)} by name")
        self._takes = {it.name: it for it in parameters[1:] if it.kind in _NAMED}
        self._adapters = {name: _adapter(hints.get(name, Any)) for name in self._takes}
        if not isinstance(tool, str):
            self.faults += self._strangers(signature(tool).parameters)

    @property
    def takes_unknown(self) -> bool:
        """Whether it can undo a call whose outcome, and so whose result, is unknown."""
        try:
            self._pick({_RESULT: None})
        except UserError:
            return False
        return True

    async def __call__(self, ctx: RunContext[Any], args: dict[str, Any], result: Any) -> None:
        """Undo the call that had these arguments and this result.

        Raises:
            UserError: When the function takes something else.
        """
        picked = self._pick({**args, _RESULT: result})
        if iscoroutinefunction(self._function):
            await self._function(ctx, **picked)
        else:
            await asyncio.to_thread(self._function, ctx, **picked)

    def misfits(self, tool: ToolsetTool[Any], *, complete: bool) -> list[str]:
        """Say what does not fit `tool`.

        Args:
            tool: The tool.
            complete: Whether its calls have all arguments, also those that the model left out.
        """
        faults: list[str] = []
        name, schema = tool.tool_def.name, tool.tool_def.parameters_json_schema
        if self._by_name:
            arguments = cast("dict[str, Any]", schema.get("properties", {}))
            required = cast("list[str]", schema.get("required", []))
            faults += self._strangers(arguments)
            faults += [
                f"the argument `{it.name}` is optional, so give it a default"
                for it in self._takes.values()
                if not complete
                and it.name in arguments.keys() - required
                and it.default is Parameter.empty
            ]
        options = tool_options(tool, name, base=StepOptions())
        if options and options.at_most_once and not self.takes_unknown:
            faults.append(
                "the outcome of an at-most-once tool may be unknown, so its `result` must accept `None`"
            )
        return [f"`{self.name}` cannot undo `{name}`: {fault}" for fault in faults]

    def _strangers(self, arguments: Collection[str]) -> list[str]:
        faults = [
            f"it takes `{name}`, which is neither an argument of the tool nor `result`"
            for name in self._takes
            if name != _RESULT and name not in arguments
        ]
        if _RESULT in self._takes and _RESULT in arguments:
            faults.append("`result` would be both an argument of the tool and what it returned")
        return faults

    def _pick(self, values: Mapping[str, Any]) -> dict[str, Any]:
        picked: dict[str, Any] = {}
        for name, adapter in self._adapters.items():
            if name in values:
                try:
                    picked[name] = adapter.validate_python(values[name])
                except ValidationError as error:
                    problems = sorted({it["msg"] for it in error.errors(include_input=False)})
                    raise UserError(
                        f"`{self.name}` does not take this `{name}`: {'; '.join(problems)}"
                    ) from error
        return picked


def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint)
    except PydanticSchemaGenerationError:  # a class that Pydantic does not know
        return TypeAdapter(Any)
