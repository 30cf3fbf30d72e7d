"""A small model as draft on a worker of its own: real processes, on loopback addresses as of other machines."""

from __future__ import annotations

import json
import logging
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from command_line import Run
from engines import Fault, engine_of
from engines import run as run_jobs
from flowspec import LLM, SamplingParams
from flowspec.cluster.membership import Membership
from flowspec.config import EngineConfig, LinkConfig
from flowspec.draft import remote_passes
from flowspec.draft.remote_passes import RemoteModelSource
from flowspec.engine import draft_worker as draft_worker_module
from flowspec.engine.engine import Engine
from flowspec.errors import UsageError, WorkerError
from flowspec.model.loader import Checkpoint
from flowspec.model.slots import INITIAL_CAPACITY
from flowspec.wire.key_file import STATE_VARIABLE
from idle_worker import idle_worker
from server_process import ServerProcess
from tiny_models import VOCAB_SIZE, make_checkpoint
from worker_process import WorkerProcess

PROMPT_IDS = [1, 4, 2, 1, 4, 2, 3, 5, 0, 2, 1, 3, 4]
LINK = LinkConfig(start_timeout_s=60, stall_timeout_s=60, heartbeat_timeout_s=1.5)


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small"), "mistral", seed=3, hidden_size=16, num_hidden_layers=2)


@pytest.fixture(scope="module")
def workers() -> Iterator[list[str]]:
    """One for the model, and one for the draft."""
    started = [WorkerProcess(f"127.0.0.{host}") for host in (2, 3)]
    yield [worker.address for worker in started]
    for worker in started:
        worker.end()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def open_llm(target: Path, draft: Path | str, worker: str, draft_worker: str | None, **more: object) -> LLM:
    settings = {"draft_check": "off", "link": LINK, **more}
    return LLM(target, draft=draft, workers=[worker], draft_worker=draft_worker, **settings)


def state_of(engine: Engine) -> tuple[str, str]:
    status = engine.status().draft_worker
    assert status is not None
    return status.address, status.state


def draft_bytes(llm: LLM) -> int:
    status = llm.engine.status().draft_worker
    return 0 if status is None else status.link_bytes


def test_it_guesses_what_it_guesses_on_the_driver(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, workers: list[str]
) -> None:
    """The texts are those of plain decoding; where no timing has a say, as many guesses are right."""
    found: list[dict[tuple[str, float], tuple[list[int], int, int]]] = []
    num_bytes: list[int] = []  # of a request whose segments do not hang on timing
    for draft_worker in (None, workers[1]):
        with open_llm(checkpoint_dir("qwen3"), small_dir, workers[0], draft_worker) as llm:
            texts = {}
            for name in ("ar", "serial", "pipedec", "flow"):
                for temperature in (0.0, 0.8):
                    params = SamplingParams(max_tokens=20, temperature=temperature, seed=5)
                    done = llm.generate(PROMPT_IDS, params, schedule=name)
                    texts[name, temperature] = done.token_ids, done.stats.drafted, done.stats.accepted
                    assert done.stats.draft == ("none" if name == "ar" else "model")
            found.append(texts)
            before, params = draft_bytes(llm), SamplingParams(max_tokens=20)
            done = llm.generate(PROMPT_IDS, params, schedule="serial")
            num_bytes.append(done.stats.link_bytes)
            of_draft = draft_bytes(llm) - before
    assert abs(num_bytes[1] - num_bytes[0] - of_draft) < of_draft / 10, "but for signs of life, which time brings"
    assert of_draft > 8 * VOCAB_SIZE * done.stats.draft_passes, "each token's number and log-probability, and more"
    here, there = found
    for name, temperature in here:
        assert there[name, temperature][0] == here["ar", temperature][0]
        if name in ("serial", "pipedec"):
            assert there[name, temperature] == here[name, temperature] and there[name, temperature][1] > 0
    assert any(accepted for _, _, accepted in there.values())


