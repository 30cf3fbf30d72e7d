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
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest

from flowspec import LLM, SamplingParams
from flowspec.cli.chat import Conversation
from flowspec.cli.keyboard import Pipe
from flowspec.config import ServerConfig
from flowspec.errors import FlowspecError, UsageError
from flowspec.server.app import create_app
from flowspec.server.feed import Feed
from flowspec.talk.local import LocalTalker
from flowspec.talk.remote import RemoteTalker, read_events
from flowspec.talk.talker import Settings
from fork_server import as_at_a_terminal
from server_process import forked_workers
from tiny_models import make_checkpoint

COMMAND = [sys.executable, "-m", "flowspec"]
KEY = "open-sesame"
TEMPLATE = "{% for message in messages %}t1 {{ message['content'] }} {% endfor %}t2"
PROMPT = r"\n>"
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
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx.get(f"{self.url}/health?verbose=1", headers=headers, timeout=10).json()["running"]

    def complete(self, prompt: str, max_tokens: int) -> str:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        headers = {"authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=60)
        return answer.json()["choices"][0]["text"].strip()  # a continuation begins with its space, an answer does not


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
    """`flowspec chat` at a terminal of its own.

    ``wait_for`` sees the text without what moves the cursor, which may stand for a space.
    """

    _CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>78]|[\r\x08]")

    def __init__(self, state: Path, *options: str) -> None:
        self._screen, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))

        self.process = subprocess.Popen(
            [*COMMAND, "chat", *options],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            preexec_fn=as_at_a_terminal,
            # This terminal does not say where its cursor is.
            env=os.environ
            | {"TERM": "xterm", "FLOWSPEC_API_KEY": KEY, "XDG_STATE_HOME": str(state), "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(inner)
        self._raw = ""
        self._num_seen = 0

    @property
    def shown(self) -> str:
        """What nobody has waited for yet."""
        return self._CONTROLS.sub("", self._raw)[self._num_seen :]

    def type(self, text: str) -> None:
        for start in range(0, len(text), 512):
            os.write(self._screen, text[start : start + 512].encode())
            self._read(0)  # else neither side could write

    def wait_for(self, pattern: str) -> str:
        """What was shown before, and with it."""
        deadline = time.monotonic() + 40
        while (found := re.search(pattern, self.shown, re.DOTALL)) is None:
            assert time.monotonic() < deadline and self._read(), repr(self.shown[-2000:])
        text = self.shown[: found.end()]
        self._num_seen += found.end()
        return text

    def _read(self, wait_s: float = 1) -> bool:
        if not select.select([self._screen], [], [], wait_s)[0]:
            return True
        try:
            self._raw += os.read(self._screen, 65536).decode(errors="replace")
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


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_stops_an_answer_keeps_what_was_typed_and_leaves_when_asked_twice(
    server: Server, tmp_path: Path
) -> None:
    with Terminal(tmp_path, "--url", server.url, "--temperature", "0") as terminal:
        terminal.wait_for(PROMPT)
        for _ in range(2):
            terminal.type("t3 t4\r")
            terminal.wait_for(r"t3 ?t4\n.*t\d")
            assert server.num_running == 1
            terminal.type("t5 t6")  # while the answer is printed
            time.sleep(0.1)
            terminal.type("\x03")
            text = terminal.wait_for(r"tokens/s, the first after [^\n]*\n> ?t5 ?t6")
            assert len(re.findall("t5 ?t6", text)) == 1, "it is not shown inside the answer"
            until(lambda: server.num_running == 0)
            terminal.type("\x03")  # gives up what was typed, and nothing else
            terminal.wait_for(PROMPT)
        terminal.type("/nonsense\r")
        terminal.wait_for(r"error: there is no command /nonsense[^>]*\n>")
        terminal.type("t" + "3" * 5_000 + "\\\r")
        terminal.wait_for(r"\n\.\.\.")
        terminal.type("\x03")
        terminal.wait_for(PROMPT)
        terminal.type("\x03")
        terminal.wait_for(r"Ctrl-C again leaves[^>]*\n>")
        terminal.type("/help\r")
        terminal.wait_for(r"/save FILE .*stops an answer[^>]*\n>")
        terminal.type("\x03")
        terminal.wait_for(r"Ctrl-C again leaves[^>]*\n>")
        terminal.type("\x03")
        assert terminal.end() == 0, terminal.shown
        assert "the conversation is kept in" in terminal.shown and "Traceback" not in terminal.shown
    (kept,) = (tmp_path / "flowspec" / "chats").iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    messages = json.loads(kept.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == "t3 t4" and messages[1]["content"]


def test_a_question_typed_during_an_answer_is_the_next_one(server: Server, tmp_path: Path) -> None:
    with Terminal(tmp_path, "--url", server.url, "--max-new-tokens", "700", "--temperature", "0") as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("t3 t4\r")
        terminal.wait_for(r"t3 ?t4\n.*t\d")
        terminal.type("/system t9\rt5\x7ft6\r")
        terminal.wait_for(r"700 tokens.*\n>[^\n]*/system ?t9[^\n]*\n>[^\n]*tt6.*700 tokens.*\n>")
        terminal.type("/save " + str(tmp_path / "talk.json") + "\r")
        terminal.wait_for(r"saved in.*\n>")
        terminal.type("\x04")
        assert terminal.end() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert (saved["system"], saved["messages"][2]) == ("t9", {"role": "user", "content": "tt6"})


def test_a_conversation_that_was_kept_goes_on(server: Server, tmp_path: Path) -> None:
    options = ("--url", server.url, "--temperature", "0", "--max-new-tokens", "9")
    told = f"/system t7\nt3 t4\n/save {tmp_path / 'talk.json'}\nt5\n"
    whole = chat(*options, stdin=told)
    rest = chat(*options, stdin=f"/load {tmp_path / 'talk.json'}\nt5\n")
    assert rest.returncode == 0, rest.stderr
    assert whole.stdout.splitlines()[1] == rest.stdout.strip()
    assert (tmp_path / "talk.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/save", "wants a file"),
        ("/save /no/such/place/talk.json", "cannot write /no/such/place/talk.json"),
        ("/load /no/such/file", "cannot read /no/such/file"),
        ("/load {wrong}", "is no conversation of flowspec chat"),
        ("/load", "no conversation is kept"),
        ("/temperature hot", "/temperature hot: could not convert"),
    ],
)
def test_a_command_that_cannot_be_obeyed_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, message: str
) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"messages": "none"}')
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO(command.format(wrong=wrong) + "\n"))
    with talking() as (talker, _), pytest.raises(UsageError, match=re.escape(message)):
        Conversation(talker, Settings(), "").run(Pipe())


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


