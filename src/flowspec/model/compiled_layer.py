"""One layer of a model as compiled kernels read it."""

from __future__ import annotations

from typing import Any

import numpy as np

from flowspec.model import layer_kernel
from flowspec.model.compiled_experts import put_experts
from flowspec.model.compiled_matrix import CompiledMatrix
from flowspec.model.compiled_record import LayerRecord
from flowspec.model.layer_tensors import LayerTensors
from flowspec.model.packed import Precision
from flowspec.model.slot_kernel import factor_of
from flowspec.model.source import TensorSource

_NO_NORM = np.empty(0, np.float32)


def load_layer(source: TensorSource, prefix: str, layer: Any, precision: Precision) -> LayerRecord:
    """``layer``: transformers' module, without values; ``prefix``: of its tensors' names.

    Raises ``ModelError`` for what the source does not hold, or the kernels do not compute.
    """
    tensors, record = LayerTensors(source, prefix, layer, precision), LayerRecord()
    record.put_float(layer_kernel.EPS, np.float32(source.config.rms_norm_eps))
    record.put_float(layer_kernel.MULTIPLIER, np.float32(getattr(layer, "residual_multiplier", 1)))
    _put_attention(record, tensors, layer.self_attn)
    if hasattr(layer.mlp, "experts"):
        put_experts(record, tensors, "mlp", layer.mlp)
    else:
        _put_gate(record, tensors)
    _put_norms(record, tensors)
    tensors.check_nothing_left()
    return record


def _put_attention(record: LayerRecord, tensors: LayerTensors, attention: Any) -> None:
    record.put_float(layer_kernel.FACTOR, factor_of(attention.scaling))
    record.put(layer_kernel.IS_TURNED, getattr(attention, "use_rope", True))  # of SmolLM3, some layers are not
    heads, output = _heads_of(tensors, attention.head_dim), tensors.matrix("self_attn.o_proj")
    record.put(layer_kernel.STARTS, *heads.starts)
    record.put_matrix(layer_kernel.HEADS, heads.lanes, heads.size)
    record.put_matrix(layer_kernel.OUTPUT, output.lanes, output.size)


def _heads_of(tensors: LayerTensors, head_dim: int) -> CompiledMatrix:
    """What makes queries, keys and values."""
    if not tensors.has("self_attn.qkv_proj"):
        return tensors.matrix(*(f"self_attn.{name}_proj" for name in "qkv"))
    config = tensors.source.config
    counts = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    return tensors.matrix("self_attn.qkv_proj", heights=[count * head_dim for count in counts])


def _put_gate(record: LayerRecord, tensors: LayerTensors) -> None:
    """What rows run through behind attention, where there are no experts: down(f(gate) * up)."""
    if tensors.has("mlp.gate_up_proj"):
        gate_up = tensors.matrix("mlp.gate_up_proj", heights=[tensors.source.config.intermediate_size] * 2)
    else:
        gate_up = tensors.matrix("mlp.gate_proj", "mlp.up_proj")
    down = tensors.matrix("mlp.down_proj")
    record.put_matrix(layer_kernel.GATE_UP, gate_up.lanes, gate_up.size)
    record.put_matrix(layer_kernel.DOWN, down.lanes, down.size)
    record.put(layer_kernel.IS_GELU, tensors.is_gelu, gate_up.starts[1], down.num_inputs)


def _put_norms(record: LayerRecord, tensors: LayerTensors) -> None:
    """By what a layer's norms multiply, each [H], those of heads [d]; empty where there is none."""
    before, behind = tensors.norm("input_layernorm"), tensors.norm("post_attention_layernorm")
    norms = [before, _NO_NORM, behind, _NO_NORM]
    if tensors.has("pre_feedforward_layernorm"):
        inner, given = (tensors.norm(f"{name}_feedforward_layernorm") for name in ("pre", "post"))
        norms = [before, behind, inner, given]
    of_heads = [tensors.norm(f"self_attn.{name}_norm") for name in "qk"]
    record.put_arrays(layer_kernel.NORMS, [*norms, *of_heads])
