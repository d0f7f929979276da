"""Agents as services: one line hosts an agent, and makes it a tool of other agents.

    caller → AgentService/run → agent → output
    agent → tool call → AgentService/delegate → agent → output and usage → agent

A delegate is an invocation of its own, in any process that hosts the service, with a journal, retries and a line
in the UI. What it uses counts on the account of the agent that called it, under that agent's limits, its
spans lie under the tool call, and it is cancelled with the run that waits for it.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, Generic, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic_ai import format_as_xml
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.exceptions import AgentRunError, ModelRetry, ToolFailed, UserError
from pydantic_ai.messages import UserContent
from pydantic_ai.tools import AgentDepsT, RunContext, ToolDefinition
from pydantic_ai.toolsets import AbstractToolset, ToolsetTool
from pydantic_ai.usage import RunUsage, UsageLimits
from pydantic_core import SchemaValidator, core_schema, from_json, to_json
from restate import Context, Service, TerminalError
from restate.serde import Serde

from durable import _calls
from durable._capability import RestateDurability
from durable._context import current_invocation
from durable._driver import InvocationCancelled
from durable._errors import original_error
from durable._sdk import Handler, TypeHint, types_from_output_spec

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")

MAX_PROMPT = 8 * 2**20
"""Characters in a prompt, unless `agent_service` has an `input_type`."""


def _says_something(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return prompt


Prompt = Annotated[str, Field(max_length=MAX_PROMPT), AfterValidator(_says_something)]
"""What an agent takes unless something else is said."""

_ARGUMENTS = SchemaValidator(core_schema.dict_schema(core_schema.str_schema()))


class _Delegation(BaseModel):
    """What an agent hands over with a task."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    input: Any
    usage: RunUsage
    limits: UsageLimits | None


class _Delivery(BaseModel):
    """What the delegate hands back."""

    output: Any
    used: RunUsage


class AgentService(Service, Generic[InputT, OutputT]):
    """A Restate service that hosts an agent: see `agent_service`.

    Other handlers call it with `await ctx.service_call(service.run, arg=...)`.
    """

    def __init__(
        self,
        agent: AbstractAgent[Any, OutputT],
        *,
        name: str,
        input_type: type[InputT],
        prompt: Callable[[InputT], str | Sequence[UserContent]],
        deps: Callable[[Context, InputT], Any] | None,
        **options: Any,
    ) -> None:
        super().__init__(name, **options)
        self.agent = agent
        self.input = TypeAdapter[InputT](input_type)
        self._prompt = prompt
        self._deps = deps

        async def run(ctx: Context, input: InputT) -> OutputT:
            return (await self._run(ctx, input)).output

        async def delegate(ctx: Context, delegation: _Delegation) -> _Delivery:
            before = delegation.usage
            usage = RunUsage() + before
            input = self.input.validate_json(to_json(delegation.input))
            result = await self._run(ctx, input, usage=usage, usage_limits=delegation.limits)
            return _Delivery(output=result.output, used=usage - before)

        types: Sequence[Any] = types_from_output_spec(agent.output_type)
        output: TypeAdapter[Any] = TypeAdapter(reduce(lambda one, other: one | other, types))
        self.run: Callable[[Context, InputT], Awaitable[OutputT]] = self.handler(
            input_serde=_TypedSerde(self.input), output_serde=_TypedSerde(output)
        )(run)
        self.handler(ingress_private=True)(delegate)
        handlers: dict[str, Handler[Any, Any]] = cast(Any, self).handlers
        io = handlers["run"].handler_io
        io.input_type = TypeHint(input_type, generate_json_schema=self.input.json_schema)
        io.output_type = TypeHint(Any, generate_json_schema=agent.output_json_schema)

    async def _run(self, ctx: Context, input: InputT, **options: Any) -> Any:
        deps = {} if self._deps is None else {"deps": self._deps(ctx, input)}
        return await self.agent.run(self._prompt(input), **deps, **options)

    async def run_plainly(self, input: InputT, ctx: RunContext[Any]) -> OutputT:
        """Run the agent as a delegate in this process, without Restate.

        Raises:
            UserError: When its dependencies are made from a handler's context.
        """
        if self._deps is not None:
            raise UserError(
                f"The agent of `{self.name}` gets its `deps` from a handler's context, so it can only be called in a "
                "handler that `durable.app` hosts."
            )
        prompt = self._prompt(input)
        result = await self.agent.run(prompt, usage=ctx.usage, usage_limits=ctx.usage_limits)
        return result.output


