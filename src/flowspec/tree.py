"""The draft tree: the driver's guesses of the next tokens. Arrays and set operations; no model, no schedule, no I/O.

A node's score is the sum of the log-probabilities along its path from the root (FlowSpec, arXiv 2507.02620: the
cumulative draft score). No log-probability is above zero, so a parent never scores below its child and every prefix of
the score order is a connected tree: whatever is sent best first arrives parents first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

_LEAST_REST = 1e-4  # probability that a hint leaves to tokens it does not name, at least
UNDRAFTED = 2**31 - 1  # staleness of a node whose children were never drafted


class DraftTree:
    """One request's draft tree. Row 0 is the root; a parent's row is below its child's; ids grow with the rows.

    Rows are positions in the arrays and change whenever nodes are dropped; node ids never change and are never reused.
    The best ``size`` nodes by score, the root included, may be sent or expanded if they score at least ``min_score``;
    of many unsent nodes only so many are kept.

    =============  =====================================================================================
    ``node_ids``   what driver and workers call the nodes
    ``token_ids``  the guessed tokens
    ``parents``    the parent's row; -1 for the root
    ``depths``     distance from the root
    ``staleness``  how many steps the node's children were extrapolated from a verified feature; ``UNDRAFTED``
    ``logprobs``   log-probability of the token after its parent, by draft and hint; 0 for the root
    ``scores``     sum of ``logprobs`` over the path from the root; -inf: not drafted since ``forget_scores``
    ``drafted``    the token's log-probability by the draft; NaN where only a hint names it
    ``hinted``     by a hint; NaN where none names it
    ``rests``      log of what a hint leaves to children that it does not name; 0 without a hint
    ``sent``       the node has been given to the pipeline
    =============  =====================================================================================
    """

    def __init__(self, root_id: int, token_id: int, size: int, min_score: float = -np.inf) -> None:
        assert min_score < 0, "the root is always good enough"
        self.size = size
        self.min_score = min_score
        self._next_id = root_id
        self._ints: Ints = np.zeros((5, 4 * size), dtype=np.int64)
        self._floats: Floats = np.zeros((5, 4 * size))
        self._sent: Bools = np.zeros(4 * size, dtype=np.bool_)
        self.restart(token_id)

    def _resize(self, num_nodes: int) -> None:
        self.node_ids, self.token_ids, self.parents, self.depths, self.staleness = self._ints[:, :num_nodes]
        self.logprobs, self.scores, self.drafted, self.hinted, self.rests = self._floats[:, :num_nodes]
        self.sent = self._sent[:num_nodes]

    def __len__(self) -> int:
        return len(self.node_ids)

    @property
    def root_id(self) -> int:
        return int(self.node_ids[0])

    # --- reading ---

    def find(self, row: int, token_id: int) -> int | None:
        """The row of the child of ``row`` that holds ``token_id``."""
        rows = np.flatnonzero((self.parents == row) & (self.token_ids == token_id))
        return int(rows[0]) if len(rows) else None

    def rows_of(self, node_ids: Ints) -> Ints:
        """The rows of those of ``node_ids`` (ascending) that are still in the tree."""
        rows = np.searchsorted(self.node_ids, node_ids)
        rows[rows == len(self)] = 0
        return rows[self.node_ids[rows] == node_ids]

    def path(self, row: int) -> list[int]:
        """The rows from the root to ``row``, both included."""
        rows = [row]
        while rows[-1]:
            rows.append(int(self.parents[rows[-1]]))
        return rows[::-1]

    def best(self, limit: int | None = None) -> Ints:
        """The rows that are good enough, best first, ``limit`` (``size``) at most; ties go to the older node."""
        rows = np.argsort(-self.scores, kind="stable")[: self.size if limit is None else limit]
        return rows[(self.scores[rows] >= self.min_score) & (self.scores[rows] > -np.inf)]

    def best_unsent(self, limit: int, num_worth: Callable[[Floats], int] = len) -> Ints:
        """The best ``limit`` rows that may be sent and were not, in id order: the next segment.

        ``num_worth``: how many of them are worth it, by their scores, which fall; it is not asked about none.
        """
        best = self.best()
        unsent = best[~self.sent[best]][:limit]
        return np.sort(unsent[: num_worth(self.scores[unsent])]) if len(unsent) else unsent

    def best_at(self, depth: int, limit: int) -> Ints:
        """The best ``limit`` rows at a depth, in id order: what EAGLE-2 expands in one pass."""
        rows = np.flatnonzero((self.depths == depth) & (self.scores > -np.inf))
        return np.sort(rows[np.argsort(-self.scores[rows], kind="stable")[:limit]])

    def worth_expanding(self, max_depth: int, limit: int, steady_steps: int = 1) -> Ints:
        """The best ``limit`` rows above ``max_depth`` that a draft pass is worth, in id order; the root goes alone.

        A row gains when its children were never drafted, or from a staler feature than its parent has by now; but what
        was extrapolated for no more than ``steady_steps`` is as good as new.
        """
        if self.staleness[0] > steady_steps:
            return np.zeros(min(max_depth, 1), dtype=np.int64)
        return self.worth_growing(max_depth, limit, steady_steps)

    def worth_growing(self, max_depth: int, limit: int, steady_steps: int = 1) -> Ints:
        """As ``worth_expanding``, below the root."""
        best = self.best()
        best = best[(best != 0) & (self.depths[best] < max_depth)]
        parents_staleness = self.staleness[self.parents[best]]
        staleness = self.staleness[best]
        gains = (parents_staleness != UNDRAFTED) & (staleness > parents_staleness + 1) & (staleness > steady_steps)
        return np.sort(best[gains][:limit])

    # --- growing ---

    def expand(self, rows: Ints, token_ids: Ints, logprobs: Floats, staleness: Ints) -> None:
        """Give each of ``rows`` [w] the drafted children ``token_ids`` [w, k] with their ``logprobs`` [w, k].

        A child that exists keeps its id and takes the new log-probability. An older child that is missing from the new
        draft keeps at most the smallest new one: the draft no longer ranks it among the best. Rows may change.
        """
        assert token_ids.shape == logprobs.shape and len(token_ids) == len(rows) == len(staleness)
        again = self.staleness[rows] != UNDRAFTED
        self.staleness[rows] = staleness
        if again.any():
            floor = np.zeros(len(self))
            floor[rows] = logprobs.min(axis=1)
            self.drafted[1:] = np.minimum(self.drafted[1:], floor[self.parents[1:]])
        children = self._merge(np.repeat(rows, token_ids.shape[1]), token_ids.ravel())
        self.drafted[children] = np.minimum(logprobs.ravel(), 0.0)  # rounding may leave the surest just above zero
        self._rate()
        self._forget()

    def hint(self, rows: Ints, token_ids: Ints, logprobs: Floats) -> None:
        """Another source knows better than the draft what follows each of ``rows`` [w]: one of ``token_ids`` [w, k].

        It gives their ``logprobs`` [w, k]; other children share what is left. What is not good enough to be sent is not
        added. A later hint for a row replaces an earlier one. Rows may change.
        """
        self.rests[rows] = np.log(np.maximum(1 - np.exp(logprobs).sum(axis=1), _LEAST_REST))
        self.hinted[1:][np.isin(self.parents[1:], rows)] = np.nan
        is_good = self.scores[rows][:, None] + logprobs >= self.min_score
        children = self._merge(np.repeat(rows, is_good.sum(axis=1)), token_ids[is_good])
        self.hinted[children] = logprobs[is_good]
        self._rate()
        self._forget()

    def graft(self, row: int, token_ids: Ints, parents: Ints, logprobs: Floats) -> None:
        """Merge a tree of guesses [n] below ``row``; a node that exists keeps the better of both log-probabilities.

        ``parents``: places in these arrays, a parent's before its children's; -1 for ``row``. Rows may change.
        """
        depths = np.zeros(len(parents), dtype=np.int64)
        for place, parent in enumerate(parents.tolist()):
            depths[place] = 0 if parent < 0 else depths[parent] + 1
        rows = np.full(len(parents) + 1, row, dtype=np.int64)  # the last one is found by -1
        for depth in range(int(depths.max(initial=-1)) + 1):
            level = np.flatnonzero(depths == depth)
            rows[level] = self._merge(rows[parents[level]], token_ids[level])
        children = rows[:-1]
        self.drafted[children] = np.fmax(self.drafted[children], logprobs)
        self._rate()
        self._forget()

    def _merge(self, parents: Ints, token_ids: Ints) -> Ints:
        """Find or add each (parent row, token), and return their rows; no pair may occur twice."""
        # (parent row, token) as one integer: rows and tokens stay far below 2**31.
        keys, known = (parents << 31) | token_ids, (self.parents[1:] << 31) | self.token_ids[1:]
        order = np.argsort(known)
        places = np.searchsorted(known, keys, sorter=order)
        found = places < len(known)
        found[found] = known[order[places[found]]] == keys[found]
        rows = np.zeros(len(keys), dtype=np.int64)
        rows[found] = 1 + order[places[found]]
        new = ~found
        if new.any():
            rows[new] = np.arange(len(self), len(self) + new.sum())
            self._append(parents[new], token_ids[new])
        return rows

    def _append(self, parents: Ints, token_ids: Ints) -> None:
        start, end = len(self), len(self) + len(parents)
        if end > self._ints.shape[1]:
            self._ints = np.concatenate([self._ints, np.zeros_like(self._ints)], axis=1)
            self._floats = np.concatenate([self._floats, np.zeros_like(self._floats)], axis=1)
            self._sent = np.concatenate([self._sent, np.zeros_like(self._sent)])
            self._resize(start)
            self._append(parents, token_ids)
            return
        depths = self.depths[parents] + 1
        self._resize(end)
        self.node_ids[start:] = np.arange(self._next_id, self._next_id + len(parents))
        self.token_ids[start:] = token_ids
        self.parents[start:] = parents
        self.depths[start:] = depths
        self.staleness[start:] = UNDRAFTED
        self.drafted[start:], self.hinted[start:], self.rests[start:] = np.nan, np.nan, 0.0
        self.sent[start:] = False
        self._next_id += len(parents)

    def _rate(self) -> None:
        """Log-probabilities from what draft and hints say, and the scores that follow.

        Where both name children of a node, the shares of the two are multiplied, as if neither knew the other; one that
        does not name a child leaves it what it gives to the last one named.
        """
        self.logprobs[1:] = self.drafted[1:]
        rows = 1 + np.flatnonzero(self.rests[self.parents[1:]])
        if len(rows):
            parents, drafted, hinted = self.parents[rows], self.drafted[rows], self.hinted[rows]
            least_drafted, least_hinted = np.zeros(len(self)), np.array(self.rests)
            np.fmin.at(least_drafted, parents, drafted)
            np.fmin.at(least_hinted, parents, hinted)
            products = np.where(np.isnan(drafted), least_drafted[parents], drafted)
            products += np.where(np.isnan(hinted), least_hinted[parents], hinted)
            totals = np.exp(least_drafted + self.rests) + np.bincount(parents, np.exp(products), len(self))
            self.logprobs[rows] = products - np.log(totals[parents])
        self._rescore()

    def _rescore(self) -> None:
        self.scores[0] = 0.0
        for depth in range(1, int(self.depths.max()) + 1):
            rows = np.flatnonzero(self.depths == depth)
            self.scores[rows] = self.scores[self.parents[rows]] + self.logprobs[rows]

    def forget_scores(self) -> None:
        """No node is worth anything until it is drafted again: a new tree grows from the root, among the old nodes."""
        self.drafted[1:], self.hinted[1:], self.rests[:] = -np.inf, np.nan, 0.0
        self._rate()

    # --- dropping ---

    def reroot(self, row: int) -> None:
        """Make ``row`` the root and drop all that does not descend from it."""
        alive = np.zeros(len(self), dtype=np.bool_)
        alive[row] = True
        for depth in range(int(self.depths[row]) + 1, int(self.depths.max()) + 1):
            rows = np.flatnonzero(self.depths == depth)
            alive[rows] = alive[self.parents[rows]]
        self.depths -= self.depths[row]
        self.logprobs[row] = 0.0
        self._keep(alive)
        self._rescore()

    def restart(self, token_id: int) -> None:
        """Drop everything; a new node that holds ``token_id`` is the root."""
        self._resize(1)
        self.node_ids[0], self.token_ids[0], self.parents[0] = self._next_id, token_id, -1
        self.depths[0], self.staleness[0] = 0, UNDRAFTED
        self.logprobs[0], self.scores[0], self.sent[0] = 0.0, 0.0, False
        self.drafted[0], self.hinted[0], self.rests[0] = 0.0, np.nan, 0.0
        self._next_id += 1

    def mark_sent(self, rows: Ints) -> None:
        assert not self.sent[rows].any(), "a node is sent once"
        self.sent[rows] = True

    def drop_unsent(self) -> None:
        """Schedules that send a fixed tree forget the rest of what was drafted."""
        self._keep(self.sent | (self.depths == 0))

    def _forget(self) -> None:
        """Keep no more than the best ``size`` of the unsent nodes once they are twice as many."""
        unsent = np.flatnonzero(~self.sent)
        if len(unsent) > 2 * self.size:
            keep: Bools = np.array(self.sent)
            keep[unsent[np.argsort(-self.scores[unsent], kind="stable")[: self.size]]] = True
            keep[0] = True
            self._keep(keep)

    def _keep(self, keep: Bools) -> None:
        """Drop the rows outside ``keep``, which holds every kept node's ancestors up to the new root."""
        rows = np.flatnonzero(keep)
        new_rows = np.cumsum(keep) - 1
        ints, floats, sent = self._ints[:, rows], self._floats[:, rows], self._sent[rows]
        self._resize(len(rows))
        self._ints[:, : len(rows)], self._floats[:, : len(rows)], self._sent[: len(rows)] = ints, floats, sent
        self.parents[1:] = new_rows[self.parents[1:]]
        self.parents[0] = -1

    def check_integrity(self) -> None:
        """Assert the invariants that the class promises."""
        num = len(self)
        assert num and self.parents[0] == -1 and self.depths[0] == 0 and self.scores[0] == 0.0
        assert (np.diff(self.node_ids) > 0).all() and self.node_ids[-1] < self._next_id
        parents = self.parents[1:]
        assert ((parents >= 0) & (parents < np.arange(1, num))).all(), "parent below child"
        assert (self.depths[1:] == self.depths[parents] + 1).all()
        assert (self.scores[1:] <= self.scores[parents]).all(), "a parent never scores below its child"
        assert np.allclose(self.scores[1:], self.scores[parents] + self.logprobs[1:])
        assert (self.sent[parents] | ~self.sent[1:]).all(), "parents are sent before children"
        pairs = set(zip(parents.tolist(), self.token_ids[1:].tolist(), strict=True))
        assert len(pairs) == num - 1, "siblings hold different tokens"
