"""`durable.configure_logfire` adds to what the program has set up, in processes of their own: Logfire is global."""

import os
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import asyncio, logfire, durable
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from pydantic_ai import Agent
    from pydantic_ai.exceptions import UserError
    from pydantic_ai.models.test import TestModel

    spans = InMemorySpanExporter()
    agent = Agent(TestModel(), name="poet", capabilities=[durable.RestateDurability()])

    def run():
        asyncio.run(agent.run("secret"))
        return [it.name for it in spans.get_finished_spans()], "secret" in repr(
            [dict(it.attributes) for it in spans.get_finished_spans()]
        )

    host = dict(
        send_to_logfire=False, console=False, additional_span_processors=[SimpleSpanProcessor(spans)]
    )
"""
TRACED = ["chat test", "invoke_agent poet"]


def printed(code: str) -> str:
    """Run the program with `code` behind it, without any token, and return what it prints."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LOGFIRE_", "OTEL_"))}
    program = textwrap.dedent(PROGRAM) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_outside_a_handler() -> None:
    """There it is PydanticAI's ordinary tracing; the program's own configuration is used."""
    code = "logfire.configure(**host); durable.configure_logfire(); print(run())"
    assert printed(code) == f"({TRACED}, True)"


def test_instrumentation_of_the_program_stays() -> None:
    code = """
        logfire.configure(**host)
        logfire.instrument_pydantic_ai(include_content=False)
        durable.configure_logfire()
        print(run())
    """
    assert printed(code) == f"({TRACED}, False)"


def test_it_configures_what_is_not_configured() -> None:
    """Options are those of `logfire.configure`; without a token nothing is sent."""
    code = """
        host.pop("send_to_logfire")
        durable.configure_logfire(**host)
        print(run(), logfire.DEFAULT_LOGFIRE_INSTANCE.config.token)
    """
    assert printed(code) == f"({TRACED}, True) None"


def test_options_that_would_be_ignored_are_refused() -> None:
    code = """
        logfire.configure(**host)
        try:
            durable.configure_logfire(service_name="mine", console=False)
        except UserError as error:
            print(error)
    """
    assert "`console`, `service_name` would be ignored" in printed(code)


@pytest.mark.parametrize("instrumented", [True, False])
def test_another_provider(instrumented: bool) -> None:
    """OpenTelemetry's own SDK does; an application that does not instrument its agents is left alone."""
    code = f"""
        from opentelemetry.sdk.trace import TracerProvider
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(spans))
        trace.set_tracer_provider(provider)
        if {instrumented}:
            Agent.instrument_all()
        print(run())
    """
    assert printed(code) == f"({TRACED if instrumented else []}, {instrumented})"
