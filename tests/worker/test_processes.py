"""Real processes and sockets: what users run. Every test here starts a few processes, so there are few of them."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import zmq

import fork_server
from flowspec import LLM, SamplingParams
from flowspec.cluster.local import LocalProcesses
from flowspec.config import LinkConfig
from flowspec.errors import ModelError, UsageError, WorkerError
from flowspec.model.loader import Checkpoint
from flowspec.wire.codec import Codec
from flowspec.wire.messages import (
    LOADED,
    PROTOCOL_VERSION,
    Alive,
    Configure,
    Failure,
    Loading,
    Ready,
    Stop,
    ToDriver,
    WantManifest,
)
from idle_worker import idle_worker
from pump import Pump
from server_process import forked_workers
from tiny_models import make_checkpoint
from worker_process import WorkerProcess

PROMPT_IDS = [1, 4, 2, 1, 4, 2, 3]
LINK = LinkConfig(start_timeout_s=60, stall_timeout_s=60, heartbeat_timeout_s=1.5)


def plain_text(directory: Path, num_tokens: int) -> list[int]:
    pump = Pump(directory, 1, "none", "ar")
    generation = pump.submit(PROMPT_IDS, SamplingParams(max_tokens=num_tokens))
    pump.run()
    return generation.output_ids


def worker_pids() -> set[int]:
    """Local worker processes of this test run, the process that forks them included."""
    return {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    fork_server.server.start()
    before = worker_pids()
    yield
    deadline = time.monotonic() + 10
    while worker_pids() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert worker_pids() <= before


@pytest.fixture
def remote_workers() -> Iterator[list[str]]:
    """Three workers as on three machines, on loopback addresses of their own."""
    workers = [WorkerProcess(f"127.0.0.{host}") for host in (2, 3, 4)]
    yield [worker.address for worker in workers]
    for worker in workers:
        worker.end()


@contextmanager
def closed_port() -> Iterator[str]:
    """An address where nobody listens, held meanwhile so that nobody else does either."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_local_processes_give_the_text_of_plain_decoding(checkpoint_dir: Callable[[str], Path]) -> None:
    directory = checkpoint_dir("qwen2")
    with LLM(directory, stages=3, link=LINK) as llm:
        assert [ready.stage for ready in llm.engine.pipeline.ready] == [1, 2, 3]
        completion = llm.generate(PROMPT_IDS, SamplingParams(max_tokens=30))
        again = llm.generate(PROMPT_IDS, SamplingParams(max_tokens=30), schedule="ar")
    assert completion.token_ids == again.token_ids == plain_text(directory, 30)
    assert completion.stats.draft == "eagle" and again.stats.draft == "none"
    assert completion.stats.link_bytes > 0 and completion.ttft_ms > 0
    with pytest.raises(UsageError, match="closed"):
        llm.generate(PROMPT_IDS)


def test_a_stream_that_is_closed_cancels_its_request(checkpoint_dir: Callable[[str], Path]) -> None:
    directory = checkpoint_dir("qwen2")
    with LLM(directory, stages=2, link=LINK) as llm:
        stream = llm.stream(PROMPT_IDS, SamplingParams(max_tokens=100))
        next(iter(stream))
        stream.close()  # type: ignore[attr-defined]
        assert llm.generate(PROMPT_IDS, SamplingParams(max_tokens=10)).token_ids == plain_text(directory, 10)


def test_a_killed_worker_ends_the_run_with_an_error_where_nobody_waits(checkpoint_dir: Callable[[str], Path]) -> None:
    """It is seen to end; nobody waits until it has said nothing for too long."""
    with LLM(checkpoint_dir("llama"), stages=3, schedule="ar", link=replace(LINK, rejoin_timeout_s=0)) as llm:
        chunks = llm.stream(PROMPT_IDS, SamplingParams(max_tokens=240))
        next(iter(chunks))
        forked_workers(psutil.Process())[-1].kill()
        with pytest.raises(WorkerError, match=r"lost (the connection to )?worker 3|worker 3 ended"):
            list(chunks)


