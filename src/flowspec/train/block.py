"""Trains a DSpark draft head (arXiv 2607.05147): a block of rows that guesses several tokens in one pass.

Anchors are drawn in each window of text. A block begins with its anchor's token, goes on with masks, and sees what the
target's layers made of the text before it, and itself. Row i guesses the token i + 1 behind the anchor, from its own
state and, by the Markov head, from the token above, which in training is the right one. What is minimised is the
cross-entropy against the target's distribution, and the logarithm of the rate at which rejection sampling would take
the draft's token (as the losses of arXiv 2602.23881), less for later rows. The confidence head learns that rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from flowspec.errors import UsageError
from flowspec.model.block_sight import Sight
from flowspec.model.dflash_head import BlockLayer
from flowspec.model.draft_files import CONFIG, SAFETENSORS
from flowspec.model.tensor_files import save_tensors
from flowspec.train.corpus import Tokens
from flowspec.train.frozen_target import Target, head_config, spread_layers
from flowspec.train.loop import run_steps, write_json
from flowspec.train.losses import rows_at_a_time
from flowspec.train.own_text import Conversations
from flowspec.train.windows import REFERENCE_WIDTH, DraftRecipe, batch_at, data_identity, generate_windows

_LEAST_RATE = 1e-4  # of acceptance, whose logarithm is taken


@dataclass(frozen=True)
class BlockShape:
    """The sizes of a head that the target does not give."""

    block_size: int = 8  # rows, each of which guesses a token
    num_layers: int = 2
    num_taps: int = 3  # layers of the target that it reads, or all of a smaller one
    rank: int = 64  # of the Markov head

    def __post_init__(self) -> None:
        for name, least in (("block_size", 2), ("num_layers", 1), ("num_taps", 1), ("rank", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def tapped(self, num_target_layers: int) -> list[int]:
        """As of ``spread_layers``."""
        return spread_layers(num_target_layers, self.num_taps)


@dataclass(frozen=True)
class BlockRecipe:
    """Of a block head's training; text, steps and learning rate are those of ``windows``."""

    windows: DraftRecipe
    shape: BlockShape = field(default_factory=BlockShape)
    anchors: int = 24  # of a window
    decay: float = 4.0  # rows over which a row's weight in the loss falls to 1 / e
    acceptance_weight: float = 0.5  # of the logarithm of the rate of acceptance, beside the cross-entropy
    confidence_weight: float = 0.1


