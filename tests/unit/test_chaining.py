"""Chaining: the request's bounds and what each step is given."""

import pytest
from pydantic import ValidationError
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, TextPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.profiles import ModelProfile

from agents.chaining import Transformed, step_prompt, transformer
from services.chaining import CallChainingRequest


async def test_a_step_is_given_its_instruction_and_the_text() -> None:
    """Both are in the prompt; the typed result is the text alone."""

    def shout(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        request = messages[-1]
        assert isinstance(request, ModelRequest)
        [prompt] = [part for part in request.parts if isinstance(part, UserPromptPart)]
        assert prompt.content == "Instruction: Shout.\n\nInput:\nhello"
        return ModelResponse(parts=[TextPart(Transformed(text="HELLO").model_dump_json())])

    profile = ModelProfile(
        supports_json_schema_output=True, default_structured_output_mode="native"
    )
    with transformer.override(model=FunctionModel(shout, profile=profile)):
        result = await transformer.run(step_prompt(prompt="Shout.", text="hello"))
    assert result.output == Transformed(text="HELLO")


def test_the_example_request_has_the_figures_and_four_prompts() -> None:
    """`{}` is a whole request, so the playground works without typing."""
    request = CallChainingRequest.model_validate_json("{}")
    assert len(request.prompts) == 4
    for figure in (
        "92 points",
        "45 %",
        "23 %",
        "5 %",
        "8 %",
        "43 USD",
        "78 %",
        "87 points",
        "34 %",
    ):
        assert figure in request.text


def test_the_example_prompts_are_not_shared() -> None:
    """Changing one request's prompts changes no other request's."""
    CallChainingRequest().prompts.clear()
    assert len(CallChainingRequest().prompts) == 4


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"prompts": []}', ("prompts",)),
        ('{"prompts": ["a", " "]}', ("prompts", 1)),
        ('{"prompts": "a"}', ("prompts",)),
        ('{"text": 1}', ("text",)),
        ('{"text": "  "}', ("text",)),
        ('{"prompt": ["a"]}', ("prompt",)),
    ],
)
def test_bad_input_names_the_field(body: str, field: tuple[str | int, ...]) -> None:
    """`durable.app` turns this into a 400."""
    with pytest.raises(ValidationError) as error:
        CallChainingRequest.model_validate_json(body)
    assert error.value.errors()[0]["loc"] == field
