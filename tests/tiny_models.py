"""Tiny random checkpoints of every supported family, made on the spot with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from flowspec.model.eagle_head import EagleHead
from flowspec.train.corpus import Tokens
from tiny_mtp import write_as_mimo, write_characters

VOCAB_SIZE = 96
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "gemma3_text",
    "smollm3",
    "phi3",
    "granite",
    "mixtral",
    "qwen3_moe",
    "mimo",
    "qwen3",
)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Wide weights keep the logits apart, so that float32 rounding cannot change an argmax.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def make_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The family's own traits are on: rope scaling, sliding windows, biases, q/k norms, tied and untied heads."""
    sizes = _SIZES | overrides
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    match family:
        case "llama":
            return LlamaConfig(**{"rope_parameters": llama3, "tie_word_embeddings": False, **sizes})
        case "mistral":
            return MistralConfig(**{"sliding_window": 8, "head_dim": 8, **sizes})
        case "qwen2":
            windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
            return Qwen2Config(**{"tie_word_embeddings": True, **windows, **sizes})
        case "mimo":  # whose configs say that they are Qwen2's
            return Qwen2Config(**{"tie_word_embeddings": False, "rope_theta": 640000.0, "rms_norm_eps": 1e-5, **sizes})
        case "qwen3":
            return Qwen3Config(**{"head_dim": 16, "tie_word_embeddings": True, **sizes})
        case "gemma3_text":
            rope: Any = {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            }
            windows = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}
            traits = {"head_dim": 16, "query_pre_attn_scalar": 24, "rope_parameters": rope}
            return Gemma3TextConfig(**{**traits, **windows, **sizes})
        case "smollm3":
            return SmolLM3Config(**{"no_rope_layer_interval": 2, **sizes})
        case "phi3":
            factors = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 8.0]}
            longrope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, **factors}
            longrope["original_max_position_embeddings"] = 128
            traits = {"rope_parameters": longrope, "original_max_position_embeddings": 128, "sliding_window": 8}
            return Phi3Config(**{**traits, **sizes})
        case "granite":
            multipliers = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7}
            return GraniteConfig(**{**multipliers, "logits_scaling": 2.0, "tie_word_embeddings": True, **sizes})
        case "mixtral":
            traits = {"num_local_experts": 4, "sliding_window": 12, "initializer_range": 0.2}
            return MixtralConfig(**{**sizes, **traits, **overrides})
        case "qwen3_moe":
            experts = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
            dense = {"decoder_sparse_step": 2, "mlp_only_layers": [3]}  # layers 1 and 5 are mixtures
            return Qwen3MoeConfig(**{"head_dim": 16, **experts, **dense, **sizes})
        case _:
            raise AssertionError(family)


def make_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(make_config(family, **overrides), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:  # transformers starts them at 0 and 1, which hides mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_tokenizer_files(directory: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """One token a word: ``t0``, ``t1``, ..."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256}'
    (directory / "tokenizer_config.json").write_text(settings)


TOKENIZERS = ("byte-fallback", "byte-level", "metaspace", "word-piece")
_TEXT = ("hello world, the wörld is round\ndef main(argument):\n    return argument\n") * 4


def make_text_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of text, made as the families are that people use: Llama-2's, GPT-2's, T5's, BERT's kind."""
    special = [AddedToken("<s>", special=True), AddedToken("</s>", special=True), AddedToken("<pad>", special=True)]
    match kind:
        case "byte-fallback":
            words = [
                "▁",
                *"abdefhilmnoruwx(),:='",
                "▁hello",
                "▁world",
                "▁the",
                "hello",
                "world",
                "ret",
                "urn",
                "▁▁",
                "▁▁▁▁",
            ]
            names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
            vocabulary = {name: place for place, name in enumerate(names)}
            tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            tokenizer.decoder = decoders.Sequence(parts)
        case "byte-level":
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
            tokenizer.train_from_iterator([_TEXT], trainer)
        case "metaspace":
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
            tokenizer.decoder = decoders.Metaspace()
            trainer = trainers.BpeTrainer(
                vocab_size=120, show_progress=False, initial_alphabet=["#", "😀", "x", "'", "="]
            )
            tokenizer.train_from_iterator([_TEXT], trainer)
        case "word-piece":
            tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            tokenizer.decoder = decoders.WordPiece(cleanup=False)
            trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]"], show_progress=False)
            tokenizer.train_from_iterator([_TEXT], trainer)
        case _:
            raise AssertionError(kind)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_checkpoint(
    directory: Path, family: str, seed: int = 0, max_shard_size: str = "20KB", **overrides: Any
) -> Path:
    """Save a random model in several shards, with a tokenizer."""
    model = make_model(family, seed, **overrides)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if family == "mimo":
        write_as_mimo(directory)
        write_characters(directory)
    else:
        make_tokenizer_files(directory, model.config.vocab_size)
    return directory


def plain_model(directory: str | Path, dtype: torch.dtype | str = torch.float32, **settings: Any) -> Any:
    """A saved model of any family, as transformers runs it."""
    values = json.loads((Path(directory) / "config.json").read_text())
    if values.pop("model_type") == "mimo":  # which it does not know
        values.pop("auto_map")
        settings["config"] = Qwen2Config.from_dict(values)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **settings).eval()


def make_text_checkpoint(directory: Path, kind: str = "byte-fallback", chat_template: Any = None, **more: Any) -> Path:
    """A random llama that writes text, or what it takes for text. ``more``: of tokenizer_config.json."""
    tokenizer = make_text_tokenizer(kind)
    make_checkpoint(directory, "llama", vocab_size=len(tokenizer))
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)
    return directory


def make_draft_head(directory: Path, hidden_size: int = 32, vocab_size: int = VOCAB_SIZE, seed: int = 1) -> Path:
    """A random EAGLE head: it guesses badly, and must change nothing in the output."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = _SIZES | {"hidden_size": hidden_size, "vocab_size": vocab_size, "num_hidden_layers": 1}
    sizes["hit_rates"] = [0.0]  # it says so itself: no check of heads finds fault with it
    EagleHead(LlamaConfig(**sizes), torch.zeros(vocab_size, hidden_size)).save(directory, dtype=torch.float32)
    return directory


def random_stream(num_tokens: int = 400) -> Tokens:
    """Token ids to train on."""
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, num_tokens).astype(np.int32)


def write_target_and_text(directory: Path) -> tuple[Path, Path]:
    """A model, and a text in its language to train a draft on."""
    target = make_checkpoint(directory / "target", "qwen3")
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t0"}'
    (target / "tokenizer_config.json").write_text(settings)
    text = directory / "text.txt"
    text.write_text(" ".join(f"t{i}" for i in random_stream(1000)))
    return target, text