class Layer(BlockLayer):
    """A decoder layer whose rows, of many blocks of several texts, see their own block's and the text before it."""

    def forward(self, rows: Tensor, text: Tensor, turns: Sequence[Tensor], mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``rows`` [B, N, D], ``text`` [B, T, D]; ``mask`` [B, 1, N, T + N].

        ``turns``: cosines and sines [B, T + N, d].
        """
        rows = rows + self._attend(self.input_layernorm(rows), text, turns, mask)
        return rows + self.mlp(self.post_attention_layernorm(rows))

    def _attend(self, rows: Tensor, text: Tensor, turns: Sequence[Tensor], mask: Tensor) -> Tensor:
        own = self.self_attn

        def heads(rows: Tensor) -> Tensor:
            return rows.unflatten(-1, (-1, own.head_dim)).transpose(1, 2)

        both, (cos, sin), num = torch.cat((text, rows), dim=1), turns, rows.shape[1]
        queries, keys = own.q_norm(heads(own.q_proj(rows))), own.k_norm(heads(own.k_proj(both)))
        queries, _ = apply_rotary_pos_emb(queries, queries, cos[:, -num:], sin[:, -num:])
        keys, _ = apply_rotary_pos_emb(keys, keys, cos, sin)
        values = heads(own.v_proj(both))
        mixed = F.scaled_dot_product_attention(queries, keys.to(queries.dtype), values, mask, enable_gqa=True)
        return own.o_proj(mixed.transpose(1, 2).flatten(2))


class MarkovHead(nn.Module):
    """What a row's logits get of the token above it; at first, nothing."""

    def __init__(self, vocab_size: int, rank: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)
        nn.init.zeros_(self.markov_w2.weight)


class ConfidenceHead(nn.Module):
    """The log-odds of the rate at which a row's guesses are taken."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)


class BlockTrainee(nn.Module):
    """A head in training; its parameters are called as in published files."""

    embedding: Tensor  # [V, D]

    def __init__(self, config: Qwen3Config, shape: BlockShape, tapped: Sequence[int], embedding: Tensor) -> None:
        """``tapped``: layers of the target. ``embedding`` [V, D]: its own, which stays as it is."""
        super().__init__()
        self.config, self.shape, self.tapped = config, shape, tapped
        self.mask_token_id = config.vocab_size - 1  # the id that tokenizers use least
        size = config.hidden_size
        self.register_buffer("embedding", embedding, persistent=False)
        self.fc = nn.Linear(len(tapped) * size, size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config, index, Sight()) for index in range(shape.num_layers))
        self.norm = Qwen3RMSNorm(size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.markov_head = MarkovHead(config.vocab_size, shape.rank)
        self.confidence_head = ConfidenceHead(size + shape.rank)

    def forward(self, streams: Tensor, token_ids: Tensor, anchors: Tensor) -> Tensor:
        """The rows' states, [B, A, S, D].

        ``streams`` [B, T, n D] enter the tapped layers, of the tokens [B, T + 1]; ``anchors`` [B, A]: positions.
        """
        text = self.hidden_norm(self.fc(streams))
        size, num_text = self.shape.block_size, streams.shape[1]
        ids = torch.full((*anchors.shape, size), self.mask_token_id, device=anchors.device)
        ids[..., 0] = token_ids.gather(1, anchors)
        rows = F.embedding(ids.flatten(1), self.embedding)
        of_rows = self.places_of(anchors)
        of_text = torch.arange(num_text, device=anchors.device).expand(len(anchors), -1)
        turns = self.rotary_emb(rows, torch.cat((of_text, of_rows), dim=1))
        first = anchors.repeat_interleave(size, dim=1)
        block = torch.arange(first.shape[1], device=anchors.device) // size
        sees_text = of_text[:, None] < first[..., None]
        sees_rows = (block[:, None] == block).expand(len(anchors), -1, -1)
        mask = torch.cat((sees_text, sees_rows), dim=2)[:, None]
        for layer in self.layers:
            rows = layer(rows, text, turns, mask)
        return self.norm(rows).unflatten(1, (-1, size))

    def tokens_above(self, token_ids: Tensor, anchors: Tensor) -> Tensor:
        """[B, A, S] of tokens [B, T + 1]: the right token above each row, the anchor's first."""
        return token_ids.gather(1, self.places_of(anchors)).view(*anchors.shape, -1)

    def places_of(self, anchors: Tensor) -> Tensor:
        """Positions of the rows of blocks at ``anchors`` [B, A], [B, A S]."""
        return (anchors[..., None] + torch.arange(self.shape.block_size, device=anchors.device)).flatten(1)

    def save(self, directory: Path, hit_rates: Sequence[float] = ()) -> None:
        """In the form of speculators' dspark heads, fp16. ``hit_rates``: for the check before the first request."""
        layers = self.config.to_dict()
        layers = {
            name: value for name, value in layers.items() if name not in ("_name_or_path", "transformers_version")
        }
        config = {
            "architectures": ["DSparkSpeculator"],
            "speculators_model_type": "dspark",
            "transformer_layer_config": layers,
            "aux_hidden_state_layer_ids": list(self.tapped),
            "block_size": self.shape.block_size,
            "mask_token_id": self.mask_token_id,
            "sample_from_anchor": True,
            "draft_vocab_size": self.config.vocab_size,
            "markov_rank": self.shape.rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }
        if hit_rates:
            config["hit_rates"] = [round(rate, 4) for rate in hit_rates]
        save_tensors(directory / SAFETENSORS, self.state_dict(), torch.float16)
        write_json(directory / CONFIG, config)


def block_config(target: Any, shape: BlockShape) -> Qwen3Config:
    """Layers of the target's sizes, with norms of queries and keys."""
    sizes = head_config(target).to_dict()
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "rms_norm_eps", "rope_parameters", "max_position_embeddings",
    )  # fmt: skip
    return Qwen3Config(**{name: sizes[name] for name in names}, num_hidden_layers=shape.num_layers)


def train_block_head(
    target: Target,
    tokens: Tokens,
    recipe: BlockRecipe,
    work_dir: Path,
    out: Path,
    *,
    plan: Conversations | None = None,
    checkpoint_interval_s: float = 180.0,
    stop_after: int | None = None,
) -> BlockTrainee:
    """To the end of the recipe; one that was interrupted ends in the same weights, as in ``train_head``."""
    windows, shape = recipe.windows, recipe.shape
    tapped = shape.tapped(target.config.num_hidden_layers)
    if windows.context_len < 2 * shape.block_size:
        raise UsageError(f"blocks of {shape.block_size} do not fit into windows of {windows.context_len} tokens")
    generated = generate_windows(target, tokens, windows, work_dir / "generated", plan)
    torch.manual_seed(windows.seed)
    config = block_config(target.config, shape)
    head = BlockTrainee(config, shape, tapped, target.embedding).to(target.device)

    def learn(step: int) -> dict[str, float]:
        rows = batch_at(windows, tokens, generated, step).to(target.device)
        anchors = anchors_at(recipe, step).to(target.device)
        return learn_blocks(head, target, recipe, rows, anchors)

    run_steps(
        "block head",
        head,
        torch.optim.AdamW(head.parameters(), lr=windows.learning_rate * REFERENCE_WIDTH / config.hidden_size),
        windows,
        learn,
        work_dir / "block.pt",
        asdict(recipe) | data_identity(target, tokens),
        lambda: head.save(out),
        checkpoint_interval_s=checkpoint_interval_s,
        stop_after=stop_after,
    )
    return head.eval().requires_grad_(False)


