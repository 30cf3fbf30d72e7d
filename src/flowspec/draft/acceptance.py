"""How good a draft's guesses are along a text that the target has written, and whether that is what they should be.

Draft heads fail without a word: one that lacks a matrix, reads the wrong layers or pairs tokens with the wrong features
still drafts. Here its most probable guesses, step by step from every token of a text, are compared with the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from flowspec.core import SamplingParams
from flowspec.draft.base import Accepted, ApartDraft, BlockDraft, Draft, DraftSource
from flowspec.sampling import Sampler
from flowspec.tree import UNDRAFTED, DraftTree, Ints

DEPTH: Final = 3  # steps from one token
FEWEST: Final = 12  # first guesses that say anything
# Shares of right guesses along greedy text, the first one's and a later one's, by a source's name. The weakest EAGLE-3
# heads that are published accept 1.8 tokens a pass as chains: half of the first guesses are right, and somewhat fewer
# later ones. Of the weakest DSpark head it is 60 % and 56 %, at temperature 1. EAGLE-1 heads of small models may be
# weaker: a third, in those of a model with 135 million parameters. Small language models agree with large ones more
# often, where they read the same tokens; some share but half of them. Of an MTP layer's first guesses 90 % are right,
# as its authors say; it is trained for no later ones, so that none is too bad.
FLOORS: Final = {
    "eagle": (0.2, 0.15),
    "eagle3": (0.3, 0.2),
    "peagle": (0.3, 0.2),
    "dflash": (0.3, 0.2),
    "dflash2": (0.3, 0.25),
    "dspark": (0.3, 0.25),
    "model": (0.2, 0.15),
    "mtp": (0.3, 0.0),
}
SHARE: Final = 0.6  # of the rates that a head's config says it has; another text is harder, or easier
BAD_LUCK: Final = 0.01  # a head that is just right as often as that is judged broken in so many checks

_GREEDY = Sampler(SamplingParams())


@dataclass(frozen=True)
class ReadText:
    """A text of the target, and the features of its tokens as a draft was told them.

    ``features`` [n, width], ``None`` for a draft that reads none; the first ``prompt_len`` tokens were given.
    """

    token_ids: list[int]
    prompt_len: int
    features: Tensor | None


class Recorder:
    """Another source; it keeps what the newest draft is told."""

    def __init__(self, inner: DraftSource) -> None:
        self._inner = inner
        self.name = inner.name
        self.steady_steps = inner.steady_steps
        self.block_len = inner.block_len
        self.feature_layers = inner.feature_layers
        self.told: list[Tensor] = []
        self._newest: Draft | None = None

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> _Recorded:
        self.told.clear()  # a request that was preempted begins again
        self._newest = self._inner.open(prompt_ids, sampler, top_k)
        return _Recorded(self._newest, self.told)

    def close(self) -> None:
        """The newest draft is of no more use."""
        if isinstance(self._newest, ApartDraft):
            self._newest.close()

    def text(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> ReadText:
        features = torch.cat(self.told) if self.feature_layers and self.told else None
        return ReadText([*prompt_ids, *output_ids], len(prompt_ids), features)


class _Recorded:
    def __init__(self, inner: Draft, told: list[Tensor]) -> None:
        self._inner = inner
        self._told = told

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        self._told.append(features)
        self._inner.read_prompt(node_ids, features)

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._told.append(accepted.features)
        self._inner.commit(accepted, tree)

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        return self._inner.expand(tree, rows)

    def reread(self, tree: DraftTree) -> None:
        assert isinstance(self._inner, BlockDraft)
        self._inner.reread(tree)


@dataclass
class Acceptance:
    """Of guesses at each step, where those before were right: how many were made, and how many were right."""

    num_made: list[int] = field(default_factory=lambda: [0] * DEPTH)
    num_right: list[int] = field(default_factory=lambda: [0] * DEPTH)

    def wrong_step(self, kind: str, hit_rates: Sequence[float] = ()) -> int | None:
        """The first step, from 0, at which the draft is far worse than its kind; ``None`` where that cannot be said.

        ``kind``: one of ``FLOORS``. ``hit_rates``: how often its guesses were right when it was trained, by step, if
        that is known.
        """
        if self.num_made[0] < FEWEST:
            return None
        for step, (num_made, num_right) in enumerate(zip(self.num_made, self.num_right, strict=True)):
            floor = FLOORS[kind][min(step, 1)]
            if step < len(hit_rates):
                floor = SHARE * hit_rates[step]
            tails = (math.comb(num_made, i) * floor**i * (1 - floor) ** (num_made - i) for i in range(num_right + 1))
            if sum(tails) < BAD_LUCK:
                return step
        return None

    def told(self, step: int) -> str:
        """How bad it is at a step."""
        first = f"{self.num_right[0]} of {self.num_made[0]} first guesses are right"
        if not step:
            return f"only {first}"
        return f"{first}, but only {self.num_right[step]} of {self.num_made[step]} that build on {_NUMBERS[step]}"


_NUMBERS = ("", "one", "two")


def measure(source: DraftSource, text: ReadText, is_late: Callable[[], bool] = lambda: False) -> Acceptance:
    """Let the source guess from every token of the answer on; once it has done so often enough, until ``is_late``."""
    token_ids, start = text.token_ids, text.prompt_len - 1
    num_levels = DEPTH if source.block_len == 1 else min(DEPTH, source.block_len)
    features = torch.zeros(len(token_ids), 1) if text.features is None else text.features
    draft = source.open(token_ids[: text.prompt_len], _GREEDY, 1)
    if source.feature_layers:
        draft.read_prompt(list(range(start)), features[:start])
    acceptance = Acceptance()
    tree = DraftTree(start, token_ids[start], 2 * DEPTH)
    for place in range(start, len(token_ids) - 1):
        _guess(draft, tree, token_ids[place + 1 :][:num_levels], acceptance)
        if place >= len(features) or (acceptance.num_made[0] >= FEWEST and is_late()):
            break
        accepted = Accepted([tree.root_id], [token_ids[place]], features[place : place + 1])
        tree.restart(token_ids[place + 1])
        draft.commit(accepted, tree)
    if isinstance(draft, ApartDraft):
        draft.close()
    return acceptance


def _guess(draft: Draft, tree: DraftTree, following: Sequence[int], acceptance: Acceptance) -> None:
    """From the root as far as guesses are right; ``following``: as many of the next tokens as are of interest."""
    row: int | None = 0
    for step, token_id in enumerate(following):
        while tree.staleness[row] == UNDRAFTED:  # a language model reads a long prompt in several passes
            if not draft.expand(tree, np.array([row])):
                return
        if not (tree.parents == row).any():
            return  # it cannot read what is there
        acceptance.num_made[step] += 1
        row = tree.find(row, token_id)
        if row is None:
            return
        acceptance.num_right[step] += 1