def agent_service(
    agent: AbstractAgent[Any, OutputT],
    *,
    name: str | None = None,
    input_type: Any = Prompt,
    prompt: Callable[[Any], str | Sequence[UserContent]] | None = None,
    deps: Callable[[Context, Any], Any] | None = None,
    **options: Any,
) -> AgentService[Any, OutputT]:
    """Host `agent` as a Restate service with the handler `run`.

    Its input and output types are those of the handler, with their JSON schemas in Restate's UI and OpenAPI.

    Example:
        ```python
        poet = durable.agent_service(agent)
        app = durable.app([poet])
        ```
        ```console
        $ curl localhost:8080/poet/run --json '"A haiku about spring"'
        ```

    Args:
        agent: An agent with a name and the capability `RestateDurability`.
        name: The service's name, default the agent's.
        input_type: What `run` takes: any type that Pydantic can validate, by default the prompt, which must not be
            empty.
        prompt: Makes the prompt from the input. By default an input that is no text is formatted as XML.
        deps: Makes the agent's dependencies, from the handler's context and the input. It is called in handler code:
            on each replay.
        options: What `restate.Service` takes, such as `invocation_retry_policy`.

    Raises:
        UserError: When the agent has no name or is not durable, all of it in one message.
    """
    faults: list[str] = []
    if (name or agent.name) is None:
        faults.append("it has no name: give it one, or the service a `name`")
    capability = RestateDurability.from_agent(agent)
    if capability is None:
        faults.append("it is not durable: add `RestateDurability()` to its `capabilities`")
    if faults:
        raise UserError(f"The agent cannot be hosted: {'; '.join(faults)}.")
    return AgentService(
        agent,
        name=cast(str, name or agent.name),
        input_type=input_type,
        prompt=prompt or _as_prompt,
        deps=deps,
        **options,
    )


def _as_prompt(input: Any) -> str:
    return input if isinstance(input, str) else format_as_xml(input, root_tag="input")


class _TypedSerde(Serde[Any]):
    """Reads JSON as a type, and writes what it is given."""

    def __init__(self, adapter: TypeAdapter[Any]) -> None:
        self._adapter = adapter

    def deserialize(self, buf: bytes) -> Any:
        return self._adapter.validate_json(buf)

    def serialize(self, obj: Any) -> bytes:
        return to_json(obj)


@dataclass
class AgentToolset(AbstractToolset[AgentDepsT]):
    """Agents that are hosted as services, as tools of another agent.

    A tool is named as the agent and described by its `description`. What a delegate uses counts for the run that
    called it, and against its limits; an error that ends the delegate's run, ends that run too, as it does
    where agents call each other without Restate.

    Example:
        ```python
        research = durable.agent_service(researcher)
        editor = Agent(
            "openai:gpt-5-mini",
            name="editor",
            toolsets=[durable.AgentToolset([research])],
            capabilities=[durable.RestateDurability()],
        )
        app = durable.app([research, durable.agent_service(editor)])
        ```
    """

    services: Sequence[AgentService[Any, Any]]
    """What `agent_service` returned. Another app may host them too, under the same names."""

    toolset_id: str = "agents"

    def __post_init__(self) -> None:
        """Name the tools.

        Raises:
            UserError: When two agents give the same name.
        """
        self._services = {_tool_name(service): service for service in self.services}
        if len(self._services) < len(self.services):
            names = ", ".join(_tool_name(service) for service in self.services)
            raise UserError(f"Two agents make tools of one name ({names}): give each its own.")

    @property
    def id(self) -> str:
        """The toolset's id."""
        return self.toolset_id

    async def get_tools(self, ctx: RunContext[AgentDepsT]) -> dict[str, ToolsetTool[AgentDepsT]]:
        """Return the agents as tools."""
        return {
            name: ToolsetTool(
                toolset=self,
                tool_def=ToolDefinition(
                    name=name,
                    description=service.agent.description,
                    parameters_json_schema=_parameters(service),
                ),
                max_retries=ctx.max_retries,
                args_validator=_ARGUMENTS,
            )
            for name, service in self._services.items()
        }

    async def call_tool(
        self,
        name: str,
        tool_args: dict[str, Any],
        ctx: RunContext[AgentDepsT],
        tool: ToolsetTool[AgentDepsT],
    ) -> Any:
        """Have the agent do it, in an invocation of its own.

        Raises:
            ModelRetry: When the arguments do not fit the agent's input type.
            AgentRunError: The error that ended the delegate's run.
            ToolFailed: When the delegate's invocation ended in another way.
        """
        service = self._services[name]
        try:
            input = service.input.validate_json(
                to_json(tool_args if _is_object(service) else tool_args.get("prompt"))
            )
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False)
            raise ModelRetry(to_json(problems).decode()) from error
        invocation = current_invocation()
        if invocation is None:
            return await service.run_plainly(input, ctx)
        delegation = _Delegation(input=input, usage=ctx.usage, limits=ctx.usage_limits)
        try:
            delivered = await _calls.call(
                invocation.context, service.name, "delegate", to_json(delegation)
            )
        except InvocationCancelled:
            raise
        except TerminalError as failure:
            error = original_error(failure)
            if isinstance(error, AgentRunError | UserError):
                raise error from failure
            raise ToolFailed(failure.message) from failure
        delivery = _Delivery.model_validate(from_json(delivered))
        ctx.usage.incr(delivery.used)
        return delivery.output


def _tool_name(service: AgentService[Any, Any]) -> str:
    return "".join(it if it.isalnum() else "_" for it in service.agent.name or service.name)


def _is_object(service: AgentService[Any, Any]) -> bool:
    return service.input.json_schema().get("type") == "object"


def _parameters(service: AgentService[Any, Any]) -> dict[str, Any]:
    if _is_object(service):
        return service.input.json_schema()
    prompt = {
        "description": "What it is to do, with all it needs to know.",
        **service.input.json_schema(),
    }
    return {"type": "object", "properties": {"prompt": prompt}, "required": ["prompt"]}
