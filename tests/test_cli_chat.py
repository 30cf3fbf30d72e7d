"""`flowspec chat` as a user meets it: against real servers and in process, through pipes and at a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from flowspec import LLM
from flowspec.cli.chat import Conversation
from flowspec.errors import FlowspecError, UsageError
from flowspec.talk.local import LocalTalker
from flowspec.talk.server import ServerTalker, read_events
from flowspec.talk.talker import Settings
from tiny_models import make_checkpoint

COMMAND = [sys.executable, "-m", "flowspec"]
KEY = "open-sesame"
TEMPLATE = "{% for message in messages %}t1 {{ message['content'] }} {% endfor %}t2"
NUM_POSITIONS = 20_000  # an answer takes long enough to be stopped


@contextlib.contextmanager
def serving(model: Path, *options: str) -> Iterator[Server]:
    command = [*COMMAND, "serve", "--model", str(model), "--stages", "1", "--port", "0", *options]
    log = model / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stderr=output, text=True)
    try:
        deadline = time.monotonic() + 120
        while (found := re.search(r"(http://[\d.:]+)/v1", log.read_text())) is None:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Server(process, found[1])
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(timeout=20)


class Server:
    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    @property
    def num_running(self) -> int:
        return httpx.get(f"{self.url}/health?verbose=1", timeout=10).json()["running"]

    def complete(self, prompt: str, max_tokens: int) -> str:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        headers = {"authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=60)
        return answer.json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain"), "qwen3", max_position_embeddings=NUM_POSITIONS)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_checkpoint(tmp_path_factory.mktemp("chat"), "qwen3", max_position_embeddings=NUM_POSITIONS)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def server(chat_model: Path) -> Iterator[Server]:
    with serving(chat_model, "--api-key", KEY) as server:
        yield server


def chat(*options: str, stdin: str = "", key: str | None = KEY) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "FLOWSPEC_API_KEY"}
    return subprocess.run(
        [*COMMAND, "chat", *options],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment | ({"FLOWSPEC_API_KEY": key} if key else {}),
    )


class Terminal:
    """`flowspec chat` at a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self._screen, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))

        def prepare() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            [*COMMAND, "chat", *options],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=prepare,
            env=os.environ | {"TERM": "xterm", "FLOWSPEC_API_KEY": KEY},
        )
        os.close(inner)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def wait_for(self, pattern: str) -> str:
        """What was shown before, and with it."""
        deadline = time.monotonic() + 40
        while (found := re.search(pattern, self.shown, re.DOTALL)) is None:
            assert time.monotonic() < deadline and self._read(), self.shown
        text, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return text

    def _read(self) -> bool:
        if not select.select([self._screen], [], [], 1)[0]:
            return True
        try:
            self.shown += os.read(self._screen, 65536).decode(errors="replace")
        except OSError:  # the other end is closed
            return False
        return True

    def end(self) -> int:
        """The exit code, once everything has been shown."""
        deadline = time.monotonic() + 20
        while self._read() and time.monotonic() < deadline:
            pass
        return self.process.wait(timeout=10)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait(timeout=10)
        os.close(self._screen)


# --- a server ---


def test_a_conversation_is_sent_as_a_whole(server: Server) -> None:
    told = "/system t7\nt3 t4\n\nt5\\\nt6\n/reset\nt3 t4\n"
    done = chat("--url", f"{server.url}/v1", "--temperature", "0", "--max-new-tokens", "9", stdin=told)
    assert done.returncode == 0, done.stderr
    first = server.complete("t1 t7 t1 t3 t4 t2", 9)
    second = server.complete(f"t1 t7 t1 t3 t4 t1 {first} t1 t5 t6 t2", 9)
    assert done.stdout == f"{first}\n{second}\n{first}\n"
    figures = done.stderr.splitlines()
    assert len(figures) == 3, done.stderr
    assert all(re.match(r"9 tokens, [\d.]+ tokens/s, the first after \d+ ms", line) for line in figures)
    assert "\x1b" not in done.stdout + done.stderr, "nothing but text in a pipe"


