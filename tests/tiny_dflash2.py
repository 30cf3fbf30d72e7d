"""Tiny random DFlash2 checkpoints in the published forms, and the published arithmetic written out once more.

The arithmetic is plain torch after the authors' description, row by row, and shares nothing with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tiny_dflash
from tiny_dflash import MASK, DFlashForm, write_head
from tiny_eagle3 import TARGET, VOCAB


@dataclass
class DFlash2Form(DFlashForm):
    """Which of the published forms."""

    taps: int = 2
    group: int = 8
    rank: int = 16
    top_k: int = 12
    multiplier: float = 0.4
    softcap: float | None = 6.0


def write_dflash2(directory: Path, form: DFlash2Form | None = None, seed: int = 1, **more: Tensor) -> dict[str, Tensor]:
    """As ``write_dflash``."""
    form = form or DFlash2Form()
    weights = make_weights(form, seed)
    end = "" if form.dialect == "speculators" else ".weight"  # as each of the two programs writes them
    stored = {f"{name}{end}" if "_codebook" in name else name: tensor for name, tensor in weights.items()}
    write_head(directory, stored, make_config(form) | form.config, more)
    return weights


def make_weights(form: DFlash2Form, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 300)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    weights = tiny_dflash.make_weights(form, seed)
    for layer in range(form.num_layers):
        for name in ("attention_conv", "mlp_conv"):
            prefix = f"layers.{layer}.{name}."
            weights[f"{prefix}base_kernel"] = matrix(2, form.taps, TARGET) + 0.5
            weights[f"{prefix}kernel_projection.weight"] = matrix(2 * form.taps * TARGET // form.group, TARGET)
    for name in ("predecessor_codebook", "successor_codebook"):
        weights[f"candidate_selector.{name}"] = matrix(VOCAB, form.rank) * 3
    weights["candidate_selector.hidden_projection.weight"] = matrix(form.rank, TARGET)
    return weights


def make_config(form: DFlash2Form) -> dict[str, Any]:
    config = tiny_dflash.make_config(form)
    own: dict[str, Any] = {
        "conv_kernel_size": form.taps,
        "conv_group_size": form.group,
        "selector_rank": form.rank,
        "selector_top_k": form.top_k,
        "output_multiplier": form.multiplier,
        "final_logit_softcapping": form.softcap,
    }
    if form.dialect == "speculators":
        return {**config, **own, "architectures": ["DFlash2DraftModel"], "speculators_model_type": "dflash2"}
    inner = {**config["dflash_config"], **own, "mask_token_id": MASK}
    return {**config, "architectures": ["DFlash2DraftModel"], "dflash_config": inner}


class Reference(tiny_dflash.Reference):
    """A head as its authors describe it."""

    form: DFlash2Form

    def mixed(self, part: str, side: int, rows: Tensor, inputs: Tensor) -> Tensor:
        form, weights = self.form, self.weights
        kernels = (inputs @ weights[f"{part}_conv.kernel_projection.weight"].T).view(len(rows), 2, form.taps, -1)
        out = torch.zeros_like(rows)
        for place in range(len(rows)):
            for tap in range(min(form.taps, place + 1)):
                own = kernels[place, side, tap].repeat_interleave(form.group)
                out[place] += (weights[f"{part}_conv.base_kernel"][side, tap] + own) * rows[place - tap]
        return out

    def behind(self, streams: list[Tensor], path: list[int]) -> tuple[Tensor, float]:
        """As of ``tiny_dspark.Reference``: logits of the candidates, minus infinity else."""
        form, weights = self.form, self.weights
        row = self.rows(streams, path[0])[len(path) - 1]
        logits = row @ self.lm_head.T * form.multiplier
        logits = logits if form.softcap is None else form.softcap * torch.tanh(logits / form.softcap)
        few = logits.topk(form.top_k).indices
        context = weights["candidate_selector.predecessor_codebook"][path[-1]]
        context = context * (weights["candidate_selector.hidden_projection.weight"] @ row)
        added = weights["candidate_selector.successor_codebook"][few] @ context
        return torch.full_like(logits, -torch.inf).index_copy(0, few, logits[few] + added), 1.0
