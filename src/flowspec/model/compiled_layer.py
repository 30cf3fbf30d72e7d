"""One layer of a model for compiled kernels: what they read of it, and its experts, if it has any."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowspec.model import layer_kernel, row_kernel
from flowspec.model.compiled_experts import CompiledExperts
from flowspec.model.compiled_matrix import CompiledMatrix, Floats
from flowspec.model.layer_kernel import ARRAYS_EACH, MATRICES, NUM_FIELDS, NUMBERS_EACH
from flowspec.model.layer_tensors import LayerTensors
from flowspec.model.packed import Precision
from flowspec.model.slot_kernel import factor_of
from flowspec.model.source import TensorSource
from flowspec.model.team import Mailbox
from flowspec.model.team_code import ARRAYS, WORDS_EACH

_NO_NORM = np.empty(0, np.float32)


class CompiledLayer:
    """It keeps what its ``record`` tells of."""

    def __init__(self, source: TensorSource, prefix: str, layer: Any, precision: Precision) -> None:
        """``layer``: transformers' module, without values; ``prefix``: of its tensors' names.

        Raises ``ModelError`` for what the source does not hold, or the kernel does not compute.
        """
        tensors = LayerTensors(source, prefix, layer, precision)
        attention, config = layer.self_attn, source.config
        self._eps = np.float32(config.rms_norm_eps)
        self._multiplier = np.float32(getattr(layer, "residual_multiplier", 1))
        self._experts = CompiledExperts(tensors, "mlp", layer.mlp) if hasattr(layer.mlp, "experts") else None
        self._norms = _norms_of(tensors)
        self._matrices = {layer_kernel.HEADS: _heads_of(tensors, attention.head_dim)}
        self._matrices[layer_kernel.OUTPUT] = tensors.matrix("self_attn.o_proj")
        self.record: NDArray[np.int64] = np.zeros(NUM_FIELDS, np.int64)  # as ``layer_kernel`` describes a layer
        self._put(layer_kernel.EPS, self._eps)
        self._put(layer_kernel.MULTIPLIER, self._multiplier)
        self._put(layer_kernel.FACTOR, factor_of(attention.scaling))
        self.record[layer_kernel.IS_TURNED] = getattr(attention, "use_rope", True)  # of SmolLM3, some layers are not
        if self._experts is None:
            self._add_gate(tensors)
        starts = self._matrices[layer_kernel.HEADS].starts
        self.record[layer_kernel.STARTS : layer_kernel.STARTS + len(starts)] = starts
        for which, matrix in self._matrices.items():
            *arrays, kind, multiplier = matrix.lanes
            first = MATRICES + which * NUMBERS_EACH
            self.record[first : first + NUMBERS_EACH] = matrix.size, kind, multiplier
            for number, array in enumerate(arrays):
                self._tell_of(which * ARRAYS_EACH + number, array)
        for which, norm in self._norms.items():
            self._tell_of(which, norm)
        tensors.check_nothing_left()

    @property
    def has_experts(self) -> bool:
        """Kernels alone do not run it."""
        return self._experts is not None

    @property
    def nbytes(self) -> int:
        parts = [*self._matrices.values(), *self._norms.values()]
        return sum(part.nbytes for part in parts) + (self._experts.nbytes if self._experts else 0)

    def add_experts(self, hidden: Floats, mailbox: Mailbox) -> None:
        """To rows [n, H] behind attention, which are written."""
        assert self._experts is not None
        given = self._experts(row_kernel.normalised(hidden, self._norms[layer_kernel.INNER], self._eps), mailbox)
        row_kernel.add(given, self._norms[layer_kernel.GIVEN], self._eps, self._multiplier, hidden)

    def _add_gate(self, tensors: LayerTensors) -> None:
        """What rows run through behind attention, where there are no experts: down(f(gate) * up)."""
        if tensors.has("mlp.gate_up_proj"):
            gate_up = tensors.matrix("mlp.gate_up_proj", heights=[tensors.source.config.intermediate_size] * 2)
        else:
            gate_up = tensors.matrix("mlp.gate_proj", "mlp.up_proj")
        down = tensors.matrix("mlp.down_proj")
        self._matrices |= {layer_kernel.GATE_UP: gate_up, layer_kernel.DOWN: down}
        self.record[layer_kernel.IS_GELU] = tensors.is_gelu
        self.record[layer_kernel.UP] = gate_up.starts[1]
        self.record[layer_kernel.NUM_INNER] = down.num_inputs

    def _put(self, place: int, value: np.float32) -> None:
        self.record[place] = value.view(np.int32)

    def _tell_of(self, place: int, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        first = ARRAYS + place * WORDS_EACH
        self.record[first : first + 1 + array.ndim] = array.ctypes.data, *array.shape


def _heads_of(tensors: LayerTensors, head_dim: int) -> CompiledMatrix:
    """What makes queries, keys and values."""
    if not tensors.has("self_attn.qkv_proj"):
        return tensors.matrix(*(f"self_attn.{name}_proj" for name in "qkv"))
    config = tensors.source.config
    counts = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    return tensors.matrix("self_attn.qkv_proj", heights=[count * head_dim for count in counts])


def _norms_of(tensors: LayerTensors) -> dict[int, Floats]:
    """By what a layer's norms multiply, each [H], those of heads [d]; empty where there is none."""
    has_four = tensors.has("pre_feedforward_layernorm")
    return {
        layer_kernel.BEFORE: tensors.norm("input_layernorm"),
        layer_kernel.ATTENDED: tensors.norm("post_attention_layernorm") if has_four else _NO_NORM,
        layer_kernel.INNER: tensors.norm("pre_feedforward_layernorm" if has_four else "post_attention_layernorm"),
        layer_kernel.GIVEN: tensors.norm("post_feedforward_layernorm") if has_four else _NO_NORM,
        layer_kernel.OF_QUERIES: tensors.norm("self_attn.q_norm"),
        layer_kernel.OF_KEYS: tensors.norm("self_attn.k_norm"),
    }
