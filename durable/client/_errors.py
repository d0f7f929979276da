"""What can go wrong with a call.

ClientError
├── RunFailed           the run ended with an error: its status, message and metadata, the agent's error by name
├── NotReady            the run has not ended yet
├── NotFound            no such service, handler, invocation, or call that waits for an answer
├── RejectedInput       what was sent does not fit: found here, by the server, or by the handler (400, 413)
├── Conflict            not now: answered already, ended already, still running
├── UnexpectedOutput    the answer does not fit the handler's type
├── Unreachable         nobody answers, or somebody on the way says that Restate does not
└── Timeout             no answer in time; the run goes on
"""

from collections.abc import Mapping

from pydantic_core import from_json
from restate import TerminalError

from durable._errors import METADATA_KEY, original_error


class ClientError(Exception):
    """A call that did not work."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        metadata: Mapping[str, str] | None = None,
        invocation_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        """The HTTP status of the answer, or of the run, if there was one."""
        self.metadata = dict(metadata or {})
        """What the handler's `TerminalError` held."""
        self.invocation_id = invocation_id
        """The invocation that it is about, where an answer named one."""


class RunFailed(ClientError):
    """The run ended with an error.

    Its cause is the agent's original error, `UsageLimitExceeded` for instance, where PydanticAI raised it.
    """

    @property
    def error_type(self) -> str | None:
        """The name of the class of the agent's original error."""
        encoded = self.metadata.get(METADATA_KEY)
        return None if encoded is None else from_json(encoded)["type"]

    def __str__(self) -> str:
        """Return what happened, with the status and the invocation."""
        return f"{self.message} ({self.status}, {self.invocation_id})"


class NotReady(ClientError):
    """The run has not ended yet."""


class NotFound(ClientError, LookupError):
    """There is no such service, handler, invocation, or call that waits for an answer."""


class RejectedInput(ClientError, ValueError):
    """What was sent does not fit."""


class Conflict(ClientError):
    """It cannot be done to the invocation as it is now."""


class UnexpectedOutput(ClientError):
    """The answer does not fit the handler's type."""


class Unreachable(ClientError, ConnectionError):
    """Restate does not answer."""


class Timeout(ClientError, TimeoutError):
    """No answer came in time. The run, if it has begun, goes on."""


def run_failure(
    message: str, status: int, metadata: Mapping[str, str] | None, invocation_id: str | None
) -> ClientError:
    """Return the error of a run, caused by the agent's original error."""
    failed = RunFailed(message, status=status, metadata=metadata, invocation_id=invocation_id)
    if status in {400, 413} and failed.error_type is None:
        return RejectedInput(message, status=status, metadata=metadata, invocation_id=invocation_id)
    failed.__cause__ = original_error(TerminalError(message, status, failed.metadata))
    return failed
