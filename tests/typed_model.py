"""A model for tests that answers prompts with typed outputs, as a provider in JSON-schema mode does."""

import inspect
from collections.abc import Awaitable, Callable

from pydantic import BaseModel
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, TextPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.profiles import ModelProfile

Answer = BaseModel | str
"""An output, or text that may be none."""

JSON_SCHEMA_MODE = ModelProfile(
    supports_json_schema_output=True, default_structured_output_mode="native"
)


class TypedModel(FunctionModel):
    """Answers each request with what a function makes of the run's prompt.

    Args:
        answer: Gets the run's prompt; may raise what a provider's client would raise.
    """

    def __init__(self, answer: Callable[[str], Answer | Awaitable[Answer]]) -> None:
        self.asked: list[str] = []
        """The prompts in the order of the requests."""

        async def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
            prompt = _prompt(messages)
            self.asked.append(prompt)
            answered = answer(prompt)
            if inspect.isawaitable(answered):
                answered = await answered
            text = answered if isinstance(answered, str) else answered.model_dump_json()
            return ModelResponse(parts=[TextPart(text)])

        super().__init__(respond, profile=JSON_SCHEMA_MODE)


def _prompt(messages: list[ModelMessage]) -> str:
    first = messages[0]
    assert isinstance(first, ModelRequest)
    [part] = [part for part in first.parts if isinstance(part, UserPromptPart)]
    assert isinstance(part.content, str)
    return part.content