def test_workers_end_when_their_driver_is_killed(checkpoint_dir: Callable[[str], Path]) -> None:
    code = (
        "import sys, time; from flowspec import LLM; llm = LLM(sys.argv[1], stages=2); print('up', flush=True); "
        "time.sleep(60)"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(checkpoint_dir("llama"))], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None and driver.stdout.readline() == "up\n"
    children = psutil.Process(driver.pid).children(recursive=True)
    assert len(forked_workers(psutil.Process(driver.pid))) == 2
    driver.kill()
    driver.wait()
    driver.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_remote_workers_serve_one_driver_after_another(
    checkpoint_dir: Callable[[str], Path], remote_workers: list[str]
) -> None:
    directory = checkpoint_dir("llama")
    expected = plain_text(directory, 20)
    params = SamplingParams(max_tokens=20)
    with LLM(directory, workers=remote_workers, link=LINK) as llm:
        assert llm.generate(PROMPT_IDS, params).token_ids == expected
        # One driver at a time.
        with pytest.raises(WorkerError, match="busy"):
            LLM(directory, workers=remote_workers[:1], link=LINK)
        # What strangers send is dropped.
        _send_garbage(remote_workers[0])
        assert llm.generate(PROMPT_IDS, params).token_ids == expected
    # A driver that asks for something impossible, or that vanishes, leaves them waiting for the next one.
    with pytest.raises(UsageError, match="3 workers for 2 stages"):
        LLM(directory, workers=remote_workers, stages=2, link=LINK)
    code = "import os, sys; from flowspec import LLM; LLM(sys.argv[1], workers=sys.argv[2].split(',')); os._exit(9)"
    lost = subprocess.run([sys.executable, "-c", code, str(directory), ",".join(remote_workers)], timeout=100)
    assert lost.returncode == 9
    with _connect_patiently(directory, remote_workers[::-1]) as llm:
        assert llm.generate(PROMPT_IDS, params).token_ids == expected


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_flow_with_measured_costs_gives_the_text_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path], remote_workers: list[str], temperature: float
) -> None:
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=5)
    with LLM(checkpoint_dir("qwen2"), workers=remote_workers[:2], link=LINK) as llm:
        for ready in llm.engine.pipeline.ready:
            rows, seconds = zip(*ready.forward_s, strict=True)
            assert rows[0] == 1 and list(rows) == sorted(set(rows)) and list(seconds) == sorted(seconds)
            assert seconds[0] > 0
        first, last = llm.engine.pipeline.ready
        assert first.link_bytes_per_s is not None and first.link_bytes_per_s > 0
        assert last.link_bytes_per_s is None
        flow, plain = (llm.generate(PROMPT_IDS, params, schedule=name) for name in ("flow", "ar"))
    assert flow.token_ids == plain.token_ids
    assert flow.stats.drafted > 0


def test_an_int8_wire_saves_bytes_between_workers(
    checkpoint_dir: Callable[[str], Path], remote_workers: list[str]
) -> None:
    params, received = SamplingParams(max_tokens=12), list[int]()
    for int8_wire in (False, True):
        link = replace(LINK, int8_wire=int8_wire)
        with LLM(checkpoint_dir("llama"), workers=remote_workers[:2], link=link, draft="none") as llm:
            assert llm.generate(PROMPT_IDS, params).num_tokens == 12
            assert llm.last_stats is not None
            first, *_, last = llm.last_stats.timings
            received.append(last[-1].link_bytes - first[-1].link_bytes)
    num_rows = 11  # that reached the second worker after the first one
    saved = num_rows * (3 * llm.checkpoint.hidden_size - 4 - len("int8/"))
    assert abs(received[0] - received[1] - saved) < 20, "but for the lengths of some numbers in the headers"


def _connect_patiently(directory: Path, workers: list[str]) -> LLM:
    """The workers notice within a few heartbeats that their driver is gone."""
    for _ in range(20):
        try:
            return LLM(directory, workers=workers, draft="ngram", link=LINK)
        except WorkerError:
            time.sleep(0.5)
    raise AssertionError("the workers did not go back to waiting")


