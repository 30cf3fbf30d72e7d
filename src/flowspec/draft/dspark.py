"""Drafts with a DSpark (arXiv 2607.05147) or DFlash2 head: one pass at a root, and guesses by the tokens above them.

The children of a node are those of its level and its token, so each pair of both has guesses of its own, which are made
when a node is first expanded that needs them: a product with some rows of the Markov head's last matrix, and no pass.
(A recurrent head goes by all tokens since the anchor.) Of a large vocabulary these are the rows of the tokens that the
level itself finds most probable, since all of the matrix is as dear to read as a layer.

What the confidence head says of a node is a factor of all its children, so a node's score falls with the rates of all
levels above: the product is the share of blocks that rejection sampling would take so far, and the best unsent nodes
are those that are most probably reached and right.
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
from flowspec.model.dflash2_head import DFlash2Head
from flowspec.model.dspark_head import DSparkHead
from flowspec.model.target_head import LogitsHead
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Floats, Ints

FEW = 1024  # tokens of a level that the Markov head speaks of
_BEYOND = 1000.0  # less than any of these; no infinity: what ties with all of a vocabulary is slow to be drawn from

# What a node's guesses hang on: its level in the block and its token, or all tokens from the anchor to it.
Key: TypeAlias = tuple[int, ...]


class DSparkSource(DFlashSource):
    """A loaded head, shared by all requests."""

    def __init__(
        self,
        head: DSparkHead | DFlash2Head,
        lm_head: LogitsHead,
        token_ids: Tensor | None,
        feature_layers: tuple[int, ...],
        is_coupled: bool = True,
        name: str = "dspark",
        num_candidates: int = FEW,
    ) -> None:
        """``token_ids``: as ``HeadTensors.token_ids``. ``num_candidates``: of a level, which are corrected."""
        super().__init__(head, lm_head, feature_layers, is_coupled, name)
        self.hit_rates: tuple[float, ...] = ()  # how often guesses were right when it was trained, by level, if known
        self.markov = head
        self._places: Tensor | None = None  # of the target's tokens among those that the head knows, [V]
        self.num_candidates = num_candidates
        if token_ids is not None:
            self._places = torch.zeros(int(token_ids.max()) + 1, dtype=torch.long)
            self._places[token_ids] = torch.arange(len(token_ids))
            self.num_candidates = min(num_candidates, len(token_ids))

    def matrix_of(self, token_ids: Tensor) -> Tensor | None:
        """Rows of the Markov head's last matrix, of tokens [C] that the head knows: [C, r]; ``None``: it has none."""
        return self.markov.weights_of(token_ids if self._places is None else self._places[token_ids.cpu()])

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> DSparkDraft:
        return DSparkDraft(self, prompt_ids, sampler if self.is_coupled else GREEDY, top_k)


class DSparkDraft(DFlashDraft):
    """One request: as ``DFlashDraft``, and of the newest block its rows, and the guesses that were asked for."""

    def __init__(self, source: DSparkSource, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> None:
        super().__init__(source, prompt_ids, sampler, min(top_k, source.num_candidates))
        self._markov, self._matrix_of, self._num_candidates = source.markov, source.matrix_of, source.num_candidates
        self._rows, self._logits = torch.zeros(0), torch.zeros(0)  # [levels, D]; [levels, V], without the Markov head
        self._above: list[int] = []  # tokens from the newest block's anchor to the root
        self._candidates: dict[int, tuple[Tensor, Tensor]] = {}  # by level: tokens [C], the matrix's rows of them
        self._guesses: dict[Key, tuple[Ints, Floats]] = {}  # tokens and log-probabilities [k]
        self._states: dict[Key, Tensor] = {}  # of a recurrent head, [r]

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        super().commit(accepted, tree)
        self._above += [*accepted.token_ids[1:], int(tree.token_ids[0])]

    def end(self) -> DSparkDraft:
        """What may be taken over is the text's; a block is large."""
        self._rows, self._logits, self._candidates = torch.zeros(0), torch.zeros(0), {}
        self._guesses, self._states = {}, {}
        return self

    def _draft_block(self, token_id: int) -> None:
        self._rows = self._source.head.guess(token_id, self._cache)
        self._logits = self._source.lm_head.logits(self._rows)
        self._anchor_position = self._root_position
        self._above, self._guesses, self._candidates = [token_id], {}, {}
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
        logits = torch.stack([self._corrected(*pair) for pair in zip(levels.tolist(), latents, strict=True)])
        positions = self._anchor_position + 1 + levels
        token_ids, logprobs = self._sampler.draft_children(logits, positions, self._top_k)
        logprobs = logprobs + rates[:, None]
        self._guesses.update(zip(keys, zip(token_ids, logprobs, strict=True), strict=True))

    def _corrected(self, level: int, latent: Tensor) -> Tensor:
        """A level's logits [V] with what ``markov_w2`` makes of ``latent`` [r]; those of other tokens are far below."""
        logits = self._logits[level]
        if level not in self._candidates:
            few = logits.topk(min(self._num_candidates, len(logits))).indices
            matrix = self._matrix_of(few)
            if matrix is None:
                return logits
            self._candidates[level] = few, matrix
        few, matrix = self._candidates[level]
        added = (matrix @ latent.to(matrix.dtype)).to(logits)
        return (logits - _BEYOND).index_copy(0, few, logits[few] + added)

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
