"""What hosted tools ask the server over HTTP: which handlers there are, and calls from outside Restate."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import httpx2
from pydantic_ai.exceptions import UserError
from restate import TerminalError

from durable._tracing import trace_headers

_NOT_FOUND = 404


@dataclass(frozen=True, kw_only=True)
class ServerURLs:
    """Where the server answers, as far as it was told."""

    admin: str | None
    ingress: str | None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    async def describe(self, service: str) -> dict[str, Any] | None:
        """Return what the admin API says about a service, `None` if there is no such service.

        Raises:
            UserError: When it refuses to answer.
            ConnectionError: When it does not answer.
        """
        url = _url(self.admin, "services", service)
        answer = await self._request("GET", url, timeout=30)
        if answer.status_code == _NOT_FOUND:
            return None
        _check(answer, f"The service `{service}` cannot be looked up")
        return answer.json()

    async def call(
        self,
        service: str,
        handler: str,
        body: bytes,
        *,
        key: str | None,
        send: bool,
        delay: timedelta | None,
    ) -> httpx2.Response:
        """Call a handler over the ingress.

        Raises:
            TerminalError: The handler's.
            UserError: When the ingress refuses the call.
            ConnectionError: When it does not answer.
        """
        answer = await self._request(
            "POST",
            _url(self.ingress, service, key, handler, "send" if send else None),
            content=body,
            headers=trace_headers() | ({"content-type": "application/json"} if body else {}),
            params=None if delay is None else {"delay": f"{delay // timedelta(milliseconds=1)}ms"},
            timeout=httpx2.Timeout(None, connect=10),
        )
        _check(answer, f"`{service}/{handler}` cannot be called")
        return answer

    async def _request(self, method: str, url: str, **options: Any) -> httpx2.Response:
        try:
            # trust_env: a proxy from the environment must not get requests to loopback
            async with httpx2.AsyncClient(headers=self.headers, trust_env=False) as http:
                return await http.request(method, url, **options)
        except httpx2.TransportError as error:
            raise ConnectionError(f"Restate does not answer at {url} ({error!r}).") from error


def _url(base: str | None, *path: str | None) -> str:
    assert base is not None
    parts = [quote(part, safe="") for part in path if part is not None]
    return "/".join([base.rstrip("/"), *parts])


def _check(answer: httpx2.Response, problem: str) -> None:
    if not answer.is_error:
        return
    try:
        said: dict[str, Any] = answer.json()
    except ValueError:  # not from Restate, but from something on the way
        said = {}
    if said.get("source") == "invocation":
        raise TerminalError(said["message"], answer.status_code, said.get("metadata"))
    message = f"{problem}: HTTP {answer.status_code} {said.get('message', '')}".strip()
    raise UserError(message) if answer.is_client_error else ConnectionError(message)
