"""The command line as a user meets it: exit codes, one-line errors, JSON, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-m", "flowspec"]


def run(*arguments: str, stdin: str = "", timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout)


def test_json_is_one_object_and_nothing_else(checkpoint_dir: Callable[[str], Path]) -> None:
    done = run(
        "generate", "--prompt-file", "-", "--model", str(checkpoint_dir("qwen3")), "--stages", "2", "--json",
        "--max-new-tokens", "12", stdin="t1 t4 t2 t1 t4 t2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values.keys() == {
        "text", "token_ids", "prompt_tokens", "num_tokens", "finish_reason", "tokens_per_s", "ttft_ms", "stats",
    }  # fmt: skip
    assert values["stats"].keys() == {
        "segments", "rows", "drafted", "accepted", "verified", "restarts", "draft_passes", "mean_accepted",
        "link_bytes", "schedule", "draft", "partition",
    }  # fmt: skip
    assert (values["prompt_tokens"], values["num_tokens"], values["finish_reason"]) == (6, 12, "length")
    assert values["stats"]["partition"] == "0:3,3:6" and values["stats"]["draft"] == "eagle"
    assert done.stderr == "", "silent in a pipe"


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
        (["t1", "--draft", "/no/such/head"], "no draft head"),
        (["t1", "--draft", "ngram", "--draft-dtype", "int8"], "int8 is for draft heads, and the draft is ngram"),
        (["t1", "--model", "/no/such/model"], "not a directory"),
        (["t1", "--workers", "nonsense"], "not HOST:PORT"),
        (["t1", "--segment-len", "-1"], "segment_len is -1"),
        (["t1", "--schedule", "nonsense"], "schedule 'nonsense' is none of auto, ar, serial"),
        (["t1", "--device", "nonsense"], "device 'nonsense' cannot be used here"),
        (["t1 " * 300], "300 tokens, but"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    checkpoint_dir: Callable[[str], Path], arguments: list[str], message: str
) -> None:
    model = [] if "--model" in arguments else ["--model", str(checkpoint_dir("llama"))]
    default_stages = [] if {"--stages", "--partition", "--workers"} & set(arguments) else ["--stages", "1"]
    done = run("generate", *arguments, *model, *default_stages)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_an_int8_draft_changes_no_token_and_an_unknown_dtype_is_refused(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    command = ("generate", "t1 t4 t2", "--model", str(checkpoint_dir("llama")), "--stages", "2", "--json")
    plain, int8 = (run(*command, *options) for options in ([], ["--draft-dtype", "int8"]))
    assert int8.returncode == 0, int8.stderr
    assert json.loads(int8.stdout)["token_ids"] == json.loads(plain.stdout)["token_ids"]
    refused = run(*command, "--draft-dtype", "int4")
    words = " ".join(refused.stderr.replace("│", " ").split())
    assert refused.returncode == 2 and "'int4' is not one of 'auto', 'int8'" in words


def test_a_head_of_another_model_is_refused(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    from tiny_models import make_draft_head

    head = make_draft_head(tmp_path / "head", hidden_size=64)
    done = run("generate", "t1", "--model", str(checkpoint_dir("llama")), "--draft", str(head), "--stages", "1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(head) in done.stderr


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("worker", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.returncode == 1
    assert "the port is in use" in done.stderr and "Traceback" not in done.stderr


def test_a_worker_warns_when_the_network_can_reach_it() -> None:
    worker = subprocess.Popen([*COMMAND, "worker", "--listen", "0.0.0.0:0"], stderr=subprocess.PIPE, text=True)
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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert driver.stdout is not None and driver.stderr is not None
    assert driver.stdout.read(1), "it has begun to print"
    children = psutil.Process(driver.pid).children(recursive=True)
    assert len(children) == 4
    os.killpg(driver.pid, signal.SIGINT)
    started = time.monotonic()
    _, errors = driver.communicate(timeout=20)
    assert time.monotonic() - started < 15
    assert driver.returncode == 130, errors
    assert errors.decode() == "flowspec: interrupted\n"
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0 and done.stdout.startswith("flowspec ")
