"""The one door to private names of restate-sdk.

Everything this project touches that restate-sdk does not document is imported here and nowhere
else (`tests/unit/test_conventions.py` checks it), for the pinned range in `pyproject.toml`. A new
release of the SDK is a matter of this file and the modules that say `from durable._sdk import`.

Verified with restate-sdk 1.3.0 on 2026-11-22.
"""

from restate.handler import Handler
from restate.server_context import ServerInvocationContext

__all__ = ["Handler", "ServerInvocationContext"]
