"""The command line of the eval suite: how good are the agents, pattern by pattern, and did they get better?

    python -m evals routing chaining --model openai:gpt-6-luna --repeat 3 --baseline evals/reports/local.json

The exit code is 1 when a pattern's score is below the threshold in pyproject.toml, 2 when the suite could not run.
"""

import argparse
import asyncio
import os
import re
import signal
import tempfile
import time
import tomllib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx2
import logfire
from pydantic import BaseModel
from pydantic_ai.exceptions import UserError
from pydantic_ai.models import infer_model
from rich.console import Console

import durable
from agents.local_model import LocalModelError, shared_url
from agents.models import DEFAULT_MODEL, LocalModel, configured_model
from durable.server import ServerError
from durable.worker import WorkerError
from evals.evaluators import JUDGE_VARIABLE
from evals.experiment import LocalRunner, Runner, run_pattern
from evals.ingress import CHECKOUT, IngressRunner, hosted
from evals.loading import LoadedDataset, load
from evals.patterns import EVAL_PATTERNS, Exchange
from evals.reference import REFERENCE, ReferenceModel, exchanges_of
from evals.report import (
    PatternReport,
    Report,
    comparison_table,
    differences,
    faults,
    markdown,
    read_baseline,
    table,
)
from evals.sloppy import SLOPPY, spoiled

SCRIPTED = (REFERENCE, SLOPPY)
DATA = CHECKOUT / ".durable" / "evals"


class Arguments(argparse.Namespace):
    """The command line."""

    patterns: list[str]
    model: str | None
    via: str
    repeat: int
    max_concurrency: int
    baseline: Path | None
    experiment: str | None
    data: Path
    report: Path | None
    ingress: str | None
    admin: str


class ExperimentRecord(BaseModel):
    """What an experiment was begun with: it can only be continued with the same."""

    model: str
    datasets: dict[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval suite.

    Args:
        argv: The arguments, by default those of the command line.

    Returns:
        The exit code.
    """
    arguments = _parse(argv)
    console = Console(highlight=False)
    try:
        return asyncio.run(_evals(arguments, console))
    except (asyncio.CancelledError, KeyboardInterrupt):
        console.print("interrupted")
        return 130
    except (
        UserError,
        LocalModelError,
        ServerError,
        WorkerError,
        httpx2.HTTPError,
        OSError,
    ) as error:
        Console(stderr=True).print(f"Error: {error}", style="red", markup=False, soft_wrap=True)
        return 2


def _parse(argv: Sequence[str] | None) -> Arguments:
    parser = argparse.ArgumentParser(
        prog="python -m evals", description="Measure how good the agents are, pattern by pattern."
    )
    add = parser.add_argument
    add("patterns", nargs="*", metavar="PATTERN", help=f"default: {', '.join(EVAL_PATTERNS)}")
    add(
        "--model",
        metavar="M",
        help="as AGENTS_MODEL; `reference` gives the datasets' own answers, `sloppy` spoils them",
    )
    add("--via", choices=["local", "ingress"], default="local", help="default: %(default)s")
    add("--repeat", type=positive_number, default=1, metavar="N", help="runs of each case")
    add(
        "--max-concurrency",
        type=positive_number,
        default=4,
        metavar="N",
        help="default: %(default)s",
    )
    add("--baseline", type=Path, metavar="FILE", help="a JSON report to compare with")
    add("--report", type=Path, metavar="FILE", help="write FILE.json and FILE.md")
    add("--experiment", metavar="NAME", help="over the ingress, the same name goes on")
    add("--data", type=Path, default=DATA, metavar="DIR", help="default: .durable/evals")
    add("--ingress", metavar="URL", help="a restate-server that runs; default: start one")
    add("--admin", default="http://127.0.0.1:9070", metavar="URL", help="its admin API")
    arguments = parser.parse_args(argv, Arguments())
    if unknown := [name for name in arguments.patterns if name not in EVAL_PATTERNS]:
        parser.error(f"no such pattern: {', '.join(unknown)}; there are {', '.join(EVAL_PATTERNS)}")
    if arguments.experiment and not re.fullmatch(r"[A-Za-z0-9_-]+", arguments.experiment):
        parser.error("--experiment is made of letters, digits, hyphens and underscores")
    if arguments.ingress and arguments.via == "local":
        parser.error("--ingress needs --via ingress")
    if arguments.model in SCRIPTED and arguments.via == "ingress":
        parser.error(f"the {arguments.model} model has no server: use --via local")
    return arguments


def positive_number(text: str) -> int:
    """Read an option that counts something; argparse shows this name when it is wrong."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


async def _evals(arguments: Arguments, console: Console) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    logfire.configure(
        console=False,
        send_to_logfire="if-token-present",
        service_name="evals",
        distributed_tracing=True,
    )
    durable.configure_logfire()
    thresholds = _thresholds()
    loaded = {name: load(name) for name in arguments.patterns or EVAL_PATTERNS}
    versions = {name: it.version for name, it in loaded.items()}
    judge = _judge()
    baseline = (
        read_baseline(arguments.baseline, versions, judge=judge) if arguments.baseline else None
    )
    experiment = arguments.experiment or f"evals-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    path = _report_path(arguments.report or arguments.data / "reports" / experiment)
    model = await _use_model(arguments, loaded)
    began = time.monotonic()
    async with _runner(arguments, experiment, model, versions) as runner:
        console.print(f"experiment {experiment}, model {model}, via {arguments.via}")
        patterns: dict[str, PatternReport] = {}
        for name, it in loaded.items():
            try:
                patterns[name] = await run_pattern(
                    name,
                    it,
                    runner,
                    experiment=experiment,
                    repeat=arguments.repeat,
                    max_concurrency=arguments.max_concurrency,
                    progress=console.is_terminal,
                )
            except asyncio.CancelledError:
                if arguments.via == "ingress":
                    console.print(_GO_ON.format(experiment), soft_wrap=True)
                raise
            if isinstance(runner, IngressRunner) and runner.unreachable:
                raise UserError(f"{runner.unreachable[0]} {_GO_ON.format(experiment)}")
            console.print(f"{time.monotonic() - began:6.0f} s  {name} {patterns[name].score:.1%}")
    report = Report(
        experiment=experiment,
        model=model,
        via=arguments.via,
        repeat=arguments.repeat,
        judge=judge,
        finished=datetime.now(UTC),
        seconds=time.monotonic() - began,
        patterns=patterns,
    )
    _write(report, baseline, path, console)
    return _verdict(report, thresholds.get(model, thresholds["default"]), console)


_GO_ON = "Go on with `--experiment {}`: what is finished is kept."


def _judge() -> str | None:
    """Return the name of the judge's model, if one is configured.

    Raises:
        UserError: There is no such model, which is to be known before the agents' models are paid.
    """
    if not (name := os.environ.get(JUDGE_VARIABLE)):
        return None
    try:
        infer_model(name)
    except Exception as error:  # of PydanticAI, or of the provider's own client
        raise UserError(f"`{JUDGE_VARIABLE}` names no model that can be asked: {error}") from error
    return name


def _report_path(path: Path) -> Path:
    """Return where the reports go, without a suffix, and see that they can be written there.

    Raises:
        UserError: They cannot, which is to be known before they are there.
    """
    path = path.with_suffix("") if path.suffix in {".json", ".md"} else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"The report cannot be written to {path.parent}: {error}") from error
    return path