def test_ctrl_c_stops_an_answer_at_the_server_and_then_ends_the_chat(server: Server) -> None:
    with Terminal("--url", server.url) as terminal:
        terminal.wait_for("> ")
        for _ in range(2):
            terminal.type("t3 t4\n")
            text = terminal.wait_for(r"tokens/s\x1b8.*tokens/s\x1b8")
            assert "\x1b[1;23r" in text, "the text scrolls above the status line"
            assert server.num_running == 1
            terminal.type("\x03")
            text = terminal.wait_for(r"tokens/s, the first after .*> ")
            assert "\x1b[r" in text, "and then in the whole terminal again"
            deadline = time.monotonic() + 10
            while server.num_running:
                assert time.monotonic() < deadline, "the answer goes on at the server"
                time.sleep(0.02)
        terminal.type("/nonsense\n")
        terminal.wait_for(r"error: there is no command /nonsense.*> ")
        terminal.type("t" + "3" * 40_000 + "\\\n")
        terminal.wait_for(r"\.\.\. ")
        terminal.type("\x03")
        assert terminal.end() == 0, terminal.shown
    assert "Traceback" not in terminal.shown


@pytest.mark.parametrize(
    ("options", "key", "message", "code"),
    [
        (["--url", "SERVER"], "wrong", "wants its API key", 2),
        (["--url", "SERVER"], None, "--api-key", 2),
        (["--url", "SERVER", "--model", "other"], KEY, "the model 'other' is not served", 2),
        (["--url", "SERVER", "--stages", "2"], KEY, "--stages is the server's matter", 2),
        (["--url", "SERVER", "--max-new-tokens", "30000"], KEY, "max_tokens is 30000", 2),
        (["--url", "CLOSED"], KEY, "is 'flowspec serve' running there?", 1),
        (["--url", "nonsense"], KEY, "no address of a server", 2),
        (["--temperature", "-1"], KEY, "temperature is -1.0", 2),
    ],
)
def test_errors_are_one_line(server: Server, options: list[str], key: str | None, message: str, code: int) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        urls = {"SERVER": server.url, "CLOSED": f"http://127.0.0.1:{closed.getsockname()[1]}"}
        done = chat(*(urls.get(option, option) for option in options), stdin="t3\n", key=key)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout, done.stderr


def test_without_a_chat_template_each_text_is_continued_until_the_server_hangs_and_dies(model: Path) -> None:
    options = ("--max-new-tokens", "15000", "--temperature", "0", "--timeout", "2")
    with serving(model) as server, Terminal("--url", server.url, *options) as terminal:
        terminal.wait_for("> ")
        terminal.type("t3 t4\n")
        shown = terminal.wait_for("continued, each text by itself.*tokens/s")
        assert "plain0 has no chat template" in shown and server.complete("t3 t4", 5) in shown
        server.process.send_signal(signal.SIGSTOP)
        terminal.wait_for("error: http.* has said nothing for 2 s.*> ")
        server.process.send_signal(signal.SIGCONT)
        terminal.type("t3 t4\n")
        assert "has no chat template" not in terminal.wait_for("tokens/s")
        server.process.kill()
        terminal.wait_for("error: (lost|the server ended).*> ")
        terminal.type("t3 t4\n")
        terminal.wait_for("error: (cannot reach|lost) .*> ")
        terminal.type("\x04")
        assert terminal.end() == 0


class Playback(BaseHTTPRequestHandler):
    """Answers each request with the next of the server's ``scripts``: a status, headers, and a body."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200, {}, b'{"data": [{"id": "fake"}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._answer(*self.server.scripts.pop(0))  # type: ignore[attr-defined]

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def talking(*scripts: tuple[int, dict[str, str], bytes]) -> Iterator[tuple[ServerTalker, list[str]]]:
    """With a server that plays ``scripts``, and what its talker tells the user."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Playback)
    server.scripts = list(scripts)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    told: list[str] = []
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with contextlib.closing(ServerTalker(url, None, None, 10, told.append)) as talker:
            yield talker, told
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


