"""Trains an EAGLE-3 draft head (arXiv 2503.01840): a layer that reads three of the target's, and its own output.

A row takes a token and what ``fc`` makes of the streams at the token before it; its state gives the next token's
logits, and is fed to the row behind it in place of such a feature. No state has to be like a feature of the target's:
what is minimised is the cross-entropy against the target's distribution alone, at several draft levels at once, each
fed with the states of the one before (training-time test), less for later ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from flowspec.errors import UsageError
from flowspec.model.draft_files import CONFIG, SAFETENSORS
from flowspec.model.eagle3_head import Eagle3Head
from flowspec.model.eagle3_layers import eagles_choice
from flowspec.model.head_tensors import FIRST, HEAD, IDS
from flowspec.model.tensor_files import save_tensors
from flowspec.train.corpus import Tokens
from flowspec.train.frozen_target import Target, head_config, spread_layers
from flowspec.train.loop import run_steps, write_json
from flowspec.train.losses import cross_entropy, expected_rows, log_partition
from flowspec.train.own_text import Conversations
from flowspec.train.unroll import unroll
from flowspec.train.windows import DraftRecipe, batch_at, data_identity, generate_windows, optimiser_of


@dataclass(frozen=True)
class Eagle3Shape:
    """What of a head the target does not give."""

    num_tokens: int | None = None  # that it guesses, the most frequent ones; by default all of a small vocabulary
    fc_norm: bool = False  # a norm of each stream that is read, as in EAGLE-3.1 (arXiv 2605.09992)
    norm_output: bool = False  # what is fed back has passed the last norm, as there

    def __post_init__(self) -> None:
        if self.num_tokens is not None and self.num_tokens < 1:
            raise UsageError(f"a head cannot guess {self.num_tokens} tokens; name 1 at least (--draft-vocab)")

    def tapped(self, num_target_layers: int) -> list[int]:
        """The authors' choice, or where a target is too small for it, as of ``spread_layers``."""
        layers = list(eagles_choice(num_target_layers))
        is_possible = all(lower < upper for lower, upper in pairwise(layers))
        return layers if is_possible else spread_layers(num_target_layers, len(layers))


@dataclass(frozen=True)
class Eagle3Recipe:
    """Of a head's training; text, steps and learning rate are those of ``windows``."""

    windows: DraftRecipe
    shape: Eagle3Shape = field(default_factory=Eagle3Shape)
    num_levels: int = 5  # draft levels that are trained together
    decay: float = 0.8  # a level's weight in the loss, of that of the level before it

    def __post_init__(self) -> None:
        if not 0 < self.num_levels < self.windows.context_len:
            raise UsageError(
                f"num_levels is {self.num_levels}; it must lie between 0 and {self.windows.context_len}, the length of "
                "a window"
            )
        if not 0 < self.decay <= 1:
            raise UsageError(f"decay is {self.decay}; it must lie in (0, 1]")


