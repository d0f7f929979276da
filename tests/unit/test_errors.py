"""The error table: every exception of PydanticAI has a verdict, and classes survive the journal."""

from datetime import timedelta
from typing import Any

import pytest
from pydantic_ai import exceptions as pai
from restate import TerminalError
from restate.exceptions import RetryableError

from durable._errors import (
    RETRY,
    VERDICTS,
    Terminal,
    describe,
    handler_failure,
    original_error,
    retry_after,
    step_failure,
    verdict,
)


def http(status: int, category: Any = None, **kwargs: Any) -> pai.ModelHTTPError:
    """An error of a provider."""
    return pai.ModelHTTPError.for_category(
        category, status_code=status, model_name="m", body={"secret": "body"}, **kwargs
    )


PUBLIC = [
    value
    for name in pai.__all__
    if isinstance(value := getattr(pai, name), type)
    and issubclass(value, Exception)
    and not issubclass(value, Warning)
]


@pytest.mark.parametrize("error_type", PUBLIC)
def test_every_exception_has_a_verdict(error_type: type[Exception]) -> None:
    """A new exception of PydanticAI must be put into the table before it is released to users."""
    own = [base for base in error_type.__mro__ if base in VERDICTS]
    assert own, f"{error_type.__name__} is not in VERDICTS"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (pai.UserError("x"), Terminal(500)),
        (pai.UsageLimitExceeded("x"), Terminal(429)),
        (pai.ContentFilterError("x"), Terminal(422)),
        (pai.UnexpectedModelBehavior("x"), Terminal(502)),
        (pai.RunTimedOut("x"), Terminal(504)),
        (pai.ModelConnectionError("m", "refused"), RETRY),
        (pai.ModelTimeoutError("m", "slow"), RETRY),
        (http(429, pai.ModelRateLimitError), RETRY),
        (http(402, pai.ModelQuotaExceededError), Terminal(503)),
        (http(401, pai.ModelAuthenticationError), Terminal(502)),
        (http(400, pai.ModelContextWindowExceededError), Terminal(413)),
        (http(529, pai.ModelOverloadedError), RETRY),
        (http(500, pai.ModelServerError), RETRY),
        (http(500), RETRY),
        (http(409), RETRY),
        (http(418), Terminal(502)),
        (pai.ModelAPIError("m", "unknown"), RETRY),
        (pai.FallbackExceptionGroup("g", [http(401), http(503)]), RETRY),
        (pai.FallbackExceptionGroup("g", [http(401), http(404)]), Terminal(502)),
        (ValueError("the tool's own"), None),
    ],
)
def test_verdicts(error: Exception, expected: object) -> None:
    """The most specific class decides; an HTTP error without a category goes by its status."""
    assert verdict(error) == expected


def test_retry_after_is_passed_on() -> None:
    """The provider's pace becomes Restate's delay; a group waits for the longest."""
    limited = http(429, pai.ModelRateLimitError, headers={"Retry-After": "7"})
    failure = step_failure(limited, "step")
    assert isinstance(failure, RetryableError)
    assert failure.retry_after == timedelta(seconds=7)
    assert retry_after(pai.FallbackExceptionGroup("g", [http(500), limited])) == timedelta(
        seconds=7
    )


@pytest.mark.parametrize(
    "error",
    [
        pai.UserError("wrong"),
        pai.UsageLimitExceeded("limit"),
        pai.UnexpectedModelBehavior("odd", "secret body"),
        http(401, pai.ModelAuthenticationError, provider_error_code="invalid_api_key"),
        http(418),
        pai.ModelRequestRejectedError("m", "no", body="secret"),
        pai.FallbackExceptionGroup("g", [http(401, pai.ModelAuthenticationError), http(404)]),
        pai.ToolFailed("broken"),
    ],
)
def test_the_class_survives_the_journal(error: Exception) -> None:
    """What a step raised is rebuilt in handler code, without bodies."""
    failure = step_failure(error, "step")
    assert isinstance(failure, TerminalError)
    assert "step `step`" in failure.message
    assert "secret" not in failure.message + str(failure.metadata)
    rebuilt = original_error(failure)
    assert rebuilt is not None
    assert type(rebuilt) is type(error)
    assert describe(rebuilt).count(type(error).__name__) == 1
    assert "secret" not in str(rebuilt)
    if isinstance(error, pai.ModelHTTPError) and isinstance(rebuilt, pai.ModelHTTPError):
        assert rebuilt.status_code == error.status_code
        assert rebuilt.provider_error_code == error.provider_error_code


def test_every_terminal_class_can_be_rebuilt() -> None:
    """Constructors differ; the journal must not depend on them."""
    for error_type, found in VERDICTS.items():
        if isinstance(found, Terminal) and error_type is not pai.FallbackExceptionGroup:
            metadata = {"pydantic_ai.error": f'{{"type":"{error_type.__name__}","message":"m"}}'}
            rebuilt = original_error(TerminalError("m", metadata=metadata))
            assert type(rebuilt) is error_type
            assert "m" in str(rebuilt)


def test_other_failures_pass() -> None:
    """A tool's own exception is Restate's to retry; a `TerminalError` is as the user made it."""
    own = ValueError("mine")
    assert step_failure(own, "step") is own
    assert handler_failure(own) is None
    terminal = TerminalError("enough", status_code=418)
    assert step_failure(terminal, "step") is terminal
    assert original_error(terminal) is None


def test_a_wrapped_hopeless_error_ends_the_handler() -> None:
    """`raise MyError() from UsageLimitExceeded` repeats itself just as well."""
    error = ValueError("mine")
    error.__cause__ = pai.UsageLimitExceeded("limit")
    failure = handler_failure(error)
    assert failure is not None
    assert failure.status_code == 429
    error.__cause__ = TerminalError("the SDK handles it")
    assert handler_failure(error) is None
