"""Run PydanticAI agents durably on Restate."""

from durable._app import app
from durable._capability import DEFAULT_RUN_OPTIONS, RestateDurability
from durable._context import restate_context
from durable._operation_backend import idempotency_key

__all__ = [
    "DEFAULT_RUN_OPTIONS",
    "RestateDurability",
    "app",
    "idempotency_key",
    "restate_context",
]
