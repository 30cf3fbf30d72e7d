"""Drafts with a DSpark head (arXiv 2607.05147): one pass at a root, and a tree whose guesses hang on the tokens above.

The children of a node are those of its level and its token, so each pair of both has guesses of its own, which are made
when a node is first expanded that needs them: a product with the Markov head's last matrix, and no pass. (A recurrent
head goes by all tokens since the anchor.) What the confidence head says of a node is a factor of all its children, so a
node's score falls with the rates of all levels above: the product is the share of blocks that rejection sampling would
take so far, and the best unsent nodes are those that are most probably reached and right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowspec.draft.base import Accepted
from flowspec.draft.dflash import DFlashDraft, DFlashSource
from flowspec.draft.eagle import GREEDY
from flowspec.model.dspark_head import DSparkHead
from flowspec.model.target_head import LogitsHead
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Floats, Ints

# What a node's guesses hang on: its level in the block and its token, or all tokens from the anchor to it.
Key: TypeAlias = tuple[int, ...]


class DSparkSource(DFlashSource):
    """A loaded head, shared by all requests."""

    def __init__(
        self,
        head: DSparkHead,
        lm_head: LogitsHead,
        bias_head: LogitsHead | None,
        feature_layers: tuple[int, ...],
        is_coupled: bool = True,
    ) -> None:
        """``bias_head``: what the Markov head adds to logits over the target's tokens, if there is one."""
        super().__init__(head, lm_head, feature_layers, is_coupled, "dspark")
        self.markov = head
        self.bias_head = bias_head

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> DSparkDraft:
        return DSparkDraft(self, prompt_ids, sampler if self.is_coupled else GREEDY, top_k)


class DSparkDraft(DFlashDraft):
    """One request: as ``DFlashDraft``, and of the newest block its rows, and the guesses that were asked for."""

    def __init__(self, source: DSparkSource, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> None:
        super().__init__(source, prompt_ids, sampler, top_k)
        self._markov, self._bias_head = source.markov, source.bias_head
        self._rows, self._logits = torch.zeros(0), torch.zeros(0)  # [levels, D]; [levels, V], without the Markov head
        self._above: list[int] = []  # tokens from the newest block's anchor to the root
        self._guesses: dict[Key, tuple[Ints, Floats]] = {}  # tokens and log-probabilities [k]
        self._states: dict[Key, Tensor] = {}  # of a recurrent head, [r]

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        super().commit(accepted, tree)
        self._above += [*accepted.token_ids[1:], int(tree.token_ids[0])]

    def _draft_block(self, token_id: int) -> None:
        self._rows = self._source.head.guess(token_id, self._cache)
        self._logits = self._source.lm_head.logits(self._rows)
        self._anchor_position = self._root_position
        self._above, self._guesses = [token_id], {}
        self._states = {(): self._markov.first_states(1)[0]}

    def _read_block(self, tree: DraftTree, rows: Ints) -> None:
        levels = tree.depths[rows] + self._root_position - self._anchor_position
        keys = [self._key(tree, row, level) for row, level in zip(rows.tolist(), levels.tolist(), strict=True)]
        missing = {key: level for key, level in zip(keys, levels.tolist(), strict=True) if key not in self._guesses}
        if missing:
            self._draft_behind(list(missing), np.array(list(missing.values())))
        token_ids, logprobs = (np.stack(column) for column in zip(*(self._guesses[key] for key in keys), strict=True))
        tree.expand(rows, token_ids, logprobs, levels + 1)

    def _key(self, tree: DraftTree, row: int, level: int) -> Key:
        if self._markov.is_recurrent:
            return (*self._above[:-1], *tree.token_ids[tree.path(row)].tolist())
        return level, int(tree.token_ids[row])

    def _draft_behind(self, keys: Sequence[Key], levels: Ints) -> None:
        latents, rates = self._run(keys, levels)
        logits = self._logits[torch.from_numpy(levels).to(self._logits.device)]
        if self._bias_head is not None:
            logits = logits + self._bias_head.logits(latents)
        positions = self._anchor_position + 1 + levels
        token_ids, logprobs = self._sampler.draft_children(logits, positions, self._top_k)
        logprobs = logprobs + rates[:, None]
        self._guesses.update(zip(keys, zip(token_ids, logprobs, strict=True), strict=True))

    def _run(self, keys: Sequence[Key], levels: Ints) -> tuple[Tensor, Floats]:
        """What the Markov head's last matrix takes [n, r], and the logarithms of the rates [n]."""
        if self._markov.is_recurrent:
            for key in keys:
                self._go_to(key[:-1])
            states = torch.stack([self._states[key[:-1]] for key in keys])
        else:
            states = self._markov.first_states(len(keys))
        rows = self._rows[torch.from_numpy(levels).to(self._rows.device)]
        latents, states, rates = self._markov.behind(rows, torch.tensor([key[-1] for key in keys]), states)
        if self._markov.is_recurrent:
            self._states.update(zip(keys, states, strict=True))
        return latents, rates.cpu().numpy().astype(np.float64)

    def _go_to(self, key: Key) -> None:
        """See to it that there is a state behind these tokens."""
        if key not in self._states:
            self._run([key], np.array([len(key) - 1]))
