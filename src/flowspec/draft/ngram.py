"""Drafts by looking back: what followed the last tokens when they occurred before, in this text or in earlier ones.

Known as prompt lookup decoding within a text, and as suffix decoding (arXiv 2411.04975) over many; free of weights, and
good on text that repeats itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from flowspec.draft.base import Accepted
from flowspec.draft.memory import CONTEXT, Memory
from flowspec.draft.suffixes import BETWEEN, Places, Suffixes
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints

_ROOM = 1 << 16  # tokens of an answer that a look-up goes back over
_LESS_PER_TOKEN = 0.5  # what a place weighs whose context is one token shorter in common
_OWN_WEIGHT = 4.0  # of the text's own places: it repeats itself more than others


@dataclass(frozen=True)
class NgramConfig:
    """How far back and ahead an n-gram draft looks."""

    widths: tuple[int, ...] = (2, 4, 8)  # tokens of the text itself by which places are found; the first must match
    min_foreign: int = 4  # tokens that must match in an earlier text
    depth: int = 10  # tokens ahead
    size: int = 24  # guesses at most, the most probable ones
    min_share: float = 0.05  # what happened more rarely is no guess


@dataclass(frozen=True)
class Guesses:
    """A small tree of what may follow, parents first: ``parents`` are places in it, -1 for the text's end.

    ``shares``: how often the node's path followed, of all that followed; ``length``: of the longest match.
    """

    token_ids: list[int]
    parents: list[int]
    shares: list[float]
    length: int = 0

    def children(self) -> dict[int, dict[int, int]]:
        """By parent: the places of its children, by token."""
        children: dict[int, dict[int, int]] = {}
        for place, (parent, token_id) in enumerate(zip(self.parents, self.token_ids, strict=True)):
            children.setdefault(parent, {})[token_id] = place
        return children

    def graft(self, tree: DraftTree, row: int, trust: float) -> None:
        """Merge them below ``row``, as if at every step the next token were one of them with probability ``trust``."""
        above = [1.0 if parent < 0 else self.shares[parent] for parent in self.parents]
        logprobs = np.log(np.array(self.shares) / np.array(above) * trust)
        tree.graft(row, np.array(self.token_ids), np.array(self.parents), logprobs)


NOTHING = Guesses([], [], [])


class LookBack:
    """One request's text, and the memory of others, if there is one."""

    def __init__(self, config: NgramConfig, prompt_ids: Sequence[int], memory: Memory | None) -> None:
        self._config = config
        self._memory = memory
        self._own = Suffixes(len(prompt_ids) + _ROOM, config.widths)
        self.append(prompt_ids)

    def append(self, token_ids: Sequence[int]) -> None:
        self._own.add(token_ids)

    def look_up(self, path: list[int]) -> Guesses:
        """What may follow the text with ``path`` behind it."""
        config = self._config
        context = (self._own.tail(CONTEXT) + path)[-CONTEXT:]
        own = self._own.find(context, config.depth, behind=path)
        foreign = None
        if self._memory is not None:
            foreign = self._memory.find(context, config.depth, config.min_foreign)
        found = [(places, weight) for places, weight in ((own, _OWN_WEIGHT), (foreign, 1.0)) if places is not None]
        return _grow(found, config) if found else NOTHING


def _grow(found: Sequence[tuple[Places, float]], config: NgramConfig) -> Guesses:
    """The most probable paths: a place counts the more, the longer the context is that it has in common."""
    longest = max(int(places.lengths.max()) for places, _ in found)
    weights = [weight * _LESS_PER_TOKEN ** (longest - places.lengths) for places, weight in found]
    following: list[list[int]] = np.concatenate([places.following for places, _ in found]).tolist()
    all_weights: list[float] = np.concatenate(weights).tolist()
    token_ids: list[int] = []
    parents: list[int] = []
    shares: list[float] = []
    ready = list(_children(-1, 1.0, 0, range(len(following)), following, all_weights))
    heapq.heapify(ready)
    while ready and len(token_ids) < config.size:
        negative_share, _, depth, parent, token_id, places = heapq.heappop(ready)
        if -negative_share < config.min_share:
            break
        token_ids.append(token_id)
        parents.append(parent)
        shares.append(-negative_share)
        if depth < config.depth:
            children = _children(len(token_ids) - 1, -negative_share, depth, places, following, all_weights)
            for child in children:
                heapq.heappush(ready, child)
    return Guesses(token_ids, parents, shares, longest)


_Child = tuple[float, int, int, int, int, Sequence[int]]  # negative share, first place, depth, parent, token, places


def _children(
    parent: int,
    share: float,
    depth: int,
    places: Sequence[int],
    following: list[list[int]],
    weights: list[float],
) -> list[_Child]:
    """What comes next where a path has come so far; the share of each, of the path's ``share``."""
    by_token: dict[int, list[int]] = {}
    for place in places:
        by_token.setdefault(following[place][depth], []).append(place)
    by_token.pop(BETWEEN, None)
    totals = {token_id: sum(weights[place] for place in group) for token_id, group in by_token.items()}
    total = sum(totals.values())
    return [
        (-share * totals[token_id] / total, group[0], depth + 1, parent, token_id, group)
        for token_id, group in by_token.items()
    ]


class NgramSource:
    """Look-ups alone: in the request's text, and in ``memory``."""

    name = "ngram"
    steady_steps = 1
    block_len = 1
    feature_layers: tuple[int, ...] = ()

    def __init__(self, config: NgramConfig | None = None, memory: Memory | None = None) -> None:
        self.config = config or NgramConfig()
        self.memory = memory

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> NgramDraft:
        return NgramDraft(LookBack(self.config, prompt_ids[:-1], self.memory))


class NgramDraft:
    """One request's text; the root is the tree's."""

    def __init__(self, text: LookBack) -> None:
        self._text = text

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        """Nothing to learn: the prompt was read when the draft was opened."""

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        self._text.append(accepted.token_ids)

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """Continue each node by what followed the longest matches of its own path."""
        tree.staleness[rows] = 0  # there is nothing fresher to learn about them
        for node_id in tree.node_ids[rows].tolist():
            found = tree.rows_of(np.array([node_id]))  # guesses may have moved the rows
            if not len(found):
                continue  # or the tree has forgotten this one for better nodes
            row = int(found[0])
            guesses = self._text.look_up(tree.token_ids[tree.path(row)].tolist())
            if guesses.token_ids:
                # Longer matches are surer; the share is a rule of thumb, and only the order of nodes hangs on it.
                guesses.graft(tree, row, guesses.length / (guesses.length + 1))
        return True
