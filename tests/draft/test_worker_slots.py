"""A draft worker's memory for keys and values: no request takes what is not there, and none is lost for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flowspec.config import PipelineConfig, TreeConfig
from flowspec.core import MAX_ROWS, SamplingParams
from flowspec.draft import remote_passes
from flowspec.draft.remote_passes import RemoteDraft, RemoteModelSource
from flowspec.draft.worker_slots import WorkerSlots
from flowspec.model.slots import INITIAL_CAPACITY
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree
from inproc_port import InprocPort, remote_source
from pump import Pump, prompt_of
from tiny_models import make_checkpoint

SMALL = PipelineConfig(segment_len=5, prefill_chunk=64)
TREE = TreeConfig(top_k=4, width=4, depth=4, max_depth=6, size=24, min_probability=0.0)
PARAMS = SamplingParams(max_tokens=10)


@pytest.fixture(scope="module")
def target(checkpoint_dir: Callable[[str], Path]) -> Path:
    return checkpoint_dir("qwen3")


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = tmp_path_factory.mktemp("small")
    return make_checkpoint(small, "mistral", 3, hidden_size=16, num_hidden_layers=2, max_position_embeddings=2048)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_passes, "PATIENCE_S", 1000.0)


class BoundedPort(InprocPort):
    """Whose worker has memory for so many slots, and would be killed for one more."""

    def __init__(self, small: Path, num_slots: int) -> None:
        super().__init__(small)
        self._num_slots = num_slots

    def work(self) -> None:
        super().work()
        requests = self.worker._requests
        caches = [*(request.cache for request in requests._open.values()), *requests._cached.values()]
        assert sum(cache.slots.capacity for cache in caches) <= self._num_slots

    def work_all(self) -> None:
        while self.has_work:
            self.work()


def bounded(target: Path, small: Path, num_slots: int) -> tuple[RemoteModelSource, BoundedPort]:
    port = BoundedPort(small, num_slots)
    source = remote_source(target, small, port)
    source.slots.num_slots = num_slots
    return source, port


def open_draft(source: RemoteModelSource, text: list[int]) -> tuple[RemoteDraft, DraftTree]:
    return source.open(text, Sampler(PARAMS), 4), DraftTree(len(text) - 1, text[-1], 24)


def draft_once(source: RemoteModelSource, text: list[int]) -> RemoteDraft:
    draft, tree = open_draft(source, text)
    assert draft.expand(tree, np.array([0])) and len(tree) > 1
    return draft


@pytest.mark.parametrize("num_slots", [0, 600, 1500])
def test_requests_that_run_at_once_share_what_there_is(
    target: Path, small_dir: Path, caplog: pytest.LogCaptureFixture, num_slots: int
) -> None:
    """Four of them, twice: the first come draft with the model, the others from n-grams, and one line says so."""
    prompts = [prompt_of(20 + 40 * seed, seed) for seed in range(4)]
    plain, texts = Pump(target, 1, "none", "ar"), []
    generations = [plain.submit(prompt, PARAMS) for prompt in prompts]
    plain.run()
    source, port = bounded(target, small_dir, num_slots)
    rng = np.random.default_rng(num_slots)
    pump = Pump(target, 2, source, "flow", TREE, SMALL, keeps_caches=True, apart=port)
    for _ in range(2):
        again = [pump.submit(prompt, PARAMS) for prompt in prompts]
        pump.run(lambda num: int(rng.integers(num)))
        texts += [generation.output_ids for generation in again]
    assert texts == 2 * [generation.output_ids for generation in generations]
    port.work_all()
    assert port.worker.num_open == source.slots.num_held == 0, "what ended ones held is there again"
    port.worker.check_integrity()
    assert (source.slots.num_refused == 0) == (num_slots == 1500)
    assert bool(port.num_rows) == (num_slots > 0)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == (num_slots < 1500)
    assert all(f"has memory for the keys and values of {num_slots:,} tokens" in line for line in told)


def test_what_is_kept_for_later_makes_room_the_oldest_first(target: Path, small_dir: Path) -> None:
    source, port = bounded(target, small_dir, 3 * INITIAL_CAPACITY)
    first, second, third = (draft_once(source, prompt_of(30, seed)) for seed in range(3))
    kept = [draft.end() for draft in (second, first)]
    fourth = draft_once(source, prompt_of(30, 4))
    port.work_all()
    assert (port.worker.num_open, port.worker.num_cached, source.slots.num_refused) == (2, 1, 0)
    assert [draft.num_certain > 0 for draft in kept if draft is not None] == [False, True], "the older one is gone"
    fifth = draft_once(source, prompt_of(30, 5))
    assert not fifth._passes.is_lost and source.slots.num_kept == 0, "so is the other one"
    sixth, tree = open_draft(source, prompt_of(30, 6))
    sixth.expand(tree, np.array([0]))
    assert sixth._passes.is_lost and source.slots.num_refused == 1, "those that run make none"
    for draft in (third, fourth, fifth, sixth):
        draft.close()
    port.work_all()
    assert (port.worker.num_open, source.slots.num_held) == (0, 0)


def test_a_request_that_outgrows_what_there_is_goes_on_with_ngrams(
    target: Path, small_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And its cache is there for others at once."""
    source, port = bounded(target, small_dir, 400)
    text = prompt_of(380)
    draft, tree = open_draft(source, text)
    while draft.expand(tree, tree.worth_expanding(16, 8, 16)) and not draft._passes.is_lost:
        assert len(tree) > 1
    assert len(port.num_rows) > 2, "it has drafted with the model before"
    port.work_all()
    assert (port.worker.num_open, source.slots.num_held) == (0, 0)
    assert "needs 40" in caplog.text and "Give that worker more memory (--max-memory)" in caplog.text
    num_segments = len(port.num_rows)
    tree.restart(text[5])
    assert draft.expand(tree, np.array([0])), "n-grams are a draft"
    draft.close()
    port.work_all()
    assert len(port.num_rows) == num_segments


