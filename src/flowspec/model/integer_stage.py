"""A stage on a processor's integers: matrices in 8 or 4 bits on ``integer_kernel``, attention on ``slot_kernel``.

The rows of a segment do not change each other's bits, whatever slots they have: what plain decoding with the same
weights gives, every schedule gives. All is computed, and cached, in float32; ``dtype`` is that of hidden states between
stages.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowspec.core import DType, LayerRange
from flowspec.model import row_kernel
from flowspec.model.attention import ATTENTION
from flowspec.model.families import PREFIX, embedding_scale, layer_prefix, norm_scale
from flowspec.model.forward_rows import LayersStage, masks_of, rotations_of
from flowspec.model.integer_layer import Heads, IntegerLayer
from flowspec.model.integer_matrix import Floats, IntegerMatrix, in_parts, share_of
from flowspec.model.packed import Bits, PackedWeight
from flowspec.model.slot_cache import Paths, SlotCache
from flowspec.model.source import TensorSource
from flowspec.model.stage import Part, Watch, forward
from flowspec.model.stage_weights import bare_model, check_nothing_ignored, checked_config, rotary_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Threads share out the rows of a layer that processors' caches hold, if each gets as many; else the layer's matrices.
_NEAR_BYTES = 16_000_000
_ROWS_EACH = 8


class IntegerStage(LayersStage):
    """On a processor."""

    def __init__(
        self,
        config: PreTrainedConfig,
        layers: LayerRange,
        dtype: DType,
        parts: Sequence[IntegerLayer],
        embedding: Tensor | None,
        norm: Floats | None,
        rotary: nn.Module,
    ) -> None:
        """Use ``load`` to make a stage. ``embedding`` [V, H]: of the first one; ``norm`` [H]: of the last one."""
        super().__init__(config, layers, getattr(torch, dtype))
        self.slot_bytes = self.attention.slot_bytes(torch.float32)
        ends = sum(end.nbytes for end in (embedding, norm) if end is not None)
        self.weights_bytes = sum(part.nbytes for part in parts) + ends
        self._layers = parts
        self._embedding = embedding
        self._embedding_scale = torch.tensor(embedding_scale(config))
        self._norm = norm
        self._eps = np.float32(config.rms_norm_eps)
        self._rotary = rotary
        self._threads = torch.get_num_threads()

    @classmethod
    def load(
        cls,
        source: TensorSource,
        layers: LayerRange,
        dtype: DType,
        bits: Bits,
        progress: Callable[[float], None] | None = None,
    ) -> IntegerStage:
        """Read the tensors of these layers and no others; ``progress`` is told the fraction that is done.

        Raises ``ModelError`` as ``TorchStage.load`` does, and for what the kernels cannot take.
        """
        config = checked_config(source, layers)
        model = bare_model(config, ATTENTION)
        own = {layer_prefix(index): model.layers[index] for index in range(layers.start, layers.end)}
        shapes = {
            prefix + name: tuple(parameter.shape)
            for prefix, layer in own.items()
            for name, parameter in layer.named_parameters()
        }
        check_nothing_ignored(source, layers, shapes)
        parts: list[IntegerLayer] = []
        for prefix, layer in own.items():
            parts.append(IntegerLayer(source, prefix, layer, bits))
            if progress is not None:
                progress(len(parts) / (len(own) + 1))
        norm = _norm(source) if layers.end == source.num_layers else None
        embedding = source.load_embedding(dtype, "cpu") if layers.start == 0 else None
        stage = cls(config, layers, dtype, parts, embedding, norm, rotary_of(model, config))
        stage._warm_up()
        if progress is not None:
            progress(1.0)
        return stage

    def open_cache(self, root_id: int | None = None) -> SlotCache:
        """An empty cache for one request."""
        return SlotCache(len(self.layers), self.attention.num_kv_heads, self.attention.head_dim, root_id)

    @torch.inference_mode()
    def steps(self, parts: Sequence[Part], watch: Watch | None = None) -> Generator[Tensor | None]:
        """With a pause before each attention but the first."""
        if not len(parts[0].slots):
            yield torch.empty(0, self.hidden_size, dtype=self.dtype)
            return
        requests = _rows_of(parts, self.attention.window)
        inputs = torch.cat([part.inputs for part in parts])
        hidden = (inputs.to(torch.float32, copy=True) if self._embedding is None else self._embed(inputs)).numpy()
        rows = _Rows(hidden, self._rotations(parts), self._heads(len(hidden)), self._attended(len(hidden)))
        self._between(rows, None, 0)
        for index, layer_type in enumerate(self.attention.types):
            if index:
                yield None
            if watch is not None:
                watch(self.layers.start + index, torch.from_numpy(hidden))
            for request in requests:
                request.attend(index, layer_type, rows, self._layers[index].scaling)
            self._between(rows, index, index + 1)
        if watch is not None and self.is_last:
            watch(self.layers.end, torch.from_numpy(hidden))
        if self._norm is not None:
            hidden = row_kernel.normalised(hidden, self._norm, self._eps)
        yield torch.from_numpy(hidden).to(self.dtype)

    def _between(self, rows: _Rows, before: int | None, after: int) -> None:
        """What is left of a layer behind its attention, and what the next one has before its own."""
        is_near = self._layers[0].nbytes < _NEAR_BYTES
        team = max(1, min(self._threads, len(rows.hidden) // _ROWS_EACH)) if is_near else 1
        threads = 1 if is_near else self._threads

        def work(part: int) -> None:
            own = rows.part(part, team)
            if before is not None:
                self._layers[before].rest(own.hidden, own.attended, threads)
            if after < len(self._layers):
                self._layers[after].heads(own.hidden, own.rotations[self.attention.types[after]], own.heads, threads)

        in_parts(team, work)

    def _embed(self, token_ids: Tensor) -> Tensor:
        assert self._embedding is not None, "the first stage has it"
        return (self._embedding[token_ids] * self._embedding_scale.to(self._embedding.dtype)).float()

    def _rotations(self, parts: Sequence[Part]) -> dict[str, tuple[Floats, Floats]]:
        positions = np.concatenate([part.cache.slots.positions[part.slots] for part in parts])
        like = torch.empty(0)
        found = rotations_of(self._rotary, like, torch.from_numpy(positions)[None], self.attention.types)
        return {kind: (cos[0].numpy(), sin[0].numpy()) for kind, (cos, sin) in found.items()}

    def _heads(self, num_rows: int) -> Heads:
        shape = self.attention
        counts = shape.num_heads, shape.num_kv_heads, shape.num_kv_heads
        return Heads(*(np.empty((num_rows, count, shape.head_dim), np.float32) for count in counts))

    def _attended(self, num_rows: int) -> Floats:
        return np.empty((num_rows, self.attention.num_heads * self.attention.head_dim), np.float32)

    def _warm_up(self) -> None:
        """Have the kernels compiled, or read."""
        for count in (1, 2):
            rows = torch.zeros(count, self.hidden_size) if self.layers.start else torch.zeros(count, dtype=torch.long)
            cache = self.open_cache()
            forward(self, rows, cache.slots.append_prefix(range(count)), cache)


class _Rows(NamedTuple):
    """Of a forward."""

    hidden: Floats  # [n, H]
    rotations: dict[str, tuple[Floats, Floats]]  # cosines and sines [n, r], by type of layer
    heads: Heads
    attended: Floats  # [n, heads * d]

    def part(self, index: int, count: int) -> _Rows:
        """One of so many, none of which sees another's rows."""
        rows = slice(*share_of(index, count, len(self.hidden)))
        rotations = {kind: (cos[rows], sin[rows]) for kind, (cos, sin) in self.rotations.items()}
        return _Rows(self.hidden[rows], rotations, Heads(*(each[rows] for each in self.heads)), self.attended[rows])


