"""Workers as if on other machines, for benchmarks: processes on ports of their own, and links to them that can fail."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import psutil

from flowspec.cluster.membership import Membership
from flowspec.wire.key_file import STATE_VARIABLE

_START_S = 60.0
_READ_BYTES = 1 << 16


class WorkerElsewhere:
    """``flowspec worker``, started at once, in its own process; a context manager that ends it."""

    def __init__(self, *arguments: str, port: int = 0, environment: Mapping[str, str] | None = None) -> None:
        """``environment``: beside that of this process."""
        self._command = [sys.executable, "-m", "flowspec", "worker", "--threads", "1", *arguments, "--listen"]
        self._environment = {**os.environ, **(environment or {})}
        self.lines: list[str] = []  # of its log
        self._start(port)

    def _start(self, port: int) -> None:
        self._has_news = threading.Event()  # it listens, or has ended
        self._process = subprocess.Popen(
            [*self._command, f"127.0.0.1:{port}"], stderr=subprocess.PIPE, text=True, env=self._environment
        )
        self._reader = threading.Thread(target=self._read, args=(self._process, self._has_news), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str], has_news: threading.Event) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.lines.append(line)
            if "listening on" in line:
                has_news.set()
        has_news.set()

    @functools.cached_property
    def address(self) -> str:
        """Waits until it listens for the first time. Raises ``SystemExit`` where it does not come up."""
        self._has_news.wait(_START_S)
        found = re.search(r"listening on tcp://(\S+:\d+)", "".join(self.lines))
        if found is None:
            raise SystemExit(f"a worker did not come up: {''.join(self.lines)}")
        return found[1]

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self._process.pid)

    def send_signal(self, number: int) -> None:
        """Nothing happens where it has ended."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """As when its power is cut. A supervisor starts it again, at the same address."""
        port = int(self.address.rpartition(":")[2])
        self._end(signal.SIGKILL)
        self._start(port)

    def _end(self, number: int) -> None:
        self._process.send_signal(signal.SIGCONT)  # it may stand still
        self._process.send_signal(number)
        self._process.wait(20)
        self._reader.join(5)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def __enter__(self) -> WorkerElsewhere:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(signal.SIGTERM)


@contextmanager
def joined_workers(num_workers: int, environment: Mapping[str, str] | None = None) -> Iterator[list[WorkerElsewhere]]:
    """That have joined the cluster of this process' drivers, whose keys are in a folder of its own from now on."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="flowspec-joined-")))
        os.environ[STATE_VARIABLE] = str(folder / "driver")
        membership = Membership.init(folder / "driver")
        token = str(membership.new_token())
        states = [{**(environment or {}), STATE_VARIABLE: str(folder / f"{place}")} for place in range(num_workers)]
        workers = [stack.enter_context(WorkerElsewhere("--join", token, environment=state)) for state in states]
        for worker in workers:
            membership.let_join(worker.address)
        yield workers


class Link:
    """Passes on what comes, in both directions, to an address; can be cut, and can fall silent."""

    def __init__(self, target: str) -> None:
        self._host, port = target.split(":")
        self._port = int(port)
        self._loop = asyncio.new_event_loop()
        self._ends: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self._may_pass = asyncio.Event()
        self._may_pass.set()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._join, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def cut(self, seconds: float) -> None:
        """All connections end at once, and new ones do for so long."""
        self._loop.call_soon_threadsafe(self._set_cut, True)
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._set_cut, False)

    def silence(self, seconds: float) -> None:
        """Nothing passes for so long, and no connection ends by it."""
        self._loop.call_soon_threadsafe(self._may_pass.clear)
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self._may_pass.set)

    def _set_cut(self, is_cut: bool) -> None:
        self._is_cut = is_cut
        for end in self._ends if is_cut else ():
            end.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._may_pass.wait()
        if self._is_cut:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        self._ends |= {writer, far_writer}
        await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
        self._ends -= {writer, far_writer}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_READ_BYTES):
                await self._may_pass.wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    def close(self) -> None:
        """Ends its connections, and its thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        self._may_pass.set()
        self._set_cut(True)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(others, timeout=5) if others else None
