"""Tiny quantised checkpoints in the published forms, written value by value, with the models that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from tiny_models import make_model, make_tokenizer_files

GROUP = 32
_AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours comes first, second, ... in a word
_FP8_BLOCK = (24, 32)

Array = NDArray[np.int64]
Written = tuple[Tensor, dict[str, Tensor]]  # what the weight is, and its parts


def words(values: Array, bits: int) -> Tensor:
    """[n, m] -> int32 [n, m * bits / 32], the first value in the lowest bits."""
    per_word = 32 // bits
    packed = np.zeros((values.shape[0], values.shape[1] // per_word), dtype=np.uint32)
    for column in range(values.shape[1]):
        packed[:, column // per_word] |= values[:, column].astype(np.uint32) << np.uint32(bits * (column % per_word))
    return torch.from_numpy(packed.view(np.int32))


def rounded(weight: Tensor, bits: int, groups: Array, symmetric: bool) -> tuple[Array, Tensor, Array, Tensor]:
    """Codes [N, K] from 0 on, scales [N, G] in float16, zero points [N, G], and what all that means."""
    most, num_groups = 2**bits - 1, int(groups.max()) + 1
    codes = np.zeros(weight.shape, dtype=np.int64)
    zeros = np.zeros((len(weight), num_groups), dtype=np.int64)
    scales, meant = torch.zeros(len(weight), num_groups), torch.zeros_like(weight)
    for row in range(len(weight)):
        for group in range(num_groups):
            own = np.flatnonzero(groups == group)
            values = weight[row, own]
            low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
            low, high = (-max(-low, high), max(-low, high)) if symmetric else (low, high)
            scale = float(torch.tensor((high - low) / most).half()) or 1.0
            zero = 2 ** (bits - 1) if symmetric else min(max(round(-low / scale), 1), most)
            for place, value in zip(own, values.tolist(), strict=True):
                codes[row, place] = min(max(round(value / scale) + zero, 0), most)
                meant[row, place] = (codes[row, place] - zero) * scale
            zeros[row, group], scales[row, group] = zero, scale
    return codes, scales.half(), zeros, meant


def gptq(weight: Tensor, bits: int = 4, is_mixed: bool = False, offset: int = 1, symmetric: bool = False) -> Written:
    groups = np.arange(weight.shape[1]) // GROUP
    if is_mixed:
        groups = np.random.default_rng(weight.shape[1]).permutation(groups)
    codes, scales, zeros, meant = rounded(weight, bits, groups, symmetric)
    parts = {
        "qweight": words_down(codes.T, bits),
        "qzeros": words(zeros.T - offset, bits),
        "scales": scales.T.contiguous(),
        "g_idx": torch.from_numpy(groups).int(),
    }
    return meant, parts


def words_down(values: Array, bits: int) -> Tensor:
    """[n, m] -> int32 [n * bits / 32, m]."""
    return words(values.T, bits).T.contiguous()


def awq(weight: Tensor) -> Written:
    codes, scales, zeros, meant = rounded(weight, 4, np.arange(weight.shape[1]) // GROUP, symmetric=False)

    def interleaved(values: Array) -> Tensor:
        order = [start + place for start in range(0, values.shape[1], 8) for place in _AWQ_PLACES]
        return words(values[:, order], 4)

    return meant, {
        "qweight": interleaved(codes.T),
        "qzeros": interleaved(zeros.T),
        "scales": scales.T.contiguous(),
    }


def pack_quantized(weight: Tensor, symmetric: bool = True) -> Written:
    codes, scales, zeros, meant = rounded(weight, 4, np.arange(weight.shape[1]) // GROUP, symmetric)
    parts = {
        "weight_packed": words(codes, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return meant, parts if symmetric else {**parts, "weight_zero_point": words_down(zeros, 4)}


def int_quantized(weight: Tensor) -> Written:
    scales = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16()
    codes = (weight / scales.float()).round().clamp(-128, 127)
    return codes * scales.float(), {"weight": codes.to(torch.int8), "weight_scale": scales}


def float_quantized(weight: Tensor) -> Written:
    scale = (weight.abs().amax() / 448).reshape(1)
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes.float() * scale, {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}


def fp8(weight: Tensor) -> Written:
    """Blocks, of which the last ones may be smaller."""
    rows, inputs = (np.arange(size) // block for size, block in zip(weight.shape, _FP8_BLOCK, strict=True))
    scales = torch.zeros(int(rows.max()) + 1, int(inputs.max()) + 1)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            scales[i, j] = weight[rows == i][:, inputs == j].abs().max() / 448
    whole = scales[rows][:, inputs]
    codes = (weight / whole).to(torch.float8_e4m3fn)
    return codes.float() * whole, {"weight": codes, "weight_scale_inv": scales}


def _packed_config(symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    return _compressed("pack-quantized", weights)


def _compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    named = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return {**named, "config_groups": groups, "ignore": ["lm_head"]}


_GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
FORMS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Written]]] = {
    "gptq": (_GPTQ, gptq),
    "gptq, act-order": ({**_GPTQ, "desc_act": True}, lambda weight: gptq(weight, is_mixed=True)),
    "gptq_v2, 8 bits": (
        {**_GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"},
        lambda weight: gptq(weight, bits=8, offset=0, symmetric=True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "pack-quantized": (_packed_config(symmetric=True), pack_quantized),
    "pack-quantized, zero points": (_packed_config(symmetric=False), lambda weight: pack_quantized(weight, False)),
    "int-quantized": (_compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}), int_quantized),
    "float-quantized": (_compressed("float-quantized", {"num_bits": 8, "type": "float"}), float_quantized),
    "fp8": ({"quant_method": "fp8", "weight_block_size": list(_FP8_BLOCK)}, fp8),
}


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """All weights by the names in files, which have each expert's by themselves; parts of the model's own memory."""
    for name, parameter in model.named_parameters():
        stem, _, kind = name.rpartition(".")
        if parameter.ndim < 3:
            yield name, parameter
            continue
        for expert, matrix in enumerate(parameter):
            if kind == "gate_up_proj":
                gate, up = matrix.chunk(2)
                yield from ((f"{stem}.{expert}.gate_proj.weight", gate), (f"{stem}.{expert}.up_proj.weight", up))
            else:
                yield f"{stem}.{expert}.{kind}.weight", matrix


def write_quantised(directory: Path, form: str, family: str = "qwen2", **overrides: Any) -> PreTrainedModel:
    """A random model whose layers' matrices are quantised; returned is the one in float32 that it stands for."""
    config, quantise = FORMS[form]
    model = make_model(family, **{"num_hidden_layers": 3, **overrides})
    model.config.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    tensors: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in _matrices(model):
            if name.endswith("_proj.weight"):
                meant, parts = quantise(parameter)
                parameter.copy_(meant)
                tensors |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
            else:
                tensors[name] = parameter.clone()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer_files(directory, model.config.vocab_size)
    return model
