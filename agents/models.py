"""Which LLM the agents use.

`AGENTS_MODEL` decides: `openai:NAME`, `anthropic:NAME` or `local`. Without it the first of these
that is configured: OpenAI (`OPENAI_API_KEY`, or `OPENAI_BASE_URL` for any OpenAI-compatible
server), Anthropic (`ANTHROPIC_API_KEY`), and else a small local model that needs no key. With
`OPENAI_BASE_URL` set `AGENTS_MODEL`, too, to the name that server gives its model.

Every model answers typed outputs in its provider's JSON-schema mode, so one agent definition
(`output_type=SomeModel`) is right for all of them.
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio.to_thread
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.profiles import JsonSchemaTransformer, ModelProfile
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import RunContext

from agents.local_model import MODEL_NAME, LocalModelError, shared_url

OPENAI_DEFAULT = "gpt-6-luna"
ANTHROPIC_DEFAULT = "claude-haiku-5-5"

LOCAL_STRING = 300
"""No string in an answer of the local model is longer, whatever its schema says."""
LOCAL_LIST = 5
"""No list in an answer of the local model has more items, whatever its schema says."""

_OPENAI_URL = "https://api.openai.com/v1"
_CHOICES = (
    "It has to be `openai:NAME` (for example `openai:"
    + OPENAI_DEFAULT
    + "`; with `OPENAI_BASE_URL` the name "
    "of a model on that server), `anthropic:NAME` (for example `anthropic:"
    + ANTHROPIC_DEFAULT
    + "`) or "
    "`local`. Unset it to use whatever key is set, or the local model without one."
)


def configured_model() -> Model:
    """Build the model that the environment asks for. Starts nothing and sends nothing.

    Raises:
        UserError: `AGENTS_MODEL` names no model, or the key for it is missing.
    """
    provider, name = _choice()
    if provider == "local":
        return LocalModel()
    if provider == "anthropic":
        return _anthropic(name)
    if base_url := os.environ.get("OPENAI_BASE_URL"):
        # What all OpenAI-compatible servers understand is chat completions; local ones need no key.
        key = os.environ.get("OPENAI_API_KEY") or "not-needed"
        server = OpenAIProvider(base_url=base_url, api_key=key)
        return OpenAIChatModel(name, provider=server, profile=_json_schema_mode)
    openai = OpenAIProvider(base_url=_OPENAI_URL, api_key=_key("OPENAI_API_KEY", "openai"))
    return OpenAIResponsesModel(name, provider=openai, profile=_json_schema_mode)


def _anthropic(name: str) -> Model:
    # Imported here: it takes seconds, at each start of a worker that may well not use it.
    from pydantic_ai.models.anthropic import AnthropicModel  # noqa: PLC0415
    from pydantic_ai.providers.anthropic import AnthropicProvider  # noqa: PLC0415

    provider = AnthropicProvider(api_key=_key("ANTHROPIC_API_KEY", "anthropic"))
    return AnthropicModel(name, provider=provider, profile=_json_schema_mode)


def _choice() -> tuple[str, str]:
    """Return provider and model name; an empty variable counts as unset."""
    if chosen := os.environ.get("AGENTS_MODEL"):
        if chosen == "local":
            return "local", MODEL_NAME
        provider, _, name = chosen.partition(":")
        if provider not in ("openai", "anthropic") or not name.strip():
            raise UserError(f"`AGENTS_MODEL={chosen}` names no model. {_CHOICES}")
        return provider, name.strip()
    if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"):
        return "openai", OPENAI_DEFAULT
    if os.environ.get("ANTHROPIC_API_KEY"):
        return "anthropic", ANTHROPIC_DEFAULT
    return "local", MODEL_NAME


def _key(variable: str, provider: str) -> str:
    if key := os.environ.get(variable):
        return key
    raise UserError(
        f"`AGENTS_MODEL` asks for a model of {provider!r}, but `{variable}` is not set. "
        "Set it, or `AGENTS_MODEL=local` for the local model, which needs no key."
    )


def _json_schema_mode(profile: ModelProfile) -> ModelProfile:
    if profile.get("supports_json_schema_output"):
        profile["default_structured_output_mode"] = "native"
    return profile


class _BoundedSchema(JsonSchemaTransformer):
    """Gives every string and list of a schema an end that the small model reaches in its tokens.

    llama.cpp compiles `maxLength` and `maxItems` into the grammar that it samples by. Without them
    a model this small repeats itself until its tokens are used up, which leaves broken JSON.
    (OpenAI's strict form of a schema is written for OpenAI's limits and drops keywords.)
    """

    def transform(self, schema: dict[str, Any]) -> dict[str, Any]:
        if schema.get("type") == "string" and not schema.keys() & {"enum", "const", "format"}:
            schema["maxLength"] = min(schema.get("maxLength", LOCAL_STRING), LOCAL_STRING)
        if schema.get("type") == "array":
            schema["maxItems"] = min(schema.get("maxItems", LOCAL_LIST), LOCAL_LIST)
        return schema


def _local_profile(profile: ModelProfile) -> ModelProfile:
    profile["json_schema_transformer"] = _BoundedSchema
    return _json_schema_mode(profile)


class LocalModel(OpenAIChatModel):
    """SmolLM2 on this machine through the `openai` client; the first request starts it.

    It is started once per process and stops with it, see `agents.local_model`. A model that runs
    already is used when its URL is in `AGENTS_LOCAL_URL`.
    """

    def __init__(self) -> None:
        super().__init__(
            MODEL_NAME,
            # The address is known once the model runs.
            provider=OpenAIProvider(base_url="http://127.0.0.1:0/v1", api_key="not-needed"),
            profile=_local_profile,
            settings=ModelSettings(
                max_tokens=2048,
                temperature=0.3,
                frequency_penalty=0.4,  # fewer answers like `1.1.1.1...`, which take most time
                timeout=300,  # generous: with all slots taken a request waits for its turn
            ),
        )

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        await self._locate()
        return await super().request(messages, model_settings, model_request_parameters)

    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[StreamedResponse]:
        await self._locate()
        async with super().request_stream(
            messages, model_settings, model_request_parameters, run_context
        ) as response:
            yield response

    async def _locate(self) -> None:
        try:
            self.client.base_url = await anyio.to_thread.run_sync(shared_url)
        except LocalModelError as error:
            raise UserError(str(error)) from error


class ConfiguredModel(WrapperModel):
    """The model the environment asks for, looked up when it is first used.

    Agents are module-level objects: importing them must need no key. It is one instance whatever
    the provider, so it is each agent's *default* model for the journal, and step names do not
    change when the provider does.
    """

    def __init__(self) -> None:
        Model.__init__(self)  # not `WrapperModel.__init__`, which wants the wrapped model now

    def __getattr__(self, item: str) -> Any:
        if item == "wrapped":
            self.wrapped = configured_model()
            return self.wrapped
        return super().__getattr__(item)

    def check(self) -> None:
        """Look the model up now, so that a program with a wrong configuration ends at its start.

        Raises:
            UserError: See `configured_model`.
        """
        _ = self.wrapped


DEFAULT_MODEL = ConfiguredModel()