def anchors_at(recipe: BlockRecipe, step: int) -> Tensor:
    """Positions [B, A] of one step, different in a window: behind each is a whole block, and before it some token."""
    windows = recipe.windows
    generator = torch.Generator().manual_seed(windows.seed * 1_000_003 + step)
    num_places = windows.context_len - recipe.shape.block_size
    draws = torch.rand(windows.rows_per_step, num_places, generator=generator)
    return 1 + draws.topk(min(recipe.anchors, num_places), dim=1).indices


def learn_blocks(
    head: BlockTrainee, target: Target, recipe: BlockRecipe, rows: Tensor, anchors: Tensor
) -> dict[str, float]:
    """Add the gradients of the blocks at ``anchors`` [B, A] of ``rows`` [B, T + 1]; returns what to report.

    Logits are made for some rows of blocks at a time: of all they would not fit into memory.
    """
    with torch.autocast(target.device.type, torch.bfloat16):
        streams, features = target.tapped_streams(rows, head.tapped)
        states = head(streams[:, :-1], rows, anchors)
    flat = states.detach().float().flatten(0, 2).requires_grad_()
    places = head.places_of(anchors)
    wanted = features.gather(1, places[..., None].expand(-1, -1, features.shape[2])).flatten(0, 1)
    above = head.tokens_above(rows, anchors).flatten()
    size = recipe.shape.block_size
    weights = torch.exp(-torch.arange(size, device=rows.device) / recipe.decay)
    weights = (weights / weights.sum()).repeat(len(flat) // size) * size / len(flat)
    totals = torch.zeros(4)
    for part in torch.arange(len(flat), device=rows.device).split(rows_at_a_time(target.lm_head)):
        loss, figures = _part_loss(head, target, recipe, flat[part], wanted[part], above[part], weights[part])
        loss.backward()
        totals += figures
    assert flat.grad is not None, "the parts have been taken back"
    states.backward(flat.grad.view_as(states).to(states.dtype))
    return dict(zip(("loss", "top1", "accepted", "confidence"), totals.tolist(), strict=True))


def _part_loss(
    head: BlockTrainee,
    target: Target,
    recipe: BlockRecipe,
    states: Tensor,
    wanted: Tensor,
    above: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of rows with these ``states`` [n, D], the target's features ``wanted`` [n, H], and the tokens ``above`` [n].

    ``weights`` [n]: of the rows, which add up to 1 over all parts.
    """
    with torch.no_grad():
        truth = target.logits(wanted).softmax(-1)
    latents = head.markov_head.markov_w1(above)
    with torch.autocast(target.device.type, torch.bfloat16):
        logits = F.linear(states, target.lm_head) + head.markov_head.markov_w2(latents)
    logprobs = logits.float().log_softmax(-1)
    entropy = -(truth * logprobs).sum(-1)
    rates = torch.minimum(truth, logprobs.exp()).sum(-1)
    told = head.confidence_head.proj(torch.cat((states, latents), dim=-1))[:, 0]
    confidence = F.binary_cross_entropy_with_logits(told, rates.detach(), reduction="none")
    each = entropy - recipe.acceptance_weight * rates.clamp(min=_LEAST_RATE).log()
    loss = (weights * (each + recipe.confidence_weight * confidence)).sum()
    hits = (logits.argmax(-1) == truth.argmax(-1)).float()
    figures = [loss.detach(), *((weights * each).sum().detach() for each in (hits, rates, confidence))]
    return loss, torch.stack(figures).cpu()


@torch.inference_mode()
def level_rates(head: BlockTrainee, target: Target, token_ids: Tensor, counted: Tensor) -> list[float]:
    """How often a row's first guess is right behind the right tokens, by level, in tokens [B, T] of which some count.

    ``counted`` [B, T].
    """
    size = head.shape.block_size
    right, made = torch.zeros(size), torch.zeros(size)
    anchors = torch.arange(1, token_ids.shape[1] - size, device=token_ids.device)
    for row, is_counted in zip(token_ids, counted, strict=True):
        streams, _ = target.tapped_streams(row[None], head.tapped)
        for part in anchors.split(max(1, rows_at_a_time(target.lm_head) // size)):
            states = head(streams[:, :-1], row[None], part[None])[0]
            above = head.tokens_above(row[None], part[None])[0]
            bias = head.markov_head.markov_w2(head.markov_head.markov_w1(above))
            guesses = (target.logits(states) + bias).argmax(-1)
            behind = head.places_of(part[None]).view(-1, size) + 1
            hits, counts = (guesses == row[behind]), is_counted[behind]
            right += (hits & counts).sum(0).cpu()
            made += counts.sum(0).cpu()
    return (right / made.clamp(min=1)).tolist()
