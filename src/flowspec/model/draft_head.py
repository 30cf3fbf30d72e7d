"""What EAGLE heads of all versions share: they join an embedding and a feature, and run the rows through layers."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from flowspec.model.kv_cache import CACHE_ARGUMENT


class DraftCache(Protocol):
    """Where a head keeps keys and values, [B, heads, rows, head size]; ``layer_idx`` counts the head's layers."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, /, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the new rows; return all that the mask's columns speak of."""
        ...


def replace_linears(head: nn.Module, made: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what is ``made`` of them in the place of ``fc`` and all projections of a loaded head."""
    linears = [(name, module) for name, module in head.named_modules() if isinstance(module, nn.Linear)]
    for name, linear in linears:
        head.set_submodule(name, made(linear))


class DraftHead(nn.Module):
    """Knows nothing of trees and slots. Its subclasses make ``layers`` and ``rotary_emb``."""

    embedding: Tensor  # [V, D]
    layers: nn.ModuleList
    rotary_emb: Any  # transformers', of the layers' family

    def __init__(self, config: Any, embedding: Tensor) -> None:
        """``config``: transformers', of the layers. ``embedding`` [V, D] is shared and never trained."""
        super().__init__()
        config._attn_implementation = "sdpa"  # takes batches, and assumes nothing of rows where a mask is given
        self.config = config
        self.register_buffer("embedding", embedding.detach(), persistent=False)

    def forward(
        self,
        token_ids: Tensor,
        features: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: DraftCache | None = None,
    ) -> Tensor:
        """What the head says of the rows, [B, T, D]: their lm_head's input, of which the rows behind them are fed.

        ``token_ids`` [B, T]; ``features`` [B, T, D], of the token before each; ``position_ids`` [B, T], the token's
        position less one; ``attention_mask`` bool, [B or 1, 1, T, KV], true where a row sees a key. ``cache``:
        anything with transformers' ``update(keys, values, layer_idx)``; it gets the new keys and values.
        """
        embedded = self._embed(token_ids, position_ids).to(features.dtype)
        rows = self._join(embedded, features)
        attention = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": cache is not None,
            "position_embeddings": self.rotary_emb(rows, position_ids),
            CACHE_ARGUMENT: cache,
        }
        return self._run_layers(embedded, rows, attention)

    def features_of(self, read: Tensor) -> Tensor:
        """What came of the target's layers [n, width] -> features [n, D]."""
        raise NotImplementedError

    def fed_back(self, states: Tensor) -> Tensor:
        """What the head says of rows [n, D] -> the features of the rows behind them [n, D]."""
        return states

    def _embed(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T] each -> [B, T, D]."""
        return F.embedding(token_ids, self.embedding)

    def _join(self, embedded: Tensor, features: Tensor) -> Tensor:
        """What the layers take, [B, T, D]."""
        raise NotImplementedError

    def _run_layers(self, embedded: Tensor, rows: Tensor, attention: dict[str, Any]) -> Tensor:
        """``attention``: as a decoder layer takes it."""
        raise NotImplementedError

    def _set_biases(self, biases: Set[str]) -> None:
        """Of all linear layers, those of these names get one, and the others none."""
        linears = [(name, module) for name, module in self.named_modules() if isinstance(module, nn.Linear)]
        for name, linear in linears:
            if (linear.bias is not None) != (name in biases):
                self.set_submodule(name, nn.Linear(linear.in_features, linear.out_features, bias=name in biases))
