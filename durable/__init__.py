"""Run PydanticAI agents durably on Restate."""

from durable._agent_run import (
    Answer,
    Approve,
    Deny,
    PendingCall,
    SteeringMessage,
    Supply,
    agent_run,
)
from durable._agent_service import AgentService, AgentToolset, agent_service
from durable._agent_session import SessionMessage, agent_session
from durable._app import app
from durable._approvals import Approvals
from durable._capability import RestateDurability
from durable._context import restate_context
from durable._hosted_tools import HostedTool, HostedToolset
from durable._journaled import step
from durable._logfire import configure_logfire
from durable._operation_backend import idempotency_key
from durable._options import DEFAULT_RUN_OPTIONS
from durable._sagas import Saga, saga
from durable._sessions import Session, SessionStatus

__all__ = [
    "AgentService",
    "AgentToolset",
    "Answer",
    "Approvals",
    "Approve",
    "DEFAULT_RUN_OPTIONS",
    "Deny",
    "HostedTool",
    "HostedToolset",
    "PendingCall",
    "RestateDurability",
    "Saga",
    "Session",
    "SessionMessage",
    "SessionStatus",
    "SteeringMessage",
    "Supply",
    "agent_run",
    "agent_service",
    "agent_session",
    "app",
    "configure_logfire",
    "idempotency_key",
    "restate_context",
    "saga",
    "step",
]
