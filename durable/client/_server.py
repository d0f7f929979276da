"""Where the server is and how to talk to it: what a client is made of, checked."""

import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx2
from pydantic_ai.exceptions import UserError


@dataclass(frozen=True, kw_only=True)
class Server:
    """The addresses of a server, with what is secret out of sight."""

    ingress_url: httpx2.URL
    admin_url: httpx2.URL | None
    timeout: timedelta | None
    retries: int
    http: Mapping[str, Any]
    """What all HTTP clients take."""

    @staticmethod
    def at(
        ingress_url: str,
        *,
        admin_url: str | None,
        token: str | None,
        headers: Mapping[str, str] | None,
        timeout: timedelta | None,
        retries: int,
        verify: ssl.SSLContext | bool,
    ) -> "Server":
        """Check what a client was given.

        Raises:
            UserError: When something of it is wrong, all of it in one message.
        """
        faults: list[str] = []
        if retries < 0:
            faults.append(f"`retries` must not be negative, got {retries}")
        if timeout is not None and timeout <= timedelta(0):
            faults.append(f"`timeout` must be positive, got {timeout!r}")
        sent = {} if token is None else {"authorization": f"Bearer {token}"}
        sent |= headers or {}
        if not all(it.isascii() and it.isprintable() for it in [*sent, *sent.values()]):
            faults.append("`token` and `headers` must be printable ASCII")
        urls = {"ingress_url": ingress_url, "admin_url": admin_url}
        faults += [
            f"`{name}` {fault}" for name, url in urls.items() if url and (fault := _fault(url))
        ]
        if faults:
            raise UserError(f"The client cannot be made: {'; '.join(faults)}.")
        return Server(
            ingress_url=httpx2.URL(ingress_url),
            admin_url=None if admin_url is None else httpx2.URL(admin_url),
            timeout=timeout,
            retries=retries,
            http={
                "headers": sent,
                "verify": verify,
                "limits": httpx2.Limits(max_connections=None),  # a call keeps one while it waits
            },
        )

    def http_options(self, url: httpx2.URL) -> dict[str, Any]:
        """Return what the HTTP client for the ingress or the admin API takes."""
        # a proxy from the environment must not get requests to loopback
        return {**self.http, "base_url": url, "trust_env": not _is_loopback(url.host)}

    def __repr__(self) -> str:
        """Return the addresses alone."""
        return ", ".join(repr(str(url)) for url in (self.ingress_url, self.admin_url) if url)


def _fault(text: str) -> str | None:
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        return f"is no URL: {error}"
    if url.scheme not in {"http", "https"} or not url.host:
        return f"must be like 'http://localhost:8080', got {str(url.copy_with(userinfo=b''))!r}"
    if url.userinfo or url.query:
        return "must hold no credentials: they belong into `token` or `headers`"
    return None


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
