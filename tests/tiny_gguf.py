"""Tiny GGUF files of the supported architectures, written with the ``gguf`` package as llama.cpp's converter does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedTokenizerFast

from flowspec.model.gguf_architectures import architecture_of
from tiny_models import make_config, make_model, make_text_tokenizer

# llama.cpp's names, but for Mixtral, which is a llama with experts there.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "smollm3", "granite", "phi3", "qwen3moe", "mixtral")
_MODEL_TYPES = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}  # where they are not the same
_INTERLEAVED = ("llama", "mixtral", "granite", "smollm3")
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def stored_name(name: str, family: str = "llama") -> str:
    """The file's name of transformers' tensor."""
    module, _, end = name.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{end}"
    _, _, index, inner = module.split(".", 3)
    values = {"general.architecture": family}
    if family == "mixtral":
        values = {"general.architecture": "llama", "llama.expert_count": 4}
    short = {long: short for short, long in architecture_of(values, Path()).layer_names.items()}
    return f"blk.{index}.{short[inner]}.{end}"


def interleaved(weight: Any, num_heads: int) -> Any:
    """Llama's queries and keys, as llama.cpp wants the halves of their heads."""
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _traits(family: str) -> dict[str, Any]:
    """What a file can say, or leaves unsaid."""
    plain: dict[str, Any] = {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    if family == "qwen2":
        plain["use_sliding_window"] = False
    if family == "gemma3":
        full = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0}
        local = {"rope_type": "default", "rope_theta": 10000.0}  # as every file of this family leaves unsaid
        plain["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
        plain |= {"num_hidden_layers": 7, "layer_types": None, "query_pre_attn_scalar": 16}
    if family == "smollm3":
        plain["no_rope_layer_interval"] = 4
    if family == "qwen3moe":
        plain |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 4}
    if family == "phi3":  # with a window longer than the texts here, which llama.cpp leaves out
        plain |= {"rope_parameters": make_config("phi3").rope_parameters, "sliding_window": 200}
        plain["rope_parameters"] |= {name: [1.0, 1.2, 1.5, 2.0, 3.0, 4.0] for name in ("short_factor", "long_factor")}
    if family == "mixtral":
        plain["sliding_window"] = None
    return plain


def _add_traits(writer: gguf.GGUFWriter, family: str, config: Any) -> None:
    """What only some architectures say."""
    if family in ("qwen3", "qwen3moe", "gemma3"):
        writer.add_key_length(config.head_dim)
    if family in ("gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if family == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["full_attention"]["factor"])
    if family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if family in ("qwen3moe", "mixtral"):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if family == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if family == "phi3":
        rope, original = config.rope_parameters, config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], dtype=np.float32))


