"""Whatever the order in which messages arrive and processes work, the tokens are the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowspec.config import PipelineConfig, TreeConfig
from flowspec.core import SamplingParams
from flowspec.wire.actor import Send
from flowspec.wire.messages import Commit, Message, Segment
from flowspec.wire.transport import DRIVER, Link
from flowspec.worker.actor import Worker
from pump import Choose, Pump

PROMPT = [1, 4, 2, 1, 4, 2, 3, 1, 4]
PARAMS = SamplingParams(max_tokens=14)
TREE = TreeConfig(top_k=3, depth=4, max_depth=6, size=20, min_probability=0.0)


def text_of(directory: Path, num_stages: int, draft: str, segment_len: int, choose: Choose) -> list[int]:
    pipeline = PipelineConfig(segment_len=segment_len, prefill_chunk=4)
    pump = Pump(directory, num_stages, draft, tree=TREE, pipeline=pipeline)
    generation = pump.submit(PROMPT, PARAMS)
    pump.run(choose)
    return generation.output_ids


@functools.cache
def plain_text(directory: Path) -> list[int]:
    return text_of(directory, 1, "none", 1, lambda num: 0)


@pytest.mark.parametrize("draft", ["eagle", "ngram"])
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), num_stages=st.integers(1, 4), segment_len=st.sampled_from([1, 2, 6]))
def test_any_order_of_events_gives_the_same_tokens(
    checkpoint_dir: Callable[[str], Path], draft: str, seed: int, num_stages: int, segment_len: int
) -> None:
    directory = checkpoint_dir("qwen2")
    assert text_of(directory, num_stages, draft, segment_len, Random(seed).randrange) == plain_text(directory)


class _ControlLast:
    """Delivers commits only when nothing else can happen: the latest that a network can be."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump

    def __call__(self, num_choices: int) -> int:
        links = self._pump.network.waiting()
        for i, link in enumerate(links):
            if not (link.kind == "control" and link.target != DRIVER):
                return i
        return len(links) if len(links) < num_choices else 0


@pytest.mark.parametrize("segment_len", [1, 3])
def test_commits_that_come_last_of_all_change_nothing(checkpoint_dir: Callable[[str], Path], segment_len: int) -> None:
    directory = checkpoint_dir("llama")
    pump = Pump(directory, 3, "eagle", tree=TREE, pipeline=PipelineConfig(segment_len=segment_len))
    generation = pump.submit(PROMPT, PARAMS)
    pump.run(_ControlLast(pump))
    assert generation.output_ids == plain_text(directory)


def test_a_row_with_living_siblings_in_the_cache_does_not_see_them(checkpoint_dir: Callable[[str], Path]) -> None:
    """Segments of one row skipped the ancestor mask in the paper's public code."""
    pump = Pump(checkpoint_dir("llama"), 2, "eagle", tree=TREE, pipeline=PipelineConfig(segment_len=1))
    generation = pump.submit(PROMPT, PARAMS)
    num_checked = 0
    original = pump.workers[1].on_message

    def spy(message: object) -> list[Send]:
        nonlocal num_checked
        if isinstance(message, Segment) and not message.num_prefix:
            assert len(message.node_ids) == 1
            row = generation.tree.rows_of(np.array(message.node_ids))
            siblings = generation.tree.parents == generation.tree.parents[row] if len(row) else []
            num_checked += int(sum(siblings) > 1 and generation.tree.sent[siblings].sum() > 1)
        return original(message)  # type: ignore[arg-type]

    pump.workers[1].on_message = spy  # type: ignore[method-assign, assignment]
    pump.run()
    assert num_checked > 3, "the case did not occur"
    assert generation.output_ids == plain_text(checkpoint_dir("llama"))


def test_a_segment_whose_rows_are_all_dead_is_dropped_without_a_word(checkpoint_dir: Callable[[str], Path]) -> None:
    worker = worker_behind_the_prompt(checkpoint_dir("llama"), patience_s=None)
    worker.on_message(Commit(0, 0, [2], 9))
    worker.on_message(Segment(0, 0, 5, [3, 4], [2, 3], [3, 4], 0, [1, 1], None, []))
    assert worker.on_idle() == [] and worker.on_idle() is None
    worker.on_message(Segment(0, 0, 6, [9, 10], [2, 9], [3, 4], 0, [1, 1], None, []))
    sends = worker.on_idle()
    assert sends is not None and [s.message.node_ids for s in sends] == [[9, 10]]  # type: ignore[attr-defined]
    worker.check_integrity()


def worker_behind_the_prompt(directory: Path, patience_s: float | None) -> Worker:
    """The only worker; the prompt 1, 2, 3 is computed, node 2 is the root."""
    pump = Pump(directory, 1, "none", patience_s=patience_s)
    pump.submit([1, 2, 3], SamplingParams(max_tokens=5))
    worker = pump.workers[0]
    while pump.network.waiting():
        worker.on_message(pump.network.take(pump.network.waiting()[0]))
    while worker.on_idle() is not None:
        pass
    return worker


def test_a_forward_whose_rows_have_died_ends_between_two_layers(checkpoint_dir: Callable[[str], Path]) -> None:
    worker = worker_behind_the_prompt(checkpoint_dir("llama"), patience_s=0.0)
    worker.on_message(Segment(0, 0, 5, [3, 4], [2, 3], [3, 4], 0, [1, 1], None, []))
    assert worker.on_idle() == []
    worker.on_message(Commit(0, 0, [2], 9))
    assert worker.on_idle() == [] and worker.on_idle() is None
    worker.check_integrity()


def test_a_forward_passes_on_what_is_still_alive_at_its_end(checkpoint_dir: Callable[[str], Path]) -> None:
    segment = Segment(0, 0, 5, [3, 4, 5], [2, 2, 3], [3, 3, 4], 0, [1, 2, 3], None, [])
    results: list[Message] = []
    for commit in (None, Commit(0, 0, [2], 3)):
        worker = worker_behind_the_prompt(checkpoint_dir("llama"), patience_s=0.0)
        worker.on_message(segment)
        assert worker.on_idle() == []
        if commit is not None:
            worker.on_message(commit)
        while not (sends := worker.on_idle()):
            assert sends is not None
        results.append(sends[0].message)
        worker.check_integrity()
    whole, pruned = results
    assert whole.node_ids == [3, 4, 5] and pruned.node_ids == [3, 5]  # type: ignore[attr-defined]
    assert torch.equal(whole.hidden[[0, 2]], pruned.hidden)  # type: ignore[attr-defined]


def test_messages_of_another_epoch_are_dropped_whole(checkpoint_dir: Callable[[str], Path]) -> None:
    pump = Pump(checkpoint_dir("llama"), 1, "none")
    pump.submit([1, 2, 3], SamplingParams(max_tokens=5))
    worker = pump.workers[0]
    worker.on_message(pump.network.take(Link(DRIVER, 1, "data")))
    assert worker.on_idle() == []
    worker.on_message(Segment(0, 1, 5, [2], [1], [2], 0, [1], None, []))
    assert worker.on_idle() == []
    worker.on_message(Commit(0, 1, [2], 9))
    worker.check_integrity()