def _send_garbage(address: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 1000
    dealer.connect(f"tcp://{address}")
    for frames in ([b"garbage"], [b""], [b"\xc1", b"x" * 1000], [bytes(f) for f in Codec().encode(Stop())]):
        dealer.send_multipart(frames)
    dealer.close()
    context.term()


def test_a_worker_with_other_weights_of_the_same_shape_is_an_error(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote_workers: list[str]
) -> None:
    """On one machine the same path holds the same files, so the driver names another one."""
    other = make_checkpoint(tmp_path / "other", "llama", seed=7)
    monkeypatch.setattr(Checkpoint, "full_name", str(other))
    with pytest.raises(ModelError, match=rf"worker 1 .{remote_workers[0]}. holds other weights .*copy the same model"):
        LLM(checkpoint_dir("llama"), workers=remote_workers[:2], draft="none", link=LINK)


def test_a_worker_that_never_comes_up_is_an_error_in_time(checkpoint_dir: Callable[[str], Path]) -> None:
    with closed_port() as address, pytest.raises(WorkerError, match=f"no sign of worker 1 .{address}. for 1 s"):
        LLM(checkpoint_dir("llama"), workers=[address], link=LinkConfig(start_timeout_s=1.0))


def test_a_worker_that_is_missing_is_an_error_in_time_though_another_is_ready(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    with (
        closed_port() as missing,
        idle_worker() as ready,
        pytest.raises(WorkerError, match=f"no sign of worker 1 .{missing}. for 1 s; is 'flowspec worker' r"),
    ):
        LLM(checkpoint_dir("llama"), workers=[missing, ready], link=LinkConfig(start_timeout_s=1.0))


def test_a_worker_that_hangs_while_it_loads_is_an_error_in_time(checkpoint_dir: Callable[[str], Path]) -> None:
    """It answers heartbeats, as a process does whose disk hangs, and says nothing."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    silent = context.socket(zmq.ROUTER)
    address = f"127.0.0.1:{silent.bind_to_random_port('tcp://127.0.0.1')}"
    told = f"no sign of worker 1 .{address}. for 1 s; does it hang while it loads"
    with idle_worker() as ready, pytest.raises(WorkerError, match=told):
        LLM(checkpoint_dir("llama"), workers=[address, ready], link=LinkConfig(start_timeout_s=1.0))
    silent.close(linger=0)
    context.term()


def said_by_a_worker(configure: Configure, last: type) -> list[ToDriver]:
    """All that a new worker says of it, up to a message of this type."""
    processes = LocalProcesses(1, threads=1, device="cpu")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    try:
        dealer.setsockopt(zmq.IDENTITY, b"me:control")
        dealer.connect(processes.addresses[0])
        dealer.send_multipart([bytes(frame) for frame in Codec().encode(configure)])
        said: list[ToDriver] = []
        until_s = time.monotonic() + 60
        while not isinstance(said[-1] if said else None, last):
            assert dealer.poll(60_000) and time.monotonic() < until_s
            said.append(Codec().decode_to_driver([bytearray(frame) for frame in dealer.recv_multipart()]))
        return said
    finally:
        dealer.close(linger=0)
        context.term()
        processes.close()


def test_a_workers_own_mistake_reaches_the_driver_as_one_line(tmp_path: Path) -> None:
    """The model's directory is whole at the driver, but not at the worker."""
    configure = Configure(PROTOCOL_VERSION, 1, str(tmp_path), 0, 2, "float32", None, 1.0)
    first, failure = said_by_a_worker(configure, Failure)
    assert first == Alive(), "it says at once that it is there"
    assert f"{tmp_path}: no config.json" in failure.text and failure.user_error  # type: ignore[union-attr]


def test_a_worker_without_the_model_asks_for_it(tmp_path: Path) -> None:
    configure = Configure(PROTOCOL_VERSION, 1, str(tmp_path / "elsewhere"), 0, 2, "float32", None, 1.0)
    assert said_by_a_worker(configure, WantManifest) == [Alive(), WantManifest()]


def test_a_worker_has_loaded_when_it_has_done_all_and_not_when_the_weights_are_read(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    """Its kernels may be yet to be compiled: then the time in which it must reach the next worker has not begun."""
    configure = Configure(PROTOCOL_VERSION, 1, str(checkpoint_dir("llama")), 0, 1, "float32", None, 1.0)
    said = said_by_a_worker(configure, Ready)
    fractions = [message.fraction for message in said if isinstance(message, Loading)]
    assert len(fractions) > 2 and fractions == sorted(set(fractions))
    assert fractions[0] == 0.0 and fractions[-1] == LOADED