def _stored_tensors(model: Any, family: str) -> Iterator[tuple[str, Any]]:
    """By the file's names: experts lie kind by kind."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        kind = name.split(".")[-2]
        if family in _INTERLEAVED and kind in heads:
            array = interleaved(array, heads[kind])
        if family == "gemma3" and name.endswith("norm.weight"):
            array = array + 1
        layer, _, inner = name.partition(".mlp.")
        if inner == "gate.weight":
            yield f"{layer.replace('model.layers', 'blk')}.ffn_gate_inp.weight", array
        elif inner == "experts.gate_up_proj":
            for kind, half in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                yield f"{layer.replace('model.layers', 'blk')}.ffn_{kind}_exps.weight", half
        elif inner == "experts.down_proj":
            yield f"{layer.replace('model.layers', 'blk')}.ffn_down_exps.weight", array
        else:
            yield stored_name(name, family), array


def write_gguf(
    path: Path,
    family: str = "llama",
    kind: Kind = Kind.F32,
    tokenizer: PreTrainedTokenizerFast | Callable[[gguf.GGUFWriter], None] | None = None,
    values: dict[str, Any] | None = None,
    split: tuple[int, int] | None = None,
    other_kinds: Mapping[str, Kind] | None = None,
    **overrides: Any,
) -> Any:
    """Write a random model; return it, as transformers has it. ``values``: of the metadata, as well.

    ``kind``: of matrices; ``other_kinds``: of some, by parts of their names. ``split``: the part's number and how many
    there are; each has every second tensor.
    """
    plain = _traits(family)
    model: Any = make_model(_MODEL_TYPES.get(family, family), **plain | overrides)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama" if family == "mixtral" else family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        _add_tokenizer(writer, tokenizer)
    elif tokenizer is not None:
        tokenizer(writer)
    for name, value in (values or {}).items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    if split is not None:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
    _add_traits(writer, family, config)
    tensors = list(_stored_tensors(model, family))
    for name, array in tensors if split is None else tensors[split[0] :: split[1]]:
        other = next((other for part, other in (other_kinds or {}).items() if part in name), kind)
        of = other if array.ndim >= 2 else Kind.F32
        data = quantised(np.ascontiguousarray(array), of)
        writer.add_tensor(name, data, raw_dtype=None if of == Kind.F32 else of)
    _write(writer)
    return model


def quantised(array: Any, kind: Kind) -> Any:
    """As the file has it [..., bytes of a row]."""
    if kind == Kind.F32:
        return array
    return _quantised_q4_k(array) if kind == Kind.Q4_K else gguf.quantize(array, kind)


def _quantised_q4_k(array: Any) -> Any:
    """Rounded to the nearest, which the ``gguf`` package does not do for this kind."""
    groups = array.reshape(-1, 8, 32)  # [blocks, groups, inputs]
    minima = np.maximum(-groups.min(axis=2), 0)
    spans = (groups.max(axis=2) + minima) / 15
    factors = np.stack([spans.max(axis=1), minima.max(axis=1)], axis=1).astype(np.float16) / np.float16(63)
    divisors = factors.astype(np.float32)[..., None]
    scales = np.clip(np.ceil(spans / divisors[:, 0]), 0, 63).astype(np.uint8)
    shifts = np.clip(np.round(minima / divisors[:, 1]), 0, 63).astype(np.uint8)
    steps = np.maximum(divisors[:, 0] * scales, 1e-9)[..., None]
    codes = np.clip(np.round((groups + (divisors[:, 1] * shifts)[..., None]) / steps), 0, 15).astype(np.uint8)
    upper = [(each[:, :4] | each[:, 4:] >> 4 << 6) for each in (scales, shifts)]
    mixed = (scales[:, 4:] & 15) | (shifts[:, 4:] & 15) << 4
    halves = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(len(groups), -1)
    blocks = np.concatenate([factors.view(np.uint8), *upper, mixed, halves], axis=1)
    return blocks.reshape(*array.shape[:-1], -1)


def rewrite(path: Path, plain: Path, values: dict[str, Any], tensors: dict[str, Any] | None = None) -> None:
    """A llama's file again, with other metadata, and with more tensors."""
    reader = gguf.GGUFReader(plain)
    writer = gguf.GGUFWriter(path, values.get("general.architecture", "llama"))
    for name, field in reader.fields.items():
        if name.startswith("llama.") and name not in values:
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, value in values.items():
        if name.startswith("llama."):
            kind = gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.UINT32
            writer.add_key_value(name, value, kind)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    _write(writer)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_text_gguf(path: Path, kind: Kind = Kind.F32, pre: str = "smollm", family: str = "llama", **more: Any) -> Any:
    """With a byte-level tokenizer and a chat template."""
    tokenizer = make_text_tokenizer("byte-level")
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    values = {"tokenizer.ggml.pre": pre}
    return write_gguf(path, family, kind, tokenizer, values, vocab_size=len(tokenizer), **more)


def write_gemma_gguf(path: Path) -> list[str]:
    """With a tokenizer and a chat template as Gemma 3's files have them; its tokens."""
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    own = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    words = ["  ", "\u2581", *"helowrd", "he", "ll", "hell", "hello", "\u2581w", "or", "\u2581wor", "ld", "\u2581world"]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([*own, *bytes_of, *words])
        writer.add_token_scores([-1000.0] * len([*own, *bytes_of, *words]))
        writer.add_token_types([3] * len(own) + [6] * len(bytes_of) + [1] * len(words))
        for name, number in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_space_prefix(False)
        writer.add_chat_template(
            "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }} {{ m.content }}{% endfor %}"
        )

    tokens = [*own, *bytes_of, *words]
    write_gguf(path, "gemma3", tokenizer=add, vocab_size=len(tokens))
    return tokens


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    words = sorted(tokenizer.get_vocab(), key=lambda word: tokenizer.get_vocab()[word])
    special = set(tokenizer.all_special_tokens)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in special else 1 for word in words])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<s>"))
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("</s>"))
    writer.add_chat_template(str(tokenizer.chat_template))
