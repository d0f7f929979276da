"""Serve `services:app` for a restate-server: `python -m services --port 9080`."""

import argparse

from rich.console import Console

from durable.worker import serve


def main() -> None:
    """Run `python -m services`."""
    parser = argparse.ArgumentParser(
        prog="python -m services", description="Serve the agents for a restate-server to call."
    )
    parser.add_argument("--port", type=int, default=9080, help="on loopback (default: %(default)s)")
    arguments = parser.parse_args()
    Console(stderr=True).print(
        f"Serving services:app on http://127.0.0.1:{arguments.port} (Ctrl-C ends it)",
        highlight=False,
    )
    serve("services:app", port=arguments.port)


if __name__ == "__main__":
    main()
