"""Runs code that a model wrote against tests: in a process of its own, with limits.

What the process can do is what pure Python needs: compute, import the standard library, read and write files in
an empty directory of its own, at most ten of a megabyte each. It has five seconds of the processor and half a
gigabyte, and nothing of this process's environment. An audit hook refuses everything else: other files and
directories, other programs, sockets. Where the operating system gives it a namespace of its own, there is no
network to reach anyhow. That stops what a model writes by mistake or is talked into. It is no prison for an
attacker, who finds a way around the hook: those need a virtual machine.

    code, tests → evals.sandboxed → token when all of it ran, else the last line of its error
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 10.0
"""Seconds on the clock; of the processor it gets half."""

_PROGRAM = Path(__file__).with_name("sandboxed.py")


@dataclass(frozen=True, kw_only=True)
class Tested:
    """What became of the code."""

    passed: bool
    reason: str
    """Why not: the last line of what the process wrote; empty when it passed."""


def source_of(text: str) -> str:
    """Return the code in a text: its fenced block, when there is one."""
    _, fence, rest = text.partition("```")
    if not fence:
        return text
    language, _, code = rest.partition("\n")
    return (code if language.strip().isalnum() or not language.strip() else rest).partition("```")[
        0
    ]


def run_tests(code: str, tests: str, *, timeout: float = TIMEOUT) -> Tested:
    """Run `tests`, statements that raise when something is wrong, after `code`, in one namespace.

    Args:
        code: Python, as a model wrote it.
        tests: Python that uses the names defined by `code`.
        timeout: How many seconds all of it may take.
    """
    # code that exits early does not know what to print
    token = secrets.token_hex(16)
    given = {"code": code, "tests": tests, "token": token}
    with tempfile.TemporaryDirectory(prefix="evals-") as directory:
        output = Path(directory) / ".output"
        with output.open("wb") as written:
            process = subprocess.Popen(
                [sys.executable, "-ISBu", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=written,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env={},
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps(given).encode(), timeout=timeout)
            except subprocess.TimeoutExpired:
                return Tested(passed=False, reason=f"not done after {timeout:g} s")
            finally:
                _kill_group(process)
        *_, last = output.read_text(errors="replace").strip().splitlines() or [""]
    if process.returncode == 0 and last == token:
        return Tested(passed=True, reason="")
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return Tested(passed=False, reason=f"killed by {name}: a limit was reached")
    return Tested(passed=False, reason=(last or f"exit code {process.returncode}")[:300])


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended and left nothing behind
    process.wait()