def test_without_a_chat_template_each_text_is_continued_until_the_server_hangs_and_dies(
    model: Path, tmp_path: Path
) -> None:
    options = ("--max-new-tokens", "15000", "--temperature", "0", "--timeout", "2")
    with serving(model) as server, Terminal(tmp_path, "--url", server.url, *options) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("t3 t4\r")
        shown = terminal.wait_for(r"continued, each text by itself.*(t\d+ ){6}")
        assert "plain0 has no chat template" in shown and server.complete("t3 t4", 5) in shown
        server.process.send_signal(signal.SIGSTOP)
        terminal.wait_for(r"error: http.* has said nothing for 2 s.*\n>")
        server.process.send_signal(signal.SIGCONT)
        terminal.type("t3 t4\r")
        assert "has no chat template" not in terminal.wait_for(r"t3 ?t4\n.*t\d")
        server.process.kill()
        terminal.wait_for(r"error: (lost|the server ended).*\n>")
        terminal.type("t3 t4\r")
        terminal.wait_for(r"error: (cannot reach|lost) .*\n>")
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
def talking(*scripts: tuple[int, dict[str, str], bytes]) -> Iterator[tuple[RemoteTalker, list[str]]]:
    """With a server that plays ``scripts``, and what its talker tells the user."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Playback)
    server.scripts = list(scripts)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    told: list[str] = []
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with contextlib.closing(RemoteTalker(url, None, None, 10, told.append)) as talker:
            yield talker, told
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


HELLO = 'data: {"choices": [{"delta": {"content": "a\u2028b"}}]}\n\n'.encode()
BUSY = (429, {"retry-after": "0"}, b'{"error": {"message": "so many wait"}}')


def ask(talker: RemoteTalker) -> str:
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
        Conversation(LocalTalker(llm, told.append), Settings({"max_tokens": 9, "temperature": 0.0}), "t7").run(Pipe())
    first = server.complete("t1 t7 t1 t3 t4 t2", 9)
    second = server.complete(f"t1 t7 t1 t3 t4 t1 {first} t1 t5 t2", 9)
    shown = capsys.readouterr()
    assert shown.out == f"{first}\n{second}\n" and not told
    assert shown.err.count("9 tokens, ") == shown.err.count("\n") == 2


def test_in_process_the_demo_stops_goes_on_and_ends_with_a_dead_worker(tmp_path: Path) -> None:
    options = ("--stages", "2", "--max-new-tokens", "400", "--temperature", "0.8", "--seed", "3")
    with Terminal(tmp_path, *options, "--rejoin-timeout", "0") as terminal:
        terminal.wait_for(r"has no chat template.*\n>")
        children = psutil.Process(terminal.process.pid).children(recursive=True)
        terminal.type("import os\r")
        terminal.wait_for(r"import ?os\n.*\n")
        terminal.type("\x03")
        terminal.wait_for(r"the first after [^\n]*\n>")
        terminal.type("class Queue:\\\r    def __init__(self):\r")
        assert re.search(r"400 tokens, .* accepted per draft", terminal.wait_for(r"400 tokens[^\n]*\n>"))
        forked_workers(psutil.Process(terminal.process.pid))[-1].kill()
        terminal.type("import os\r")
        assert terminal.end() == 1
        assert re.search("flowspec: error: .*worker 2.*\n", terminal.shown)
        assert "Traceback" not in terminal.shown
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_the_model_decides_where_nothing_is_said_as_at_a_server(
    chat_model: Path, server: Server, tmp_path: Path
) -> None:
    """The temperature was 0 in this process, and the model's own at a server."""
    told = [{"role": "user", "content": "t3 t4"}]
    for wanted in ({"do_sample": True, "temperature": 0.7, "top_k": 9}, {"do_sample": False}, {}):
        directory = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(chat_model, directory)
        (directory / "generation_config.json").write_text(json.dumps(wanted))
        with LLM(directory, stages=1, in_process=True) as llm:
            api = create_app(llm.engine, ServerConfig(), Feed()).state.api
            pieces = list(LocalTalker(llm, print).reply(told, Settings({"max_tokens": 9, "seed": 5})))
            params = SamplingParams(**{**api.defaults, "max_tokens": 9, "seed": 5})
            assert "".join(piece.text for piece in pieces) == llm.chat(told, params).text
