"""Serve `services:app` with hypercorn: `python -m services --port 9080`."""

import argparse
import asyncio

from hypercorn.asyncio import serve  # pyright: ignore[reportUnknownVariableType] - WSGI's types
from hypercorn.config import Config

from services import app


def main() -> None:
    """Run `python -m services`."""
    parser = argparse.ArgumentParser(
        prog="python -m services", description="Serve the agents for a restate-server to call."
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to bind (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=9080, help="port to bind (default: %(default)s)"
    )
    arguments = parser.parse_args()
    config = Config()
    config.bind = [f"{arguments.host}:{arguments.port}"]
    asyncio.run(serve(app, config))


if __name__ == "__main__":
    main()
