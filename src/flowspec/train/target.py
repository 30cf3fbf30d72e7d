"""Trains the demo target: a small Llama with its own byte-level BPE tokenizer, from nothing, on a CPU.

Knows the recipe and the checkpoint format of the target; nothing of drafting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from flowspec.train.corpus import Tokens, windows
from flowspec.train.loop import (
    TrainingProgress,
    learning_rate_factor,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
    write_json,
)

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0


@dataclass(frozen=True)
class TargetRecipe:
    """Sizes, data mixture and optimiser of the target; the defaults are the shipped model's."""

    num_tokens: int = 7_500_000  # training tokens in all, the mixture's tests included
    batch_tokens: int = 8192  # tokens of one optimiser step
    context_len: int = 512  # tokens of a training window at first
    long_context_len: int = 1024  # tokens of a window at the end; the model's context
    long_share: float = 0.15  # share of the tokens that is trained on long windows
    test_share: float = 0.25  # share of the windows that come from the library's tests
    vocab_size: int = 2048
    num_layers: int = 8
    hidden_size: int = 256
    intermediate_size: int = 688
    num_heads: int = 4
    num_kv_heads: int = 2
    matrix_learning_rate: float = 0.02  # Muon, for the layers' matrices
    learning_rate: float = 3e-3  # AdamW, for embedding and norms
    weight_decay: float = 0.1  # of the matrices, times the learning rate
    warmup_share: float = 0.03  # share of the run with rising learning rate
    seed: int = 0

    @property
    def num_steps(self) -> int:
        return max(1, self.num_tokens // self.batch_tokens)

    def model_config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.long_context_len,
            tie_word_embeddings=True,
            bos_token_id=END_OF_TEXT_ID,
            eos_token_id=END_OF_TEXT_ID,
            pad_token_id=END_OF_TEXT_ID,
        )


