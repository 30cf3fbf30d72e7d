"""Whatever is sent to the server, it answers, and never with an internal error."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from server_process import ServerProcess, add_chat_template
from tiny_models import make_checkpoint

TIMEOUT_S = 60.0
GOOD: dict[str, Any] = {"model": "tiny", "prompt": "t1 t2 t3", "max_tokens": 3}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "t1 t2"}], "max_tokens": 3}
HUGE = [
    10**400, -(10**400), 2**63, 2**64, 1e308, -1e308, 1e-320, float("inf"), float("-inf"), float("nan"), -1, 0, 0.5,
    "", "x", "1", "😀" * 50, "\ud800", "\x00", [], {}, [[]], [{}], {"a": {"b": []}}, True, False, None, [None], "null",
    [10**400], [-1], ["a", 1], {"1": "a"}, {"-1": 1}, {"99999999999999999999": 1}, {"1": 1e999}, [[1], ["a"]],
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = add_chat_template(make_checkpoint(tmp_path_factory.mktemp("fuzz") / "tiny", "llama"))
    with ServerProcess("--model", str(directory), "--stages", "2", "--draft", "ngram") as process:
        yield process


def test_no_request_that_the_document_describes_gives_a_500(server: ServerProcess) -> None:
    tool = str(Path(sys.executable).with_name("schemathesis"))
    options = ["--checks", "not_a_server_error", "--max-examples", "30", "--seed", "1", "--request-timeout", "60"]
    command = [tool, "run", f"{server.url}/openapi.json", *options, "--no-color"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "/v1/completions" in httpx.get(f"{server.url}/openapi.json").text and "bug" not in server.text


def is_told(response: httpx.Response) -> bool:
    """Whether it is an answer, or an error in OpenAI's form."""
    if response.status_code == 200:
        return True
    error = response.json()["error"]
    return 400 <= response.status_code < 500 and set(error) == {"message", "type", "param", "code"} and error["message"]


def test_a_thousand_malformed_bodies_get_clear_answers(server: ServerProcess) -> None:
    rng = random.Random(0)
    fields = [
        "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed",
        "stop", "stop_token_ids", "ignore_eos", "n", "logprobs", "top_logprobs", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "logit_bias", "echo", "stream", "stream_options", "user", "model",
        "return_spec_stats", "tokens", "add_special_tokens",
    ]  # fmt: skip
    paths = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
    statuses: set[int] = set()
    with httpx.Client(base_url=server.url, timeout=TIMEOUT_S) as client:
        for number in range(1000):
            path = rng.choice(paths)
            body: dict[str, Any] = dict(CHAT if "chat" in path else GOOD if number % 4 else {})
            for field in rng.sample(fields, rng.randint(1, 3)):
                body[field] = rng.choice(HUGE)
            text = json.dumps(body).encode()
            match number % 5:
                case 0:
                    cut = rng.randrange(len(text))
                    text = text[:cut] + rng.randbytes(rng.randint(0, 4)) + text[cut + rng.randint(0, 3) :]
                case 1 if number % 50 == 1:
                    text = rng.choice([b"[" * 100_000, b'{"prompt":' * 5_000, b"1" * 10_000, b"", b"null", b"\xff\xfe"])
            response = client.post(path, content=text, headers={"content-type": "application/json"})
            assert is_told(response), (path, text[:300], response.status_code, response.text[:300])
            statuses.add(response.status_code)
        assert {200, 400} <= statuses
        last = client.post("/v1/completions", json=GOOD)
        assert last.status_code == 200, f"it does not work any more: {last.text}"
    assert "bug" not in server.text


def test_a_body_over_four_mebibytes_is_refused(server: ServerProcess) -> None:
    text = b'{"prompt": "' + b"t1 " * (4 * 2**20 // 3) + b'"}'
    whole = httpx.post(f"{server.url}/v1/completions", content=text, timeout=TIMEOUT_S)

    def pieces() -> Iterator[bytes]:
        """A body whose length nobody has told."""
        for start in range(0, len(text), 65536):
            yield text[start : start + 65536]

    chunked = httpx.post(f"{server.url}/v1/completions", content=pieces(), timeout=TIMEOUT_S)
    for response in (whole, chunked):
        assert response.status_code == 413 and "bytes" in response.json()["error"]["message"]
    just_fits = {"prompt": ("t" * 9_999 + " ") * 400}  # more tokens than the model has room for
    assert httpx.post(f"{server.url}/v1/completions", json=just_fits, timeout=TIMEOUT_S).status_code == 400


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
)
def test_what_is_no_http_does_not_harm_the_server(server: ServerProcess, request_text: bytes) -> None:
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=20) as raw:
        raw.sendall(request_text)
        answer = raw.recv(4096)
    assert not answer.startswith(b"HTTP/1.1 5")
    assert httpx.get(f"{server.url}/health").status_code == 200
