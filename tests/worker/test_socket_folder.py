"""No litter: the folder of a server that was killed is cleared by the next start, and nobody else's is."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flowspec.cluster.local import LocalProcesses
from flowspec.cluster.socket_folder import SocketFolder
from server_process import ServerProcess, forked_workers


def test_a_folder_whose_owner_is_gone_is_cleared_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("flowspec.cluster.socket_folder._MAX_PARENT_BYTES", 1000)
    mine = SocketFolder()
    young = tmp_path / "flowspec-sockets-young"  # whose owner has not locked it yet
    young.mkdir()
    foreign = tmp_path / "flowspec-notes"
    foreign.mkdir()
    dead = SocketFolder()
    (dead.path / "1").touch()
    dead_path, dead.path = dead.path, tmp_path / "elsewhere"
    dead.close()  # it gives the lock back, as the system does for a process that was killed
    assert dead_path.exists()
    other = SocketFolder()
    assert not dead_path.exists()
    assert set(tmp_path.iterdir()) == {mine.path, young, foreign, other.path}
    for folder in (mine, other):
        folder.close()
        folder.close()
    assert set(tmp_path.iterdir()) == {young, foreign}


def test_a_long_path_to_temporary_files_is_no_place_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    processes = LocalProcesses(1, threads=1, device="cpu")
    try:
        assert not list(long.iterdir())
        socket = Path(processes.addresses[0].removeprefix("ipc://"))
        deadline = time.monotonic() + 60
        while not socket.exists():
            processes.check()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        processes.close()
    assert not socket.parent.exists()


def test_a_killed_server_leaves_no_worker_and_its_folder_to_the_next_one(
    monkeypatch: pytest.MonkeyPatch, checkpoint_dir: Callable[[str], Path]
) -> None:
    """Even while one of its workers stands still, and would not notice."""
    place = tempfile.TemporaryDirectory(dir="/tmp")
    monkeypatch.setenv("TMPDIR", place.name)
    options = ["--model", str(checkpoint_dir("llama")), "--stages", "2", "--draft", "none"]

    def folders() -> list[Path]:
        return list(Path(place.name).glob("flowspec-sockets-*"))

    with ServerProcess(*options) as server:
        (left,) = folders()
        family = server.workers()
        forked_workers(server.process)[-1].send_signal(signal.SIGSTOP)
        server.process.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
    assert folders() == [left]
    monkeypatch.setattr("tempfile.tempdir", place.name)
    next_one = SocketFolder()
    assert folders() == [next_one.path] != [left]
    next_one.close()
    assert not folders()
    place.cleanup()
