"""What a draft source is: anything that proposes nodes. One object per request holds what it has read so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints


@dataclass(frozen=True)
class Accepted:
    """What a commit tells a draft: the old root and the accepted nodes have joined the prefix, in path order.

    ``features`` [nodes, hidden size]: the target's final hidden states of exactly these nodes.
    """

    node_ids: Sequence[int]
    token_ids: Sequence[int]
    features: Tensor


class Draft(Protocol):
    """The drafting state of one request. Only its generation calls it; ``expand`` alone may change the tree."""

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        """The next prompt tokens before the root were verified; ``features`` as in ``Accepted``."""

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        """The prefix has grown; ``tree`` is rooted at the new root already."""

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """Make one draft pass: give ``rows`` children, and note their staleness. False when none could be made.

        ``rows`` is the root alone, or nodes whose parents have been expanded. One pass is the unit of patience: the
        driver looks for results between two of them.
        """
        ...


class DraftSource(Protocol):
    """Opens drafts; shared by all requests."""

    name: str
    needs_features: bool  # whether the hidden states of the prompt must come back from the last worker

    def open(self, prompt_ids: Sequence[int], sampler: Sampler) -> Draft:
        """``sampler`` is the request's: what it knows of the noise to come may guide the guesses."""
        ...
