"""The DFlash draft head (arXiv 2602.06036): one pass over a block of rows guesses all the tokens behind an anchor.

Every layer's keys and values of the text come straight from what the target's layers made of it; they are computed
once for each verified token, and nothing else is kept. The block's own rows, the anchor's token and masks, see all of
the text and each other, both ways, unless a layer's ``Sight`` says otherwise. Knows nothing of trees and files'
dialects; ``fc`` is the stages' (``model.taps``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, rotate_half

from flowspec.core import DType
from flowspec.model.block_sight import Sight
from flowspec.model.dflash_format import DFlashFormat
from flowspec.model.head_tensors import EMBEDDING, FC, HEAD, IDS
from flowspec.model.text_cache import TextCache

_NOT_HERE = {FC, EMBEDDING, HEAD, IDS}  # tensors of a checkpoint that are no part of the module


class BlockAttention(nn.Module):
    def __init__(self, config: LlamaConfig | Qwen3Config, layer_index: int, sight: Sight) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.sight = sight
        assert config.head_dim is not None and config.num_key_value_heads is not None, "the format fills them in"
        self.head_dim: int = config.head_dim
        size, num, num_kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.groups = num // num_kv
        self.q_proj = nn.Linear(size, num * self.head_dim, bias=False)
        self.k_proj = nn.Linear(size, num_kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(size, num_kv * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num * self.head_dim, size, bias=False)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def keys_and_values(self, rows: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[n, D] -> both [heads, n, d]; ``turn``: cosines and sines [n, d] of the rows' positions."""
        keys = _turned(self.k_norm(self._heads(self.k_proj(rows))), turn)
        return keys, self._heads(self.v_proj(rows))

    def forward(self, rows: Tensor, text: TextCache, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[B, D] -> [B, D]."""
        queries = _turned(self.q_norm(self._heads(self.q_proj(rows))), turn)
        start = self.sight.start(text.num_rows)
        both = text.with_rows(self.layer_index, *self.keys_and_values(rows, turn), start)
        keys, values = (part.repeat_interleave(self.groups, dim=0) for part in both)
        mask = self.sight.mask(text.num_rows, len(rows), rows.device)
        mixed = F.scaled_dot_product_attention(queries[None], keys[None], values[None], mask)[0]
        return self.o_proj(mixed.transpose(0, 1).flatten(1))

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(len(rows), -1, self.head_dim).transpose(0, 1)


class BlockLayer(nn.Module):
    def __init__(self, config: LlamaConfig | Qwen3Config, layer_index: int, sight: Sight) -> None:
        super().__init__()
        self.self_attn = BlockAttention(config, layer_index, sight)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, rows: Tensor, text: TextCache, turn: tuple[Tensor, Tensor]) -> Tensor:
        rows = rows + self.self_attn(self.input_layernorm(rows), text, turn)
        return rows + self.mlp(self.post_attention_layernorm(rows))


class DFlashHead(nn.Module):
    """A loaded head."""

    embedding: Tensor  # [V, D]
    min_text = 0  # tokens before an anchor without which nothing can be guessed

    def __init__(self, form: DFlashFormat, embedding: Tensor) -> None:
        """``embedding`` [V, D] is shared."""
        super().__init__()
        config = form.config
        self.block_size, self.mask_token_id = form.block_size, form.mask_token_id
        self.num_levels, self.embedding_scale = form.num_levels, form.embedding_scale
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config, *pair) for pair in enumerate(form.sights))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]

    def open_cache(self) -> TextCache:
        return TextCache(len(self.layers))

    @torch.inference_mode()
    def read(self, sums: Tensor, cache: TextCache, next_ids: Sequence[int] = ()) -> None:
        """The next verified tokens of the text: what the stages have added up for them, [n, D].

        ``next_ids``: the tokens behind each, which nothing hangs on here.
        """
        rows = self.hidden_norm(sums.to(self.embedding.device, self.embedding.dtype))
        turn = self._turn(rows, cache.num_rows, len(rows))
        for index, layer in enumerate(self._layers()):
            cache.write(index, *layer.self_attn.keys_and_values(rows, turn))
        cache.num_rows += len(rows)

    @torch.inference_mode()
    def guess(self, token_id: int, cache: TextCache) -> Tensor:
        """What the levels' logits are made of, [num_levels, D]. ``token_id``: of the anchor, behind the text."""
        ids = torch.full((self.block_size,), self.mask_token_id, device=self.embedding.device)
        ids[0] = token_id
        rows = F.embedding(ids, self.embedding) * self.embedding_scale
        turn = self._turn(rows, cache.num_rows, self.block_size)
        for layer in self.layers:
            rows = layer(rows, cache, turn)
        return self.norm(rows)[self.block_size - self.num_levels :]

    def _layers(self) -> Iterator[BlockLayer]:
        for layer in self.layers:
            assert isinstance(layer, BlockLayer)
            yield layer

    def _turn(self, like: Tensor, start: int, num: int) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary_emb(like, torch.arange(start, start + num, device=like.device)[None])
        return cos[0], sin[0]

    @classmethod
    def load(cls, form: DFlashFormat, embedding: Tensor, dtype: DType, device: torch.device | str) -> DFlashHead:
        """``embedding`` [V, H]: the target's, where the file has none. Raises ``ModelError``."""
        torch_dtype: torch.dtype = getattr(torch, dtype)
        if EMBEDDING in form.names:
            embedding = form.tensor(EMBEDDING)
        with torch.device("meta"):
            head = cls(form, embedding.to(device, torch_dtype))
        head.rotary_emb = LlamaRotaryEmbedding(form.config).to(device)  # type: ignore[arg-type]
        form.fill(head, _NOT_HERE, torch_dtype, device)
        return head.eval().requires_grad_(False)


def _turned(rows: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    return rows * cos + rotate_half(rows) * sin
