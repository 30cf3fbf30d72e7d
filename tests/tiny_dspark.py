"""Tiny random DSpark checkpoints in the published forms, and the published arithmetic written out once more.

The arithmetic is plain torch after arXiv 2607.05147, for one chain of tokens, and shares nothing with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_dflash
from tiny_dflash import MASK, DFlashForm, write_head
from tiny_eagle3 import LAYERS, TARGET, VOCAB


@dataclass
class DSparkForm(DFlashForm):
    """Which of the published forms. ``sample_from_anchor`` is left to each one's default where it is true."""

    dialect: str = "speculators"  # speculators, specforge, deepspec
    samples_anchor: bool = True
    rank: int = 16  # 0: no Markov head
    variant: str = "vanilla"  # vanilla, gated, rnn
    confidence: str = "token"  # token: reads the token, too; row; none


def write_dspark(directory: Path, form: DSparkForm | None = None, seed: int = 1, **more: Tensor) -> dict[str, Tensor]:
    """As ``write_dflash``."""
    form = form or DSparkForm()
    weights = make_weights(form, seed)
    write_head(directory, weights, make_config(form) | form.config, more)
    return weights


def make_weights(form: DSparkForm, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed + 100)

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    weights, rank = tiny_dflash.make_weights(form, seed), form.rank
    if rank:
        weights["markov_head.markov_w1.weight"] = matrix(VOCAB, rank) * 4
        weights["markov_head.markov_w2.weight"] = matrix(form.num_draft or VOCAB, rank)
    sizes = {"gated": ("gate_proj", rank, TARGET + rank), "rnn": ("joint_proj", 3 * rank, 2 * rank + TARGET)}
    if rank and form.variant in sizes:
        name, rows, columns = sizes[form.variant]
        weights[f"markov_head.{name}.weight"], weights[f"markov_head.{name}.bias"] = matrix(rows, columns), matrix(rows)
    if form.confidence != "none":
        weights["confidence_head.proj.weight"] = matrix(1, TARGET + (rank if form.confidence == "token" else 0))
        weights["confidence_head.proj.bias"] = matrix(1)
    if form.dialect == "deepspec":
        weights |= {"embed_tokens.weight": matrix(VOCAB, TARGET), "lm_head.weight": matrix(VOCAB, TARGET)}
    return weights


def make_config(form: DSparkForm) -> dict[str, Any]:
    config = tiny_dflash.make_config(form)
    heads = {
        "markov_rank": form.rank,
        "markov_head_type": form.variant,
        "enable_confidence_head": form.confidence != "none",
        "confidence_head_with_markov": form.confidence == "token",
    }
    match form.dialect:
        case "speculators":
            return {**config, **heads, "architectures": ["DSparkSpeculator"], "speculators_model_type": "dspark"}
        case "specforge":
            inner = {
                "target_layer_ids": [layer - 1 for layer in form.tapped],
                "mask_token_id": MASK,
                "projector_type": "dspark",
                **heads,
            }
            return {
                **config,
                "architectures": ["DSparkDraftModel"],
                "block_size": form.block_size,
                "dflash_config": inner,
            }
        case _:
            del config["dflash_config"]
            own = {"architectures": ["Qwen3DSparkModel"], "block_size": form.block_size, "mask_token_id": MASK}
            layers = {"target_layer_ids": [layer - 1 for layer in form.tapped], "num_target_layers": LAYERS}
            return {**config, **heads, **own, **layers, "num_anchors": 512}


class Reference(tiny_dflash.Reference):
    """A head as its paper describes it."""

    form: DSparkForm

    def behind(self, streams: list[Tensor], path: list[int]) -> tuple[Tensor, float]:
        """Logits [V] behind a chain that begins with the anchor, and the rate that the confidence head gives them.

        ``streams``: as of ``logits``.
        """
        weights, rank = self.weights, self.form.rank
        rows = self.rows(streams, path[0])
        row = rows[len(path) - 1]
        few = row @ self.lm_head.T
        token = torch.zeros(0)
        if rank:
            table = weights["markov_head.markov_w1.weight"]
            token = latent = table[path[-1]]
            if self.form.variant == "gated":
                latent = torch.sigmoid(self._linear("gate_proj", torch.cat([row, token]))) * token
            elif self.form.variant == "rnn":
                state = torch.zeros(rank)
                for place, token_id in enumerate(path):
                    joint = self._linear("joint_proj", torch.cat([state, table[token_id], rows[place]]))
                    gate, latent = torch.sigmoid(joint[:rank]), torch.tanh(joint[2 * rank :])
                    state = gate * state + (1 - gate) * torch.tanh(joint[rank : 2 * rank])
            few = few + weights["markov_head.markov_w2.weight"] @ latent
        return self.spread(few[None])[0], self._rate(row, token)

    def _rate(self, row: Tensor, token: Tensor) -> float:
        if self.form.confidence == "none":
            return 1.0
        inputs = torch.cat([row, token]) if self.form.confidence == "token" else row
        weights = self.weights
        return float(
            torch.sigmoid(
                F.linear(inputs, weights["confidence_head.proj.weight"], weights["confidence_head.proj.bias"])
            )
        )

    def _linear(self, name: str, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weights[f"markov_head.{name}.weight"], self.weights[f"markov_head.{name}.bias"])