async def _use_model(arguments: Arguments, loaded: Mapping[str, LoadedDataset]) -> str:
    """Make the agents of this process and of its workers use the model, and return its name."""
    if arguments.model in SCRIPTED:
        said: list[Exchange] = []
        for name, of in loaded.items():  # runs that were exported have no reference
            cases = of.dataset.cases = [it for it in of.dataset.cases if it.metadata is not None]
            said += exchanges_of(name, spoiled(name, cases) if arguments.model == SLOPPY else cases)
        DEFAULT_MODEL.wrapped = ReferenceModel(said)
        return arguments.model
    if arguments.model:
        os.environ["AGENTS_MODEL"] = arguments.model
    DEFAULT_MODEL.wrapped = model = configured_model()
    if isinstance(model, LocalModel):
        # Now, because it may not be installed; and here, to outlive a worker that is killed.
        os.environ["AGENTS_LOCAL_URL"] = await asyncio.to_thread(shared_url)
        return "local"
    return os.environ.get("AGENTS_MODEL") or model.model_id


@asynccontextmanager
async def _runner(
    arguments: Arguments, experiment: str, model: str, versions: dict[str, str]
) -> AsyncGenerator[Runner]:
    if arguments.via == "local":
        yield LocalRunner()
        return
    _record(arguments.data / "experiments" / f"{experiment}.json", model, versions)
    if arguments.ingress:
        runner = IngressRunner(
            experiment=experiment,
            ingress_url=arguments.ingress.rstrip("/"),
            admin_url=arguments.admin.rstrip("/"),
        )
        await runner.check(versions)
        yield runner
        return
    async with hosted(experiment, data_dir=arguments.data) as runner:
        yield runner


def _record(path: Path, model: str, versions: dict[str, str]) -> None:
    """Remember what the experiment is made with.

    Raises:
        UserError: It was begun with something else, so its answers are to other questions.
    """
    old = ExperimentRecord(model=model, datasets={})
    if path.exists():
        old = ExperimentRecord.model_validate_json(path.read_bytes())
    changed = [name for name, it in versions.items() if old.datasets.get(name, it) != it]
    if old.model != model or changed:
        what = f"the model {old.model}" if old.model != model else f"another dataset {changed[0]!r}"
        raise UserError(
            f"The experiment {path.stem!r} was begun with {what}: give another `--experiment`."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    record = ExperimentRecord(model=model, datasets=old.datasets | versions)
    path.write_text(record.model_dump_json(), encoding="utf-8")


def _write(report: Report, baseline: Report | None, path: Path, console: Console) -> None:
    console.print(table(report))
    for row in comparison_table(differences(report, baseline)):
        console.print("compared with the baseline: " + "  ".join(row), markup=False)
    for fault in faults(report):
        console.print(f"- {fault}", style="dim", markup=False, soft_wrap=True)
    for suffix, text in (
        (".json", report.model_dump_json(indent=1) + "\n"),
        (".md", markdown(report, baseline)),
    ):
        # not `with_suffix`, which takes the 2 of `gpt-5.2` for one
        written = path.with_name(path.name + suffix)
        written.write_text(text, encoding="utf-8")
        console.print(f"report: {written}", markup=False, soft_wrap=True)


def _thresholds() -> dict[str, float]:
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings["tool"]["evals"]["thresholds"]


def _verdict(report: Report, threshold: float, console: Console) -> int:
    low = {name: it.score for name, it in report.patterns.items() if it.score < threshold}
    for name, score in low.items():
        console.print(f"{name} scored {score:.1%}, below {threshold:.0%}", style="bold red")
    return 1 if low else 0
