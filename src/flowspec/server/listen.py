"""The listening socket, bound before the model is loaded, and uvicorn on it."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from flowspec.errors import UsageError

SWITCH_INTERVAL_S = 0.001  # the engine's thread yields to the event loop this soon, not after Python's 5 ms
HEADER_TIMEOUT_S = 20.0  # from the connection's beginning, or the last answer's end, to the end of the headers
BODY_TIMEOUT_S = 60.0  # from there to the body's end
GRACE_S = 2  # for open streams when the server ends


@dataclass(frozen=True)
class Listening:
    socket: socket.socket
    url: str

    @classmethod
    def open(cls, host: str, port: int) -> Listening:
        """Raises ``UsageError`` for an address that cannot be had."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            # asyncio sends at once (TCP_NODELAY) only where the socket is known to be TCP; else text waits for ACKs.
            bound = socket.socket(family, kind, protocol)
        except OSError as error:
            raise UsageError(f"cannot listen on {host}: {error.strerror or error}; is it an address here?") from None
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
            bound.listen(2048)
        except OSError as error:
            bound.close()
            raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from None
        shown = f"[{host}]" if ":" in host else host
        return cls(bound, f"http://{shown}:{bound.getsockname()[1]}")

    def close(self) -> None:
        self.socket.close()


class ImpatientProtocol(H11Protocol):
    """A client that does not get to the end of its request is cut off; uvicorn alone waits for it for ever."""

    _timer: asyncio.TimerHandle | None = None
    _state: Any = None  # of the request, that the timer is for

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """A timer for the headers, and another one for the body."""
        state = self.conn.their_state
        if state is not self._state:
            self._stop()
            if state in (h11.IDLE, h11.SEND_BODY):
                seconds = HEADER_TIMEOUT_S if state is h11.IDLE else BODY_TIMEOUT_S
                self._timer, self._state = self.loop.call_later(seconds, self._give_up), state

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._state = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Ends the application's work before it waits for open streams, which end with it."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self.config.app.state.api.service.stop()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def run(app: FastAPI, listening: Listening, verbose: bool = False, announce: Callable[[], None] = lambda: None) -> None:
    """Serve until interrupted or terminated, or until nothing can be generated any more: ``Service.failure``.

    ``announce`` is called once all that may happen.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    config = uvicorn.Config(
        app,
        log_level="info" if verbose else "warning",
        access_log=verbose,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        h11_max_incomplete_event_size=64 * 1024,
        http=ImpatientProtocol,
    )
    server = _Server(config, announce)

    def end() -> None:
        server.should_exit = True  # whoever watches over this process may start it again

    app.state.api.service.on_failure = end
    server.run(sockets=[listening.socket])
