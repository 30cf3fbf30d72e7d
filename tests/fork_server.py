"""Python processes that import nothing: forked from one process that has imported everything.

Torch and transformers take seconds to import, and the tests start hundreds of processes. After ``install``, those that
``subprocess`` would start as ``python -m flowspec...`` or ``python benchmarks/...`` are forked by a server: real
processes, with descriptors, environment, folder, signals and exit code of their own, and children of whoever starts
them; in the place of ``namespaces`` that the command names. All others are started as ever: what has a ``preexec_fn``
but ``as_at_a_terminal``, what is told other variables that are read at import, what is not on Linux. With
FLOWSPEC_FRESH_PROCESSES=1 every process is.

This file is also the server's program. Beside each process that it forks stands a fork of the server itself, for what
that process starts.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

import namespaces

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")
MAX_REQUEST_BYTES = 1 << 18
READ_AT_IMPORT = ("HF_ENDPOINT", "HF_HOME", "OMP_", "PYTHON")  # variables that begin so
# As ``cli.terminal`` says before it imports anything.
SAID_BY_CLI = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
SET_NAME, SET_CHILD_SUBREAPER = 15, 36  # of prctl

# What commands and benchmarks import, but for modules that are programs themselves.
IMPORTED = (
    "flowspec.bench.emulated", "flowspec.bench.load", "flowspec.bench.local", "flowspec.bench.plots",
    "flowspec.bench.study", "flowspec.bench.trace", "flowspec.cli.main", "flowspec.emulation.emulator",
    "flowspec.emulation.paced", "flowspec.emulation.simulator", "flowspec.llm", "flowspec.server.app",
    "flowspec.server.listen", "flowspec.server.metrics", "flowspec.server.service", "flowspec.talk.local",
    "flowspec.talk.remote", "flowspec.worker.process", "prompt_toolkit",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A Python command; its descriptors 0, 1 and 2 come with it."""

    words: list[str]  # after ``python``
    folder: str
    environment: dict[str, str]
    has_own_session: bool
    network: str | None  # the namespace that it is in
    hidden: str | None  # a folder that is empty there

    def send(self, connection: socket.socket, descriptors: list[int]) -> None:
        socket.send_fds(connection, [json.dumps(asdict(self)).encode()], descriptors)


# --- who starts processes ---

_start_fresh: Any = getattr(subprocess, "_fork_exec", None)  # from Python 3.11 on
is_possible = sys.platform == "linux" and _start_fresh is not None and os.environ.get("FLOWSPEC_FRESH_PROCESSES") != "1"


class ForkServer:
    """What a process asks; without a connection to one it is started when it is first asked."""

    def __init__(self, connection: socket.socket | None = None) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def start(self) -> socket.socket:
        if self._connection is None:
            self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with other:
                environment = os.environ | SAID_BY_CLI
                self._process = subprocess.Popen([sys.executable, __file__], stdin=other.fileno(), env=environment)
            atexit.register(self._close)
        return self._connection

    def _close(self) -> None:
        """The server ends when nobody can ask it any more."""
        assert self._connection is not None
        self._connection.close()
        self._process.wait()

    def fork(self, request: Request, descriptors: list[int]) -> int:
        """The process, which loses its parent at once, and is then a child of this one."""
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        with self._lock:
            connection = self.start()
            request.send(connection, descriptors)
            answer = connection.recv(64)
        assert answer, "the fork server has ended"
        return int(answer)


server = ForkServer()  # of pytest's process


