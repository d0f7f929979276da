"""Run PydanticAI agents durably on Restate."""

from durable._app import app
from durable._capability import RestateDurability
from durable._context import restate_context

__all__ = ["RestateDurability", "app", "restate_context"]
