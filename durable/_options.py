"""How a step is executed: the defaults, the options of a role, and a tool's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Any, Literal, cast

from pydantic_ai.exceptions import UserError
from pydantic_ai.toolsets import ToolsetTool
from restate import RunOptions

DEFAULT_RUN_OPTIONS = RunOptions[Any](
    max_duration=timedelta(minutes=10),
    initial_retry_interval=timedelta(milliseconds=500),
    max_retry_interval=timedelta(seconds=30),
    retry_interval_factor=2.0,
)
"""Retries of a step unless options say otherwise: with growing pauses, for ten minutes at most."""

_NUMBER = (int, float)
_RETRY_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "max_attempts": int,
    "max_duration": timedelta,
    "initial_retry_interval": timedelta,
    "max_retry_interval": timedelta,
    "retry_interval_factor": _NUMBER,
}
_TOOL_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "timeout": _NUMBER,
    "name": str,
    "at_most_once": bool,
}


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a step is executed."""

    run: RunOptions[Any] = field(default_factory=lambda: DEFAULT_RUN_OPTIONS)
    """Retries, as `ctx.run` takes them."""

    timeout: float | None = None
    """Seconds that one try may take; then it is cancelled and counts as failed."""

    name: str | None = None
    """Stands in for the tool's name in the step's name."""

    at_most_once: bool = False
    """Declare the step in the journal before it begins, and never begin it twice."""


def tool_options(
    tool: ToolsetTool[Any] | None, tool_name: str, *, base: StepOptions
) -> StepOptions | Literal[False]:
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
    if faults := tool_faults(tool_name, own):
        raise UserError("\n".join(faults))
    given = cast("dict[str, Any]", own)
    retries = {key: value for key, value in given.items() if key in _RETRY_FIELDS}
    own_options = {key: value for key, value in given.items() if key in _TOOL_FIELDS}
    return replace(base, run=replace(base.run, **retries), **own_options)


def tool_faults(tool_name: str, own: object) -> list[str]:
    """Say what is wrong with a tool's name and with its `metadata["restate"]`."""
    faults: list[str] = []
    if tool_name == "<lambda>":
        faults.append(
            "A lambda has no name that could identify its steps in the journal: give the tool one with "
            "`Tool(function, name=...)`."
        )
    if own is None or own is False:
        return faults
    if not isinstance(own, dict):
        faults.append(
            f'Tool {tool_name!r}: `metadata["restate"]` is a dict of options or `False`, '
            f"not {type(own).__name__}."
        )
        return faults
    given, known = cast("dict[str, Any]", own), {**_RETRY_FIELDS, **_TOOL_FIELDS}
    if unknown := sorted(given.keys() - known):
        faults.append(
            f'Tool {tool_name!r}: unknown options in `metadata["restate"]`: {", ".join(unknown)}. '
            f"Known are {', '.join(sorted(known))}."
        )
    for key in sorted(given.keys() & known):
        value, kinds = given[key], known[key]
        if value is not None and not isinstance(value, kinds):
            name = "a number" if kinds is _NUMBER else f"`{cast(type, kinds).__name__}`"
            faults.append(
                f'Tool {tool_name!r}: `{key}` in `metadata["restate"]` takes {name}, not {value!r}.'
            )
    return faults


def check_run_options(options: Mapping[str, RunOptions[Any] | None]) -> None:
    """Reject what would be ignored, all of it in one message."""
    defaults = RunOptions[Any]()
    faults = [
        f"`{key}` is a {type(value).__name__} and not `restate.RunOptions`"
        for key, value in options.items()
        if value is not None and not isinstance(value, RunOptions)  # pyright: ignore[reportUnnecessaryIsInstance]
    ]
    if faults:
        raise UserError(f"{'; '.join(faults)}: give `restate.RunOptions(max_attempts=3)`.")
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
