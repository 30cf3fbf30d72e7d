"""The P-EAGLE draft head (arXiv 2602.01469): EAGLE-3's layers, and one pass that guesses all the tokens behind a root.

The rows of the text are EAGLE-3's, each a token and the target's feature of the token before, and all of them are true.
Behind the root's row stand rows of masks, one for each further level; every row sees those before it. Keys and values
of masks are written over by the text that comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowspec.core import DType
from flowspec.model.eagle3_format import Eagle3Format
from flowspec.model.eagle3_head import Eagle3Head
from flowspec.model.peagle_format import PEagleFormat
from flowspec.model.text_cache import TextCache

_WAITING = 16  # rows of the text that a guess runs with its own; more of them are run at once


class PEagleCache:
    """Of a text: the features of its tokens and the tokens behind them, and the keys and values of rows made of both.

    A head's layers write to it while one of its forwards runs.
    """

    def __init__(self, num_layers: int, features: Tensor) -> None:
        """``features`` [0, D]."""
        self.next_ids: list[int] = []  # by token: the one behind it
        self._features = features
        self._keys_and_values = TextCache(num_layers)

    @property
    def num_rows(self) -> int:
        """Tokens whose features have come."""
        return len(self.next_ids)

    @property
    def num_run(self) -> int:
        """Rows whose keys and values are there."""
        return self._keys_and_values.num_rows

    @num_run.setter
    def num_run(self, value: int) -> None:
        self._keys_and_values.num_rows = value

    @property
    def waiting(self) -> Tensor:
        """The features of the rows that were not run yet, [n, D]."""
        return self._features[self.num_run : self.num_rows]

    def add(self, features: Tensor, next_ids: Sequence[int]) -> None:
        end = self.num_rows + len(next_ids)
        if end > len(self._features):
            grown = features.new_empty(2 * end, features.shape[1])
            grown[: self.num_rows] = self._features[: self.num_rows]
            self._features = grown
        self._features[self.num_rows : end] = features
        self.next_ids += next_ids

    def cut(self, num_rows: int, next_id: int) -> None:
        """Keep the first tokens alone; another one, ``next_id``, stands behind them now."""
        assert num_rows > 0, "a text that is taken over has a token"
        self.next_ids[num_rows - 1 :] = [next_id]
        self.num_run = min(self.num_run, num_rows - 1)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As of ``DraftCache``."""
        keys, values = self._keys_and_values.write(layer_idx, key_states[0], value_states[0])
        return keys[None], values[None]


class PEagleHead(Eagle3Head):
    """A loaded head. What its forward returns has passed the last norm."""

    mask_feature: Tensor  # [1, D]
    mask_token_id: int
    num_levels: int
    min_text = 1  # tokens before an anchor without which nothing can be guessed

    def open_cache(self) -> PEagleCache:
        return PEagleCache(len(self.layers), self.mask_feature[:0])

    @torch.inference_mode()
    def read(self, sums: Tensor, cache: PEagleCache, next_ids: Sequence[int]) -> None:
        """The next verified tokens of the text: what the stages have added up [n, width], and the token behind each."""
        cache.add(self.features_of(sums), next_ids)
        num = len(cache.waiting) - 1  # the last one may be the root's
        if num >= _WAITING:
            start = cache.num_run
            self._run(cache.next_ids[start : start + num], cache.waiting[:num], cache)
            cache.num_run += num

    @torch.inference_mode()
    def guess(self, token_id: int, cache: PEagleCache) -> Tensor:
        """What the levels' logits are made of, [num_levels, D]. ``token_id``: of the anchor, behind the text."""
        ids, features = cache.next_ids[cache.num_run :], cache.waiting
        assert ids and ids[-1] == token_id, "the text ends before the anchor"
        num_masks = self.num_levels - 1
        rows = torch.cat((features, self.mask_feature.expand(num_masks, -1)))
        states = self._run([*ids, *[self.mask_token_id] * num_masks], rows, cache)
        cache.num_run += len(ids)
        return states[-self.num_levels :]

    def _run(self, token_ids: Sequence[int], features: Tensor, cache: PEagleCache) -> Tensor:
        """Rows behind those that were run, [n, D]; each sees those before it."""
        start, num, device = cache.num_run, len(token_ids), self.embedding.device
        positions = torch.arange(start, start + num, device=device)
        sees = torch.arange(start + num, device=device)[None] <= positions[:, None]
        ids = torch.tensor([token_ids], device=device)
        return self(ids, features[None], positions[None], sees[None, None], cache)[0]

    @classmethod
    def load(cls, form: Eagle3Format, embedding: Tensor, dtype: DType, device: torch.device | str) -> PEagleHead:
        """As ``Eagle3Head.load``."""
        assert isinstance(form, PEagleFormat)
        head = super().load(form, embedding, dtype, device)
        assert isinstance(head, PEagleHead)
        head.norm_output = True  # nothing is fed back, and logits are made of nothing else
        head.mask_token_id, head.num_levels = form.mask_token_id, form.num_levels
        head.register_buffer("mask_feature", head.features_of(form.mask_sum()), persistent=False)
        return head
