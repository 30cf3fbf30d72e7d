"""A stage on a processor's integer kernels: OpenVINO graphs between attentions, which are our own kernel's.

The rows of a segment do not change each other's bits, whatever slots they have: what plain decoding with the same
weights gives, every schedule gives. All is computed, and cached, in float32; ``dtype`` is that of hidden states between
stages.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowspec.core import DType, LayerRange
from flowspec.model.families import PREFIX, embedding_scale, layer_prefix
from flowspec.model.forward_rows import AttentionShape, LayersStage, masks_of, rotations_of
from flowspec.model.openvino_graph import CUT, Between, Buffer, Graph, Template, Weight, filled_up, linear
from flowspec.model.packed import Bits, PackedWeight
from flowspec.model.slot_cache import Paths, SlotCache
from flowspec.model.source import TensorSource
from flowspec.model.stage import Part, Watch, forward
from flowspec.model.stage_weights import bare_model, check_nothing_ignored, checked_config, rotary_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class OpenVinoStage(LayersStage):
    """With the weights of linear layers in 8 or 4 bits."""

    def __init__(
        self,
        config: PreTrainedConfig,
        layers: LayerRange,
        dtype: DType,
        graphs: _Graphs,
        embedding: Tensor | None,
        rotary: nn.Module,
    ) -> None:
        """Use ``load`` to make a stage. ``embedding`` [V, H]: of the first one."""
        super().__init__(config, layers, getattr(torch, dtype))
        self.slot_bytes = self.attention.slot_bytes(torch.float32)
        self.weights_bytes = graphs.weights_bytes + (0 if embedding is None else embedding.nbytes)
        self._graphs = graphs.compiled
        self._scaling = graphs.scaling
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
        graphs = _Graphs(source, layers, bits, model, _rotary_dim(rotary, config, layers), progress)
        embedding = source.load_embedding(dtype, "cpu") if layers.start == 0 else None
        stage = cls(config, layers, dtype, graphs, embedding, rotary)
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
        first, *others = self._graphs
        first([buffers.hidden[0], *buffers.rotations[types[0]]], buffers.heads)
        for index, (graph, layer_type, next_type) in enumerate(zip(others, types, [*types[1:], types[0]], strict=True)):
            if index:
                yield None
            before, after = buffers.hidden[index % 2], buffers.hidden[(index + 1) % 2]
            if watch is not None:
                watch(self.layers.start + index, torch.from_numpy(before.rows)[:num_rows])
            for request in requests:
                request.attend(index, layer_type, buffers, self._scaling)
            following = buffers.heads if index + 1 < len(others) else buffers.unnormed
            graph([before, buffers.attended, *buffers.rotations[next_type]], [after, *following])
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
            width = self._graphs[0].widths[-1]  # of cosines and sines
            rotations = {kind: (Buffer(count, width), Buffer(count, width)) for kind in shape.types}
            attended = Buffer(count, shape.num_heads * shape.head_dim)
            self._buffers[count] = _Buffers(
                hidden, rotations, self._graphs[0].results(count), attended, self._graphs[-1].results(count)[1:]
            )
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


class _Graphs:
    """The graphs of a stage: one before each attention, and one behind the last."""

    def __init__(
        self,
        source: TensorSource,
        layers: LayerRange,
        bits: Bits,
        model: Any,
        rotary_dim: int,
        progress: Callable[[float], None] | None,
    ) -> None:
        self.compiled: list[Graph] = []
        self.weights_bytes = 0
        own = [model.layers[index] for index in range(layers.start, layers.end)]
        self.scaling: float = own[0].self_attn.scaling  # of attention's scores
        norm = model.norm if layers.end == source.num_layers else None
        shapes = {
            layer_prefix(index) + name: tuple(parameter.shape)
            for index, layer in enumerate(own, layers.start)
            for name, parameter in layer.named_parameters()
        }
        check_nothing_ignored(source, layers, shapes)
        before: dict[str, Weight] = {}
        for index in range(len(own) + 1):
            after_layer = own[index] if index < len(own) else None
            after = {}
            if after_layer is not None:
                after = self._load(source, layer_prefix(layers.start + index), after_layer, bits)
            ends = after_layer is None
            between = Between(own[index - 1] if index else None, after_layer, norm if ends else None)
            weights = {f"before.{name}": weight for name, weight in before.items()}
            weights |= {f"after.{name}": weight for name, weight in after.items()}
            if ends and norm is not None:
                weights |= {f"norm.{n}": w for n, w in self._load(source, f"{PREFIX}norm.", norm, bits).items()}
            template = _template(between, own[min(index, len(own) - 1)].self_attn, rotary_dim, source)
            self.compiled.append(template.filled(weights, torch.get_num_threads()))
            if progress is not None:
                progress((index + 1) / (len(own) + 1))
            before = after

    def _load(self, source: TensorSource, prefix: str, module: nn.Module, bits: Bits) -> dict[str, Weight]:
        """A module's weights, by their names in it: those of linear layers packed."""
        linear_weights = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        weights: dict[str, Weight] = {}
        for name, parameter in module.named_parameters():
            if name in linear_weights:
                weights[name] = source.packed(prefix + name, bits)
            else:
                ((_, weights[name]),) = source.tensors([prefix + name], "float32", "cpu")
            source.check_shape(prefix + name, weights[name], tuple(parameter.shape))
            self.weights_bytes += weights[name].nbytes
        return weights


def _rotary_dim(rotary: nn.Module, config: PreTrainedConfig, layers: LayerRange) -> int:
    """How many cosines a row has: some models turn a part of each head alone."""
    types = AttentionShape.of(config, layers).types
    rotations = rotations_of(rotary, torch.empty(0), torch.zeros(1, 1, dtype=torch.long), types)
    return int(rotations[types[0]][0].shape[-1])


# By the model's config and the graph's weights: layers are alike, and so are the stages of one process.
_templates: dict[tuple[str, Any, bool], Template] = {}


def _template(between: Between, attention: Any, rotary_dim: int, source: TensorSource) -> Template:
    """``attention``: of the layer that begins there."""
    uses_rope = bool(getattr(attention, "use_rope", True))  # of SmolLM3, some layers do not
    key = source.config.to_json_string(), tuple(between.shapes.items()), uses_rope
    if key not in _templates:
        widths = [source.hidden_size, rotary_dim, rotary_dim]
        if any(name.startswith("before.") for name in between.shapes):
            widths.insert(1, attention.o_proj.in_features)
        _templates[key] = Template(between, widths)
    return _templates[key]


def _fill(buffer: Buffer, rows: Tensor) -> None:
    torch.from_numpy(buffer.rows)[: len(rows)] = rows
