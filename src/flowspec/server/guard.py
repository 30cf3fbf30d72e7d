"""Before any route: trailing slashes, the Host, the API key, and the size of bodies; what browsers are told of pages.

Plain ASGI: streams pass untouched.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowspec.config import ServerConfig
from flowspec.errors import shortened
from flowspec.server import replies

OPEN_PATHS = ("/health",)  # that need no key; their details do
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts
        self._api_key = None if api_key is None else api_key.encode()
        self._max_body_bytes = max_body_bytes
        self._too_large_text = f"the body has more than {max_body_bytes} bytes; send less"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        headers = Headers(scope=scope)
        send = _with_page_headers(send)
        if not self._hosts.include(headers.get("host", "")):
            await _misdirected(headers)(scope, receive, send)
            return
        if scope["path"] in OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
            scope = {**scope, "query_string": b""}  # whether it is well is for all; who works where is not
        if not self._may_pass(scope["path"], headers.get("authorization", "")):
            await _unauthorized(headers)(scope, receive, send)
            return
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._max_body_bytes:
            await self._too_large()(scope, receive, send)
            return
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large_text)
            return message

        await self._app(scope, counted, send)

    def _may_pass(self, path: str, authorization: str) -> bool:
        return path in OPEN_PATHS or self._has_key(authorization)

    def _has_key(self, authorization: str) -> bool:
        if self._api_key is None:
            return True
        kind, _, value = authorization.partition(" ")
        given = value.strip().encode()
        if kind.lower() == "basic":  # a browser's: any name, and the key as password
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != "bearer":
            return False
        return hmac.compare_digest(given, self._api_key)

    def _too_large(self) -> JSONResponse:
        body = replies.error(self._too_large_text, "invalid_request_error")
        return JSONResponse(body, 413, {"connection": "close"})


@dataclass(frozen=True)
class Hosts:
    """Names by which a browser may call a server of this machine alone that wants no key.

    A page of somebody else's may let its own name mean 127.0.0.1 (DNS rebinding), and would then read all answers.
    """

    names: frozenset[str] | None  # besides those of this machine; ``None``: all

    @classmethod
    def of(cls, config: ServerConfig) -> Hosts:
        """A key, or the network, makes the name of no use; the hosts of allowed origins are names too."""
        if config.api_key is not None or not _is_loopback(config.host) or "*" in config.cors_origins:
            return cls(None)
        return cls(frozenset(_name_of(origin.partition("://")[2]) for origin in config.cors_origins))

    def include(self, host: str) -> bool:
        """``host``: the header; a client that sends none is no browser."""
        name = _name_of(host)
        return self.names is None or not name or _is_loopback(name) or name in self.names


def _name_of(host: str) -> str:
    """Without its port."""
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return name.removesuffix(".")


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _with_page_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in PAGE_HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending


def _misdirected(headers: Headers) -> JSONResponse:
    name = shortened(headers.get("host", ""), 80)
    message = (
        f"this server wants no key, and so answers under names of its own machine alone, as 127.0.0.1, and not as "
        f"{name!r}; set --api-key, or name the page with --cors-origin"
    )
    return JSONResponse(replies.error(message, "invalid_request_error", code="wrong_host"), 421)


def _unauthorized(headers: Headers) -> JSONResponse:
    message = "this server wants its API key; send it as 'Authorization: Bearer KEY'"
    body: dict[str, Any] = replies.error(message, "authentication_error", code="invalid_api_key")
    # A browser asks its user for a password, and then sends it with everything the page wants.
    scheme = "Basic" if "text/html" in headers.get("accept", "") else "Bearer"
    return JSONResponse(body, 401, {"www-authenticate": f'{scheme} realm="flowspec"'})
