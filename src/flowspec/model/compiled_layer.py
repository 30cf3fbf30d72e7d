"""One layer of a model on compiled kernels: all of it but its attention, for any rows, each by itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flowspec.model import layer_kernel, row_kernel
from flowspec.model.compiled_experts import CompiledExperts
from flowspec.model.compiled_matrix import Floats
from flowspec.model.layer_tensors import LayerTensors
from flowspec.model.packed import Precision
from flowspec.model.source import TensorSource
from flowspec.model.team import Mailbox

_NO_NORM = np.empty(0, np.float32)


class Heads(NamedTuple):
    """What attention reads of some rows."""

    query: Floats  # [n, heads, d]
    key: Floats  # [n, kv_heads, d]
    value: Floats


class CompiledLayer:
    """Rows pass ``heads``, attention, and ``rest``."""

    def __init__(self, source: TensorSource, prefix: str, layer: Any, precision: Precision) -> None:
        """``layer``: transformers' module, without values; ``prefix``: of its tensors' names.

        Raises ``ModelError`` for what the source does not hold, or the kernel does not compute.
        """
        tensors = LayerTensors(source, prefix, layer, precision)
        attention = layer.self_attn
        self.scaling: float = attention.scaling  # of attention's scores
        self._is_turned = bool(getattr(attention, "use_rope", True))  # of SmolLM3, some layers are not
        self._eps = np.float32(source.config.rms_norm_eps)
        self._multiplier = np.float32(getattr(layer, "residual_multiplier", 1))
        if tensors.has("self_attn.qkv_proj"):
            num_heads, num_kv_heads = source.config.num_attention_heads, source.config.num_key_value_heads
            heights = [count * attention.head_dim for count in (num_heads, num_kv_heads, num_kv_heads)]
            self._heads = tensors.matrix("self_attn.qkv_proj", heights=heights)
        else:
            self._heads = tensors.matrix(*(f"self_attn.{name}_proj" for name in "qkv"))
        self._output = tensors.matrix("self_attn.o_proj")
        self._head_norms = tensors.norm("self_attn.q_norm"), tensors.norm("self_attn.k_norm"), _NO_NORM
        has_four = tensors.has("pre_feedforward_layernorm")
        self._norms = Norms(
            tensors.norm("input_layernorm"),
            tensors.norm("post_attention_layernorm") if has_four else _NO_NORM,
            tensors.norm("pre_feedforward_layernorm" if has_four else "post_attention_layernorm"),
            tensors.norm("post_feedforward_layernorm") if has_four else _NO_NORM,
        )
        has_experts = hasattr(layer.mlp, "experts")
        self._inner = CompiledExperts(tensors, "mlp", layer.mlp) if has_experts else CompiledGate(tensors)
        tensors.check_nothing_left()
        norms = sum(norm.nbytes for norm in (*self._norms, *self._head_norms))
        self.nbytes = self._heads.nbytes + self._output.nbytes + self._inner.nbytes + norms

    def heads(self, hidden: Floats, rotation: tuple[Floats, Floats], heads: Heads, mailbox: Mailbox) -> None:
        """Rows [n, H], and the cosines and sines of their positions [n, r]; ``heads`` are written."""
        width = rotation[0].shape[1] if self._is_turned else 0
        weights = self._heads.lanes, self._heads.size, self._heads.starts, self._norms.before, self._head_norms
        layer_kernel.write_heads(mailbox, hidden, *weights, self._eps, *rotation, width, heads)

    def rest(self, hidden: Floats, attended: Floats, mailbox: Mailbox) -> None:
        """Rows [n, H], which are written, and what they have attended to [n, heads * d]."""
        norms, eps, multiplier = self._norms, self._eps, self._multiplier
        output = self._output.lanes, self._output.size
        if isinstance(self._inner, CompiledGate):
            layer_kernel.add_rest(mailbox, hidden, attended, *output, *self._inner.weights, norms, eps, multiplier)
            return
        layer_kernel.add_attended(mailbox, hidden, attended, *output, norms, eps, multiplier)
        given = self._inner(row_kernel.normalised(hidden, norms.inner, eps), mailbox)
        row_kernel.add(given, norms.given, eps, multiplier, hidden)


class Norms(NamedTuple):
    """By what a layer's norms multiply, each [H] or empty: of most models only the first and the third one."""

    before: Floats
    attended: Floats
    inner: Floats
    given: Floats


class CompiledGate:
    """What rows run through behind attention, where there are no experts: down(f(gate) * up)."""

    def __init__(self, tensors: LayerTensors) -> None:
        """Raises as ``CompiledLayer`` does."""
        if tensors.has("mlp.gate_up_proj"):
            gate_up = tensors.matrix("mlp.gate_up_proj", heights=[tensors.source.config.intermediate_size] * 2)
        else:
            gate_up = tensors.matrix("mlp.gate_proj", "mlp.up_proj")
        down = tensors.matrix("mlp.down_proj")
        self.nbytes = gate_up.nbytes + down.nbytes
        # As ``layer_kernel.add_rest`` takes them.
        of_gate_up = gate_up.lanes, gate_up.size, gate_up.starts[1], tensors.is_gelu
        self.weights = *of_gate_up, down.lanes, down.size, down.num_inputs
