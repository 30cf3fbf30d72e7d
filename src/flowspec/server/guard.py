"""Before any route: trailing slashes, the API key, and the size of bodies. Plain ASGI: streams pass untouched."""

from __future__ import annotations

import base64
import binascii
import hmac
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowspec.server import replies

OPEN_PATHS = ("/health",)  # that need no key


class Guard:
    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
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
        if self._api_key is None or path in OPEN_PATHS:
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


def _unauthorized(headers: Headers) -> JSONResponse:
    message = "this server wants its API key; send it as 'Authorization: Bearer KEY'"
    body: dict[str, Any] = replies.error(message, "authentication_error", code="invalid_api_key")
    # A browser asks its user for a password, and then sends it with everything the page wants.
    scheme = "Basic" if "text/html" in headers.get("accept", "") else "Bearer"
    return JSONResponse(body, 401, {"www-authenticate": f'{scheme} realm="flowspec"'})
