"""The tensors of one layer as compiled kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowspec.errors import ModelError
from flowspec.model.compiled_matrix import CompiledMatrix, Floats
from flowspec.model.families import norm_scale
from flowspec.model.packed import Precision, Weight
from flowspec.model.source import TensorSource

_IS_GELU = {"silu": False, "swish": False, "gelu_pytorch_tanh": True}  # the gates that the kernel has


class UncompiledError(ModelError):
    """A layer has what kernels do not compute."""


class LayerTensors:
    """It knows which were asked for."""

    def __init__(self, source: TensorSource, prefix: str, layer: Any, precision: Precision) -> None:
        """``layer``: transformers' module, without values; ``prefix``: of its tensors' names."""
        self.source = source
        self.prefix = prefix
        self.precision: Precision = precision
        self._shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        """Whether the layer has a module with a weight."""
        return f"{name}.weight" in self._shapes

    @property
    def is_gelu(self) -> bool:
        """How gates let through what is multiplied with them; else it is SiLU. Raises ``UncompiledError``."""
        config = self.source.config
        name = getattr(config, "hidden_activation", None) or config.hidden_act
        if name not in _IS_GELU:
            raise UncompiledError(f"{self.source.name}: its layers are gated by {name!r}, which no kernel knows")
        return _IS_GELU[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter, which is used."""
        self._used.add(name)
        return self._shapes[name]

    def norm(self, name: str) -> Floats:
        """What an RMS norm multiplies by [K]; empty where there is none."""
        weight = self._vector(f"{name}.weight")
        return np.empty(0, np.float32) if weight is None else norm_scale(self.source.config, weight).numpy()

    def matrix(self, *names: str, heights: Sequence[int] = ()) -> CompiledMatrix:
        """Of linear layers that read the same rows, or of a single one that is cut into parts with ``heights``.

        All get as many bits as the one that needs most.
        """
        parts: list[Weight] = []
        biases: list[Floats | None] = []
        precision = self.source.precision_of([f"{self.prefix}{name}.weight" for name in names], self.precision)
        for name in names:
            weight = self.source.weight(f"{self.prefix}{name}.weight", precision)
            self.source.check_shape(f"{self.prefix}{name}.weight", weight, self.shape(f"{name}.weight"))
            bias = self._vector(f"{name}.bias")
            ends = np.cumsum(heights or weight.shape[:1])
            for begin, end in zip([0, *ends[:-1]], ends, strict=True):
                parts.append(weight.rows(np.arange(begin, end)) if heights else weight)
                biases.append(None if bias is None else bias.numpy()[begin:end])
        return CompiledMatrix(parts, biases)

    def check_nothing_left(self) -> None:
        """Raises ``UncompiledError`` if the layer has parts that nobody asked for."""
        if left := sorted(self._shapes.keys() - self._used):
            raise UncompiledError(f"{self.source.name}: its layers have {', '.join(left)}, which no kernel computes")

    def _vector(self, name: str) -> Any:
        """Of a norm or a bias, as a tensor [n]; ``None``: there is none."""
        if name not in self._shapes:
            return None
        ((_, vector),) = self.source.tensors([self.prefix + name], "float32", "cpu")
        self.source.check_shape(self.prefix + name, vector, self.shape(name))
        return vector
