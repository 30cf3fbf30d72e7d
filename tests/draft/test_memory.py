"""The memory of earlier requests: what it finds was there, what is old is forgotten, and it guides guesses alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines import engine_of, run
from flowspec.config import EngineConfig, PipelineConfig, TreeConfig
from flowspec.core import SamplingParams
from flowspec.draft.eagle import GREEDY
from flowspec.draft.memory import BYTES_PER_TOKEN, CONTEXT, Memory
from flowspec.draft.ngram import LookBack, NgramConfig, NgramSource
from flowspec.draft.suffixes import BETWEEN, MAX_FOUND, Suffixes
from flowspec.errors import UsageError
from flowspec.schedule.catalogue import AUTO, SCHEDULES
from flowspec.tree import DraftTree
from pump import Pump, prompt_of


def places_by_hand(text: list[int], first: int, context: list[int], width: int) -> list[int]:
    """Where at least ``width`` tokens of the context's end stand, newest first."""
    ends = range(len(text) - 1, first + width - 1, -1)
    return [end for end in ends if text[end - width : end] == context[-width:] and text[end] != BETWEEN]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12), st.integers(12, 40))
@example([[0], [0], [0] * 5, [0], [0, 1, 1, 0, 0], [0], [0] * 3], 12)
def test_a_search_finds_what_a_comparison_of_all_places_finds(pieces: list[list[int]], capacity: int) -> None:
    index, text, width = Suffixes(capacity, (3,)), [], 3
    for number, piece in enumerate(pieces):
        added = [BETWEEN, *piece] if number % 3 == 0 else piece
        index.add(added)
        text += added
        first = max(0, len(text) - capacity)
        for context in ([0, 1, 2], piece[-4:], [1, *text[-3:]]):
            if len(context) < width or BETWEEN in context:
                continue
            expected = places_by_hand(text, first, context, width)
            found = index.find(context, 5)
            assert (found is not None) == bool(expected)
            if found is not None:
                behind = [[*text, *[BETWEEN] * 5][end : end + 5] for end in expected]
                assert found.following.tolist() == behind
                assert (found.lengths >= width).all()


def test_a_search_looks_at_the_newest_places_alone() -> None:
    index = Suffixes(4000, (2,))
    index.add([1, 2, 3] * 1000)
    places = index.find([1, 2], 3)
    assert places is not None and len(places.lengths) == MAX_FOUND


def test_the_longest_width_that_has_places_counts() -> None:
    index = Suffixes(100, (2, 4))
    index.add([5, 1, 2, 3, 4, 50, BETWEEN, 9, 9, 3, 4, 60])
    long, short = index.find([1, 2, 3, 4], 1), index.find([8, 8, 3, 4], 1)
    assert long is not None and long.following.tolist() == [[50]] and long.lengths.tolist() == [4]
    assert short is not None and short.following.tolist() == [[60], [50]]
    assert index.find([8, 8, 3, 4], 1, min_length=4) is None


# --- the memory ---


def test_the_memory_keeps_to_its_budget_and_forgets_the_oldest_texts() -> None:
    rng = np.random.default_rng(0)
    memory = Memory(2000)
    texts = [rng.integers(0, 10_000, 300).tolist() for _ in range(20)]
    for text in texts:
        memory.add(text)
        assert memory.num_tokens <= 2000
    assert memory.max_bytes == 2000 * BYTES_PER_TOKEN
    is_known = [memory.find(text[100:110], 1, 8) is not None for text in texts]
    assert is_known == [False] * 14 + [True] * 6


def test_the_memory_forgets_the_oldest_of_too_many_texts() -> None:
    rng = np.random.default_rng(0)
    memory = Memory(100_000, max_texts=3)
    texts = [rng.integers(0, 10_000, 50).tolist() for _ in range(5)]
    for text in texts:
        memory.add(text)
    assert [memory.find(text[:8], 1, 8) is not None for text in texts] == [False, False, True, True, True]
    assert memory.num_tokens == 3 * 51


