"""How `durable trace` writes what it shows."""

import pytest

from durable._trace.tree import duration, written


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0004, "<1 ms"),
        (0.012, "12 ms"),
        (59.94, "59.9 s"),
        (60, "1 min 0 s"),
        (306, "5 min 6 s"),
        (25_700, "7 h 8 min"),
        (815_000, "9 d 10 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(int(seconds * 1e9)) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, ""),
        ("plain", "plain"),
        ('{"order": "A7", "amount": 10}', 'order="A7", amount=10'),
        ("{not JSON", "{not JSON"),
        ({"name": "Jürgen"}, 'name="Jürgen"'),
        ([1, "two"], '[1, "two"]'),
    ],
)
def test_values(value: object, said: str) -> None:
    assert written(value) == said
