"""A chat whose model and tool leave a trace on disk; tests kill its workers.

While the file `$CHAT_TRACE.hold` is there, the answer after the tool does not come.
"""

import asyncio
import os
from pathlib import Path

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

import durable
from tests.live.scripted import call

TRACE = Path(os.environ.get("CHAT_TRACE", "/dev/null"))


def trace(event: str) -> None:
    """Append a line that survives a kill."""
    file = os.open(TRACE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{event}\n".encode())
    os.close(file)


async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
    """Call the tool, then answer with the number of messages."""
    trace(f"model {len(messages)}")
    if isinstance(messages[-1].parts[-1], UserPromptPart):
        return ModelResponse(parts=[call("look", str(len(messages)))])
    while TRACE.with_suffix(".hold").exists():  # noqa: ASYNC110 - the worker is killed meanwhile
        await asyncio.sleep(0.05)
    return ModelResponse(parts=[TextPart(f"answer {len(messages)}")])


agent = Agent(FunctionModel(respond), name="chat", capabilities=[durable.RestateDurability()])


@agent.tool_plain
async def look() -> str:
    """Look."""
    trace("look")
    return "seen"


app = durable.app([durable.agent_session(agent)])
