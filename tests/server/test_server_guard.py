"""Who may ask the server, and how long it may take to ask; what browsers are told of its pages."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient

from engines import engine_of
from flowspec import chat_template
from flowspec.config import ServerConfig
from flowspec.core import SamplingParams
from flowspec.engine.engine import Engine
from flowspec.errors import UsageError
from flowspec.server import listen
from flowspec.server.app import create_app
from flowspec.server.feed import Feed
from flowspec.server.guard import Hosts
from flowspec.server.tokens import INLINE_CHARS, Tokens
from tiny_models import make_text_checkpoint

LOOP = "{% if messages[0].content == 'loop' %}" + "{% for a in range(9999) %}" * 4 + "x" + "{% endfor %}" * 4
TEMPLATE = LOOP + "{% endif %}{{ messages[0].content }}"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = make_text_checkpoint(tmp_path_factory.mktemp("guard") / "tiny", chat_template=TEMPLATE)
    with engine_of(directory, stages=1, in_process=True, draft="none") as made:
        yield made


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1:8000", True),
        ("localhost", True),
        ("LOCALHOST.:80", True),
        ("[::1]:8000", True),
        ("127.9.9.9", True),
        ("", True),
        ("page.example", True),
        ("evil.example:8000", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example:8000", False),
        ("10.0.0.1", False),
        ("[::2]:80", False),
    ],
)
def test_a_server_without_a_key_answers_under_names_of_its_machine_alone(host: str, is_ours: bool) -> None:
    """A page that lets its name mean 127.0.0.1 could read all answers."""
    assert Hosts.of(ServerConfig(cors_origins=("https://page.example:8443",))).include(host) == is_ours
    for config in (ServerConfig(api_key="k"), ServerConfig("0.0.0.0"), ServerConfig(cors_origins=("*",))):
        assert Hosts.of(config).include(host)


def test_pages_are_told_whom_to_trust_and_strangers_nothing_of_the_workers(engine: Engine) -> None:
    with TestClient(create_app(engine, ServerConfig(api_key="s3cret"), Feed())) as client:
        bare = client.get("/health?verbose=1")
        assert (bare.status_code, bare.content) == (200, b"")
        told = client.get("/health?verbose=1", headers={"authorization": "Bearer s3cret"}).json()
        assert told["status"] == "ok" and told["stages"]
        for path in ("/", "/static/main.js", "/health"):
            headers = client.get(path, headers={"authorization": "Bearer s3cret"}).headers
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["x-frame-options"] == "DENY" and headers["x-content-type-options"] == "nosniff"


def test_another_name_is_told_what_to_do(tmp_path: Path, checkpoint_dir: Callable[[str], Path]) -> None:
    with (
        engine_of(checkpoint_dir("llama"), stages=1, in_process=True, draft="none") as engine,
        TestClient(create_app(engine, ServerConfig(), Feed()), base_url="http://evil.example:8000") as client,
    ):
        answer = client.get("/v1/models")
        assert answer.status_code == 421 and "--api-key" in answer.json()["error"]["message"]
        assert client.get("/v1/models", headers={"host": "127.0.0.1:8000"}).status_code == 200
        engine.submit([1, 2, 3], SamplingParams(50))
        assert client.get("/health?verbose=1", headers={"host": "localhost"}).status_code == 200


def test_nothing_runs_in_an_engine_that_has_failed(checkpoint_dir: Callable[[str], Path]) -> None:
    """``running`` stayed at what it had been."""
    with engine_of(checkpoint_dir("llama"), stages=1, in_process=True, draft="none") as engine:
        engine.submit([1, 2, 3], SamplingParams(50))
        engine.step()
        assert engine.status().num_running == 1
        engine.close()
        assert engine.status().num_running == engine.status().num_slots_held == 0


# --- what is long is not done in the event loop ---


@pytest.mark.parametrize("kind", ["a long text", "a chat of a template that loops"])
def test_a_short_text_does_not_wait_for_what_is_long(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(chat_template, "TIMEOUT_S", 1.0)

    async def run() -> list[str]:
        tokens, order = Tokens(engine), list[str]()

        async def long() -> None:
            if kind == "a long text":
                assert len(await tokens.encode("hello world " * 100_000)) > INLINE_CHARS
            else:
                with pytest.raises(UsageError, match="it ran for more than"):
                    await tokens.encode_chat([{"role": "user", "content": "loop"}], {})
            order.append("long")

        async def short() -> None:
            assert await tokens.encode("hello")
            assert await tokens.encode_chat([{"role": "user", "content": "hello"}], {})
            order.append("short")

        waiting = asyncio.create_task(long())
        await asyncio.sleep(0)  # it is under way
        await short()
        await waiting
        return order

    assert asyncio.run(run()) == ["short", "long"]


# --- clients that do not get to the end of what they ask ---


@contextmanager
def served(app: Any) -> Iterator[tuple[str, int]]:
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=listen.ImpatientProtocol, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield bound.getsockname()
    finally:
        server.should_exit = True
        thread.join()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    size, has_more = 0, True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, has_more = size + len(message.get("body", b"")), message.get("more_body", False)
    await asyncio.sleep(0.6)  # longer than a client may take: its own time does not count
    text = str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc"]
)
def test_who_does_not_get_to_the_end_is_cut_off(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """800 connections without a complete header stayed open for ever."""
    monkeypatch.setattr(listen, "HEADER_TIMEOUT_S", 0.3)
    monkeypatch.setattr(listen, "BODY_TIMEOUT_S", 0.3)
    whole = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc"
    with served(echo) as address, socket.create_connection(address, 20) as slow:
        slow.sendall(sent)
        with socket.create_connection(address, 20) as quick:
            for _ in range(2):  # on one connection
                quick.sendall(whole)
                answer = b""
                while not answer.endswith(b"\r\n\r\n3"):
                    received = quick.recv(4096)
                    assert received, answer
                    answer += received
        started = time.monotonic()
        assert slow.recv(4096) == b"" and time.monotonic() - started < 15
