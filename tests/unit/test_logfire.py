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


COLLECTED = """
    import tempfile
    from pathlib import Path
    from durable._collector import Collector
    from durable._logfire import send_spans_to

    with Collector(Path(tempfile.mkdtemp()) / "spans.jsonl") as collector:
        send_spans_to(collector.url)
        tracer = trace.get_tracer("program")
        with tracer.start_as_current_span("a span", attributes={"password": "hunter2"}):
            asyncio.run(agent.run("go"))
        trace.get_tracer_provider().force_flush()
        found = collector.spans()
    print(sorted((it.name, it.pending) for it in found), "hunter2" in collector.file.read_text())
"""
BEGUN_AND_ENDED = [(name, pending) for name in ("a span", *TRACED) for pending in (False, True)]


@pytest.mark.parametrize("configured", [True, False])
def test_spans_are_collected_without_what_is_scrubbed(configured: bool) -> None:
    """Each when it begins and when it ends; agents are instrumented where nobody has set up tracing."""
    host = "logfire.configure(**host); durable.configure_logfire()" if configured else ""
    code = textwrap.dedent(COLLECTED)
    assert printed(f"{host}\n{code}") == f"{BEGUN_AND_ENDED} False"


def test_a_provider_that_tells_nobody() -> None:
    """Nothing is collected then, and the application runs."""
    code = """
        from durable._logfire import send_spans_to
        trace.set_tracer_provider(trace.NoOpTracerProvider())
        logfire.configure(**host)
        trace.get_tracer_provider = trace.NoOpTracerProvider
        send_spans_to("http://127.0.0.1:9")
        asyncio.run(agent.run("go"))
        print("runs")
    """
    assert printed(code) == "runs"
