"""`durable.configure_logfire`: the one line for Logfire."""

from typing import Any

import logfire
from pydantic_ai.exceptions import UserError

from durable._sdk import agents_are_instrumented, logfire_is_configured


def configure_logfire(**options: Any) -> None:
    """Send the traces of agents to Logfire, as far as the program has not seen to it already.

    Configures Logfire unless the program has called `logfire.configure()`, and instruments PydanticAI unless
    the program has done that: what is set already (scrubbing, `include_content=False`, providers) stays as
    it is. Without a token nothing is sent.

    That spans and metrics of a run are emitted once, however often it is replayed, does not depend on this
    call: it holds for whatever uses OpenTelemetry's SDK in a handler that `durable.app` hosts.

    Args:
        options: What `logfire.configure` takes.

    Raises:
        UserError: When options are given, but Logfire is configured already, so they would be ignored.
    """
    if not logfire_is_configured():
        options.setdefault("send_to_logfire", "if-token-present")
        logfire.configure(**options)
    elif options:
        raise UserError(
            f"Logfire is configured already, so {', '.join(f'`{name}`' for name in sorted(options))} would be "
            "ignored: give them to the program's own `logfire.configure()`, and call "
            "`durable.configure_logfire()` without options."
        )
    if not agents_are_instrumented():
        logfire.instrument_pydantic_ai()
