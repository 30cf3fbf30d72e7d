"""The target's tokens along the tree: drawn from the features of verified nodes, one for each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flowspec.core import SamplingParams, TokenLogprobs
from flowspec.errors import NumericalError
from flowspec.model.target_head import LogitsHead
from flowspec.sampling import Sampler, finite_array, token_logprobs
from flowspec.tree import DraftTree
from flowspec.wire.messages import Broken


@dataclass(frozen=True)
class Verdict:
    """What a verification found: which nodes join the prefix, and the tokens after the root."""

    accepted_rows: list[int]  # the old root first
    token_ids: list[int]  # the accepted nodes' tokens, then the new root's
    new_root: int | None  # the row that holds the last token; ``None`` when no draft guessed it
    logprobs: list[TokenLogprobs]  # of the tokens, where the request asks for them


class _Verified(NamedTuple):
    """A node whose hidden state has come back."""

    hidden: Tensor  # [hidden size]
    feature: Tensor  # that a draft reads, [hidden size] or of a width of its own
    logits: Tensor  # [vocabulary]
    segment_id: int  # that it came in


class Verifier:
    """Verified nodes since the last commit, and the walk from the root through them."""

    def __init__(self, head: LogitsHead, sampler: Sampler, params: SamplingParams, eos_ids: frozenset[int]) -> None:
        self._head = head
        self._sampler = sampler
        self._num_logprobs = params.num_logprobs
        self._end_ids = params.stop_token_ids | (frozenset() if params.ignore_eos else eos_ids)
        self._verified: dict[int, _Verified] = {}  # by node id
        self._broken: Broken | None = None  # nearest to worker 1

    def __len__(self) -> int:
        return len(self._verified)

    def receive(self, node_ids: Sequence[int], hidden: Tensor, segment_id: int, features: Tensor | None = None) -> None:
        """These nodes' final hidden states [nodes, hidden size] have come back.

        ``features`` [nodes, width]: what the draft reads instead of them.
        """
        features = hidden if features is None else features
        rows = zip(node_ids, hidden, features, self._head.logits(hidden), strict=True)
        for node_id, state, feature, logits in rows:
            self._verified[node_id] = _Verified(state, feature, logits, segment_id)

    def knows(self, node_id: int) -> bool:
        return node_id in self._verified

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Whether a text that goes on with these tokens is complete behind them."""
        return bool(token_ids) and token_ids[-1] in self._end_ids

    def walk(self, tree: DraftTree, prefix_len: int, num_left: int) -> Verdict:
        """Follow the target from the root, whose logits are here, through the verified nodes.

        The target's token at a position is drawn once, with randomness keyed by that position. A child that holds it
        is accepted; where no child does, it is the bonus token. ``num_left``: tokens that may still be emitted.
        Raises ``NumericalError`` when the model's numbers are not finite.
        """
        row: int | None = 0
        accepted_rows: list[int] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        while row is not None and len(token_ids) < num_left and not self.ends(token_ids):
            verified = self._verified.get(int(tree.node_ids[row]))
            if verified is None:
                break
            accepted_rows.append(row)
            token_ids.append(self._token(verified, prefix_len, token_ids))
            if self._num_logprobs is not None:
                logprobs.append(token_logprobs(verified.logits, token_ids[-1], self._num_logprobs))
            row = tree.find(row, token_ids[-1])
        return Verdict(accepted_rows, token_ids, row, logprobs)

    def _token(self, verified: _Verified, prefix_len: int, path: Sequence[int]) -> int:
        """The target's token behind the root and ``path``, by what was verified there."""
        position = prefix_len + len(path) + 1
        try:
            finite_array(verified.hidden, "hidden states after the last layer", position)
            return self._sampler.token(verified.logits, position, path)
        except NumericalError as error:
            where = "" if self._broken is None else f"; first seen after layers {self._broken.layers}"
            raise NumericalError(f"{error}{where}") from None

    def note_broken(self, broken: Broken) -> None:
        """Some hidden states are not finite; that matters only if one of these nodes, or what follows it, counts."""
        if self._broken is None or broken.stage < self._broken.stage:
            self._broken = broken

    def take(self, node_ids: Sequence[int]) -> tuple[Tensor, list[int]]:
        """A walk has been committed: the accepted nodes' features [nodes, hidden size] and segments.

        A verified node has verified ancestors, so the walk has accepted every one or passed it by: none stays.
        """
        accepted = [self._verified[node_id] for node_id in node_ids]
        self._verified = {}
        return torch.stack([verified.feature for verified in accepted]), [each.segment_id for each in accepted]
