"""Hosted tools: a handler of a Restate service is the tool of an agent.

The model's call becomes a Restate call: an invocation with a journal, retries and a line in the UI of its
own, in this process, in another one or in another language. It is made in handler code, so parallel
calls run beside each other, and it is an entry of the run's journal, so it is made exactly once without
an idempotency key: on replay the entry stands for the same invocation.

A handler given as a function brings its types along, as a function tool does. One given by name is
looked up in the server: what the admin API says about its service is journaled in a step.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import copy
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from keyword import iskeyword
from typing import Any

from pydantic_ai.exceptions import ModelRetry, ToolFailed, UserError
from pydantic_ai.tools import AgentDepsT, RunContext, ToolDefinition
from pydantic_ai.toolsets import AbstractToolset, ToolsetTool
from pydantic_core import SchemaValidator, core_schema
from restate import Context, TerminalError

from durable._calls import call
from durable._context import current_invocation
from durable._driver import InvocationCancelled
from durable._errors import original_error
from durable._hosted_handlers import HostedHandler, from_description, from_function, reduced
from durable._hosted_http import ServerURLs
from durable._names import hosted_toolset
from durable._operation_backend import run_step
from durable._options import StepOptions

_ARGUMENTS = SchemaValidator(core_schema.dict_schema(core_schema.str_schema()))


@dataclass(frozen=True)
class HostedTool:
    """A handler as a tool, and how it is called."""

    handler: Callable[..., Awaitable[Any]] | str
    """A function decorated with `@service.handler()` or the like; `"Service/handler"` for one that the
    server knows, or `"Service"` for all handlers of a service but the private ones."""

    _: KW_ONLY

    key: str | Callable[[RunContext[Any]], str] | None = None
    """The key of the virtual object or workflow: the name of an argument that the model fills in, which may
    be one that the handler has anyway, or a function of the run context where the key is not the
    model's to choose. `key=durable.idempotency_key` is a workflow of its own for each call."""

    name: str | None = None
    """The tool's name, by default the handler's."""

    send: bool = False
    """Do not wait for the handler: the model is told the id of the invocation."""

    delay: timedelta | None = None
    """Send, and let the handler start so much later."""

    timeout: float | None = None
    """Seconds after which the call is cancelled and the model may try again."""


@dataclass(frozen=True)
class _Tool:
    """A hosted tool whose handler is known."""

    options: HostedTool
    handler: HostedHandler

    @property
    def name(self) -> str:
        return self.options.name or self.handler.name

    @property
    def sends(self) -> bool:
        return self.options.send or self.options.delay is not None

    def faults(self) -> list[str]:
        key = self.options.key
        if self.handler.keyed and key is None:
            return [
                f'`{self.handler}` needs a key: `HostedTool(..., key="…")` names the argument that is the key'
            ]
        if not self.handler.keyed and key is not None:
            return [f"`{self.handler}` belongs to a service, which has no keys: leave `key` out"]
        own = self.handler.parameters["properties"].get(key) if isinstance(key, str) else None
        if own is not None and own.get("type") not in ("string", "integer"):
            return [f"the key of `{self.handler}` is text, which its argument `{key}` is not"]
        return []

    def definition(self) -> ToolDefinition:
        parameters, key = self.handler.parameters, self.options.key
        if isinstance(key, str):
            described = {
                "type": "string",
                "minLength": 1,
                "description": self.handler.key_description
                or f"Key of the `{self.handler.service}`.",
            }
            required = dict.fromkeys([key, *parameters.get("required", [])])
            parameters = {
                **parameters,
                "properties": {key: described, **parameters["properties"]},
                "required": list(required),
            }
        return ToolDefinition(
            name=self.name,
            parameters_json_schema=parameters,
            description=self.handler.description,
            return_schema=self.handler.result,
            timeout=self.options.timeout,
        )

    def check(self, ctx: RunContext[Any], /, **arguments: Any) -> None:
        self.request(arguments, ctx)

    def request(self, arguments: dict[str, Any], ctx: RunContext[Any]) -> tuple[str | None, bytes]:
        """Return the key and the body of the request, or raise what makes the model try again."""
        key, service = self.options.key, self.handler.service
        if key is None:
            return None, self.handler.encode(arguments)
        if callable(key):
            if not (value := key(ctx)):
                raise UserError(f"The function for the key of `{service}` returned {value!r}.")
            return value, self.handler.encode(arguments)
        value = arguments.get(key)
        if not isinstance(value, str | int) or not str(value):
            raise ModelRetry(f"`{key}` must say which `{service}` the call is for.")
        if key not in self.handler.parameters["properties"]:
            arguments = {name: it for name, it in arguments.items() if name != key}
        return str(value), self.handler.encode(arguments)

    def sent(self, invocation_id: str) -> dict[str, Any]:
        """Return what the model is told about an invocation that it does not wait for."""
        delay = self.options.delay
        when = {} if delay is None else {"starts_in_seconds": delay.total_seconds()}
        return {"status": "sent", "invocation_id": invocation_id, **when}


