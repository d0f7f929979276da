"""The command line: `durable dev`, `server` and `serve`; `durable runs`, `watch`, `trace` and `export-case`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from durable._dev import ServerOptions, run_dev, run_server, spans_file, until_interrupted
from durable._process import ProcessError
from durable._runs import ADMIN_URL, admin_client, list_runs, printable, watch
from durable._trace import show_trace
from durable.client import ClientError, Handle, RejectedInput
from durable.worker import EXIT_NO_APP, AppNotFoundError, serve

EXIT_INTERRUPTED = 130
"""What shells make of SIGINT. Servers are meant to be stopped by it: they handle it, and exit with 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (ProcessError, ClientError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(printable(f"error: {error}"))
        return EXIT_NO_APP if isinstance(error, AppNotFoundError) else 1


def _dev(options: argparse.Namespace) -> None:
    server = _server_options(options)
    dev = run_dev(options.app, server, data=options.data, port=options.port, reload=options.reload)
    until_interrupted(dev)


def _server(options: argparse.Namespace) -> None:
    until_interrupted(run_server(_server_options(options)))


def _server_options(options: argparse.Namespace) -> ServerOptions:
    return ServerOptions(
        data=options.data,
        ingress_port=options.ingress_port,
        admin_port=options.admin_port,
        always_replay=options.always_replay,
    )


def _serve(options: argparse.Namespace) -> None:
    serve(options.app, port=options.port, otlp_endpoint=options.otlp_endpoint)


def _runs(options: argparse.Namespace) -> None:
    with admin_client(options.admin) as client:
        list_runs(client, service=options.service, status=options.status, limit=options.limit)


def _watch(options: argparse.Namespace) -> int:
    with admin_client(options.admin) as client:
        return 0 if watch(client, Handle.parse(options.id)) else 1


def _export_case(options: argparse.Namespace) -> None:
    try:
        from durable._cases import export_case  # noqa: PLC0415 - pydantic-evals may be missing
    except ImportError as error:
        raise RejectedInput(str(error)) from error
    with admin_client(options.admin) as client:
        handle = Handle.parse(options.id)
        case = export_case(client, handle, name=options.name, file=options.to)
    sys.stdout.write(case)


def _trace(options: argparse.Namespace) -> None:
    try:
        show_trace(
            Handle.parse(options.id),
            admin_url=options.admin,
            spans=spans_file(options.data),
            journal=options.journal,
            full=options.full,
            svg=options.svg,
        )
    except OSError as error:
        raise RejectedInput(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="durable", description="Run PydanticAI agents durably on Restate."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    app = argparse.ArgumentParser(add_help=False)
    app.add_argument("app", metavar="MODULE:APP", help="the application, for example services:app")
    server = argparse.ArgumentParser(add_help=False)
    for name, usual in (("ingress", 8080), ("admin", 9070)):
        server.add_argument(
            f"--{name}-port", type=_port, metavar="N", help=f"default: {usual}, or a free one"
        )
    server.add_argument(
        "--always-replay", action="store_true", help="replay at every wait: finds unstable code"
    )

    dev = commands.add_parser(
        "dev",
        parents=[app, server],
        help="server with persistent data, worker with reload, registered",
    )
    dev.add_argument("--data", **_DEV_DATA)
    dev.add_argument("--port", type=_port, metavar="N", help="default: 9080, or a free one")
    dev.add_argument(
        "--no-reload", dest="reload", action="store_false", help="do not watch for changes"
    )
    dev.set_defaults(run=_dev)

    alone = commands.add_parser("server", parents=[server], help="restate-server alone")
    alone.add_argument(
        "--data", type=Path, metavar="DIR", help="default: data that is deleted at the end"
    )
    alone.set_defaults(run=_server)

    worker = commands.add_parser("serve", parents=[app], help="serve an application over HTTP/2")
    worker.add_argument("--port", type=_port, metavar="N", default=9080, help="default: 9080")
    worker.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        help="send spans to this collector, beside what the application has set up",
    )
    worker.set_defaults(run=_serve)

    _add_client_commands(commands)
    return parser


def _add_client_commands(commands: Any) -> None:
    admin = argparse.ArgumentParser(add_help=False)
    admin.add_argument(
        "--admin",
        metavar="URL",
        help=f"default: $RESTATE_ADMIN_URL, or {ADMIN_URL}; a token comes from $RESTATE_AUTH_TOKEN",
    )
    run = argparse.ArgumentParser(add_help=False, parents=[admin])
    run.add_argument("id", metavar="ID", help="the invocation's id")

    runs = commands.add_parser("runs", parents=[admin], help="list invocations, the latest first")
    runs.add_argument("--service", metavar="NAME", help="of this service only")
    runs.add_argument("--status", metavar="STATUS", help="with this status only, such as `running`")
    runs.add_argument("--limit", type=int, metavar="N", default=20, help="default: 20")
    runs.set_defaults(run=_runs)

    watching = commands.add_parser(
        "watch", parents=[run], help="show the steps of a run until it ends"
    )
    watching.set_defaults(run=_watch)

    case = commands.add_parser(
        "export-case", parents=[run], help="make a case of a pydantic-evals dataset out of a run"
    )
    case.add_argument("--to", type=Path, metavar="FILE", help="append it to this dataset, in YAML")
    case.add_argument("--name", metavar="NAME", help="the case's name; default: `run-…`, of the id")
    case.set_defaults(run=_export_case)

    trace = commands.add_parser(
        "trace", parents=[run], help="print a run as a tree: what it did, when, and for how long"
    )
    trace.add_argument("--data", **_DEV_DATA)
    trace.add_argument(
        "--journal", action="store_true", help="from the journal, also where there are spans"
    )
    trace.add_argument("--full", action="store_true", help="arguments and results as a whole")
    trace.add_argument("--svg", type=Path, metavar="FILE", help="draw the tree as a picture too")
    trace.set_defaults(run=_trace)


_DEV_DATA: dict[str, Any] = {
    "type": Path,
    "metavar": "DIR",
    "default": Path(".durable"),
    "help": "where `durable dev` keeps its data; default: .durable",
}


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError(f"{port} is not a port: 1 to 65535")
    return port


if __name__ == "__main__":
    sys.exit(main())
