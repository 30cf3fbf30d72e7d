"""The command line as a user meets it: exit codes, one-line errors, JSON, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import torch

from command_line import Run, apart_from_progress
from fork_server import as_at_a_terminal
from server_process import forked_workers

COMMAND = [sys.executable, "-m", "flowspec"]


def run_apart(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    command, everything = [*COMMAND, *arguments], os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=everything)


def test_json_is_one_object_and_nothing_else(run: Run, checkpoint_dir: Callable[[str], Path]) -> None:
    done = run(
        "generate", "--prompt-file", "-", "--model", str(checkpoint_dir("qwen3")), "--stages", "2", "--json",
        "--max-new-tokens", "12", stdin="t1 t4 t2 t1 t4 t2",
    )  # fmt: skip
    assert done.code == 0, done.err
    values = json.loads(done.out)
    assert values.keys() == {
        "text", "token_ids", "prompt_tokens", "num_tokens", "finish_reason", "tokens_per_s", "ttft_ms", "stats",
    }  # fmt: skip
    assert values["stats"].keys() == {
        "segments", "rows", "drafted", "accepted", "verified", "restarts", "draft_passes", "mean_accepted",
        "link_bytes", "schedule", "draft", "partition",
    }  # fmt: skip
    assert (values["prompt_tokens"], values["num_tokens"], values["finish_reason"]) == (6, 12, "length")
    assert values["stats"]["partition"] == "0:3,3:6" and values["stats"]["draft"] == "eagle"
    assert apart_from_progress(done.err) == "", "silent in a pipe"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt is empty"),
        ([], "give a prompt, or --prompt-file"),
        (["x", "--prompt-file", "-"], "not both"),
        (["--prompt-file", "/no/such/file"], "cannot read the prompt"),
        (["t1", "--temperature", "-1"], "temperature is -1.0"),
        (["t1", "--top-p", "0"], "top_p is 0.0"),
        (["t1", "--max-new-tokens", "0"], "max_tokens is 0"),
        (["t1", "--stages", "7"], "only 6 layers"),
        (["t1", "--stages", "0"], "at least one is needed"),
        (["t1", "--partition", "0:3,4:6"], "leaves a gap"),
        (["t1", "--partition", "0:3,3:5"], "covers 5 layers, but the model has 6"),
        (["t1", "--draft", "/no/such/head"], "no draft in '/no/such/head'"),
        (
            ["t1", "--draft", "ngram", "--draft-dtype", "int8"],
            "int8 is for draft heads and smaller models, and",
        ),
        (["t1", "--model", "/no/such/model"], "not a directory"),
        (["t1", "--workers", "nonsense"], "not HOST:PORT"),
        (["t1", "--segment-len", "-1"], "segment_len is -1"),
        (["t1", "--schedule", "nonsense"], "schedule 'nonsense' is none of auto, ar, serial"),
        (["t1", "--device", "nonsense"], "device 'nonsense' cannot be used here"),
        (["t1", "--stages", "2", "--workers", "127.0.0.1:1"], "give one of --stages, --workers and --cluster"),
        (["t1", "--cluster", "/no/such.toml"], "give the path of a file"),
        (["t1", "--draft-layers", "2,x"], "--draft-layers '2,x' is no list of layers, as in 2,16,29"),
        (
            ["t1", "--draft-layers", "1,2,3"],
            "draft_layers are for EAGLE-3, P-EAGLE, DFlash and DSpark heads, and the draft is none; leave them out",
        ),
        (["t1", "--logit-bias", "hot"], "--logit-bias 'hot' is not ID:BIAS"),
        (["t1", "--min-p", "2"], "min_p is 2.0"),
        (["t1", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["t1", "--tree-size", "0"], "size is 0"),
        (["t1 " * 300], "300 tokens, but"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    run: Run, checkpoint_dir: Callable[[str], Path], arguments: list[str], message: str
) -> None:
    model = [] if "--model" in arguments else ["--model", str(checkpoint_dir("llama"))]
    default_stages = [] if {"--stages", "--partition", "--workers", "--cluster"} & set(arguments) else ["--stages", "1"]
    done = run("generate", *arguments, *model, *default_stages)
    assert done.code == 2, done.err
    assert done.out == ""
    assert message in done.err and done.err.count("\n") == 1, done.err


def test_an_int8_draft_changes_no_token_and_an_unknown_dtype_is_refused(
    run: Run, checkpoint_dir: Callable[[str], Path]
) -> None:
    command = ("generate", "t1 t4 t2", "--model", str(checkpoint_dir("llama")), "--stages", "2", "--json")
    plain, int8 = (run(*command, *options) for options in ([], ["--draft-dtype", "int8"]))
    assert int8.code == 0, int8.err
    assert json.loads(int8.out)["token_ids"] == json.loads(plain.out)["token_ids"]
    refused = run(*command, "--draft-dtype", "int4")
    assert refused.code == 2 and "int4 is for smaller models as draft, and the draft is a head" in refused.err
    refused = run(*command, "--draft-dtype", "int2")
    words = " ".join(refused.err.split())
    assert refused.code == 2 and "'int2' is not one of 'auto', 'int8', 'int4'" in words


def test_a_head_of_another_model_is_refused(run: Run, checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    from tiny_models import make_draft_head

    head = make_draft_head(tmp_path / "head", hidden_size=64)
    done = run("generate", "t1", "--model", str(checkpoint_dir("llama")), "--draft", str(head), "--stages", "1")
    assert done.code == 2 and "Traceback" not in done.err
    assert str(head) in done.err


def test_a_port_in_use_is_one_line(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("worker", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.code == 2
    assert "the port is in use" in done.err and "Traceback" not in done.err


def test_a_worker_warns_when_the_network_can_reach_it() -> None:
    command = [*COMMAND, "worker", "--listen", "0.0.0.0:0", "--insecure"]
    worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert worker.stderr is not None
    lines = [worker.stderr.readline() for _ in range(2)]
    worker.terminate()
    worker.wait(timeout=20)
    worker.stderr.close()
    assert "without password or encryption" in lines[0] and "listening on" in lines[1]


def test_ctrl_c_ends_every_process(checkpoint_dir: Callable[[str], Path]) -> None:
    command = [
        *COMMAND, "generate", "t1 t2 t3", "--model", str(checkpoint_dir("llama")), "--stages", "3",
        "--schedule", "ar", "--max-new-tokens", "250",
    ]  # fmt: skip
    driver = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A test run in the background of a script would hand down that Ctrl-C is ignored.
        preexec_fn=as_at_a_terminal,
    )
    assert driver.stdout is not None and driver.stderr is not None
    assert driver.stdout.read(1), "it has begun to print"
    children = psutil.Process(driver.pid).children(recursive=True)
    assert len(forked_workers(psutil.Process(driver.pid))) == 3
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=20)
    assert driver.returncode == 130, errors
    assert apart_from_progress(errors.decode()) == "flowspec: interrupted\n"
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_version(run: Run) -> None:
    done = run("--version")
    assert done.code == 0 and done.out.startswith("flowspec ")


# --- what ends, and how ---


@contextlib.contextmanager
def started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, which listens to Ctrl-C whoever started the tests."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        preexec_fn=as_at_a_terminal,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=20)
        assert process.stderr is not None
        process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_is_told_to_end_has_done_its_work(number: signal.Signals) -> None:
    with started("worker", "--listen", "127.0.0.1:0") as worker:
        assert worker.stderr is not None
        assert "end it with Ctrl-C" in worker.stderr.readline()
        worker.send_signal(number)
        assert worker.wait(timeout=20) == 0
        assert worker.stderr.read() == ""


def test_a_server_that_is_told_to_end_has_done_its_work(checkpoint_dir: Callable[[str], Path]) -> None:
    with started("serve", "--model", str(checkpoint_dir("llama")), "--stages", "1", "--port", "0") as server:
        assert server.stderr is not None
        assert "end it with Ctrl-C" in server.stderr.readline()
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=20) == 0
        assert server.stderr.read() == ""


# --- the hub ---


class Hub(BaseHTTPRequestHandler):
    """Has one model, in ``server.directory``, and answers as the Hugging Face hub does."""

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, has_body: bool) -> None:
        name, _, rest = self.path.partition("?")[0].partition("/resolve/")
        path: Path = self.server.directory / rest.partition("/")[2]  # type: ignore[attr-defined]
        if "owner/tiny" not in name:
            self._send(401, {"x-error-code": "RepoNotFound"}, b"Invalid username or password.")
        elif not path.is_file():
            self._send(404, {"x-error-code": "EntryNotFound"}, b"")
        else:
            self._send(200, {"etag": f'"{path.name}"', "x-repo-commit": "a" * 40}, path.read_bytes(), has_body)

    def _send(self, status: int, headers: dict[str, str], body: bytes, has_body: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"content-length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> Iterator[dict[str, str]]:
    """What the environment must say to find it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.directory = checkpoint_dir("llama")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(tmp_path / "hub")}
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def test_a_model_of_the_hub_is_fetched_with_a_word_for_each_file(hub: dict[str, str]) -> None:
    command = ("generate", "t1 t4 t2", "--model", "owner/tiny", "--stages", "1", "--draft", "none")
    done = run_apart(*command, "--max-new-tokens", "4", **hub)
    assert done.returncode == 0, done.stderr
    told = apart_from_progress(done.stderr).splitlines()
    assert "flowspec: asking the hub for config.json of owner/tiny" in told
    assert all(line.startswith("flowspec") and "asking the hub for" in line for line in told), "no bars, no warnings"


def test_a_model_that_the_hub_does_not_have_says_once_what_to_do(hub: dict[str, str]) -> None:
    done = run_apart("generate", "t1", "--model", "owner/nothing", **hub)
    assert done.returncode == 2
    asking, error = done.stderr.splitlines()
    assert asking == "flowspec: asking the hub for config.json of owner/nothing"
    assert error.startswith("flowspec: error: owner/nothing is no directory here, and the hub does not give it (401")
    assert error.count("hf auth login") == 1


def test_a_device_that_is_not_here_is_not_what_is_suggested(run: Run) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    for command in (("generate", "x"), ("worker", "--listen", "127.0.0.1:0")):
        done = run(*command, "--device", missing)
        assert done.code == 2 and done.err.count(missing) == 1 and "give cpu" in done.err
