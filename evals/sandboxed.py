"""What runs in the process of `evals.sandbox`: a program of its own, which shares nothing with the suite.

It reads code, tests and a token from its input, gives up what they must not have, runs them, and prints the token.
"""

import _posixsubprocess
import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

FILES = 10
"""How often a file may be opened for writing."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DEVICES = ("/dev/null", "/dev/urandom")
_LOOKS = ("os.listdir", "os.scandir")
_COMPUTES = tuple(
    "import compile exec marshal. pickle. object. code. function. array. builtins. sys. cpython. gc. time. _thread. "
    "glob. pathlib. tempfile.".split()
)
"""The audit events of what stays in this process."""


def main() -> None:
    """Run the code, then the tests in its namespace; the token says that all of it ran."""
    given = json.load(sys.stdin)
    sys.stdin.close()
    _limit()
    solution = ModuleType("solution")
    # dataclasses look for their module; and who looks for this one must not find what it refuses
    sys.modules["solution"] = sys.modules["__main__"] = solution
    sys.addaudithook(_hook())
    exec(compile(given["code"], "solution.py", "exec"), vars(solution))
    exec(compile(given["tests"], "tests.py", "exec"), vars(solution))
    sys.stdout.write("\n" + given["token"])


def _limit() -> None:
    for limit, most in (
        (resource.RLIMIT_CPU, 5),
        (resource.RLIMIT_AS, 2**29),
        (resource.RLIMIT_FSIZE, 2**20),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    try:
        ctypes.CDLL(None).unshare(0x40000000 | 0x10000000)  # a network and users of its own: Linux
    except (AttributeError, OSError):
        pass
    _posixsubprocess.fork_exec = _no_program  # it starts programs, and no hook hears of it


def _no_program(*_: object) -> None:
    raise PermissionError("fork_exec is not allowed here")


def _hook() -> Callable[[str, tuple[Any, ...]], None]:
    """Return what refuses everything but what is known to be harmless: new events, too."""
    check = _paths(own=os.path.realpath(os.getcwd()), readable=sys.path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            check(arguments[0], opens=True, writes=bool(arguments[2] & _WRITES))
        elif event in _LOOKS:
            check(arguments[0])
        elif not event.startswith(_COMPUTES):
            raise PermissionError(f"{event} is not allowed here")

    return hook


def _paths(*, own: str, readable: list[str]) -> Callable[..., None]:
    """Return what refuses a path elsewhere, and to write anywhere but in the directory `own`."""
    inside = f"{own}{os.sep}"
    bounds = (inside, *(os.path.realpath(it) + os.sep for it in (*readable, *_DEVICES)))
    left = FILES

    def check(where: object, *, opens: bool = False, writes: bool = False) -> None:
        nonlocal left
        if where is None or isinstance(where, int):  # this directory, or what was opened before
            return
        if not isinstance(where, str | bytes):  # it may be another path for whoever asks next
            raise PermissionError("a path that is no string is not allowed here")
        path = os.path.realpath(os.fsdecode(where))
        if not f"{path}{os.sep}".startswith(bounds):
            raise PermissionError(f"{path} is out of bounds")
        if opens and os.path.isdir(path):  # a path that is relative to it would say nothing
            raise PermissionError(f"{path} is a directory")
        if writes:
            left -= 1
            if not path.startswith(inside):
                raise PermissionError(f"{path} is read-only")
            if left < 0:
                raise PermissionError(f"no more than {FILES} files are allowed here")

    return check


if __name__ == "__main__":
    main()
