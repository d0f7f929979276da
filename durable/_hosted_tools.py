"""Hosted tools: a handler of a Restate service is the tool of an agent.

The model's call becomes a Restate call: an invocation with a journal, retries and a line in the UI of its
own, in this process, in another one or in another language. It is made in handler code, where
parallel calls run beside each other, and it is an entry of the run's journal, so it is made exactly once
without an idempotency key: on replay the entry stands for the same invocation.

A handler that is given as a function brings its types along, as a function tool does. One that is given
by name is looked up in the server: what the admin API says about a service is journaled in a step.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from copy import copy
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any, cast
from urllib.parse import quote

import anyio
import httpx2
from pydantic_ai.exceptions import ModelRetry, ToolFailed, UserError
from pydantic_ai.tools import AgentDepsT, RunContext, ToolDefinition
from pydantic_ai.toolsets import AbstractToolset, ToolsetTool
from pydantic_core import SchemaValidator, core_schema
from restate import Context, TerminalError

from durable._context import Invocation, current_invocation
from durable._driver import InvocationCancelled
from durable._hosted_handlers import HostedHandler, from_description, from_function
from durable._names import hosted_toolset
from durable._operation_backend import run_step
from durable._options import StepOptions

_ARGUMENTS = SchemaValidator(core_schema.dict_schema(core_schema.str_schema()))
_NOT_FOUND = 404


@dataclass(frozen=True)
class HostedTool:
    """A handler as a tool, with how it is called."""

    handler: Callable[..., Awaitable[Any]] | str
    """A function decorated with `@service.handler()` or the like, or `"Service/handler"` for one that the
    server knows, or `"Service"` for all public handlers of a service."""

    _: KW_ONLY

    key: str | Callable[[RunContext[Any]], str] | None = None
    """The key of the virtual object or workflow: the name of an argument that the model fills in, which may
    be one that the handler has anyway, or a function of the run context, for a key that is not the
    model's to choose. `key=durable.idempotency_key` starts a workflow of its own for each call."""

    name: str | None = None
    """The tool's name, by default the handler's."""

    send: bool = False
    """Do not wait for the handler: the model is told the id of the invocation."""

    delay: timedelta | None = None
    """Send, and let the handler start so much later."""

    timeout: float | None = None
    """Seconds after which the call is cancelled and the model may try again."""


class HostedToolset(AbstractToolset[AgentDepsT]):
    """Handlers of Restate services as tools.

    In a handler that `durable.app` hosts, a tool call is a Restate call. Arguments are validated before.
    A terminal error of the handler is told to the model as a failed call; other failures are retried
    by Restate. When the run is cancelled or times out, so are the calls it waits for; what was sent stays.

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
            tools: The handlers; a `HostedTool` where one needs options.
            id: Names the toolset, and in the journal the step that looks services up.
            admin_url: The server's admin API, to look up handlers given by name. Handlers given as
                functions need it when another app hosts them.
            ingress_url: The server's ingress. With it, the tools also work outside a handler and inside a
                step, in notebooks and evals for instance, as ordinary requests.
            headers: Sent with requests to these URLs, such as `Authorization`.

        Raises:
            UserError: When something does not fit, all of it in one message.
        """
        self._id = id
        self._admin_url = admin_url
        self._ingress_url = ingress_url
        self._headers = dict(headers or {})
        given = [tool if isinstance(tool, HostedTool) else HostedTool(tool) for tool in tools]
        self._by_name = [tool for tool in given if isinstance(tool.handler, str)]
        found = _Found()
        for tool in given:
            found.check(tool)
            if callable(tool.handler):
                found.add(tool, lambda tool=tool: from_function(tool.handler, tool.key))
        if self._by_name and admin_url is None:
            found.faults.append("handlers given by name are looked up in the server: give `admin_url`")
        self._tools = found.tools(id)

    @property
    def id(self) -> str:
        """The toolset's id."""
        return self._id

    @property
    def tool_name_conflict_hint(self) -> str:
        """What to do about a name that another toolset has, too."""
        return "Give one of them another name with `HostedTool(..., name=...)`."

    async def for_run(self, ctx: RunContext[AgentDepsT]) -> "HostedToolset[AgentDepsT]":
        """Look up what this app does not host, in one step.

        Raises:
            UserError: When the server does not know it: Restate would try to call it again and again.
        """
        named = {cast(str, tool.handler).partition("/")[0] for tool in self._by_name}
        elsewhere = self._elsewhere(current_invocation())
        if not (services := sorted(named | {tool.handler.service for tool in elsewhere})):
            return self
        described = await self._look_up(services)