@dataclass(frozen=True)
class TargetData:
    """Token streams: the library's modules, its tests (may be empty), and modules that are never trained on."""

    train: Tokens
    tests: Tokens
    held_out: Tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> FastTokenizer:
    """Byte-level BPE: every text comes back unchanged, and no token is added on its own."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: FastTokenizer, directory: Path, context_len: int) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_len,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    write_atomically(directory / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    write_json(directory / "tokenizer_config.json", settings)


def save_target(model: LlamaForCausalLM, directory: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (float16, the tied head left out)."""
    weights = {
        name: tensor.detach().to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    config.pop("_name_or_path", None)
    end = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID}
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", end)
    write_atomically(
        directory / "model.safetensors", lambda path: save_file(weights, str(path), metadata={"format": "pt"})
    )


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by a Newton-Schulz iteration (Jordan et al. 2024); for matrices only.

    Matrices of one shape are orthogonalised in one batch: on a CPU the small products would otherwise dominate.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for matrix in group["params"]:
                by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
            for (num_rows, num_columns), matrices in by_shape.items():
                directions: list[Tensor] = []
                for matrix in matrices:
                    assert matrix.grad is not None, "every matrix takes part in the loss"
                    average = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                    average.lerp_(matrix.grad, 1 - group["momentum"])
                    directions.append(matrix.grad.lerp(average, group["momentum"]))
                scale = group["lr"] * math.sqrt(max(1.0, num_rows / num_columns))
                for matrix, update in zip(matrices, orthogonalise(torch.stack(directions)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update.to(matrix.dtype), alpha=-scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix in [N, R, C] near 1 (quintic Newton-Schulz, five rounds, bfloat16)."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = (matrices if wide else matrices.mT).to(torch.bfloat16)
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x if wide else x.mT


@dataclass
class _State:
    """Everything a checkpoint holds besides the recipe."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0

    def save(self, path: Path, recipe: TargetRecipe) -> None:
        state = {
            "recipe": asdict(recipe),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        save_checkpoint(path, state)

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]


def train_target(
    recipe: TargetRecipe,
    data: TargetData,
    work_dir: Path,
    *,
    compiled: bool = True,
    checkpoint_interval_s: float = 180.0,
    on_checkpoint: Callable[[LlamaForCausalLM], None] | None = None,
) -> LlamaForCausalLM:
    """Train to the end of the recipe and return the model; goes on from ``work_dir/target.pt`` when it is there.

    ``on_checkpoint`` is called with the current model after each checkpoint. Every batch and learning rate is a
    function of the step alone, so an interrupted run ends in the same weights as an uninterrupted one.
    """
    torch.manual_seed(recipe.seed)
    state = _new_state(recipe)
    checkpoint = work_dir / "target.pt"
    saved = load_checkpoint(checkpoint, asdict(recipe))
    if saved is not None:
        state.restore(saved)
    forward = torch.compile(next_token_loss) if compiled else next_token_loss
    base_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in _new_state(recipe).optimizers]
    last_save = time.monotonic()
    with TrainingProgress("target", recipe.num_tokens, state.step * recipe.batch_tokens) as progress:
        while state.step < recipe.num_steps:
            factor = learning_rate_factor((state.step + 0.5) / recipe.num_steps, recipe.warmup_share)
            for optimizer, rates in zip(state.optimizers, base_rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
            with torch.autocast("cpu", torch.bfloat16, enabled=compiled):
                loss = forward(state.model, batch_at(recipe, data, state.step))
            loss.backward()
            for optimizer in state.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            state.step += 1
            progress.update(state.step * recipe.batch_tokens, loss=loss.item())
            if time.monotonic() - last_save > checkpoint_interval_s or state.step == recipe.num_steps:
                state.save(checkpoint, recipe)
                if on_checkpoint is not None:
                    on_checkpoint(state.model)
                last_save = time.monotonic()
    return state.model


def next_token_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean nats per token of rows [B, T + 1]."""
    features = model.model(input_ids=rows[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(features).float()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(target: PreTrainedModel, tokens: Tokens, window_len: int) -> float:
    """Mean nats per token over consecutive windows; the last, incomplete window counts too."""
    model: Any = target
    total = 0.0
    for begin in range(0, len(tokens) - 1, window_len):
        row = torch.from_numpy(tokens[begin : begin + window_len + 1]).long().to(model.device)
        logits = model(input_ids=row[None, :-1], use_cache=False).logits[0].float()
        total += F.cross_entropy(logits, row[1:], reduction="sum").item()
    return total / (len(tokens) - 1)


def batch_at(recipe: TargetRecipe, data: TargetData, step: int) -> Tensor:
    """The batch of one step, int64 [B, T + 1]: modules and tests in the recipe's shares, long windows at the end."""
    first_long_step = round(recipe.num_steps * (1 - recipe.long_share))
    is_long = step >= first_long_step
    length = recipe.long_context_len if is_long else recipe.context_len
    index = step - first_long_step if is_long else step
    num_rows = max(1, recipe.batch_tokens // length)
    num_tests = round(num_rows * recipe.test_share) if len(data.tests) else 0
    parts = [(data.train, num_rows - num_tests, 0), (data.tests, num_tests, 1)]
    rows = [
        windows(tokens, length + 1, index * count, count, seed=recipe.seed + 2 * pool + is_long)
        for tokens, count, pool in parts
        if count
    ]
    return torch.cat([torch.from_numpy(part).long() for part in rows])


def _new_state(recipe: TargetRecipe) -> _State:
    model = LlamaForCausalLM(recipe.model_config())
    with torch.no_grad():  # residual branches start small, so that depth does not blow up the first steps
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(1 / math.sqrt(2 * recipe.num_layers))
    layer_matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    muon = Muon(layer_matrices, recipe.matrix_learning_rate, momentum=0.95, weight_decay=recipe.weight_decay)
    adam = torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return _State(model, [muon, adam])
