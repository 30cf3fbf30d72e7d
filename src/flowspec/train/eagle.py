"""Trains an EAGLE-1/2 draft head for a target, on given text and on text that the target writes itself.

Losses and noise follow the published recipe (EAGLE, arXiv 2401.15077): smooth-L1 on the features, a little
cross-entropy against the target's distribution, uniform noise on the features that go in. At the end the head may be
unrolled over its own estimates (as in HASS, arXiv 2408.15766), which it meets when it drafts several levels deep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from flowspec.errors import ModelError, UsageError
from flowspec.model.backends import open_checkpoint
from flowspec.model.demo_pair import DEMO, demo_directory
from flowspec.model.eagle_head import EagleHead
from flowspec.model.families import LM_HEAD, norm_scale, rope_tables
from flowspec.model.gguf_checkpoint import GGUFCheckpoint
from flowspec.model.loader import Checkpoint
from flowspec.model.stage_weights import EXPERTS
from flowspec.train.corpus import Tokens, shuffled_rows, windows
from flowspec.train.loop import run_steps
from flowspec.train.losses import expected_rows, log_partition
from flowspec.train.own_text import Batches, Conversations, conversation_batch, text_batch

REFERENCE_WIDTH = 256  # hidden size that a recipe's learning rate is for


@dataclass(frozen=True)
class DraftRecipe:
    """Data mixture, losses and optimiser of a head; the defaults are the shipped head's."""

    num_tokens: int = 9_000_000  # training tokens in all
    batch_tokens: int = 4096  # tokens of one optimiser step
    context_len: int = 512  # tokens of a training window
    generated_share: float = 0.5  # share of the training windows that the target wrote itself
    num_generated_tokens: int = 300_000  # distinct tokens in such windows; a longer training reads them again
    generation_batch: int = 64  # windows that the target writes at a time
    prompt_len: int = 128  # tokens of the given text at the start of a window that the target goes on with
    greedy_share: float = 0.4  # share of the target's windows that it writes greedily
    temperature: float = 0.8  # of the others
    feature_weight: float = 1.0  # of the smooth-L1 loss on features
    token_weight: float = 0.1  # of the cross-entropy against the target's distribution
    noise: float = 0.2  # width of the uniform noise on features
    unroll_len: int = 1  # draft levels that are trained together at the end of the run; 1 turns unrolling off
    unroll_share: float = 0.25  # share of the steps that are trained unrolled
    learning_rate: float = 2e-3  # AdamW's highest, for hidden size 256; it goes with 1 / hidden size
    warmup_share: float = 0.03  # share of the run with rising learning rate
    max_gradient: float = 0.5  # gradients are clipped to this, value by value
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_tokens", "batch_tokens", "generation_batch", "unroll_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("generated_share", "greedy_share", "unroll_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not 0 < self.prompt_len < self.context_len:
            raise UsageError(f"prompt_len is {self.prompt_len}; it must lie between 0 and {self.context_len}")

    @property
    def rows_per_step(self) -> int:
        return max(1, self.batch_tokens // self.context_len)

    @property
    def step_tokens(self) -> int:
        return self.rows_per_step * self.context_len

    @property
    def num_steps(self) -> int:
        return max(1, self.num_tokens // self.step_tokens)

    @property
    def num_generation_batches(self) -> int:
        """Enough for ``num_generated_tokens``, but no more than are read once."""
        wanted = min(self.num_generated_tokens, round(self.num_tokens * self.generated_share))
        return -(-wanted // (self.generation_batch * self.context_len))


class Target:
    """The frozen target in bfloat16: its features, its distribution, its embedding."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False) -> None:
        self.model: Any = model.to(torch.bfloat16).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue, reportArgumentType]
        self.config: Any = model.config
        self.device = model.device
        self.embedding = embedding_of(model).float()
        self.lm_head: Tensor = self.model.get_output_embeddings().weight.detach()
        self.final_norm = norm_scale(
            self.model.config, self.model.base_model.norm.weight.detach()
        )  # as rows are scaled
        self._run: Callable[[Tensor], Tensor] = torch.compile(self._features) if compiled else self._features

    @classmethod
    def open(cls, name: str | Path, *, compiled: bool = False) -> Target:
        """Read a checkpoint of a supported family, onto the GPU where there is one; raises ``ModelError``."""
        model = load_model(name, torch.bfloat16)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), compiled=compiled)  # pyright: ignore[reportArgumentType]

    @cached_property
    def digest(self) -> str:
        """Tells one target's weights from another's."""
        digest = hashlib.sha256()
        for parameter in self.model.parameters():
            digest.update(parameter.detach().float().sum(dtype=torch.float64).cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    @torch.no_grad()
    def features(self, token_ids: Tensor) -> Tensor:
        """float32 [B, T, H], after the final norm, of tokens [B, T]."""
        return self._run(token_ids).float()

    @torch.no_grad()
    def hidden_states(self, token_ids: Tensor) -> tuple[Tensor, ...]:
        """float32 [B, T, H] after 1, 2, ... layers, of tokens [B, T]; the last are the features."""
        output = self.model.base_model(input_ids=token_ids, use_cache=False, output_hidden_states=True)
        return tuple(states.float() for states in output.hidden_states[1:])

    def logits(self, features: Tensor) -> Tensor:
        """float32 [..., V]."""
        return F.linear(features.to(self.lm_head.dtype), self.lm_head).float()

    def _features(self, token_ids: Tensor) -> Tensor:
        return self.model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state


def load_model(name: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The target as transformers runs it; ``name``: as of ``open_checkpoint``. Raises ``ModelError``."""
    checkpoint = open_checkpoint(name)
    if isinstance(checkpoint, GGUFCheckpoint) or checkpoint.layout is not None:
        return _dequantised(checkpoint, dtype)
    directory = demo_directory() if str(name) == DEMO else Path(name).expanduser()
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory if directory.is_dir() else str(name),
            dtype=dtype,
            experts_implementation=EXPERTS,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        message = str(error).splitlines()[0]
        raise ModelError(f"{checkpoint.name} cannot be loaded ({message}); fetch its files again") from None


def _dequantised(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(checkpoint.config, dtype=dtype, experts_implementation=EXPERTS)
    places = model.state_dict()
    shapes = {name: tuple(place.shape) for name, place in places.items()}
    if LM_HEAD not in checkpoint.tensor_names():
        del shapes[LM_HEAD]
    with torch.no_grad():
        for name, tensor in checkpoint.module_tensors(shapes, "float32", "cpu"):
            places[name].copy_(tensor)
    model.tie_weights()
    return model


def embedding_of(model: Any) -> Tensor:
    """The model's token embedding [V, H], which its head shares."""
    return model.get_input_embeddings().weight.detach()


def head_config(target: Any) -> LlamaConfig:
    """One Llama layer of the sizes in the target's config, whatever its family."""
    return LlamaConfig.from_dict(
        {
            "vocab_size": target.vocab_size,
            "hidden_size": target.hidden_size,
            "intermediate_size": target.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": target.num_attention_heads,
            "num_key_value_heads": target.num_key_value_heads,
            "head_dim": getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads,
            "hidden_act": getattr(target, "hidden_act", "silu"),
            "rms_norm_eps": target.rms_norm_eps,
            "rope_parameters": rope_tables(target)[0],
            "max_position_embeddings": target.max_position_embeddings,
            "bos_token_id": target.bos_token_id,
            "eos_token_id": target.eos_token_id,
            "pad_token_id": target.pad_token_id,
            "bias": True,
        }
    )


def train_head(
    target: Target,
    tokens: Tokens,
    recipe: DraftRecipe,
    work_dir: Path,
    out: Path,
    *,
    plan: Conversations | None = None,
    compiled: bool = False,
    checkpoint_interval_s: float = 180.0,
    stop_after: int | None = None,
) -> EagleHead:
    """Train to the end of the recipe on text ``tokens`` [T]; each checkpoint is saved in ``out`` as well.

    ``plan``: what the target writes itself are conversations. Data, noise and learning rate are functions of the step
    alone, so an interrupted run ends in the same weights as an uninterrupted one. ``stop_after``: the step to interrupt
    this run at.
    """
    generated = generate_windows(target, tokens, recipe, work_dir / "generated", plan)
    torch.manual_seed(recipe.seed)
    head = EagleHead(head_config(target.config), target.embedding).to(target.device)
    size = head.config.hidden_size
    losses = torch.compile(head_losses) if compiled else head_losses

    def learn(step: int) -> dict[str, float]:
        done = (step + 0.5) / recipe.num_steps
        num_levels = recipe.unroll_len if done > 1 - recipe.unroll_share else 1
        rows = batch_at(recipe, tokens, generated, step).to(target.device)
        noise = noise_at(recipe, step, size).to(target.device)
        with torch.autocast(target.device.type, torch.bfloat16):
            found = losses(head, target.lm_head, rows, target.features(rows), noise, num_levels)
        (recipe.feature_weight * found[0] + recipe.token_weight * found[1]).backward()
        return dict(zip(("feature", "token", "top1"), (figure.item() for figure in found), strict=True))

    run_steps(
        "draft head",
        head,
        torch.optim.AdamW(head.parameters(), lr=recipe.learning_rate * REFERENCE_WIDTH / size, betas=(0.9, 0.95)),
        recipe,
        learn,
        work_dir / "draft.pt",
        asdict(recipe) | data_identity(target, tokens),
        lambda: head.save(out),
        checkpoint_interval_s=checkpoint_interval_s,
        stop_after=stop_after,
    )
    return head.eval().requires_grad_(False)


def data_identity(target: Target, tokens: Tokens) -> dict[str, str]:
    """Tells a training's target and text from others."""
    return {"target": target.digest, "data": hashlib.sha256(tokens.tobytes()).hexdigest()[:12]}


def head_losses(
    head: EagleHead, lm_head: Tensor, rows: Tensor, features: Tensor, noise: Tensor, num_levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Feature loss, token loss, and the share of first-level rows where head and target put the same token first.

    ``rows`` [B, T + 1] with the target's ``features`` [B, T + 1, H]; ``noise`` [B, T, H]. Mean over the draft levels.
    """
    truth = features[:, 1:]
    expected, true_best = (
        tensor.unflatten(0, truth.shape[:2]) for tensor in expected_rows(truth.flatten(0, 1), lm_head)
    )
    feature_loss = token_loss = hits = features.new_zeros(())
    for level, estimate in enumerate(unroll(head, rows, features[:, :-1] + noise, num_levels)):
        # The first `level` rows of a level would have needed tokens before the window.
        kept = estimate[:, level:].float()
        feature_loss = feature_loss + F.smooth_l1_loss(kept, truth[:, level:])
        sums, best = log_partition(kept.flatten(0, 1), lm_head)
        # The cross-entropy against the target's whole distribution.
        token_loss = token_loss + sums.mean() - (kept * expected[:, level:]).sum(-1).mean()
        if level == 0:
            hits = (best == true_best.flatten()).float().mean()
    return feature_loss / num_levels, token_loss / num_levels, hits


def unroll(head: EagleHead, token_ids: Tensor, features: Tensor, num_levels: int) -> list[Tensor]:
    """Estimates of draft levels 1..num_levels, each [B, T, H]; row i estimates the feature of token i + 1.

    Level 1 is fed with the given features [B, T, H] of all but the last of the tokens [B, T + 1], level k + 1 with what
    level k estimated for the token before. A row of level k sees what it would see when drafting: itself, one row each
    of the levels below, and level-1 rows before those.
    """
    tokens, num_rows = token_ids[:, 1:], features.shape[1]
    positions = torch.arange(num_rows, device=token_ids.device)[None]
    distance = positions[0][:, None] - positions[0][None]  # from row i back to row j
    if num_levels == 1:
        return [head(tokens, features, positions, (distance >= 0)[None, None])]
    cache = DynamicCache()
    outputs: list[Tensor] = []
    fed = features
    for level in range(num_levels):
        # A row of this level sees that row of the level `below` that is as far back as the levels are apart.
        blocks = [distance >= level, *(distance == level - below for below in range(1, level + 1))]
        outputs.append(head(tokens, fed, positions, torch.cat(blocks, dim=1)[None, None], cache))
        # The first row has no estimate before it: it keeps a true feature, and its later levels are not used.
        fed = torch.cat((features[:, :1], outputs[-1][:, :-1].to(features.dtype)), dim=1)
    return outputs


def batch_at(recipe: DraftRecipe, tokens: Tokens, generated: Tokens, step: int) -> Tensor:
    """The windows of one step, int64 [B, T + 1]; the share of the target's own is kept over the steps."""
    num_rows = recipe.rows_per_step
    first, last = (int(s * num_rows * recipe.generated_share) if len(generated) else 0 for s in (step, step + 1))
    parts: list[Tokens] = []
    if (num_given := num_rows - (last - first)) > 0:
        parts.append(windows(tokens, recipe.context_len + 1, step * num_rows - first, num_given, recipe.seed))
    if last > first:
        parts.append(shuffled_rows(generated, first, last - first, recipe.seed + 1))
    return torch.from_numpy(np.concatenate(parts)).long()


def noise_at(recipe: DraftRecipe, step: int, hidden_size: int) -> Tensor:
    """Uniform noise [B, T, H] of one step."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    shape = (recipe.rows_per_step, recipe.context_len, hidden_size)
    return (torch.rand(shape, generator=generator) - 0.5) * recipe.noise


def generate_windows(
    target: Target, tokens: Tokens, recipe: DraftRecipe, directory: Path, plan: Conversations | None = None
) -> Tokens:
    """Windows [N, T + 1] of the target's own text, greedy or sampled: conversations where there is a ``plan`` of them.

    Without one, they go on from given text. Finished batches are kept in ``directory`` and not generated again.
    """
    batches = Batches(recipe.num_generation_batches, recipe.generation_batch, recipe.context_len + 1)
    temperatures = torch.full((batches.num_rows,), recipe.temperature)
    temperatures[: round(batches.num_rows * recipe.greedy_share)] = 0.0
    settings = (batches.length, recipe.prompt_len, temperatures.tolist(), recipe.seed, target.digest, plan)
    if plan is None:
        write = text_batch(target.model, tokens, batches, recipe.prompt_len, temperatures, recipe.seed)
    else:
        write = conversation_batch(target.model, plan, tokens, batches, temperatures, recipe.seed)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return batches.write(directory, f"{settings} {digest}", write)
