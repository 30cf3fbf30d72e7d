"""Where a draft model reads: one request's keys and values of it, and the passes over nodes and text.

On the driver a pass is made at once (``LocalPasses``), on a worker of its own it is asked for (``remote_passes``).
Nodes are the tree's; text has no ids, since nothing names it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from flowspec.draft.token_map import TokenMap
from flowspec.model.slots import NO_NODE
from flowspec.model.stage import Stage, forward
from flowspec.model.target_head import LogitsHead
from flowspec.sampling import Sampler
from flowspec.tree import Floats, Ints

CHUNK = 64  # tokens of a prompt that are read in one pass: results do not wait for all of it


class Rows(NamedTuple):
    """Nodes that are read in one pass, each as one of the draft model's tokens; their parents have been read before."""

    node_ids: list[int]
    parent_ids: list[int]  # ``NO_PARENT`` for the root
    own_ids: list[int]  # the draft model's tokens
    positions: list[int]  # the draft model's


Same = TypeVar("Same", bound="Passes")


class Answer(Protocol):
    """What follows the nodes of a pass, as far as the draft model says."""

    def children(self, tokens: TokenMap, sampler: Sampler, positions: Ints, num: int) -> tuple[Ints, Floats]:
        """As ``Sampler.draft_children``: the target's tokens and log-probabilities [n, num]."""
        ...


class AllLogits(NamedTuple):
    logits: Tensor  # [n, V]

    def children(self, tokens: TokenMap, sampler: Sampler, positions: Ints, num: int) -> tuple[Ints, Floats]:
        return sampler.draft_children(tokens.logits(self.logits), positions, num)


class NamedTokens(NamedTuple):
    """The best ones alone."""

    token_ids: Ints  # [n, k]
    logprobs: Floats  # [n, k]

    def children(self, tokens: TokenMap, sampler: Sampler, positions: Ints, num: int) -> tuple[Ints, Floats]:
        meant = tokens.meant(self.token_ids)
        return sampler.named_children(meant, self.logprobs, tokens.target_size, positions, num)


class Passes(Protocol):
    """One request's. When ``run`` has returned ``None``, ``take`` alone may be called until that has an answer."""

    longest_text: int  # tokens that ``run`` takes before its rows

    @property
    def is_lost(self) -> bool:
        """Whether no answer comes any more."""
        ...

    def reuse(self: Same, other: Same, num_tokens: int) -> None:
        """Take over what an ended request has read of the same beginning; before anything else."""

    def read(self, own_ids: Sequence[int], start: int) -> None:
        """Text behind what has been read before, from position ``start`` on."""

    def run(self, before: Sequence[int], start: int, rows: Rows) -> Answer | None:
        """Read ``before``, text as in ``read``, and then nodes; what may follow these.

        ``None``: it has not come yet.
        """
        ...

    def take(self) -> Answer | None:
        """What the last ``run`` was to return, or ``None`` still."""
        ...

    def has(self, node_id: int) -> bool:
        """Whether the node has been read, and is not part of the text."""
        ...

    def commit(self, path: Sequence[int], root_id: int, alive: Ints) -> None:
        """These nodes, which have been read, are text now; ``alive``: those that still may be."""

    def finish(self) -> None:
        """The request has ended: its text stays for another one's ``reuse``."""

    def forget(self) -> None:
        """Nobody will reuse it."""


class LocalPasses:
    """In this process."""

    longest_text = CHUNK
    is_lost = False

    def __init__(self, stage: Stage, head: LogitsHead, root_id: int) -> None:
        """``stage``: all layers of the model; ``head``: its lm_head."""
        self._stage = stage
        self._head = head
        self._cache = stage.open_cache(root_id)

    def reuse(self, other: LocalPasses, num_tokens: int) -> None:
        root_id = self._cache.slots.root_id
        assert root_id is not None, "it has been opened with one"
        self._cache = other._cache
        self._cache.slots.reuse(num_tokens, root_id)

    def read(self, own_ids: Sequence[int], start: int) -> None:
        slots = self._cache.slots.append_prefix(np.arange(start, start + len(own_ids)))
        forward(self._stage, torch.tensor(own_ids), slots, self._cache)

    def run(self, before: Sequence[int], start: int, rows: Rows) -> AllLogits:
        table = self._cache.slots
        slots = table.append_prefix(np.arange(start, start + len(before)))
        _, own = table.place(rows.node_ids, rows.parent_ids, rows.positions)
        inputs = torch.tensor([*before, *rows.own_ids])
        hidden = forward(self._stage, inputs, np.concatenate([slots, own]), self._cache)
        return AllLogits(self._head.logits(hidden[len(before) :]))

    def take(self) -> None:
        """``run`` has returned it."""

    def has(self, node_id: int) -> bool:
        return self._cache.slots.slot_of(node_id) is not None

    def commit(self, path: Sequence[int], root_id: int, alive: Ints) -> None:
        self._cache.slots.commit(path, root_id)

    def finish(self) -> None:
        self._cache.slots.finish([])

    def forget(self) -> None:
        self._cache = self._stage.open_cache(NO_NODE)

    def check_integrity(self) -> None:
        """Assert the invariants of the cache."""
        self._cache.slots.check_integrity()
