"""The capability's options: what is wrong is said at construction, all at once."""

from datetime import timedelta
from importlib import metadata
from typing import Any

import pytest
import restate
from pydantic_ai import Agent, FunctionToolset, RunContext, Tool
from pydantic_ai.exceptions import UserError
from pydantic_ai.models.test import TestModel
from pydantic_ai.toolsets import ToolsetTool
from pydantic_ai.usage import RunUsage
from restate.serde import BytesSerde

import durable
from durable._context import current_invocation
from durable._options import StepOptions, tool_options
from durable.testing import InMemoryInvocation

BASE = StepOptions(run=durable.DEFAULT_RUN_OPTIONS)


def agent_with(metadata: Any) -> Agent:
    """An agent with one tool that has the given `restate` metadata."""
    agent = Agent(TestModel(), name="a", capabilities=[durable.RestateDurability()])

    @agent.tool_plain(metadata={"restate": metadata})
    def tool() -> str:
        return "ok"

    return agent


async def tool_of(agent: Agent) -> ToolsetTool[Any]:
    """The agent's tool as a run sees it."""
    [toolset] = [toolset for toolset in agent.toolsets if toolset.id == "<agent>"]
    ctx: RunContext[Any] = RunContext(deps=None, model=TestModel(), usage=RunUsage())
    return (await toolset.get_tools(ctx))["tool"]


def test_options_that_would_be_ignored_are_refused() -> None:
    """All faults are in one message."""
    with pytest.raises(UserError) as error:
        durable.RestateDurability(
            model_run_options=restate.RunOptions(serde=BytesSerde()),
            tool_run_options=restate.RunOptions(type_hint=str),
        )
    assert "`model_run_options` sets `serde`" in str(error.value)
    assert "`tool_run_options` sets `type_hint`" in str(error.value)


def test_an_agent_needs_a_name() -> None:
    """Step names are stored data, so they cannot be made up."""
    with pytest.raises(UserError, match="unique `name`"):
        Agent(TestModel(), capabilities=[durable.RestateDurability()])
    Agent(TestModel(), capabilities=[durable.RestateDurability(name="given")])


def test_twice_on_one_agent_is_refused() -> None:
    """One engine is enough."""
    with pytest.raises(UserError):
        Agent(
            TestModel(),
            name="a",
            capabilities=[durable.RestateDurability(), durable.RestateDurability()],
        )


async def test_tool_metadata_overrides_single_options() -> None:
    """A tool's own options are merged into those of its role; unknown ones are named."""
    tool = await tool_of(agent_with({"max_attempts": 3}))
    options = tool_options(tool, "tool", base=BASE)
    assert options is not False
    assert options.run.max_attempts == 3
    assert options.run.max_duration == timedelta(minutes=10)
    assert tool_options(None, "tool", base=BASE) is BASE


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"max_atempts": 3}, "unknown options .* max_atempts"),
        ("no", "is a dict of options or `False`, not str"),
        ({"timeout": "soon"}, "`timeout` .* takes a number, not 'soon'"),
        ({"max_duration": 3}, "`max_duration` .* takes `timedelta`, not 3"),
    ],
)
async def test_wrong_tool_metadata(metadata: Any, message: str) -> None:
    """The message names the tool and what is known, before the model is asked anything."""
    agent = agent_with(metadata)
    with pytest.raises(UserError, match=message):
        tool_options(await tool_of(agent), "tool", base=BASE)
    service = restate.Service("Wrong")

    @service.handler()
    async def run(ctx: restate.Context) -> None:
        await agent.run("go")

    invocation = InMemoryInvocation(run)
    with pytest.raises(restate.TerminalError, match=message):
        await invocation.run()
    assert not invocation.stored


def test_all_faults_of_an_agent_are_in_one_message() -> None:
    """What is known when the agent is made is said then: name, toolsets, tools, output functions."""

    def tool() -> str:
        return "ok"

    def send(to: str):
        return to

    with pytest.raises(UserError) as error:
        Agent(
            TestModel(),
            output_type=send,
            tools=[Tool(tool, metadata={"restate": {"retries": 3}}), lambda: "ok"],
            toolsets=[
                FunctionToolset([tool]),
                FunctionToolset([Tool(tool, name="no")], id="again"),
            ],
            capabilities=[durable.RestateDurability()],
        )
    message = str(error.value)
    assert "unique `name`" in message
    assert "Tool 'tool': unknown options" in message
    assert "A lambda has no name" in message
    assert "`FunctionToolset(id=...)`" in message
    assert "`send` has no return annotation" in message


def test_toolsets_of_one_id_are_refused() -> None:
    """Their steps could not be told apart."""
    toolsets = [FunctionToolset[object](id="same") for _ in range(2)]
    with pytest.raises(UserError, match="Two toolsets have the same `id` 'same'"):
        Agent(TestModel(), name="a", toolsets=toolsets, capabilities=[durable.RestateDurability()])


def test_options_of_a_wrong_type() -> None:
    """A dict looks like options, so the message says what to give instead."""
    wrong: Any = {"max_attempts": 3}
    with pytest.raises(UserError, match="`model_run_options` is a dict and not"):
        durable.RestateDurability(model_run_options=wrong)


def test_another_sdk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private names of the SDK are used, so a version outside the tested range is an error."""
    monkeypatch.setattr(metadata, "version", {"restate-sdk": "1.4.0"}.get)
    with pytest.raises(UserError, match=r"restate-sdk 1\.3\.x, but 1\.4\.0 is installed"):
        durable.RestateDurability()


def test_outside_a_handler_there_is_no_context() -> None:
    """The error says so; nothing raises `LookupError` as the SDK would."""
    assert current_invocation() is None
    with pytest.raises(UserError, match="outside a Restate handler"):
        durable.restate_context()