def test_a_conversation_is_kept_once() -> None:
    rng = np.random.default_rng(0)
    memory, conversation = Memory(100_000), []
    for _ in range(8):
        conversation = conversation + rng.integers(0, 10_000, 200).tolist()
        memory.add(conversation)
        memory.add(conversation)  # and the same request once more
    assert memory.num_tokens < 8 * (200 + CONTEXT + 2)
    for place in range(10, len(conversation) - 1, 37):
        found = memory.find(conversation[:place], 1, 8)
        assert found is not None and conversation[place] in found.following


def test_guesses_are_ranked_by_how_often_they_followed() -> None:
    memory, before = Memory(1000), list(range(10, 20))
    for answer in ([1, 2, 3], [1, 2, 4], [1, 7], [5, 6]):
        memory.add([90 + answer[-1], *before, *answer])
    text = LookBack(NgramConfig(), before[:-1], memory)
    guesses = text.look_up(before[-1:])
    children = guesses.children()
    shares = {guesses.token_ids[place]: guesses.shares[place] for place in range(len(guesses.token_ids))}
    assert set(children[-1]) == {1, 5} and guesses.length == 10
    assert shares == pytest.approx({1: 3 / 4, 5: 1 / 4, 6: 1 / 4, 2: 1 / 2, 7: 1 / 4, 3: 1 / 4, 4: 1 / 4})
    draft = NgramSource(memory=memory).open(before, GREEDY, 10)
    tree = DraftTree(9, 19, 80)
    assert draft.expand(tree, np.zeros(1, dtype=np.int64))
    tree.check_integrity()
    assert sorted(tree.token_ids[1:]) == [1, 2, 3, 4, 5, 6, 7]
    assert np.isclose(np.exp(tree.scores[tree.find(0, 1)]), 3 / 4 * 10 / 11)


# --- requests ---

SMALL = PipelineConfig(segment_len=5, prefill_chunk=7)
TREE = TreeConfig(top_k=4, width=4, depth=4, max_depth=6, size=24, min_probability=0.0)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("schedule", "draft"), [*((name, "ngram") for name in (*SCHEDULES[1:], AUTO)), ("flow", "eagle")]
)
def test_what_is_remembered_changes_no_token(
    checkpoint_dir: Callable[[str], Path], schedule: str, draft: str, temperature: float
) -> None:
    params = SamplingParams(max_tokens=16, temperature=temperature, seed=5)
    directory, prompts = checkpoint_dir("qwen3"), [prompt_of(20), prompt_of(20)]
    plain = Pump(directory, 1, "none", "ar")
    expected = []
    for prompt in prompts:
        expected.append(plain.submit(prompt, params).output_ids)
        plain.run()
    memory = Memory(5000)
    for token_ids in ([*expected[0][:12], 3, 3, 3], [*prompt_of(20)[5:], 1, 2, 3]):
        memory.add(token_ids)  # some of it is wrong
    pump = Pump(directory, 2, draft, schedule, TREE, SMALL, memory=memory)
    for prompt, tokens in zip(prompts, expected, strict=True):
        generation = pump.submit(prompt, params)
        pump.run()
        assert generation.output_ids == tokens
    assert memory.find([*prompts[0], *expected[0]][:30], 1, 8) is not None, "what has ended is remembered"


def test_a_second_request_is_guessed_by_the_first(checkpoint_dir: Callable[[str], Path]) -> None:
    accepted: dict[int, list[int]] = {}
    for memory_tokens in (0, 1000):
        config = EngineConfig(memory_tokens=memory_tokens, keeps_caches=False)
        with engine_of(checkpoint_dir("llama"), stages=2, in_process=True, schedule="flow", config=config) as engine:
            texts = []
            for _ in range(2):
                job = engine.submit(prompt_of(20), SamplingParams(max_tokens=40))
                run(engine, [job])
                assert job.generation is not None
                texts.append(job.output_ids)
                accepted.setdefault(memory_tokens, []).append(job.generation.stats.accepted)
            assert texts[0] == texts[1]
    assert accepted[1000][1] > max(*accepted[0], accepted[1000][0]) + 5


def test_a_memory_that_is_too_small_is_an_error() -> None:
    with pytest.raises(UsageError, match="memory_tokens is 3; it must be 0"):
        EngineConfig(memory_tokens=3)
