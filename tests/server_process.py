"""A real ``flowspec serve`` for tests: a process of its own, with worker processes of its own."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from types import TracebackType

import psutil

from fork_server import is_running
from logged_process import LoggedProcess

START_TIMEOUT_S = 120.0

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}t1 {{ m.content }} {% endfor %}t2"
)


def add_chat_template(directory: Path) -> Path:
    """Let a tiny model of ``tiny_models`` chat."""
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


def forked_workers(process: psutil.Process) -> list[psutil.Process]:
    """The local workers of a process that runs a model, worker 1 first: process ids start again at some time."""
    launchers = [child for child in process.children() if is_running(child, "worker.local")]
    forked = [child for launcher in launchers for child in launcher.children()]
    workers = [child for child in forked if is_running(child, "worker.local")]  # not a fork server
    return sorted(workers, key=lambda worker: (worker.create_time(), worker.pid))


class ServerProcess:
    """A context manager; ``url`` is where it listens. At its end nothing of it may be left."""

    def __init__(self, *arguments: str) -> None:
        self._running = LoggedProcess(["serve", "--port", "0", *arguments], "Ctrl-C")
        self._process = self._running.process

    @property
    def text(self) -> str:
        return self._running.log

    @property
    def url(self) -> str:
        found = re.search(r"http://[^/\s]+", self.text)
        assert found is not None, self.text
        return found.group()

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self._process.pid)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def exit_code(self) -> int:
        """Waits for the end."""
        return self._process.wait(timeout=30)

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.process.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]

    def __enter__(self) -> ServerProcess:
        if not self._running.comes_up(START_TIMEOUT_S):
            self._process.kill()
            self._running.wait(30)
            raise AssertionError(f"the server did not come up: {self.text}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        family = [self.process, *self.workers()] if self._process.poll() is None else []
        self._process.send_signal(signal.SIGTERM)
        self._running.wait(30)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, f"processes are left: {alive}"
        assert "Traceback" not in self.text, self.text
