"""Models that follow a script, and a count of what was done."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence

from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
)
from pydantic_ai.models.function import AgentInfo, DeltaToolCall, FunctionModel

done: Counter[str] = Counter()
"""How often each thing was done, by name; empty when a test begins."""


def call(name: str, id: str | None = None, **args: object) -> ToolCallPart:
    """A tool call, whose id is the tool's name unless given."""
    return ToolCallPart(name, args, tool_call_id=id or name)


def script(*turns: Sequence[ToolCallPart], name: str = "model") -> FunctionModel:
    """A model that makes the calls of each turn, then answers with what the last ones returned."""

    def answer(messages: list[ModelMessage]) -> ModelResponse:
        done[name] += 1
        turn = sum(isinstance(message, ModelResponse) for message in messages)
        if turn < len(turns):
            return ModelResponse(parts=turns[turn])
        return ModelResponse(parts=[TextPart("; ".join(results(messages)) or "hello")])

    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        return answer(messages)

    async def stream(
        messages: list[ModelMessage], info: AgentInfo
    ) -> AsyncIterator[str | dict[int, DeltaToolCall]]:
        for number, part in enumerate(answer(messages).parts):
            if isinstance(part, ToolCallPart):
                arguments = part.args_as_json_str()
                yield {
                    number: DeltaToolCall(part.tool_name, arguments, tool_call_id=part.tool_call_id)
                }
            elif isinstance(part, TextPart):
                for word in part.content.split():
                    yield f"{word} "

    return FunctionModel(respond, stream_function=stream, model_name=name)


def calls(*names: str) -> FunctionModel:
    """A model that calls the tools `names` at once, then answers with what they returned."""
    turn = [call(name, f"{number}-{name}") for number, name in enumerate(names)]
    return script(turn) if turn else script()


def results(messages: Sequence[ModelMessage]) -> list[str]:
    """What the last request tells the model about its calls."""
    last = messages[-1]
    assert isinstance(last, ModelRequest)
    return [
        f"{part.tool_name}={part.model_response_str()}"
        for part in last.parts
        if isinstance(part, ToolReturnPart)
    ]
