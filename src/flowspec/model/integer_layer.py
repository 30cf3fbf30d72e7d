"""One layer of a model on the integer kernel: all of it but its attention, for any rows, each by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flowspec.model import integer_kernel
from flowspec.model.integer_experts import IntegerExperts
from flowspec.model.integer_matrix import Floats
from flowspec.model.layer_tensors import LayerTensors
from flowspec.model.packed import Bits
from flowspec.model.source import TensorSource

_NO_NORM = np.empty(0, np.float32)


class Heads(NamedTuple):
    """What attention reads of some rows."""

    query: Floats  # [n, heads, d]
    key: Floats  # [n, kv_heads, d]
    value: Floats


class IntegerLayer:
    """Rows pass ``heads``, attention, and ``rest``."""

    def __init__(self, source: TensorSource, prefix: str, layer: Any, bits: Bits) -> None:
        """``layer``: transformers' module, without values; ``prefix``: of its tensors' names.

        Raises ``ModelError`` for what the source does not hold, or the kernel does not compute.
        """
        tensors = LayerTensors(source, prefix, layer, bits)
        attention = layer.self_attn
        self.scaling: float = attention.scaling  # of attention's scores
        self._is_turned = bool(getattr(attention, "use_rope", True))  # of SmolLM3, some layers are not
        self._eps = np.float32(source.config.rms_norm_eps)
        self._multiplier = np.float32(getattr(layer, "residual_multiplier", 1))
        self._norm = tensors.norm("input_layernorm")
        self._query_norm, self._key_norm = (tensors.norm(f"self_attn.{name}_norm") for name in "qk")
        if tensors.has("self_attn.qkv_proj"):
            num_heads, num_kv_heads = source.config.num_attention_heads, source.config.num_key_value_heads
            heights = [count * attention.head_dim for count in (num_heads, num_kv_heads, num_kv_heads)]
            self._heads = tensors.matrix("self_attn.qkv_proj", heights=heights)
        else:
            self._heads = tensors.matrix(*(f"self_attn.{name}_proj" for name in "qkv"))
        self._output = tensors.matrix("self_attn.o_proj")
        # Behind attention, before the rest, behind the rest: two of these are in few models.
        has_all = tensors.has("pre_feedforward_layernorm")
        self._attended_norm = tensors.norm("post_attention_layernorm") if has_all else _NO_NORM
        self._rest_norm = tensors.norm("pre_feedforward_layernorm" if has_all else "post_attention_layernorm")
        self._last_norm = tensors.norm("post_feedforward_layernorm")
        has_experts = hasattr(layer.mlp, "experts")
        self._rest = IntegerExperts(tensors, "mlp", layer.mlp) if has_experts else IntegerGate(tensors)
        tensors.check_nothing_left()
        self.nbytes = self._heads.nbytes + self._output.nbytes + self._rest.nbytes

    def heads(self, hidden: Floats, rotation: tuple[Floats, Floats], heads: Heads, threads: int) -> None:
        """Rows [n, H], and the cosines and sines of their positions [n, r]; ``heads`` are written."""
        products = self._heads(normed(hidden, self._norm, self._eps), threads)
        turned = rotation[0].shape[1] if self._is_turned else 0
        norms = self._query_norm, self._key_norm, _NO_NORM
        for first, norm, width, found in zip(self._heads.starts, norms, (turned, turned, 0), heads, strict=True):
            cos, sin = (angles[:, :width] for angles in rotation)
            integer_kernel.turn(products, first, norm, self._eps, cos, sin, found)

    def rest(self, hidden: Floats, attended: Floats, threads: int) -> None:
        """Rows [n, H], which are written, and what they have attended to [n, heads * d]."""
        products = self._output(attended, threads)
        integer_kernel.add(products, self._attended_norm, self._eps, self._multiplier, hidden)
        products = self._rest(normed(hidden, self._rest_norm, self._eps), threads)
        integer_kernel.add(products, self._last_norm, self._eps, self._multiplier, hidden)


def normed(rows: Floats, weight: Floats, eps: np.float32) -> Floats:
    """[n, H], by an RMS norm."""
    found = np.empty(rows.shape, np.float32)
    integer_kernel.normalise(rows, weight, eps, found)
    return found


class IntegerGate:
    """What rows run through behind attention, where there are no experts: down(f(gate) * up)."""

    def __init__(self, tensors: LayerTensors) -> None:
        """Raises as ``IntegerLayer`` does."""
        self._is_gelu = tensors.is_gelu
        if tensors.has("mlp.gate_up_proj"):
            self._gate_up = tensors.matrix("mlp.gate_up_proj", heights=[tensors.source.config.intermediate_size] * 2)
        else:
            self._gate_up = tensors.matrix("mlp.gate_proj", "mlp.up_proj")
        self._down = tensors.matrix("mlp.down_proj")
        self.nbytes = self._gate_up.nbytes + self._down.nbytes

    def __call__(self, rows: Floats, threads: int) -> Floats:
        """[n, H] -> [n, H], with what fills up its last block."""
        gated = np.empty((len(rows), self._down.num_inputs), np.float32)
        integer_kernel.gate(self._gate_up(rows, threads), self._gate_up.starts[1], self._is_gelu, gated)
        return self._down(gated, threads)
