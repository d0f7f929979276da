"""What steps left behind: their lines in a trace on disk, and their completions in the journal."""

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from durable.server import RestateServer

Step = tuple[str, str]
"""The invocation and the name of a step in it."""

TOKEN = re.compile(r"[\w./~-]+#[0-9a-f]{8}")
"""What a step of `program_app` returns: `{label}#{random number}`."""


async def completed_steps(server: RestateServer) -> set[Step]:
    """Return the steps whose completion is in the journal."""
    rows = await server.query(
        "SELECT id, name, entry_lite_json FROM sys_journal WHERE entry_type IN "
        "('Command: Run', 'Notification: Run') ORDER BY id, index"
    )
    names: dict[tuple[str, int], str] = {}
    requests: Counter[str] = Counter()
    completed: set[Step] = set()
    for row in rows:
        entry = json.loads(row["entry_lite_json"])
        if "Command" in entry:
            name = row["name"].split("__")[-1].split(":")[-1]
            if name == "model.request":
                name = f"model.request.{requests[row['id']]}"
                requests[row["id"]] += 1
            names[row["id"], entry["Command"]["Run"]["completion_id"]] = name
        else:
            completion = entry["Notification"]["id"]["CompletionId"]
            completed.add((row["id"], names[row["id"], completion]))
    return completed


async def journaled_tokens(server: RestateServer, *, above: str = "") -> set[str]:
    """Return the tokens in the completions of steps, results and failures alike.

    Args:
        server: The server to ask.
        above: Only invocations created later than this time.
    """
    later = f" AND id IN (SELECT id FROM sys_invocation WHERE created_at > '{above}')"
    rows = await server.query(
        f"SELECT raw FROM sys_journal WHERE entry_type = 'Notification: Run'{later if above else ''}"
    )
    values = (bytes.fromhex(row["raw"]).decode(errors="replace") for row in rows)
    return {token for value in values for token in TOKEN.findall(value)}


def label_of(token: str) -> str:
    """Return which step of its program a token comes from."""
    return token.split("#")[0]


@dataclass
class Evidence:
    """What the trace says about one run of a program."""

    begun: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """The processes that began each label's step."""

    failed: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    """How often each step failed as ordered, by label and process."""

    ended: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """The tokens of each label's step."""

    ordered: dict[str, int] = field(default_factory=dict[str, int])
    """How often each step was to fail."""

    seen: defaultdict[str, defaultdict[str, list[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    """What handler code got, in order, by invocation and attempt."""


def read_trace(path: Path) -> dict[str, Evidence]:
    """Return the evidence for each run of a program."""
    runs: defaultdict[str, Evidence] = defaultdict(Evidence)
    for line in path.read_text().splitlines():
        pid, root, event, subject, *more = line.split(" ")
        run = runs[root]
        label = label_of(subject)
        if event == "begin":
            run.begun[label].append(int(pid))
            run.ordered[label] = int(more[0])
        elif event == "fail":
            run.failed[label, int(pid)] += 1
        elif event == "end":
            run.ended[label].append(subject)
        else:
            attempt, *what = more
            run.seen[subject][attempt].append(" ".join(what))
    return dict(runs)
