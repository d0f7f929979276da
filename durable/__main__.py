"""The command line: `durable dev`, `durable server` and `durable serve`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from durable._dev import ServerOptions, run_dev, run_server, until_interrupted
from durable._process import ProcessError
from durable.worker import EXIT_NO_APP, AppNotFoundError, serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except KeyboardInterrupt:
        pass
    except ProcessError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
        return EXIT_NO_APP if isinstance(error, AppNotFoundError) else 1
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.command == "serve":
        serve(options.app, port=options.port)
        return
    server = ServerOptions(
        data=options.data,
        ingress_port=options.ingress_port,
        admin_port=options.admin_port,
        always_replay=options.always_replay,
    )
    if options.command == "server":
        until_interrupted(run_server(server))
    else:
        until_interrupted(run_dev(options.app, server, port=options.port, reload=options.reload))


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
    dev.add_argument(
        "--data", type=Path, metavar="DIR", default=Path(".durable"), help="default: .durable"
    )
    dev.add_argument("--port", type=_port, metavar="N", help="default: 9080, or a free one")
    dev.add_argument(
        "--no-reload", dest="reload", action="store_false", help="do not watch for changes"
    )

    alone = commands.add_parser("server", parents=[server], help="restate-server alone")
    alone.add_argument(
        "--data", type=Path, metavar="DIR", help="default: data that is deleted at the end"
    )

    worker = commands.add_parser("serve", parents=[app], help="serve an application over HTTP/2")
    worker.add_argument("--port", type=_port, metavar="N", default=9080, help="default: 9080")
    return parser


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65536:
        raise argparse.ArgumentTypeError(f"{port} is not a port: 1 to 65535")
    return port


if __name__ == "__main__":
    sys.exit(main())
