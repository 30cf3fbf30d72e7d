"""What a draft source is: anything that proposes nodes. One object per request holds what it has read so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
        driver looks for results between two of them. A block draft (see ``DraftSource.block_len``) makes its pass at
        the root, and reads from it what follows nodes below.
        """
        ...


@runtime_checkable
class ReusableDraft(Draft, Protocol):
    """A draft that can take over what one of an earlier request knows of the same first tokens.

    Without it a source that needs features computes every prompt anew.
    """

    @property
    def num_certain(self) -> int:
        """Tokens from the first on of which nothing that the draft holds is a guess."""
        ...

    def reuse(self, other: ReusableDraft, num_cached: int) -> None:
        """Before anything else: ``read_prompt`` begins behind these tokens. ``other`` is of no use then.

        ``other``: what ``end`` has returned, of a draft of the same source, or of one that another source wraps.
        """
        ...

    def end(self) -> ReusableDraft | None:
        """Its request has ended. What of it the draft of a later request may take over."""
        ...


@runtime_checkable
class ApartDraft(Draft, Protocol):
    """A draft whose passes are made on another device: they may come back while its request goes on."""

    @property
    def pass_s(self) -> float:
        """How long the last pass took, from asking to the answer."""
        ...

    def go_apart(self) -> None:
        """From now on ``expand`` asks for a pass, and does not wait for it; before anything else."""

    def settle(self, tree: DraftTree) -> bool:
        """Give the tree what has come; False when a pass is under way that is worth waiting for.

        While it is, ``expand`` has nothing to do.
        """
        ...

    def close(self) -> None:
        """Its request has ended, and nothing of it is to be kept."""


@runtime_checkable
class BlockDraft(Draft, Protocol):
    """A draft whose newest block has levels below a root that it did not foresee."""

    def reread(self, tree: DraftTree) -> None:
        """Give the root children from the newest block, without a pass; the block has guesses of that level."""


_STEADY_LEVEL, _STEADY_SHARE = 5, 0.93


def steady_steps(hit_rates: Sequence[float]) -> int:
    """Over how many steps of extrapolation a draft stays about as good as it is after one.

    ``hit_rates``: how often its first guess is right, at step 1, 2, ... A draft is steady when it keeps 93 % of its
    first rate for five steps, and then for as long as it does so; any other one is steady for one step.
    """
    if len(hit_rates) < _STEADY_LEVEL:
        return 1
    is_steady = [rate >= _STEADY_SHARE * hit_rates[0] for rate in hit_rates]
    num_steady = (*is_steady, False).index(False)
    return num_steady if num_steady >= _STEADY_LEVEL else 1


@dataclass(frozen=True)
class Levels:
    """How deep a draft's guesses are good, and how many levels one pass of it makes; see ``DraftSource``."""

    steady_steps: int = 1
    block_len: int = 1

    @classmethod
    def of(cls, source: DraftSource | None) -> Levels:
        return cls() if source is None else cls(source.steady_steps, source.block_len)


LANGUAGE_MODEL = "model"  # the name of sources that are small ones


class DraftSource(Protocol):
    """Opens drafts; shared by all requests."""

    name: str
    steady_steps: int  # steps of extrapolation over which its guesses hardly get worse
    block_len: int  # levels that one pass at the root guesses; 1: each level takes a pass of its own
    feature_layers: tuple[int, ...]  # of the target, whose outputs it reads for every token; ``core.FINAL``, or none

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> Draft:
        """``sampler`` is the request's: what it knows of the noise to come may guide the guesses.

        ``top_k``: children that the request's schedule wants for each node of a draft pass, where there are so many.
        """
        ...
