"""``serve`` as a user starts it: workers from a file, and wrong inputs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from command_line import apart_from_progress
from flowspec.cluster.device_list import DeviceList
from flowspec.core import Partition
from flowspec.errors import UsageError
from server_process import ServerProcess
from worker_process import WorkerProcess

TWO = """
[[device]]
name = "kitchen"
address = "{0}"
layers = "0:4"
[[device]]
address = "{1}"
layers = "4:6"
"""


def test_a_file_names_the_devices(tmp_path: Path) -> None:
    path = tmp_path / "home.toml"
    path.write_text(TWO.format("127.0.0.1:7070", "127.0.0.1:7071"))
    devices = DeviceList.load(path)
    assert devices == DeviceList(
        ("kitchen", "worker 2"), ("127.0.0.1:7070", "127.0.0.1:7071"), Partition.parse("0:4,4:6")
    )
    path.write_text('[[device]]\naddress = "a:1"\n')
    assert DeviceList.load(path).partition is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no devices"),
        ("device = 3", r"line 1: device is 3; it must be a list of tables, \[\[device\]\]"),
        ("[model]\nname = 'x'", "line 1: model is unknown; .* Known: device"),
        ("[pipeline]\nlinks = 'lan'", "a cluster to simulate"),
        ("[[device]]\nname = 'x'", r'line 1: \[\[device\]\] address is missing; add it, "HOST:PORT"'),
        ("[[device]]\naddress = 7070", 'line 2: .* address is 7070; it must be "HOST:PORT"'),
        (
            "[[device]]\naddress = 'a:1'\n[[device]]\nadress = 'b:1'",
            "line 4: .* adress is unknown; did you mean address",
        ),
        ("[[device]]\naddress = 'a:1'\nlayers = '0:2'\n[[device]]\naddress = 'b:1'", "for some devices only"),
        ("[[device]]\naddress = 'a:1'\nlayers = '1:2'", "must start at layer 0"),
        ("[[device", "line 1: this is not TOML"),
    ],
)
def test_a_file_that_lists_no_devices_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "home.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        DeviceList.load(path)
    with pytest.raises(UsageError, match="give the path"):
        DeviceList.load(tmp_path / "missing.toml")


def test_workers_from_a_file_serve_and_go_back_to_waiting(
    tmp_path: Path, checkpoint_dir: Callable[[str], Path]
) -> None:
    workers = [WorkerProcess() for _ in range(2)]
    (tmp_path / "home.toml").write_text(TWO.format(*(worker.address for worker in workers)))
    options = ["--model", str(checkpoint_dir("llama")), "--cluster", str(tmp_path / "home.toml")]
    try:
        for name in ("one", "two"):
            with ServerProcess(*options, "--served-model-name", name) as server:
                state = httpx.get(f"{server.url}/dashboard/state").json()
                assert state["model"] == name and [s["device"] for s in state["stages"]] == ["kitchen", "worker 2"]
                body = {"model": name, "prompt": "t1 t2", "max_tokens": 5}
                assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    finally:
        texts = [worker.end() for worker in workers]
    assert all(text.count("session ended") == 2 for text in texts), texts


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--stages", "2", "--workers", "a:1"], "one of --stages, --workers and --cluster", 2),
        (["--cluster", "/no/such.toml"], "give the path of a file", 2),
        (["--model", "/no/such/model"], "is not a directory", 2),
        (["--stages", "99"], "only 8 layers", 2),
        (["--port", "99999"], "port is 99999", 2),
        (["--port", "{taken}"], "choose another --port", 2),
        (["--host", "no.such.host.invalid"], "cannot listen on", 2),
        (["--max-running", "0"], "max_running is 0", 2),
        (["--kv-slots", "-1"], "kv_slots is -1", 2),
        (["--schedule", "slow"], "schedule 'slow' is none of", 2),
        (["--workers", "127.0.0.1:{closed}", "--timeout", "1"], "is 'flowspec worker' running there", 1),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_users_mistake_is_one_line(arguments: list[str], message: str, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        places = {"taken": taken.getsockname()[1], "closed": closed.getsockname()[1]}
        given = [argument.format(**places) for argument in arguments]
        port = [] if "--port" in given else ["--port", "0"]
        run = subprocess.run(
            [sys.executable, "-m", "flowspec", "serve", *port, *given],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "FLOWSPEC_API_KEY": "k"},
        )
    assert (run.returncode, run.stdout) == (code, "")
    assert message in run.stderr and apart_from_progress(run.stderr).count("\n") == 1, run.stderr
