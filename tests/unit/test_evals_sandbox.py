"""Code of models runs, and cannot do what it should not."""

import pytest

from evals.sandbox import run_tests, source_of

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\n"
DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Sum:
    of: list[int]

def add(a, b):
    return sum(Sum([a, b]).of)
"""


@pytest.mark.parametrize(
    "code",
    [
        ADD,
        f"import re, json, heapq, datetime, threading, random, asyncio\n{ADD}",
        f"open('a.txt', 'w').write('x')\nassert open('a.txt').read() == 'x'\n{ADD}",
        f"import glob, os\nassert glob.glob('*.py') == []\nos.listdir()\n{ADD}",
        DATACLASS,
    ],
)
def test_right_code_passes(code: str) -> None:
    assert run_tests(code, TESTS).passed


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("def add(a, b):\n    return a - b\n", "AssertionError"),
        ("def add(a, b)", "SyntaxError"),
        ("", "NameError"),
        ("import sys; sys.exit(0)", "exit code 0"),
        ("import os; os._exit(0)", "exit code 0"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("while True: print('x' * 1000)", "x"),
        ("open('/etc/passwd').read()", "out of bounds"),
        ("open('../spy', 'w')", "out of bounds"),
        ("import json\nopen(json.__file__, 'w')", "read-only"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "not allowed"),
        ("import subprocess; subprocess.run(['true'])", "not allowed"),
        ("import os; os.system('true')", "not allowed"),
        ("import os; os.fork()", "not allowed"),
        ("import os; os.kill(1, 9)", "not allowed"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_CPU, (9, 9))",
            "not allowed",
        ),
        ("import os; raise SystemExit(os.environ['PATH'])", "KeyError"),
        ("import os; os.truncate('/dev/null', 0)", "os.truncate is not allowed"),
        ("import os; os.link('/etc/passwd', 'a')", "os.link is not allowed"),
        ("import os; os.symlink('/etc', 'a')", "os.symlink is not allowed"),
        ("import os; os.mkdir('/tmp/spy')", "os.mkdir is not allowed"),
        ("import os; os.chdir('/')", "os.chdir is not allowed"),
        ("import os; os.listdir('/')", "out of bounds"),
        ("import json, os\nos.open(json.__file__, os.O_RDWR)", "read-only"),
        ("import os; os.open('/dev/shm/spy', os.O_CREAT | os.O_RDWR)", "out of bounds"),
        ("import json, os\nos.open(os.path.dirname(json.__file__), os.O_RDONLY)", "a directory"),
        ("import io, pathlib; io.FileIO(pathlib.Path('/etc/passwd'))", "no string"),
        ("import sqlite3; sqlite3.connect('/tmp/spy.db')", "sqlite3.connect is not allowed"),
        (
            "import resource; resource.prlimit(0, resource.RLIMIT_CPU, (9, 9))",
            "resource.prlimit is not allowed",
        ),
        ("import _posixsubprocess; _posixsubprocess.fork_exec()", "fork_exec is not allowed"),
        ("for n in range(11): open(f'{n}', 'w')", "no more than 10 files"),
        ("import os; open('a', 'wb').write(b'x' * 2**21); os.stat('a')", "File too large"),
        ("import __main__; print(__main__.main)", "no attribute 'main'"),
    ],
)
def test_what_is_wrong_is_said(code: str, reason: str) -> None:
    tested = run_tests(code, TESTS)
    assert not tested.passed
    assert reason in tested.reason


def test_endless_code_is_stopped() -> None:
    assert "not done after 1 s" in run_tests("import time; time.sleep(60)", "", timeout=1).reason
    assert "SIG" in run_tests("while True: pass", "").reason


def test_code_is_taken_out_of_its_fence() -> None:
    assert source_of("Here:\n```python\nx = 1\n```\nDone.") == "x = 1\n"
    assert source_of("```\nx = 1\n```") == "x = 1\n"
    assert source_of("x = 1") == "x = 1"