def test_requests_share_it_and_a_conversation_goes_on(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, workers: list[str]
) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=3)
    prompts = [PROMPT_IDS, PROMPT_IDS[::-1], PROMPT_IDS[3:]]
    with open_llm(checkpoint_dir("qwen3"), small_dir, *workers) as llm:
        plain = [llm.generate(prompt, params, schedule="ar").token_ids for prompt in prompts]
        together = llm.generate_many(prompts, params, schedule="flow")
        assert [done.token_ids for done in together] == plain
        prompt = [*PROMPT_IDS, *plain[0], 5, 3]
        next_turn = [llm.generate(prompt, params, schedule=name) for name in ("flow", "ar")]
        assert next_turn[0].token_ids == next_turn[1].token_ids and next_turn[0].stats.drafted > 0


def test_what_it_has_not_comes_from_the_driver_and_the_draft_is_checked(
    checkpoint_dir: Callable[[str], Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    """The target's own files are a draft that is always right, by a name that says nothing to the worker."""
    target = checkpoint_dir("llama")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "full_name", property(lambda model: f"{model.name}/elsewhere"))
        with open_llm(target, target, *workers, draft_check="on") as llm:
            done = llm.generate(PROMPT_IDS, SamplingParams(max_tokens=20), schedule="serial")
            assert done.stats.draft == "model", "it is not switched off"
            assert done.stats.accepted >= 12, "a tree that is cut by score is not as deep as it may be"
    assert list((own_cache / "flowspec" / "draft-checks").iterdir()), "what was found is kept"


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_draft_worker_that_is_lost_is_named_and_ngrams_go_on(
    checkpoint_dir: Callable[[str], Path],
    small_dir: Path,
    workers: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """In the middle of a text, which stays what it is; so does the next one, which begins alike."""
    monkeypatch.setattr(draft_worker_module, "_RETRY_S", 0.3)
    own = WorkerProcess("127.0.0.4")
    params = SamplingParams(max_tokens=150, temperature=0.8, seed=7)
    try:
        with open_llm(checkpoint_dir("qwen3"), small_dir, workers[0], own.address) as llm:
            plain = llm.generate(PROMPT_IDS, params, schedule="ar").token_ids
            llm.generate([*PROMPT_IDS, 5], SamplingParams(max_tokens=4), schedule="flow")
            pieces = llm.stream(PROMPT_IDS, params, schedule="flow")
            token_ids = list(next(pieces).token_ids)
            own.kill() if fault == "kill" else own.stop()
            for piece in pieces:
                token_ids += piece.token_ids
            assert token_ids == plain
            again = llm.generate(PROMPT_IDS, params, schedule="flow")
            assert again.token_ids == plain and again.stats.draft == "ngram"
            assert state_of(llm.engine) == (own.address, "away")
            num_bytes = draft_bytes(llm)
            assert num_bytes > 0
            if fault == "kill":
                with idle_worker(address=own.address, refusal="it is too small"):
                    for _ in range(40):
                        llm.engine.step(0.05)
                own = WorkerProcess("127.0.0.4", int(own.address.rpartition(":")[2]))
            else:
                own.go_on()
            until_s = time.monotonic() + 60
            while state_of(llm.engine) != (own.address, "up"):
                assert time.monotonic() < until_s, own.log
                llm.engine.step(0.05)
            back = llm.generate(PROMPT_IDS, params, schedule="flow")
            assert back.token_ids == plain and back.stats.draft == "model"
            assert draft_bytes(llm) > num_bytes, "none is forgotten, and more have come"
        lost, *refused, returned = [
            record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
        ]
        assert lost == f"lost draft worker 1 ({own.address}); n-grams draft until it is back"
        assert refused == ["the draft worker is not back yet: it is too small"] * (fault == "kill")
        assert "the draft worker is back after" in returned
    finally:
        own.go_on()
        own.end()


def test_the_pipeline_may_be_lost_and_come_back_beside_it(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, workers: list[str]
) -> None:
    """What was under way there is closed at the draft worker, and begins again behind what was emitted."""
    params = SamplingParams(max_tokens=60, temperature=0.8, seed=4)
    with engine_of(checkpoint_dir("qwen3"), stages=1, draft=small_dir, draft_worker=workers[1], link=LINK) as engine:
        jobs = [engine.submit(PROMPT_IDS, params, "ar")]
        run_jobs(engine, jobs)
        jobs += [engine.submit(PROMPT_IDS, params, "flow"), engine.submit(PROMPT_IDS[2:], params, "serial")]
        run_jobs(engine, jobs[1:], [Fault(10, 1, signal.SIGKILL)])
        assert jobs[1].output_ids == jobs[0].output_ids
        status = engine.status()
        assert status.num_recoveries == 1 and state_of(engine) == (workers[1], "up")
        assert [job.draft for job in jobs] == ["none", "model", "model"]


def test_one_that_does_no_work_is_lost_at_last(
    checkpoint_dir: Callable[[str], Path],
    small_dir: Path,
    workers: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However short the requests are that wait for it, and each of them for a while alone."""
    monkeypatch.setattr(remote_passes, "PATIENCE_S", 0.3)
    link, params = replace(LINK, stall_timeout_s=2.0), SamplingParams(max_tokens=8)
    with (
        idle_worker([(1, 0.001)]) as address,
        open_llm(checkpoint_dir("qwen3"), small_dir, workers[0], address, link=link) as llm,
    ):
        plain = llm.generate(PROMPT_IDS, params, schedule="ar").token_ids
        start_s = time.monotonic()
        while "the draft worker has answered nothing for 2 s; n-grams draft" not in caplog.text:
            for name in ("flow", "pipedec"):
                assert llm.generate(PROMPT_IDS, params, schedule=name).token_ids == plain
            assert time.monotonic() - start_s < 20


def test_one_that_is_slow_for_once_is_not_taken_for_a_broken_draft(
    checkpoint_dir: Callable[[str], Path],
    small_dir: Path,
    workers: list[str],
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is kept of a check in which it has guessed nothing."""
    monkeypatch.setattr(remote_passes, "PATIENCE_S", 0.2)
    with idle_worker([(1, 0.001)]) as address:
        for _ in range(2):
            with open_llm(checkpoint_dir("qwen3"), small_dir, workers[0], address, draft_check="on") as llm:
                assert isinstance(llm.engine.model.source, RemoteModelSource), "it is not switched off"
    checks = own_cache / "flowspec" / "draft-checks"
    assert not checks.exists() or not list(checks.iterdir())


def test_ten_at_once_share_its_memory_and_outlive_it(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, workers: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Five caches have room; the worker is killed while five requests draft with it, and others from n-grams."""
    own = WorkerProcess("127.0.0.4")
    params = SamplingParams(max_tokens=30, temperature=0.8, seed=7)
    prompts = [PROMPT_IDS[place:] + PROMPT_IDS[:place] for place in range(10)]
    try:
        with open_llm(checkpoint_dir("qwen3"), small_dir, workers[0], own.address) as llm:
            plain = llm.generate_many(prompts, params, schedule="ar")
            engine, source = llm.engine, llm.engine.model.source
            assert isinstance(source, RemoteModelSource) and source.slots.num_slots is not None, "it has said so"
            source.slots.num_slots = 1300
            jobs = [engine.submit(prompt, params, "pipedec") for prompt in prompts]
            most_held = 0
            while not all(job.is_finished for job in jobs):
                engine.step()
                status = engine.status().draft_worker
                assert status is not None and status.num_slots_held <= 1300
                most_held = max(most_held, status.num_slots_held)
                if source.slots.num_refused and own.is_alive:
                    own.kill()
            assert [job.output_ids for job in jobs] == [done.token_ids for done in plain]
            assert not own.is_alive and most_held == 5 * INITIAL_CAPACITY
        refused, lost = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        assert "1,280 of them are held by 5 others, and it needs 256" in refused and lost.startswith(
            "lost draft worker"
        )
    finally:
        own.end()


def test_one_without_memory_for_a_request_is_no_broken_draft(
    checkpoint_dir: Callable[[str], Path], workers: list[str], own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """n-grams would be judged in its place, and what was found would be kept for ever."""
    target = checkpoint_dir("llama")
    config = EngineConfig(kv_slots=1000, kv_memory_share=1e-9)
    with open_llm(target, target, *workers, config=config, draft_check="on") as llm:
        assert isinstance(llm.engine.model.source, RemoteModelSource), "it is not switched off"
        params = SamplingParams(max_tokens=20)
        flow, plain = (llm.generate(PROMPT_IDS, params, schedule=name) for name in ("flow", "ar"))
        assert flow.token_ids == plain.token_ids
    assert not list(own_cache.glob("flowspec/draft-checks/*"))
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "the draft worker has memory for the keys and values of 0 tokens" in told


def test_one_whose_guesses_are_of_no_use_is_off_and_not_awaited(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, workers: list[str], own_cache: Path
) -> None:
    with open_llm(checkpoint_dir("qwen3"), small_dir, *workers, draft_check="on") as llm:
        assert llm.generate(PROMPT_IDS, SamplingParams(max_tokens=4), schedule="flow").stats.draft == "ngram"
        assert state_of(llm.engine) == (workers[1], "off")


def test_one_that_is_not_there_is_an_error_in_time(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, workers: list[str]
) -> None:
    link = LinkConfig(start_timeout_s=1.0)
    with pytest.raises(
        WorkerError, match=r"no sign of draft worker 1 \(127.0.0.9:7070\) for 1 s; is 'flowspec worker'"
    ):
        open_llm(checkpoint_dir("qwen3"), small_dir, workers[0], "127.0.0.9:7070", link=link)


def test_what_a_draft_worker_cannot_be_is_said(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, workers: list[str]
) -> None:
    target = checkpoint_dir("qwen3")
    for draft, kind in (("none", "none"), ("ngram", "ngram"), (target / "draft", "a draft head or source")):
        with pytest.raises(UsageError, match=f"a draft worker runs a small model, and the draft is {kind}; name a sm"):
            open_llm(target, draft, *workers)
    with pytest.raises(UsageError, match=f"{workers[0]} is one of the workers already; give the draft a worker of its"):
        open_llm(target, small_dir, workers[0], workers[0])
    with pytest.raises(UsageError, match="is not HOST:PORT"):
        open_llm(target, small_dir, workers[0], "kitchen")
    with pytest.raises(UsageError, match="leave one of the two out"):
        LLM(target, draft=small_dir, draft_worker=workers[1], in_process=True)


def test_devices_that_have_joined_draft_too(
    checkpoint_dir: Callable[[str], Path],
    small_dir: Path,
    workers: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "driver"))
    membership = Membership.init(tmp_path / "driver")
    token = str(membership.new_token())
    own = WorkerProcess("127.0.0.4", 0, "--join", token, "--name", "box", state=tmp_path / "box")
    params = SamplingParams(max_tokens=12)
    try:
        assert membership.let_join(own.address) == "box"
        with open_llm(checkpoint_dir("qwen3"), small_dir, workers[0], own.address) as llm:
            flow, plain = (llm.generate(PROMPT_IDS, params, schedule=name) for name in ("flow", "ar"))
        assert flow.token_ids == plain.token_ids and flow.stats.draft == "model" and flow.stats.drafted > 0
        with pytest.raises(WorkerError, match=r"no sign of draft worker 1 .* are its keys those that have joined"):
            open_llm(
                checkpoint_dir("qwen3"), small_dir, workers[0], own.address,
                link=LinkConfig(start_timeout_s=1.0, insecure=True),
            )  # fmt: skip
    finally:
        assert "joined" in own.end()


def test_the_command_line_and_the_server_name_it(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, workers: list[str], run: Run
) -> None:
    model = ["--model", str(checkpoint_dir("qwen3")), "--workers", workers[0], "--draft-check", "off"]
    generate = ["generate", "t1 t4 t2", *model, "--max-new-tokens", "8", "--temperature", "0", "--json"]
    texts = []
    for draft in (["--draft", "none"], ["--draft", str(small_dir), "--draft-worker", workers[1]]):
        done = run(*generate, *draft)
        assert done.code == 0, done.err
        texts.append(json.loads(done.out)["text"])
    assert texts[0] == texts[1]
    refused = run(*generate, "--draft", "none", "--draft-worker", workers[1])
    assert refused.code == 2 and "a draft worker runs a small model, and the draft is none" in refused.err
    refused = run("bench", "jetson.toml", "--draft-worker", workers[1])
    assert refused.code == 2 and "--draft-worker is for runs in real time" in refused.err
    with ServerProcess(*model, "--draft", str(small_dir), "--draft-worker", workers[1]) as server:
        told = httpx.get(f"{server.url}/health?verbose=1", timeout=10).json()
        assert told["draft_worker"] == {"address": workers[1], "state": "up"}
        figures = re.search(r"flowspec:draft_link_bytes_total{.*} (\S+)", httpx.get(f"{server.url}/metrics").text)
        assert figures is not None and float(figures[1]) > 0
        assert [stage["stage"] for stage in told["stages"]] == [1]