class _RequestRows(NamedTuple):
    """The rows of one request in a forward."""

    rows: slice
    slots: NDArray[np.int64]
    paths: dict[str, Paths]  # by type of layer
    cache: SlotCache

    def attend(self, layer: int, layer_type: str, forward: _Rows, scaling: float) -> None:
        query, key, value = (heads[self.rows] for heads in forward.heads)
        attended = forward.attended[self.rows]
        self.cache.attend(layer, (query, key, value), self.slots, self.paths[layer_type], scaling, attended)


def _rows_of(parts: Sequence[Part], window: int | None) -> list[_RequestRows]:
    requests: list[_RequestRows] = []
    end = 0
    for part in parts:
        begin, end = end, end + len(part.slots)
        positions = part.cache.slots.positions
        paths = {name: Paths.of(mask, positions) for name, mask in masks_of(part, window).items()}
        requests.append(_RequestRows(slice(begin, end), part.slots, paths, part.cache))
    return requests


class IntegerLinear:
    """A matrix by itself; what a row's product is does not depend on the rows beside it."""

    def __init__(self, weight: PackedWeight) -> None:
        """``weight`` [N, K]."""
        self._matrix = IntegerMatrix([weight])
        self._num_outputs = weight.shape[0]
        self._threads = torch.get_num_threads()

    @torch.inference_mode()
    def __call__(self, rows: Tensor) -> Tensor:
        """[n, K] -> float32 [n, N]."""
        products = self._matrix(rows.to("cpu", torch.float32).contiguous().numpy(), self._threads)
        return torch.from_numpy(products)[:, : self._num_outputs]


class IntegerHead:
    """The target's lm_head in 8 or 4 bits; what a row's logits are does not depend on the rows beside it."""

    def __init__(self, source: TensorSource, bits: Bits, token_ids: Tensor | None = None) -> None:
        """``token_ids``: of these tokens alone. Raises as ``IntegerStage.load`` does."""
        weight = source.packed_lm_head(bits)
        if token_ids is not None:
            weight = weight.rows(token_ids.numpy())
        self._linear = IntegerLinear(weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""
        return self._linear(hidden)


def _norm(source: TensorSource) -> Floats:
    """What the final norm multiplies by [H]."""
    name = f"{PREFIX}norm.weight"
    ((_, weight),) = source.tensors([name], "float32", "cpu")
    source.check_shape(name, weight, (source.hidden_size,))
    return norm_scale(source.config, weight).numpy()
