"""A stage on a processor's integer kernels: OpenVINO graphs between attentions, which are our own kernel's.

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
from flowspec.model.families import embedding_scale
from flowspec.model.forward_rows import AttentionShape, LayersStage, masks_of, rotations_of
from flowspec.model.openvino_graph import CUT, Buffer, filled_up, linear
from flowspec.model.openvino_passages import Passages
from flowspec.model.packed import Bits, PackedWeight
from flowspec.model.slot_cache import Paths, SlotCache
from flowspec.model.source import TensorSource
from flowspec.model.stage import Part, Watch, forward
from flowspec.model.stage_weights import bare_model, checked_config, rotary_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class OpenVinoStage(LayersStage):
    """With the weights of linear layers in 8 or 4 bits."""

    def __init__(
        self,
        config: PreTrainedConfig,
        layers: LayerRange,
        dtype: DType,
        passages: Passages,
        embedding: Tensor | None,
        rotary: nn.Module,
    ) -> None:
        """Use ``load`` to make a stage. ``embedding`` [V, H]: of the first one."""
        super().__init__(config, layers, getattr(torch, dtype))
        self.slot_bytes = self.attention.slot_bytes(torch.float32)
        self.weights_bytes = passages.weights_bytes + (0 if embedding is None else embedding.nbytes)
        self._passages = passages
        self._embedding = embedding
        self._embedding_scale = torch.tensor(embedding_scale(config))
        self._rotary = rotary
        self._buffers: dict[int, _Buffers] = {}  # by their number of rows

    @classmethod
    def load(
        cls,
        source: TensorSource,
        layers: LayerRange,
        dtype: DType,
        bits: Bits,
        progress: Callable[[float], None] | None = None,
    ) -> OpenVinoStage:
        """Read the tensors of these layers and no others; ``progress`` is told the fraction that is done.

        Raises ``ModelError`` as ``TorchStage.load`` does, and for weights that the kernels cannot take.
        """
        config = checked_config(source, layers)
        model = bare_model(config, CUT)
        rotary = rotary_of(model, config)
        passages = Passages(source, layers, bits, model, _rotary_dim(rotary, config, layers), progress)
        embedding = source.load_embedding(dtype, "cpu") if layers.start == 0 else None
        stage = cls(config, layers, dtype, passages, embedding, rotary)
        row = torch.zeros(1, stage.hidden_size) if layers.start else torch.zeros(1, dtype=torch.long)
        cache = stage.open_cache()
        forward(stage, row, cache.slots.append_prefix([0]), cache)  # it has the attention kernel compiled, or read
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
        positions = torch.cat([torch.from_numpy(part.cache.slots.positions[part.slots]) for part in parts])
        num_rows = len(inputs)
        buffers = self._buffers_for(num_rows)
        _fill(buffers.hidden[0], inputs if self._embedding is None else self._embed(inputs))
        types = self.attention.types
        for kind, rotation in rotations_of(self._rotary, torch.empty(0), positions[None], types).items():
            for buffer, part in zip(buffers.rotations[kind], rotation, strict=True):
                _fill(buffer, part[0])
        others = self._passages.others
        self._passages.first([buffers.hidden[0], *buffers.rotations[types[0]]], buffers.heads)
        next_types = [*types[1:], types[0]]
        for index, (passage, layer_type, next_type) in enumerate(zip(others, types, next_types, strict=True)):
            if index:
                yield None
            before, after = buffers.hidden[index % 2], buffers.hidden[(index + 1) % 2]
            if watch is not None:
                watch(self.layers.start + index, torch.from_numpy(before.rows)[:num_rows])
            for request in requests:
                request.attend(index, layer_type, buffers, self._passages.scaling)
            following = buffers.heads if index + 1 < len(others) else buffers.unnormed
            passage(num_rows, before, buffers.attended, buffers.rotations[next_type], [after, *following])
        if watch is not None and self.is_last:
            watch(self.layers.end, torch.from_numpy(buffers.unnormed[0].rows)[:num_rows])
        hidden = buffers.hidden[len(others) % 2]
        yield torch.from_numpy(hidden.rows)[:num_rows].to(self.dtype, copy=True)

    def _embed(self, token_ids: Tensor) -> Tensor:
        assert self._embedding is not None, "the first stage has it"
        return self._embedding[token_ids] * self._embedding_scale.to(self._embedding.dtype)

    def _buffers_for(self, num_rows: int) -> _Buffers:
        count = filled_up(num_rows)
        if count not in self._buffers:
            shape = self.attention
            hidden = Buffer(count, self.hidden_size), Buffer(count, self.hidden_size)
            width = self._passages.first.widths[-1]  # of cosines and sines
            rotations = {kind: (Buffer(count, width), Buffer(count, width)) for kind in shape.types}
            attended = Buffer(count, shape.num_heads * shape.head_dim)
            unnormed = [Buffer(count, self.hidden_size)] if self.is_last else []
            heads = self._passages.first.results(count)
            self._buffers[count] = _Buffers(hidden, rotations, heads, attended, unnormed)
        return self._buffers[count]


class _Buffers(NamedTuple):
    """What graphs read and write in a forward, for one number of rows; more of these than it has do not matter."""

    hidden: tuple[Buffer, Buffer]  # one is read while the other is written
    rotations: dict[str, tuple[Buffer, Buffer]]  # cosines and sines, by type of layer
    heads: list[Buffer]  # queries, keys and values
    attended: Buffer
    unnormed: list[Buffer]  # of a last stage: hidden states before the final norm


class _RequestRows(NamedTuple):
    """The rows of one request in a forward."""

    rows: slice
    slots: NDArray[np.int64]
    paths: dict[str, Paths]  # by type of layer
    cache: SlotCache

    def attend(self, layer: int, layer_type: str, buffers: _Buffers, scaling: float) -> None:
        query, key, value = (buffer.rows[self.rows] for buffer in buffers.heads)
        attended = buffers.attended.rows[self.rows]
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


class OpenVinoLinear:
    """A matrix on the integer kernels; what a row's product is does not depend on the rows beside it."""

    def __init__(self, weight: PackedWeight) -> None:
        """``weight`` [N, K]."""
        self._graph = linear(weight, torch.get_num_threads())

    @torch.inference_mode()
    def __call__(self, rows: Tensor) -> Tensor:
        """[n, K] -> float32 [n, N]."""
        filled = Buffer(filled_up(len(rows)), rows.shape[1])
        _fill(filled, rows.cpu())
        (product,) = self._graph.results(len(filled.rows))
        self._graph([filled], [product])
        return torch.from_numpy(product.rows)[: len(rows)]


class OpenVinoHead:
    """The target's lm_head in 8 or 4 bits; what a row's logits are does not depend on the rows beside it."""

    def __init__(self, source: TensorSource, bits: Bits, token_ids: Tensor | None = None) -> None:
        """``token_ids``: of these tokens alone. Raises as ``OpenVinoStage.load`` does."""
        weight = source.packed_lm_head(bits)
        if token_ids is not None:
            weight = weight.rows(token_ids.numpy())
        self._linear = OpenVinoLinear(weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""
        return self._linear(hidden)


def _rotary_dim(rotary: nn.Module, config: PreTrainedConfig, layers: LayerRange) -> int:
    """How many cosines a row has: some models turn a part of each head alone."""
    types = AttentionShape.of(config, layers).types
    rotations = rotations_of(rotary, torch.empty(0), torch.zeros(1, 1, dtype=torch.long), types)
    return int(rotations[types[0]][0].shape[-1])


def _fill(buffer: Buffer, rows: Tensor) -> None:
    torch.from_numpy(buffer.rows)[: len(rows)] = rows
