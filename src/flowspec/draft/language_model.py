"""Drafts with a small language model: it needs nothing of the target but its tokens, and runs ahead as far as it likes.

All of its layers are one stage, as a worker would run it. A node's row is written once, into a slot of the request's
own cache, and is right for as long as the node lives: its keys and values hang on its path alone. Where the passes are
made, here or on a worker of their own, is for ``draft.model_passes``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
from torch import Tensor

from flowspec.draft.base import LANGUAGE_MODEL, Accepted, ReusableDraft
from flowspec.draft.eagle import GREEDY
from flowspec.draft.model_passes import Answer, Passes, Rows
from flowspec.draft.token_map import TokenMap
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Floats, Ints
from flowspec.wire.messages import NO_PARENT

STEADY_STEPS = 16  # its guesses hardly get worse with depth, and nothing makes them better
MAX_KEPT = 2  # ended requests whose caches stay: they are as deep as the model, and the driver's memory is small


class ModelSource:
    """A loaded model, shared by all requests."""

    name = LANGUAGE_MODEL
    steady_steps = STEADY_STEPS
    block_len = 1
    feature_layers: tuple[int, ...] = ()

    def __init__(
        self, open_passes: Callable[[int], Passes], tokens: TokenMap, max_positions: int, is_coupled: bool = True
    ) -> None:
        """``open_passes``: of a request, by the id of its first root. ``is_coupled``: as in ``EagleSource``."""
        self.open_passes = open_passes
        self.tokens = tokens
        self.max_positions = max_positions
        self.is_coupled = is_coupled
        self._kept: deque[ModelDraft] = deque()  # of ended requests, with their caches

    def keep(self, draft: ModelDraft) -> None:
        """An ended one; of those before it only a few stay of use."""
        self._kept.append(draft)
        if len(self._kept) > MAX_KEPT:
            self.forget_oldest()

    def forget_oldest(self) -> None:
        """Of those that are kept."""
        self._kept.popleft().forget()

    def take(self, draft: ModelDraft) -> None:
        """A kept one, of which a new request takes all over."""
        self._kept.remove(draft)

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> ModelDraft:
        return ModelDraft(self, prompt_ids, sampler if self.is_coupled else GREEDY, top_k)


@dataclass
class _Asked:
    """A pass that is under way, and what happens meanwhile."""

    node_ids: list[int]  # that are run
    positions: Ints  # the target's, of the tokens that follow them
    wanted_ids: Ints  # nodes that are to have children
    root_id: int
    accepted_ids: list[int] = field(default_factory=list)  # since then, in path order
    accepted_tokens: list[int] = field(default_factory=list)


class ModelDraft:
    """One request. Positions are the draft's own: a token of the target may be several of its tokens."""

    def __init__(self, source: ModelSource, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> None:
        self._source = source
        self._sampler = sampler
        self._top_k = top_k
        self.passes: Passes = source.open_passes(len(prompt_ids) - 1)
        self._ends: list[int] = []  # by token of the prefix: how many of the draft's tokens end with it
        self._waiting: list[int] = []  # the draft's tokens of the prefix that are not in the cache yet
        self._num_prefix = 0  # those that are
        self._waiting = self._add_to_prefix(prompt_ids[:-1])
        self._root_position = len(prompt_ids) - 1  # the target's
        self._guesses: dict[int, tuple[Ints, Floats]] = {}  # by node id: tokens and log-probabilities [k]
        self._asked: _Asked | None = None

    def _add_to_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """As the draft reads them."""
        own_ids: list[int] = []
        start = self._ends[-1] if self._ends else 0
        for token_id in token_ids:
            own_ids += self._source.tokens.read(token_id)
            self._ends.append(start + len(own_ids))
        return own_ids

    @property
    def num_certain(self) -> int:
        return bisect_right(self._ends, self._num_prefix)

    def reuse(self, other: ReusableDraft, num_cached: int) -> None:
        """Of what the other one has read, as much as it still has."""
        assert isinstance(other, ModelDraft)
        num_tokens = min(num_cached, other.num_certain)
        if not num_tokens:
            return
        self._source.take(other)
        self._num_prefix = other._ends[num_tokens - 1]
        self.passes.reuse(other.passes, self._num_prefix)
        self._waiting = self._waiting[self._num_prefix :]

    def end(self) -> ModelDraft:
        self.passes.finish()
        self._asked = None
        self._guesses.clear()
        self._source.keep(self)
        return self

    def forget(self) -> None:
        """There is nothing to take over any more."""
        self.passes.forget()
        self._num_prefix, self._ends = 0, []

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        """The prompt is known; it is read when the first pass is wanted."""

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        """What the cache has of the accepted path stays there; the rest is read with the new root.

        While a pass is under way, the cache is as it was when that was asked for.
        """
        if self._asked is not None:
            self._asked.accepted_ids += accepted.node_ids
            self._asked.accepted_tokens += accepted.token_ids
        else:
            self._commit(accepted.node_ids, accepted.token_ids, tree)

    def _commit(self, node_ids: Sequence[int], token_ids: Sequence[int], tree: DraftTree) -> None:
        known = list(takewhile(self.passes.has, node_ids))
        self.passes.commit(known, tree.root_id, tree.node_ids)
        self._add_to_prefix(token_ids[: len(known)])
        self._num_prefix += len(known)
        self._waiting += self._add_to_prefix(token_ids[len(known) :])
        self._root_position += len(node_ids)
        alive = set(tree.node_ids.tolist())
        self._guesses = {node_id: guesses for node_id, guesses in self._guesses.items() if node_id in alive}

    def settle(self, tree: DraftTree) -> bool:
        """Take what has come of the pass under way; False when there is one still."""
        if self._asked is None:
            return True
        if self.passes.is_lost:
            self._asked = None
            return True
        if (answer := self.passes.take()) is None:
            return False
        asked, self._asked = self._asked, None
        self._note(asked, answer)
        if asked.accepted_ids:
            self._commit(asked.accepted_ids, asked.accepted_tokens, tree)
        elif tree.root_id == asked.root_id:  # else whoever wants it asks again, and it is known
            self._grow(tree, tree.rows_of(asked.wanted_ids))
        return True

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """A pass over the nodes that were not run yet, or over the next part of a long prompt, which guesses nothing.

        Nodes that it cannot read as one token, or that stand below such, get no children. Where the pass has not come
        back at once, they get them from ``settle``.
        """
        wanted_ids = tree.node_ids[rows]
        if self._asked is not None:
            if not self.settle(tree):
                return False
            rows = tree.rows_of(wanted_ids)  # the tree has grown
        ids = tree.node_ids[rows].tolist()
        unread = np.array([row for row, i in zip(rows, ids, strict=True) if i not in self._guesses], dtype=np.int64)
        if len(unread) and unread[0] == 0:
            if not self._run_root(tree, wanted_ids):
                return True
            unread = unread[1:]
        if len(unread) and self._asked is None:
            self._run_nodes(tree, unread, wanted_ids)
        if self._asked is None:
            self._grow(tree, rows)
        return True

    def _grow(self, tree: DraftTree, rows: Ints) -> None:
        """Give nodes the children that are known."""
        if not len(rows):
            return
        tree.staleness[rows] = 0  # there is nothing fresher to learn about them
        ids = tree.node_ids[rows].tolist()
        known = [(row, *self._guesses[i]) for row, i in zip(rows, ids, strict=True) if i in self._guesses]
        if known:
            known_rows, token_ids, logprobs = (np.stack(column) for column in zip(*known, strict=True))
            tree.expand(known_rows, token_ids, logprobs, np.zeros(len(known), dtype=np.int64))

    def _run_root(self, tree: DraftTree, wanted_ids: Ints) -> bool:
        """Read what there is before the root, and the root; whether all of it has been read, or is."""
        *before, root = [*self._waiting, *self._source.tokens.read(int(tree.token_ids[0]))]
        longest, start = self.passes.longest_text, self._num_prefix
        num_read = min(len(before), longest) if len(self._waiting) > longest else len(before)
        if num_read + start >= self._source.max_positions:
            tree.staleness[0] = 0  # the text is longer than this model can read
            return False
        self._num_prefix += num_read
        if num_read < len(before):
            self._waiting = self._waiting[num_read:]
            self.passes.read(before[:num_read], start)
            return False
        self._waiting = []
        rows = Rows([tree.root_id], [NO_PARENT], [root], [self._num_prefix])
        self._run(tree, wanted_ids, np.zeros(1, dtype=np.int64), rows, before)
        return True

    def _run_nodes(self, tree: DraftTree, rows: Ints, wanted_ids: Ints) -> None:
        """The rows' parents are in the cache, or else they stay as they are."""
        parent_ids = tree.node_ids[tree.parents[rows]]
        read = [self._source.tokens.read(token_id) for token_id in tree.token_ids[rows].tolist()]
        deepest = self._source.max_positions - self._num_prefix - 1
        is_of_use = np.array(
            [
                row > 0 and len(own_ids) == 1 and depth <= deepest and self.passes.has(parent_id)
                for row, own_ids, depth, parent_id in zip(
                    rows.tolist(), read, tree.depths[rows].tolist(), parent_ids.tolist(), strict=True
                )
            ],
            dtype=np.bool_,
        )
        if not is_of_use.any():
            return
        rows = rows[is_of_use]
        own_ids = [ids[0] for ids, is_good in zip(read, is_of_use, strict=True) if is_good]
        positions = (self._num_prefix + tree.depths[rows]).tolist()
        nodes = Rows(tree.node_ids[rows].tolist(), parent_ids[is_of_use].tolist(), own_ids, positions)
        self._run(tree, wanted_ids, tree.depths[rows], nodes, [])

    def _run(self, tree: DraftTree, wanted_ids: Ints, depths: Ints, rows: Rows, before: Sequence[int]) -> None:
        """A pass; what may follow the nodes is known then, unless it is under way still."""
        start = self._num_prefix - len(before)
        asked = _Asked(rows.node_ids, depths + self._root_position + 1, wanted_ids, tree.root_id)
        if (answer := self.passes.run(before, start, rows)) is None:
            self._asked = asked
        else:
            self._note(asked, answer)

    def _note(self, asked: _Asked, answer: Answer) -> None:
        token_ids, logprobs = answer.children(self._source.tokens, self._sampler, asked.positions, self._top_k)
        self._guesses.update(zip(asked.node_ids, zip(token_ids, logprobs, strict=True), strict=True))
