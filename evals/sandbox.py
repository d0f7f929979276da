"""Runs code that a model wrote against tests: in a process of its own, with limits.

What the process cannot do: read this process's environment, run for longer than a few seconds, take more than
half a gigabyte, write more than a megabyte. It cannot reach a network either where the operating system gives
it a namespace of its own; everywhere else, and for other programs and files elsewhere, an audit hook refuses.
That stops what a model writes by mistake or is talked into. It is no prison for an attacker: those need a
virtual machine.

    code, tests → python -I → token when all of it ran, else the last line of its error
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

# The token is known to this code alone until the tests have run: code that exits early does not print it.
_RUNNER = """
import ctypes, json, os, resource, sys
for limit, most in (("CPU", 5), ("AS", 2**29), ("FSIZE", 2**20), ("NOFILE", 32), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
try:
    ctypes.CDLL(None).unshare(0x40000000 | 0x10000000)  # a network and users of its own: Linux only
except (AttributeError, OSError):
    pass
given = json.load(sys.stdin)
sys.stdin.close()
allowed = tuple(os.path.realpath(it) + os.sep for it in (*given["readable"], os.getcwd()))
refused = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system",
           "os.kill", "resource.setrlimit", "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.chmod", "shutil.", "ctypes.", "pty.")
def refuse(event, arguments):
    if event.startswith(refused):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0])) + os.sep
        if not path.startswith(allowed):
            raise PermissionError(f"{path[:-1]} is out of bounds")
        writes = isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if writes and not path.startswith(allowed[-1]):
            raise PermissionError(f"{path[:-1]} is read-only")
sys.addaudithook(refuse)
del ctypes, resource
names = {"__name__": "solution"}
exec(compile(given["code"], "solution.py", "exec"), names)
exec(compile(given["tests"], "tests.py", "exec"), names)
sys.stdout.write("\\n" + given["token"])
"""


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
    token = secrets.token_hex(16)
    readable = [*sys.path[1:], sys.base_prefix, "/dev"]
    given = {
        "code": code,
        "tests": tests,
        "token": token,
        "readable": [path for path in readable if path],
    }
    with tempfile.TemporaryDirectory(prefix="evals-") as directory:
        output = Path(directory) / ".output"
        with output.open("wb") as written:
            process = subprocess.Popen(
                [sys.executable, "-Iu", "-c", _RUNNER],
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