HELLO = 'data: {"choices": [{"delta": {"content": "a\u2028b"}}]}\n\n'.encode()
BUSY = (429, {"retry-after": "0"}, b'{"error": {"message": "so many wait"}}')


def ask(talker: ServerTalker) -> str:
    return "".join(piece.text for piece in talker.reply([{"role": "user", "content": "x"}], Settings()))


def test_a_busy_server_is_asked_again_twice() -> None:
    with talking(BUSY, BUSY, (200, {}, HELLO + b"data: [DONE]\n\n"), *[BUSY] * 3) as (talker, told):
        assert talker.name == "fake" and ask(talker) == "a\u2028b"
        assert told == ["the server is busy; trying again in 0 s"] * 2
        with pytest.raises(FlowspecError, match="answered 429: so many wait"):
            ask(talker)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ((200, {}, HELLO), "in the middle"),
        ((200, {"content-length": "999"}, HELLO), "lost http"),
        ((200, {}, HELLO + b'data: {"error": {"message": "lost worker 2"}}\n\n'), "lost worker 2"),
        ((200, {}, b"data: nonsense\n\n"), "no answer of an OpenAI server"),
        ((503, {}, b'{"error": {"message": "a worker\\nhangs"}}'), "answered 503: a worker hangs"),
        ((502, {}, b"<html>"), "answered 502: Bad Gateway"),
    ],
)
def test_a_broken_stream_is_an_error(script: tuple[int, dict[str, str], bytes], message: str) -> None:
    with talking(script) as (talker, _), pytest.raises(FlowspecError, match=message) as caught:
        ask(talker)
    assert not isinstance(caught.value, UsageError)


def test_events_may_be_cut_anywhere() -> None:
    stream = HELLO + b": a comment\r\n\r\ndata:{}\r\n\r\n"
    whole = list(read_events([stream]))
    assert whole == [HELLO.removeprefix(b"data: ").strip(), b"{}"]
    assert list(read_events(stream[i : i + 1] for i in range(len(stream)))) == whole


# --- a model in this process ---


def test_in_process_a_conversation_is_sent_as_a_whole(
    chat_model: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"t3 t4\nt5\n/quit\nt6\n"))
    monkeypatch.setattr(sys, "stdin", typed)
    with LLM(chat_model, stages=2, in_process=True) as llm:
        told: list[str] = []
        Conversation(LocalTalker(llm, told.append), Settings({"max_tokens": 9, "temperature": 0.0}), "t7").run()
    first = server.complete("t1 t7 t1 t3 t4 t2", 9)
    second = server.complete(f"t1 t7 t1 t3 t4 t1 {first} t1 t5 t2", 9)
    shown = capsys.readouterr()
    assert shown.out == f"{first}\n{second}\n" and not told
    assert shown.err.count("9 tokens, ") == shown.err.count("\n") == 2


def test_in_process_the_demo_stops_goes_on_and_ends_with_a_dead_worker() -> None:
    with Terminal("--stages", "2", "--max-new-tokens", "400", "--temperature", "0.8", "--seed", "3") as terminal:
        terminal.wait_for("has no chat template.*> ")
        children = psutil.Process(terminal.process.pid).children(recursive=True)
        terminal.type("import os\n")
        terminal.wait_for("tokens/s")
        terminal.type("\x03")
        terminal.wait_for("the first after .*> ")
        terminal.type("class Queue:\\\n    def __init__(self):\n")
        assert re.search(r"400 tokens, .* accepted per draft", terminal.wait_for("400 tokens.*> "))
        max(children, key=lambda child: child.pid).kill()
        terminal.type("import os\n")
        assert terminal.end() == 1
        assert re.search("flowspec: error: .*worker 2.*\n", terminal.shown)
        assert "Traceback" not in terminal.shown
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
