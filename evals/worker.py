"""What the suite hosts over the ingress: the services, with their spans.

Spans go where `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` says, the suite's collector, and to Logfire when a token is there.
"""

import logfire

import durable
from services import app

logfire.configure(console=False, send_to_logfire="if-token-present", service_name="services")
durable.configure_logfire()

__all__ = ["app"]
