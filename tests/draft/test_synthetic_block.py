"""The synthetic block draft: one pass guesses all levels, and knows which tokens it did not guess first."""

from __future__ import annotations

import numpy as np
import torch

from flowspec.core import SamplingParams
from flowspec.draft.base import Accepted
from flowspec.draft.synthetic import SyntheticDraft, SyntheticSource
from flowspec.model.synthetic import Language, increments, quality
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints

PROMPT = [3, 1, 4, 1, 5]
ROOT = np.zeros(1, dtype=np.int64)
LANGUAGE = Language(quality("block"))


def open_draft() -> tuple[SyntheticDraft, DraftTree]:
    draft = SyntheticSource(LANGUAGE).open(PROMPT, Sampler(SamplingParams()), top_k=3)
    return draft, DraftTree(len(PROMPT) - 1, PROMPT[-1], 40)


def context_of(token_ids: list[int]) -> Ints:
    return increments(np.array(token_ids, dtype=np.int64), np.arange(len(token_ids))).sum(axis=0, keepdims=True)


def guesses(text: list[int], level: int, detours: int) -> list[int]:
    return LANGUAGE.draft(context_of(text), np.array([level]), 3, np.array([detours]))[0][0].tolist()


def children(tree: DraftTree, row: int) -> list[int]:
    return tree.token_ids[tree.parents == row].tolist()


def test_a_level_is_guessed_with_its_depth_and_its_detours() -> None:
    draft, tree = open_draft()
    assert draft.expand(tree, ROOT)
    first, second, _ = children(tree, 0)
    assert [first, second, _] == guesses(PROMPT, 1, 0)
    assert draft.expand(tree, np.array([1, 2]))
    assert children(tree, 1) == guesses([*PROMPT, first], 2, 0)
    assert children(tree, 2) == guesses([*PROMPT, second], 2, 1)
    assert tree.staleness[:3].tolist() == [1, 2, 2]


def test_a_token_that_the_block_did_not_foresee_has_guesses_without_a_pass() -> None:
    draft, tree = open_draft()
    draft.expand(tree, ROOT)
    draft.expand(tree, np.array([1]))
    first, old_id = int(tree.token_ids[1]), int(tree.node_ids[1])
    foreign = next(token for token in range(64) if token not in children(tree, 1))
    tree.restart(foreign)
    draft.commit(Accepted([len(PROMPT) - 1, old_id], [PROMPT[-1], first], torch.zeros(2, 4)), tree)
    draft.reread(tree)
    assert children(tree, 0) == guesses([*PROMPT, first, foreign], 3, 1)
    assert tree.staleness[0] == 3
    assert draft.expand(tree, ROOT)  # the pass: a block of its own
    assert set(guesses([*PROMPT, first, foreign], 1, 0)) <= set(children(tree, 0))
    assert tree.staleness[0] == 1
