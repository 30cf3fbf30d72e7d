"""Drafts must not only be harmless but good: what a perfect draft guesses is accepted, and nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from flowspec.config import PipelineConfig, TreeConfig
from flowspec.core import SamplingParams
from flowspec.draft.base import Accepted
from flowspec.draft.eagle import GREEDY
from flowspec.draft.lookup import LONG, LookupDraft
from flowspec.draft.ngram import LookBack, NgramConfig, NgramSource
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints
from pump import Choose, Pump


class TargetSource:
    """The target itself as the draft: every guess is right."""

    name = "target"
    steady_steps = 1
    block_len = 1
    feature_layers: tuple[int, ...] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> TargetDraft:
        return TargetDraft(self._model, prompt_ids)


class TargetDraft:
    def __init__(self, model: PreTrainedModel, prompt_ids: Sequence[int]) -> None:
        self._model = model
        self._prefix = list(prompt_ids[:-1])

    def read_prompt(self, node_ids: Sequence[int], features: torch.Tensor) -> None:
        raise AssertionError("it asked for no features")

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._prefix += accepted.token_ids

    @torch.inference_mode()
    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """Give the first of the nodes its likeliest token."""
        text = self._prefix + tree.token_ids[tree.path(int(rows[0]))].tolist()
        best = self._model(torch.tensor([text])).logits[0, -1].log_softmax(-1).topk(1)
        tree.expand(rows[:1], best.indices[None].numpy(), best.values[None].double().numpy(), np.array([1]))
        return True


def draft_first(pump: Pump) -> Choose:
    """The driver works whenever it can: its draft is never too slow. (Its work comes right behind the messages.)"""
    return lambda num_choices: min(len(pump.network.waiting()), num_choices - 1)


@pytest.mark.parametrize("segment_len", [2, 16])
def test_a_draft_that_is_the_target_accepts_full_depth(checkpoint_dir: Callable[[str], Path], segment_len: int) -> None:
    directory = checkpoint_dir("llama")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tree = TreeConfig(top_k=1, depth=6, max_depth=12, root_passes=7, min_probability=0.0)
    pump = Pump(directory, 2, TargetSource(model), tree=tree, pipeline=PipelineConfig(segment_len=segment_len))
    generation = pump.submit([1, 4, 2, 5, 3], SamplingParams(max_tokens=50))
    generation_depths: list[int] = []

    def watch(num_choices: int) -> int:
        generation_depths.append(int(generation.tree.depths.max()))
        return draft_first(pump)(num_choices)

    pump.run(watch)
    stats = generation.stats
    # Every guess is accepted and every token was guessed, but for the last one, which nobody has to guess.
    assert (stats.drafted, stats.accepted, stats.restarts) == (49, 49, 0)
    assert max(generation_depths) >= 6, "the tree was deep"


def test_the_ngram_draft_continues_the_longest_match_first() -> None:
    prompt = [1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 1, 2, 3]
    draft = NgramSource(NgramConfig(depth=3)).open(prompt, GREEDY, 10)
    tree = DraftTree(12, 3, 80)
    assert draft.expand(tree, np.zeros(1, dtype=np.int64))
    tree.check_integrity()
    # "1 2 3" was followed by 4 5 9; the later "2 3" (then 7 8 1) is the shorter match.
    best = tree.best()
    assert tree.token_ids[best[:4]].tolist() == [3, 4, 5, 9]
    assert tree.token_ids[best[4:]].tolist() == [7, 8, 1]
    assert np.isclose(np.exp(tree.logprobs[tree.find(0, 4)]), 3 / 4 * 2 / 3)  # of three tokens in common, and two


def test_the_ngram_draft_adds_nothing_when_it_knows_nothing() -> None:
    draft = NgramSource().open([1, 2, 3, 4, 5], GREEDY, 10)
    tree = DraftTree(4, 5, 80)
    draft.expand(tree, np.zeros(1, dtype=np.int64))
    assert len(tree) == 1
    assert not len(tree.worth_expanding(6, 10)), "it need not try again"


def test_the_ngram_draft_passes_over_nodes_that_its_own_chains_have_displaced() -> None:
    draft = NgramSource().open([1, 2, 3] * 6 + [1], GREEDY, top_k=10)
    tree = DraftTree(0, 1, size=4)
    weak = np.arange(10, 17)  # with the root as many unsent nodes as a tree of this size keeps
    tree.expand(np.zeros(1, dtype=np.int64), weak[None], np.full((1, 7), -9.0), np.ones(1, dtype=np.int64))
    assert draft.expand(tree, np.arange(8))
    tree.check_integrity()
    assert tree.find(0, 2) is not None and tree.find(0, 16) is None


def test_repetitive_text_is_accepted_from_ngrams(checkpoint_dir: Callable[[str], Path]) -> None:
    pump = Pump(checkpoint_dir("qwen3"), 2, "ngram")
    generation = pump.submit([1, 2, 3] * 5, SamplingParams(max_tokens=60))
    pump.run()
    output = generation.output_ids
    repeats = sum(tuple(output[i : i + 3]) in {tuple(output[j : j + 3]) for j in range(i)} for i in range(len(output)))
    if repeats > 20:
        assert generation.stats.accepted > 10


# --- n-grams beside another draft ---


class SilentDraft:
    """Makes passes, and knows nothing."""

    def read_prompt(self, node_ids: Sequence[int], features: torch.Tensor) -> None: ...

    def commit(self, accepted: Accepted, tree: DraftTree) -> None: ...

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        tree.staleness[rows] = 1
        return True


ROOT = np.zeros(1, dtype=np.int64)


def beside_silence(prompt: Sequence[int]) -> LookupDraft:
    return LookupDraft(SilentDraft(), LookBack(LONG, prompt[:-1], None))


def accept(draft: LookupDraft, tree: DraftTree, num_nodes: int, new_token: int | None = None) -> None:
    """Commit the root and ``num_nodes - 1`` nodes below it; without ``new_token`` the next one is the new root."""
    path = tree.path(len(tree) - 1)[: num_nodes + 1]
    node_ids, token_ids = tree.node_ids[path[:num_nodes]].tolist(), tree.token_ids[path[:num_nodes]].tolist()
    if new_token is None:
        tree.reroot(path[num_nodes])
    else:
        tree.restart(new_token)
    draft.commit(Accepted(node_ids, token_ids, torch.zeros(num_nodes, 1)), tree)


@pytest.mark.parametrize(("num_repeated", "is_long"), [(7, False), (8, True)])
def test_only_long_matches_join_the_tree(num_repeated: int, is_long: bool) -> None:
    text = list(range(20))
    prompt = [*text, 50, *text[5 : 5 + num_repeated]]
    tree = DraftTree(len(prompt) - 1, prompt[-1], 80)
    assert beside_silence(prompt).expand(tree, ROOT)
    tree.check_integrity()
    expected = [*text[13:], 50, *text[5:13]] if is_long else []
    assert tree.token_ids[1:].tolist() == expected
    assert not is_long or (tree.logprobs[1:] == math.log(4 / 5)).all()


def test_ngrams_are_trusted_as_far_as_they_have_come_true() -> None:
    text = list(range(20)) * 2
    tree = DraftTree(len(text) - 1, text[-1], 80)
    draft = beside_silence(text)
    draft.expand(tree, ROOT)
    accept(draft, tree, 3)  # three tokens came true
    draft.expand(tree, ROOT)
    tree.check_integrity()
    assert tree.token_ids.tolist() == [2, *range(3, 19)], "the chain goes on where it ended"
    assert tree.logprobs[-1] == math.log(7 / 8) and tree.logprobs[1] == math.log(7 / 8)
    accept(draft, tree, 1, new_token=99)  # and one did not
    draft.expand(tree, ROOT)
    assert len(tree) == 1, "nothing like it was there before"
    for token_id in range(12):
        accept(draft, tree, 1, new_token=token_id)
    draft.expand(tree, ROOT)
    assert tree.token_ids[:9].tolist() == list(range(11, 20))
    is_fork = np.isin(tree.token_ids, [3, 99])  # after the first 19 there came 0 1 2 3, after the second 0 1 2 99
    assert np.allclose(tree.logprobs[1:][~is_fork[1:]], math.log(7 / 9))
    assert np.allclose(tree.logprobs[is_fork][:2], math.log(7 / 9 / 2))