def test_a_conversation_goes_on_with_what_was_kept_whoever_ends_meanwhile(target: Path, small_dir: Path) -> None:
    """Its cache is wanted from the time on when the next turn has come, not when that begins to draft."""
    source, port = bounded(target, small_dir, 5 * INITIAL_CAPACITY)
    text = prompt_of(60)
    before = draft_once(source, text).end()
    assert before is not None
    draft, tree = open_draft(source, [*text, 3, 5, 2])
    draft.reuse(before, 50)
    for seed in range(3):
        draft_once(source, prompt_of(30, seed)).end()
    port.num_rows.clear()
    assert draft.expand(tree, np.array([0])) and not draft._passes.is_lost
    assert max(port.num_rows) < 20, "it reads what is new alone"
    given_up, _ = open_draft(source, [*text, 3, 5, 2])
    kept = draft.end()
    assert kept is not None
    given_up.reuse(kept, 40)
    given_up.close()
    port.work_all()
    assert (port.worker.num_cached, source.slots.num_kept) == (1, INITIAL_CAPACITY), "of one that ended before"


def test_shares_are_what_a_cache_takes(small_dir: Path) -> None:
    """As the worker's table grows: never smaller than a new one, and never larger than its limit."""
    slots = WorkerSlots(10_000, most=900 + MAX_ROWS)
    assert slots.grow(1, 10) and slots.held_by(1) == INITIAL_CAPACITY
    assert slots.grow(1, 1000) and slots.held_by(1) == 1250
    assert slots.grow(2, 8000) and slots.held_by(2) == 8750, "somewhat more, as far as there is more"
    assert not slots.grow(1, 1251) and not slots.grow(3, 1) and slots.num_refused == 2
    assert slots.held_by(1) == 1250, "whoever asks in vain loses nothing by that"
    slots.release(2)
    assert slots.grow(1, 9000) and slots.held_by(1) == 900 + MAX_ROWS, "no text has use for more"
    assert WorkerSlots().grow(1, 10**9), "where nobody knows, nobody counts"