def install(server: ForkServer) -> None:
    """Let it fork what can be forked. What is replaced is the place where ``Popen`` forks and executes."""
    own = _read_at_import(os.environ)

    def start(*arguments: Any) -> int:
        words, _, _, _, folder, environment, *rest = arguments
        words, variables = [os.fsdecode(word) for word in words], _variables(environment)
        has_function = any(callable(argument) and argument is not as_at_a_terminal for argument in rest)
        network, hidden, words = namespaces.parse(words)
        if has_function or not _can_be_forked(words) or _read_at_import(variables) != own:
            return _start_fresh(*arguments)
        theirs, has_own_session = (rest[0], rest[3], rest[5]), bool(rest[9])
        descriptors = [number if given == -1 else given for number, given in enumerate(theirs)]
        folder = os.path.abspath(os.fsdecode(folder or "."))
        request = Request(words[1:], folder, variables, has_own_session, network, hidden)
        return server.fork(request, descriptors)

    subprocess._fork_exec = start  # type: ignore[attr-defined]


def as_at_a_terminal() -> None:
    """For ``preexec_fn``: it listens to Ctrl-C, whoever starts it, and a terminal of its session is its own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getsid(0) == os.getpid() and os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _can_be_forked(words: Sequence[str]) -> bool:
    match words:
        case [sys.executable, "-m", module, *_]:
            return module.partition(".")[0] == "flowspec"
        case [sys.executable, "-c", code, *_]:
            return "from flowspec import LLM;" in code
        case [sys.executable, script, *_]:
            return script.startswith(BENCHMARKS)
        case _:
            return False


def _variables(pairs: list[bytes] | None) -> dict[str, str]:
    """As ``subprocess`` hands them on; ``None``: this process's own."""
    if pairs is None:
        return dict(os.environ)
    split = (os.fsdecode(pair).partition("=") for pair in pairs)
    return {name: value for name, _, value in split}


def _read_at_import(variables: Mapping[str, str]) -> dict[str, str]:
    found = {name: value for name, value in variables.items() if name.startswith(READ_AT_IMPORT)}
    found.pop("PYTHONPATH", None)  # it leads to the same modules
    return found


def is_running(process: psutil.Process, module: str) -> bool:
    """Whether it was started as this module of flowspec, forked or as ever."""
    try:
        return process.name() == module or f"flowspec.{module}" in process.cmdline()
    except psutil.NoSuchProcess:  # of a zombie too
        return False


# --- the server, and what it forks ---


def serve(connection: socket.socket) -> tuple[Request, list[int]]:
    """Returns in each process that it forks; ends when nobody is there any more to ask."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
        if not data:
            os._exit(0)
        pid_read, pid_written = os.pipe()
        if parent := os.fork():
            os.waitpid(parent, 0)
            connection.send(os.read(pid_read, 64))
        elif child := os.fork():
            os.write(pid_written, str(child).encode())
            os._exit(0)
        for descriptor in (pid_read, pid_written):
            os.close(descriptor)
        if not parent:
            connection.close()
            return Request(**json.loads(data)), descriptors
        for descriptor in descriptors:
            os.close(descriptor)


def become(request: Request, descriptors: list[int]) -> None:
    """The process that was asked for, as far as a program can see."""
    if request.has_own_session:
        os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    as_at_a_terminal()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request.network is not None:
        namespaces.enter(request.network, request.hidden)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", 1 if os.isatty(1) else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    tempfile.tempdir = None  # by TMPDIR


def run_to_the_end(words: list[str]) -> None:
    """As Python does, but for taking each object down: they are the server's, and would be copied for that."""
    code: Any = None
    try:
        run(words)
    except SystemExit as end:
        code = end.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if isinstance(code, str):
        print(code, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else code is not None)


def run(words: list[str]) -> None:
    if words[0] == "-m":
        _, module, *arguments = words
        ctypes.CDLL(None).prctl(SET_NAME, module.removeprefix("flowspec.").encode(), 0, 0, 0)
        sys.argv, sys.path[0] = [module, *arguments], os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(words[1], {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(words[0])
        runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else the first collection in each process would copy all of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which then goes away
    connection = socket.socket(fileno=os.dup(0))
    while True:
        request, descriptors = serve(connection)
        here, connection = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            break
        here.close()
        for descriptor in descriptors:
            os.close(descriptor)
    connection.close()
    install(ForkServer(here))
    become(request, descriptors)
    run_to_the_end(request.words)


if __name__ == "__main__":
    main()
