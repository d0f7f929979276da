"""Code of models runs, and cannot do what it should not."""

import pytest

from evals.sandbox import run_tests, source_of

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\n"


@pytest.mark.parametrize(
    "code",
    [ADD, f"import re, json, heapq, datetime\n{ADD}", f"open('a.txt', 'w').write('x')\n{ADD}"],
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
