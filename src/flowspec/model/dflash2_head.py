"""The DFlash2 draft head: DFlash's rows, mixed with the rows before them, and a selector that knows the token above.

Around attention and around the MLP of each layer stands a short convolution over the block, whose kernel a row changes
for itself. Of a level's most probable tokens the selector adds to each one's logit a product of three: of the token
above, of the row, and of the candidate itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowspec.model.dflash2_format import DFlash2Format
from flowspec.model.dflash_head import BlockLayer, DFlashHead
from flowspec.model.target_head import LogitsHead
from flowspec.model.text_cache import TextCache


class BlockConvolution(nn.Module):
    """Before and behind a part of a layer, with kernels of which the part's input decides both."""

    def __init__(self, form: DFlash2Format) -> None:
        super().__init__()
        size = form.config.hidden_size
        self.num_taps, self.num_groups = form.num_taps, size // form.group_size
        self.base_kernel = nn.Parameter(torch.empty(2, form.num_taps, size))
        self.kernel_projection = nn.Linear(size, 2 * form.num_taps * self.num_groups, bias=False)

    def kernels(self, rows: Tensor) -> Tensor:
        """[B, D] -> [2, B, taps, D]: of each row, before the part and behind it."""
        own = self.kernel_projection(rows).view(len(rows), 2, self.num_taps, self.num_groups)
        spread = own.repeat_interleave(rows.shape[1] // self.num_groups, dim=-1)
        return spread.transpose(0, 1) + self.base_kernel[:, None]

    def forward(self, rows: Tensor, kernels: Tensor) -> Tensor:
        """[B, D] and [B, taps, D] -> [B, D]: tap i is for the row i before, where the block has one."""
        mixed = rows * kernels[:, 0]
        for tap in range(1, self.num_taps):
            mixed[tap:] += rows[:-tap] * kernels[tap:, tap]
        return mixed


class DFlash2Layer(BlockLayer):
    def __init__(self, form: DFlash2Format, layer_index: int) -> None:
        super().__init__(form.config, layer_index, form.sights[layer_index])
        self.attention_conv, self.mlp_conv = BlockConvolution(form), BlockConvolution(form)

    def forward(self, rows: Tensor, text: TextCache, turn: tuple[Tensor, Tensor]) -> Tensor:
        normed = self.input_layernorm(rows)
        before, behind = self.attention_conv.kernels(normed)
        mixed = self.self_attn(self.attention_conv(normed, before), text, turn)
        rows = rows + self.attention_conv(mixed, behind)
        normed = self.post_attention_layernorm(rows)
        before, behind = self.mlp_conv.kernels(normed)
        return rows + self.mlp_conv(self.mlp(self.mlp_conv(normed, before)), behind)


class Selector(nn.Module):
    def __init__(self, form: DFlash2Format) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(form.config.vocab_size, form.rank))
        self.successor_codebook = nn.Parameter(torch.empty(form.config.vocab_size, form.rank))
        self.hidden_projection = nn.Linear(form.config.hidden_size, form.rank, bias=False)


class DFlash2Head(DFlashHead):
    """A loaded head."""

    is_recurrent = False

    def __init__(self, form: DFlash2Format, embedding: Tensor) -> None:
        super().__init__(form, embedding)
        self.layers = nn.ModuleList(DFlash2Layer(form, index) for index in range(form.config.num_hidden_layers))
        self.candidate_selector = Selector(form)

    def first_states(self, num: int) -> Tensor:
        """As of ``DSparkHead``."""
        return self.embedding.new_zeros(num, 0)

    @torch.inference_mode()
    def behind(self, rows: Tensor, token_ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of ``DSparkHead``; nothing is said of rates."""
        selector = self.candidate_selector
        latents = selector.predecessor_codebook[token_ids.to(rows.device)] * selector.hidden_projection(rows)
        return latents, states, rows.new_zeros(len(rows), dtype=torch.float32)

    def weights_of(self, token_ids: Tensor) -> Tensor | None:
        """As of ``DSparkHead``."""
        return self.candidate_selector.successor_codebook[token_ids.to(self.embedding.device)]


class ScaledHead:
    """An lm_head as DFlash2 reads it."""

    def __init__(self, lm_head: LogitsHead, multiplier: float, softcap: float | None) -> None:
        self._lm_head = lm_head
        self._multiplier = multiplier
        self._softcap = softcap

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V]."""
        logits = self._lm_head.logits(hidden) * self._multiplier
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap
