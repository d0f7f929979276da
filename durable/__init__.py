"""Run PydanticAI agents durably on Restate."""

from durable._app import app
from durable._capability import DEFAULT_RUN_OPTIONS, RestateDurability
from durable._context import restate_context

__all__ = ["DEFAULT_RUN_OPTIONS", "RestateDurability", "app", "restate_context"]
