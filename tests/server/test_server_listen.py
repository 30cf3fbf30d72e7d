"""The server's socket."""

from __future__ import annotations

import asyncio
import socket

from flowspec.server.listen import Listening


def test_what_is_sent_waits_for_no_acknowledgement() -> None:
    """Without TCP_NODELAY, each piece of text waited until the client's system had confirmed the piece before."""

    async def no_delay() -> int:
        found: asyncio.Queue[int] = asyncio.Queue()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            found.put_nowait(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = Listening.open("127.0.0.1", 0)
        server = await asyncio.start_server(serve, sock=listening.socket)
        async with server:
            _, writer = await asyncio.open_connection(*listening.socket.getsockname())
            value = await asyncio.wait_for(found.get(), 10)
            writer.close()
            await writer.wait_closed()
        return value

    assert asyncio.run(no_delay())