class HostedToolset(AbstractToolset[AgentDepsT]):
    """Handlers of Restate services as tools.

    In a handler that `durable.app` hosts, a tool call is a Restate call. Arguments are validated before.
    The model is told of a terminal error of the handler as a failed call, and of `ModelRetry` and
    `ToolFailed` as if a function tool had raised them; other failures are retried by Restate. When the run
    is cancelled or times out, so are the calls that it waits for; what was sent goes on.

    Example:
        ```python
        shop = durable.HostedToolset(
            lookup_order,
            durable.HostedTool(add_note, key="customer"),
            durable.HostedTool(remind, delay=timedelta(days=1)),
            "Warehouse",
            id="shop",
            admin_url="http://localhost:9070",
        )
        agent = Agent("openai:gpt-5-mini", toolsets=[shop], capabilities=[durable.RestateDurability()])
        ```
    """

    def __init__(
        self,
        *tools: HostedTool | Callable[..., Awaitable[Any]] | str,
        id: str,
        admin_url: str | None = None,
        ingress_url: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Create the toolset.

        Args:
            tools: The handlers, each in a `HostedTool` if it needs options.
            id: Names the toolset, and in the journal the step that looks services up.
            admin_url: The server's admin API, where handlers given by name are looked up, and functions
                that another app hosts.
            ingress_url: The server's ingress. With it, the tools also work outside a handler and inside a
                step, in a notebook for instance, as HTTP requests.
            headers: Sent with the requests to both, such as `Authorization`.

        Raises:
            UserError: When something does not fit, all of it in one message.
        """
        self._id = id
        self._server = ServerURLs(admin=admin_url, ingress=ingress_url, headers=headers or {})
        given = [tool if isinstance(tool, HostedTool) else HostedTool(tool) for tool in tools]
        faults: list[str] = []
        known: list[_Tool] = []
        self._by_name: list[tuple[HostedTool, str, str]] = []
        for tool in given:
            if wrong := _option_faults(tool):
                faults += wrong
            elif isinstance(tool.handler, str):
                service, _, handler = tool.handler.partition("/")
                self._by_name.append((tool, service, handler))
            else:
                try:
                    known.append(_Tool(tool, from_function(tool.handler, tool.key)))
                except UserError as error:
                    faults.append(str(error))
        if self._by_name and admin_url is None:
            faults.append("handlers given by name are looked up in the server: give `admin_url`")
        self._tools = self._collected(known, faults)

    @property
    def id(self) -> str:
        """The toolset's id."""
        return self._id

    @property
    def tool_name_conflict_hint(self) -> str:
        """What to do when another toolset has a tool of the same name."""
        return "Name it differently with `HostedTool(..., name=...)`, or use `.prefixed(...)`."

    async def for_run(self, ctx: RunContext[AgentDepsT]) -> "HostedToolset[AgentDepsT]":
        """Look up what this app does not host, in one step.

        Raises:
            UserError: When the server does not know it: Restate would try to call it again and again.
        """
        invocation = current_invocation()
        hosted = frozenset[str]() if invocation is None else invocation.services
        elsewhere = [
            tool.handler
            for tool in self._tools.values()
            if hosted and tool.handler.service not in hosted
        ]
        if elsewhere and self._server.admin is None:
            names = ", ".join(f"`{handler}`" for handler in elsewhere)
            raise UserError(
                f"{self.label} calls {names}, which this app does not host. Add the service: "
                "`durable.app([..., service])`. If another app hosts it, give the toolset an `admin_url`, so "
                "that it can be looked up: Restate would try to call what is not there again and again."
            )
        asked = [(handler.service, handler.name) for handler in elsewhere]
        asked += [(service, name) for _, service, name in self._by_name]
        if not asked:
            return self
        services = await self._look_up(sorted({service for service, _ in asked}))
        faults = _unknown(asked, services)
        found = [
            _Tool(tool, from_description(description, handler))
            for tool, service, name in self._by_name
            if (description := services[service]) is not None
            for handler, it in description["handlers"].items()
            if (it["public"] if not name else handler == name)
        ]
        run = copy(self)
        run._tools = self._collected([*self._tools.values(), *found], faults)
        return run

    async def get_tools(self, ctx: RunContext[AgentDepsT]) -> dict[str, ToolsetTool[AgentDepsT]]:
        """Return the handlers as tools."""
        return {
            name: ToolsetTool(
                toolset=self,
                tool_def=tool.definition(),
                max_retries=ctx.max_retries,
                args_validator=_ARGUMENTS,
                args_validator_func=tool.check,
            )
            for name, tool in self._tools.items()
        }

    async def call_tool(
        self,
        name: str,
        tool_args: dict[str, Any],
        ctx: RunContext[AgentDepsT],
        tool: ToolsetTool[AgentDepsT],
    ) -> Any:
        """Call the handler, or send the request to it.

        Raises:
            ToolFailed: With the handler's terminal error.
            ModelRetry: When the handler raised it, or the tool's `timeout` has passed.
            UserError: Outside a handler or inside a step, without an `ingress_url`.
        """
        hosted, invocation, timeout = self._tools[name], current_invocation(), tool.tool_def.timeout
        key, body = hosted.request(tool_args, ctx)
        try:
            async with asyncio.timeout(timeout):
                if invocation is not None:
                    return await _call(invocation.context, hosted, key, body)
                return await _call_over_http(self._server, hosted, key, body)
        except TimeoutError:
            raise ModelRetry(f"Timed out after {timeout} seconds.") from None
        except InvocationCancelled:
            raise  # Restate has cancelled the call as well
        except TerminalError as error:
            raised = original_error(error)
            told = isinstance(raised, (ModelRetry, ToolFailed))
            raise (raised if told else ToolFailed(error.message)) from error

    def _collected(self, tools: Sequence[_Tool], faults: list[str]) -> dict[str, _Tool]:
        """Return the tools by name, or raise `UserError` with the faults and those of the tools."""
        faults = [*faults, *(fault for tool in tools for fault in tool.faults())]
        by_name: dict[str, _Tool] = {}
        for tool in tools:
            if (other := by_name.setdefault(tool.name, tool)) is not tool:
                faults.append(
                    f"`{other.handler}` and `{tool.handler}` are both named `{tool.name}`: give one "
                    "another `name`"
                )
        if faults:
            raise UserError(f"{self.label}: {'; '.join(faults)}.")
        return by_name

    async def _look_up(self, services: Sequence[str]) -> dict[str, Any]:
        async def describe() -> dict[str, Any]:
            found = {service: await self._server.describe(service) for service in services}
            return {service: it and reduced(it) for service, it in found.items()}

        if current_invocation() is None:
            return await describe()
        found: Any = await run_step(hosted_toolset(self._id), describe, StepOptions())
        return found


async def _call(context: Context, tool: _Tool, key: str | None, body: bytes) -> Any:
    service, handler, delay = tool.handler.service, tool.handler.name, tool.options.delay
    if not tool.sends:
        return tool.handler.decode(await call(context, service, handler, body, key))
    handle = context.generic_send(service, handler, body, key, delay)
    return tool.sent(await handle.invocation_id())


async def _call_over_http(server: ServerURLs, tool: _Tool, key: str | None, body: bytes) -> Any:
    if server.ingress is None:
        raise UserError(
            f"The hosted tool `{tool.name}` is called by a handler that `durable.app` hosts, but this code "
            "runs outside one, or inside a step. Run the agent in the handler itself, or give "
            "`HostedToolset(..., ingress_url=...)` to call it over HTTP."
        )
    service, handler, delay = tool.handler.service, tool.handler.name, tool.options.delay
    answer = await server.call(service, handler, body, key=key, send=tool.sends, delay=delay)
    if tool.sends:
        return tool.sent(answer.json()["invocationId"])
    return tool.handler.decode(answer.content)


def _option_faults(tool: HostedTool) -> list[str]:
    """Return what is wrong with the options by themselves."""
    found: list[str] = []
    if isinstance(tool.handler, str):
        parts = tool.handler.split("/")
        if not all(parts) or len(parts) > 2:
            found.append(f'{tool.handler!r} is neither "Service" nor "Service/handler"')
        elif tool.name is not None and len(parts) == 1:
            found.append(f"{tool.handler!r} may have several handlers, so it cannot have a `name`")
    if isinstance(tool.key, str) and (not tool.key.isidentifier() or iskeyword(tool.key)):
        found.append(f"the `key` {tool.key!r} cannot be the name of an argument")
    if tool.delay is not None and tool.delay < timedelta(0):
        found.append(f"`delay` must not be negative, got {tool.delay!r}")
    if tool.timeout is not None and tool.timeout <= 0:
        found.append(f"`timeout` must be positive, got {tool.timeout!r}")
    if tool.timeout is not None and (tool.send or tool.delay is not None):
        found.append("`timeout` has no effect on what is sent")
    return found


def _unknown(
    asked: Sequence[tuple[str, str]], services: Mapping[str, dict[str, Any] | None]
) -> list[str]:
    faults: list[str] = []
    for service, handler in dict.fromkeys(asked):
        description = services[service]
        if description is None:
            faults.append(f"the server knows no service `{service}`: register what hosts it")
        elif handler and handler not in description["handlers"]:
            there = ", ".join(f"`{name}`" for name in description["handlers"])
            faults.append(f"`{service}` has no handler `{handler}`; it has {there}")
    return faults
