"""What the suite hosts over the ingress: the services, with their spans.

Spans go where `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` says, the suite's collector, and to Logfire when a token is there.
"""

import durable
from services import app

durable.configure_logfire(console=False, service_name="services")

__all__ = ["app"]
