"""`durable.agent_session`: a virtual object that holds conversations with an agent, by session."""

import re
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any

import restate
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import UserContent
from pydantic_ai.tools import AgentDepsT
from restate import ObjectContext, ObjectSharedContext, TerminalError

from durable._capability import RestateDurability
from durable._sdk import TypeHint, handler_from_callable
from durable._sessions import MESSAGES, Session, SessionStatus

MAX_MESSAGE_SIZE = 8 * 2**20
"""Bytes that a request to a session may have, unless `agent_session` says otherwise."""

_SERVICE_NAME = re.compile(r"([a-zA-Z]|_[a-zA-Z0-9])[a-zA-Z0-9._-]*")


class SessionMessage(BaseModel):
    """What a user says in a session."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[UserContent] = Field(
        examples=["Hello!"], description="Text, or content parts as in a user prompt."
    )

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str | list[UserContent]) -> str | list[UserContent]:
        parts = [prompt] if isinstance(prompt, str) else prompt
        if all(isinstance(part, str) and not part.strip() for part in parts):
            raise ValueError("the prompt is empty")
        return prompt


def agent_session(
    agent: AbstractAgent[AgentDepsT, Any],
    *,
    name: str | None = None,
    deps: AgentDepsT = None,
    expire_after: timedelta | None = None,
    max_message_size: int = MAX_MESSAGE_SIZE,
) -> restate.VirtualObject:
    """Return a virtual object that holds conversations with `agent`; its key is the session's id.

    - `message` takes a `SessionMessage`, runs the agent on it and the session's messages, and returns the agent's
      output. One turn runs at a time, the others wait. A turn is in the history once, whatever happens to the
      worker; one that fails is not in it, and the session goes on.
    - `history` returns the messages and `status` a `SessionStatus`, while a turn runs too.
    - `clear` forgets the session, when the turns before it have ended.

    The session's key is PydanticAI's `conversation_id`, so traces group by it.

    Example:
        ```python
        chat = durable.agent_session(agent, expire_after=timedelta(days=30))
        app = durable.app([chat])
        ```

    Args:
        agent: An agent with `RestateDurability`.
        name: The name of the object, default the agent's.
        deps: The agent's dependencies, for all sessions.
        expire_after: Forget a session that was idle for so long.
        max_message_size: Bytes that a request may have.

    Raises:
        UserError: When the agent is not durable, or an option is wrong.
    """
    sessions = restate.VirtualObject(
        _checked_name(agent, name),
        description=f"Conversations with the agent `{agent.name}`, by session.",
    )
    expire = _add_other_handlers(sessions)
    _check_options(expire_after, max_message_size)

    @sessions.handler()
    async def message(ctx: ObjectContext, message: SessionMessage) -> Any:
        """Say something to the agent and return its answer."""
        size = len(ctx.request().body)
        if size > max_message_size:
            raise TerminalError(
                f"The message has {size} bytes, more than the {max_message_size} that a message may have.",
                status_code=413,
            )

        def expire_later(last_active: datetime) -> None:
            if expire_after is not None:
                seen = last_active.isoformat()
                ctx.object_send(expire, key=ctx.key(), arg=seen, send_delay=expire_after)

        session = await Session.open(ctx, when_idle=expire_later)
        return (await session.run(agent, message.prompt, deps=deps)).output

    schema = agent.output_json_schema()
    io = handler_from_callable(message).handler_io
    io.output_type = TypeHint(Any, generate_json_schema=lambda: schema)
    return sessions


def _add_other_handlers(
    sessions: restate.VirtualObject,
) -> Callable[[ObjectContext, str], Awaitable[None]]:
    """Add what does not need the agent, and return the handler that forgets idle sessions."""

    @sessions.handler(kind="shared", output_serde=MESSAGES, journal_retention=timedelta(0))
    async def history(ctx: ObjectSharedContext) -> list[Any]:
        """Return the messages of the session, in PydanticAI's JSON form."""
        return await Session.history(ctx)

    @sessions.handler(kind="shared", state_preload=False, journal_retention=timedelta(0))
    async def status(ctx: ObjectSharedContext) -> SessionStatus:
        """Return what the session is doing, how many turns it has and what they used."""
        return await Session.status(ctx)

    @sessions.handler(state_preload=False)
    async def clear(ctx: ObjectContext) -> None:
        """Forget the session."""
        ctx.clear_all()

    @sessions.handler(state_preload=False, ingress_private=True)
    async def expire(ctx: ObjectContext, seen: str) -> None:
        """Forget the session unless it was active since it was seen."""
        last_active = (await Session.status(ctx)).last_active
        if last_active is not None and last_active.isoformat() == seen:
            ctx.clear_all()

    return expire


def _check_options(expire_after: timedelta | None, max_message_size: int) -> None:
    faults: list[str] = []
    if expire_after is not None and expire_after <= timedelta(0):
        faults.append(f"`expire_after` must be positive, got {expire_after!r}")
    if max_message_size <= 0:
        faults.append(f"`max_message_size` must be positive, got {max_message_size}")
    if faults:
        raise UserError(f"{'; '.join(faults)}.")


def _checked_name(agent: AbstractAgent[Any, Any], name: str | None) -> str:
    durability = RestateDurability[Any].from_agent(agent)
    if durability is None:
        raise UserError(
            f"The agent {agent.name!r} is not durable, so a session cannot be made of it. Give it a `name` "
            "and `capabilities=[durable.RestateDurability()]`."
        )
    name = name or agent.name or durability.name
    if not _SERVICE_NAME.fullmatch(name):
        raise UserError(
            f"A Restate service cannot be named {name!r}: a letter comes first, then letters, digits, `.`, "
            "`_` and `-`. Name the session with `agent_session(agent, name=...)`."
        )
    return name
