"""`durable.configure_logfire`, the one line for Logfire, and where `durable dev` gets its spans from."""

import logging
from typing import Any

import logfire
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from pydantic_ai.exceptions import UserError
from requests import Session

from durable._sdk import (
    PendingSpanProcessor,
    agents_are_instrumented,
    logfire_is_configured,
    scrubbed,
)

logger = logging.getLogger(__name__)


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
        options.setdefault("distributed_tracing", True)  # Restate and callers send their trace
        logfire.configure(**options)
    elif options:
        raise UserError(
            f"Logfire is configured already, so {', '.join(f'`{name}`' for name in sorted(options))} would be "
            "ignored: give them to the program's own `logfire.configure()`, and call "
            "`durable.configure_logfire()` without options."
        )
    if not agents_are_instrumented():
        logfire.instrument_pydantic_ai()


def send_spans_to(endpoint: str) -> None:
    """Send the program's spans to `endpoint` too, each when it begins and when it ends.

    A program that has set up tracing keeps it as it is: what it records, with what Logfire scrubs, comes here
    as well. For one that has set up none, agents are instrumented, and nothing goes anywhere else.

    Args:
        endpoint: A collector's address, as in `OTEL_EXPORTER_OTLP_ENDPOINT`.
    """
    if not logfire_is_configured() and not isinstance(trace.get_tracer_provider(), TracerProvider):
        configure_logfire(send_to_logfire=False, console=False)
    provider: Any = trace.get_tracer_provider()
    if not hasattr(provider, "add_span_processor"):
        logger.warning("%s tells nobody of its spans, so they are not collected.", provider)
        return
    session = Session()
    session.trust_env = False  # a proxy from the environment must not get what is for this machine
    exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", session=session)
    exported = scrubbed(BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY))
    provider.add_span_processor(exported)
    provider.add_span_processor(PendingSpanProcessor(RandomIdGenerator(), exported))


_DELAY = 100  # milliseconds, so that a worker that is killed loses little
