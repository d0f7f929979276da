"""Run PydanticAI agents durably on Restate."""

from durable._app import app
from durable._capability import RestateDurability
from durable._context import restate_context
from durable._journaled import step
from durable._operation_backend import idempotency_key
from durable._options import DEFAULT_RUN_OPTIONS
from durable._steering import SteeringMessage, agent_run

__all__ = [
    "DEFAULT_RUN_OPTIONS",
    "RestateDurability",
    "SteeringMessage",
    "agent_run",
    "app",
    "idempotency_key",
    "restate_context",
    "step",
]
