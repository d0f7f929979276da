"""The names of journal entries: stored data, made here or by PydanticAI's `JournalOperationNamer`.

An invocation in flight replays against the names that its journal holds, so a changed name ends it with
a mismatch. Change one only with an entry in CHANGELOG.md; `tests/unit/test_names.py` pins them and
README.md lists them.
"""

TIMER = "timer"
"""The sleep behind `asyncio.sleep`, `asyncio.timeout` and the like in handler code."""

AGENT_RUN = "AgentRun"
"""The virtual object that brings messages from outside to the runs of an invocation."""

SESSION = "session"
"""The state of a virtual object that says how far its session is."""

SESSION_OPENED = "session.open"
"""The step that journals when a session was opened, and which of its messages came with the attempt."""

EVALUATION_REPORT = "evaluate.report"
"""The step that tells OpenTelemetry what the evaluators of a run found."""


def session_turn(number: int) -> str:
    """Name the state that holds the messages of a turn."""
    return f"session.turn:{number}"


def session_summary(number: int) -> str:
    """Name the state that holds what turn `number` left of the messages of earlier turns."""
    return f"session.summary:{number}"


def run_start_time(agent: str) -> str:
    """Name the step that journals when a run with `timeout=` started."""
    return f"{agent}__run_start_time"


def output_function(agent: str, function: str | None) -> str:
    """Name the step of an output function; `None` where PydanticAI does not say which one it is."""
    return f"{agent}__output_function:{function or 'output'}"


def external_event(agent: str, wait: str) -> str:
    """Name the step that hands out the token of PydanticAI's `wait_for_external_event`."""
    return f"{agent}__external_event.{wait}"


def notification(agent: str, tool: str) -> str:
    """Name the step that tells a reviewer about a call of `tool`."""
    return f"{agent}__notify:{tool}"


def undo(agent: str, tool: str) -> str:
    """Name the step that undoes a call of `tool`."""
    return f"{agent}__undo:{tool}"


def online_evaluation(agent: str) -> str:
    """Name the step that collects what the evaluators of a run need."""
    return f"{agent}__online_evaluation"


def evaluator(label: str) -> str:
    """Name the step of an evaluator."""
    return f"evaluate:{label}"


def evaluation_sink(number: int) -> str:
    """Name the step that gives evaluations to a sink."""
    return f"evaluate.sink:{number}"


def steering_signal(number: int) -> str:
    """Name the signal that carries a message to the runs of an invocation."""
    return f"agent_run.steer:{number}"


def hosted_toolset(toolset: str) -> str:
    """Name the step that looks up the services of a `HostedToolset`."""
    return f"hosted_toolset__{toolset}.get_tools"


def own_step(function: str) -> str:
    """Name the step of a function decorated with `durable.step`."""
    return f"step:{function}"


def declaration(step: str) -> str:
    """Name the step that declares an at-most-once `step`."""
    return f"{step}.declared"


def renamed(step: str, name: str) -> str:
    """Put a tool's `metadata={"restate": {"name": ...}}` in the place of its name."""
    return f"{step.rpartition(':')[0]}:{name}"
