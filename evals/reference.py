"""A model that says what the datasets' references say: all evaluators pass it, or the dataset is wrong.

It is asked like any other model, so what it checks is the whole way: prompts, agents, services, evaluators.
"""

from collections.abc import Iterable
from typing import Any, cast

from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ModelResponsePart,
    UserPromptPart,
)
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.profiles import ModelProfile
from pydantic_evals import Case

from evals.patterns import EVAL_PATTERNS, CaseMetadata, Exchange

REFERENCE = "reference"
"""The name of this model on the command line."""


class ReferenceModel(FunctionModel):
    """Answers the runs of agents that it knows, and no others.

    Args:
        exchanges: What it is asked, and what it answers.
    """

    def __init__(self, exchanges: Iterable[Exchange]) -> None:
        self._answers = {(kind.__name__, prompt): turns for kind, prompt, turns in exchanges}
        super().__init__(
            self._respond,
            model_name=REFERENCE,
            profile=ModelProfile(
                supports_json_schema_output=True, default_structured_output_mode="native"
            ),
        )

    def _respond(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        output = info.model_request_parameters.output_object
        assert output is not None
        return ModelResponse(parts=self.answer(str(output.name), messages))

    def answer(self, output: str, messages: list[ModelMessage]) -> list[ModelResponsePart]:
        """Return what comes next in the run of an agent with this output type."""
        turns = self._answers.get((output, _prompt(messages)))
        if turns is None:
            raise AssertionError(f"no case has this prompt for {output}: {_prompt(messages)}")
        turn = sum(isinstance(message, ModelResponse) for message in messages)
        return list(turns[min(turn, len(turns) - 1)])


def exchanges_of(pattern: str, cases: Iterable[Case[Any, Any, Any]]) -> Iterable[Exchange]:
    """Return all that is asked in these cases of a pattern, and the answers of their references."""
    for case in cases:
        if case.metadata is not None:  # a run that was exported has none
            metadata = cast(CaseMetadata[Any], case.metadata)
            yield from EVAL_PATTERNS[pattern].script(case.inputs, metadata.reference)


def _prompt(messages: list[ModelMessage]) -> str:
    first = messages[0]
    assert isinstance(first, ModelRequest)
    [prompt] = [part.content for part in first.parts if isinstance(part, UserPromptPart)]
    return str(prompt)