class Eagle3Trainee(nn.Module):
    """A head in training: the one that drafts, with ``fc``, which stages have then, and an lm_head of target's rows."""

    lm_head: Tensor  # [N, D], which stays as it is
    token_ids: Tensor | None  # [N], ascending: the target's tokens that it guesses, if not all

    def __init__(
        self,
        config: LlamaConfig,
        shape: Eagle3Shape,
        tapped: Sequence[int],
        target: Target,
        token_ids: Tensor | None = None,
    ) -> None:
        """``tapped``: layers of the target."""
        super().__init__()
        size, self.shape, self.tapped = config.hidden_size, shape, tapped
        self.head = Eagle3Head(config, target.embedding, norm_output=shape.norm_output)
        self.fc = nn.Linear(len(tapped) * size, size, bias=False)
        num_norms = len(tapped) if shape.fc_norm else 0
        self.fc_norm = nn.ModuleList(LlamaRMSNorm(size, eps=config.rms_norm_eps) for _ in range(num_norms))
        with torch.no_grad():
            self.head.norm.weight.copy_(target.final_norm)  # the lm_head is used to it
        few = target.lm_head if token_ids is None else target.lm_head[token_ids.to(target.lm_head.device)]
        self.register_buffer("lm_head", few, persistent=False)
        self.register_buffer("token_ids", token_ids, persistent=False)

    def read(self, streams: Tensor) -> Tensor:
        """What enters the tapped layers [B, T, n H] -> features, float32 [B, T, D]."""
        if self.fc_norm:
            parts = streams.chunk(len(self.tapped), dim=-1)
            streams = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(streams).float()

    def estimates(self, states: Tensor) -> Tensor:
        """What the lm_head takes, float32 [..., D], of states [..., D]."""
        return (states if self.shape.norm_output else self.head.norm(states)).float()

    def logits(self, states: Tensor) -> Tensor:
        """float32 [..., V] of states [..., D]; minus infinity for tokens that it does not guess."""
        few = F.linear(self.estimates(states).to(self.lm_head.dtype), self.lm_head).float()
        if self.token_ids is None:
            return few
        return few.new_full((*few.shape[:-1], len(self.head.embedding)), -torch.inf).index_copy(-1, self.token_ids, few)

    def save(self, directory: Path, hit_rates: Sequence[float] = ()) -> None:
        """As SpecForge writes such heads, fp16. ``hit_rates``: for the check before the first request."""
        tensors = {_published(name): tensor for name, tensor in self.state_dict().items()} | {HEAD: self.lm_head}
        if self.token_ids is not None:
            known, num_all = self.token_ids.cpu(), len(self.head.embedding)
            tensors[IDS] = known - torch.arange(len(known))
            tensors["t2d"] = torch.zeros(num_all, dtype=torch.bool).index_fill(0, known, True)
        save_tensors(directory / SAFETENSORS, tensors, torch.float16)
        write_json(directory / CONFIG, self._file_config() | _rates_entry(hit_rates))

    def _file_config(self) -> dict[str, Any]:
        sizes = self.head.config.to_dict()
        rope = sizes["rope_parameters"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        return {
            **{name: value for name, value in sizes.items() if name not in ("_name_or_path", "transformers_version")},
            "architectures": ["LlamaForCausalLMEagle3"],
            "dtype": "float16",
            # What readers of before transformers 5 know.
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "draft_vocab_size": len(self.lm_head),
            "target_hidden_size": self.head.config.hidden_size,
            "norm_before_residual": False,
            "fc_norm": self.shape.fc_norm,
            "norm_output": self.shape.norm_output,
            # vLLM looks here, and takes them for layers that a stream enters.
            "eagle_aux_hidden_state_layer_ids": list(self.tapped),
            # SpecForge and SGLang look here, and take them for layers that it leaves.
            "eagle_config": {
                "use_aux_hidden_state": True,
                "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in self.tapped],
            },
        }


def train_eagle3_head(
    target: Target,
    tokens: Tokens,
    recipe: Eagle3Recipe,
    work_dir: Path,
    out: Path,
    *,
    token_ids: Tensor | None = None,
    plan: Conversations | None = None,
    compiled: bool = False,
    checkpoint_interval_s: float = 180.0,
    stop_after: int | None = None,
) -> Eagle3Trainee:
    """To the end of the recipe; one that was interrupted ends in the same weights, as in ``train_head``.

    ``token_ids`` [N], ascending: the only tokens that it is to guess, if not all.
    """
    windows = recipe.windows
    tapped = recipe.shape.tapped(target.config.num_hidden_layers)
    generated = generate_windows(target, tokens, windows, work_dir / "generated", plan)
    torch.manual_seed(windows.seed)
    config = head_config(target.config)
    head = Eagle3Trainee(config, recipe.shape, tapped, target, token_ids).to(target.device)
    losses: Callable[..., tuple[Tensor, Tensor]] = torch.compile(level_losses) if compiled else level_losses
    weights = recipe.decay ** torch.arange(recipe.num_levels, device=target.device)
    weights = weights / weights.sum()

    def learn(step: int) -> dict[str, float]:
        rows = batch_at(windows, tokens, generated, step).to(target.device)
        with torch.autocast(target.device.type, torch.bfloat16):
            streams, features = target.tapped_streams(rows, tapped)
            found, hits = losses(head, target.lm_head, rows, streams, features, recipe.num_levels)
        (weights * found).sum().backward()
        return {"token": found.mean().item(), "top1": hits[0].item(), "deepest": hits[-1].item()}

    identity = asdict(recipe) | data_identity(target, tokens)
    if token_ids is not None:
        identity["tokens"] = hashlib.sha256(token_ids.cpu().numpy().tobytes()).hexdigest()[:12]
    run_steps(
        "EAGLE-3 head",
        head,
        optimiser_of(head, windows, config.hidden_size),
        windows,
        learn,
        work_dir / "eagle3.pt",
        identity,
        lambda: head.save(out),
        checkpoint_interval_s=checkpoint_interval_s,
        stop_after=stop_after,
    )
    return head.eval().requires_grad_(False)


def level_losses(
    head: Eagle3Trainee, lm_head: Tensor, rows: Tensor, streams: Tensor, features: Tensor, num_levels: int
) -> tuple[Tensor, Tensor]:
    """By draft level, [num_levels]: the loss, and the share of rows where head and target put the same token first.

    ``rows`` [B, T + 1] with the ``streams`` [B, T + 1, n H] at the tapped layers and the target's ``features``
    [B, T + 1, H], for its ``lm_head`` [V, H]. The loss is the cross-entropy over the tokens that the head guesses; a
    row counts as far as the target would say one of them.
    """
    truth = features[:, 1:].flatten(0, 1)
    expected, true_best = expected_rows(truth, head.lm_head)
    told = torch.ones_like(true_best, dtype=torch.float32)
    if head.token_ids is not None:
        told = (log_partition(truth, head.lm_head)[0] - log_partition(truth, lm_head)[0]).exp()
    wanted = [tensor.unflatten(0, (len(rows), -1)) for tensor in (expected, true_best, told)]
    losses, hits = list[Tensor](), list[Tensor]()
    for level, states in enumerate(unroll(head.head, rows, head.read(streams[:, :-1]), num_levels)):
        # The first `level` rows of a level would have needed tokens before the window.
        kept, expected, true_best, told = (
            tensor[:, level:].flatten(0, 1) for tensor in (head.estimates(states), *wanted)
        )
        each, best = cross_entropy(kept, expected, head.lm_head)
        losses.append((told * each).mean())
        hits.append((best == true_best).float().mean())
    return torch.stack(losses), torch.stack(hits)


def _published(name: str) -> str:
    """A parameter's name as EAGLE's authors and SpecForge write it."""
    name = name.removeprefix("head.")
    return f"midlayer.{name.removeprefix(FIRST)}" if name.startswith(FIRST) else name


def _rates_entry(hit_rates: Sequence[float]) -> dict[str, Any]:
    return {"hit_rates": [round(rate, 4) for rate in hit_rates]} if hit_rates else {}
