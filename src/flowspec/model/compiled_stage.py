"""A stage on a processor: matrices in 8 or 4 bits, or in floats, on ``matrix_kernel``, attention on ``slot_kernel``.

The rows of a segment do not change each other's bits, whatever slots they have: what plain decoding with the same
weights gives, every schedule gives. All is computed, and cached, in float32; ``dtype`` is that of hidden states between
stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowspec.core import DType, LayerRange
from flowspec.model import layer_kernel, row_kernel
from flowspec.model.attention import ATTENTION
from flowspec.model.compiled import one_at_a_time
from flowspec.model.compiled_layer import load_layer
from flowspec.model.compiled_matrix import CompiledMatrix, Floats
from flowspec.model.compiled_record import LayerRecord
from flowspec.model.families import EMBEDDING, PREFIX, embedding_scale, layer_prefix, norm_scale
from flowspec.model.forward_rows import LayersStage, frequencies_of, masks_of
from flowspec.model.packed import Precision, Weight
from flowspec.model.rotation_kernel import rotations
from flowspec.model.slot_cache import Paths, RequestRows, SlotCache
from flowspec.model.source import TensorSource
from flowspec.model.stage import Part, Watch, forward
from flowspec.model.stage_weights import bare_model, check_nothing_ignored, checked_config, rotary_of
from flowspec.model.team import team_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Heads: TypeAlias = tuple[Floats, Floats, Floats]  # [n, heads, d], [n, kv_heads, d] twice: queries, keys and values

_PAUSE_S = 0.001  # how often, at most, a forward of several layers pauses


class CompiledStage(LayersStage):
    """On a processor."""

    def __init__(
        self,
        config: PreTrainedConfig,
        layers: LayerRange,
        dtype: DType,
        parts: Sequence[LayerRecord],
        embedding: Tensor | None,
        norm: Floats | None,
        rotary: nn.Module,
        is_half: bool,
    ) -> None:
        """Use ``load`` to make a stage. ``embedding`` [V, H]: of the first one; ``norm`` [H]: of the last one.

        ``is_half``: whether keys and values are kept in float16.
        """
        super().__init__(config, layers, getattr(torch, dtype))
        self.slot_bytes = self.attention.slot_bytes(torch.float16 if is_half else torch.float32)
        self._is_half = is_half
        ends = sum(end.nbytes for end in (embedding, norm) if end is not None)
        self.weights_bytes = sum(part.nbytes for part in parts) + ends
        self._embedding = embedding
        self._embedding_scale = torch.tensor(embedding_scale(config))
        self._norm = norm
        self._eps = np.float32(config.rms_norm_eps)
        self._frequencies = frequencies_of(rotary, self.attention.types)
        self._parts = parts  # whose arrays the records tell of
        self._records = np.stack([part.words for part in parts])
        self._with_experts: list[bool] = (self._records[:, layer_kernel.NUM_EXPERTS] > 0).tolist()
        turned = list(self._frequencies)
        self._records[:, layer_kernel.ROTATION] = [turned.index(kind) for kind in self.attention.types]
        self._team = team_of(torch.get_num_threads())

    @classmethod
    def load(
        cls,
        source: TensorSource,
        layers: LayerRange,
        dtype: DType,
        precision: Precision,
        progress: Callable[[float], None] | None = None,
    ) -> CompiledStage:
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
        parts: list[LayerRecord] = []
        for prefix, layer in own.items():
            parts.append(load_layer(source, prefix, layer, precision))
            if progress is not None:
                progress(len(parts) / (len(own) + 1))
        norm = _norm(source) if layers.end == source.num_layers else None
        embedding = None
        if layers.start == 0:
            stored = source.float_dtype(EMBEDDING) if dtype == "float32" else dtype
            embedding = source.load_embedding(stored, "cpu")
        tell = progress or (lambda done: None)
        with one_at_a_time():  # which may take minutes on a small device, the first time
            stage = cls(config, layers, dtype, parts, embedding, norm, rotary_of(model, config), precision in (8, 4))
            for count in (1, 2):
                tell(len(parts) / (len(own) + 1))
                stage._warm_up(count)
        tell(1.0)
        return stage

    def open_cache(self, root_id: int | None = None) -> SlotCache:
        """An empty cache for one request."""
        shape = self.attention
        return SlotCache(len(self.layers), shape.num_kv_heads, shape.head_dim, self._is_half, root_id)

    def steps(self, parts: Sequence[Part], watch: Watch | None = None) -> Generator[Tensor | None]:
        """With a pause about every millisecond; before each layer if somebody watches."""
        if not len(parts[0].slots):
            yield torch.empty(0, self.hidden_size, dtype=self.dtype)
            return
        requests = _rows_of(parts, self.attention.window)
        rows = self._begin(parts)
        tables = np.stack([request.described(self.attention.types) for request in requests], axis=1)
        begin, count = 0, 1
        while begin < len(self._records):
            if begin:
                yield None
            if watch is not None:
                watch(self.layers.start + begin, torch.from_numpy(rows.hidden))
            before, before_s = begin, time.perf_counter()
            begin = self._run(rows, tables, begin, min(begin + count, len(self._records)))
            if watch is None:
                took_s = max(1e-6, time.perf_counter() - before_s)
                count = max(1, int((begin - before) * _PAUSE_S / took_s))
        hidden = rows.hidden
        if watch is not None and self.is_last:
            watch(self.layers.end, torch.from_numpy(hidden))
        if self._norm is not None:
            hidden = row_kernel.normalised(hidden, self._norm, self._eps)
        yield torch.from_numpy(hidden).to(self.dtype)

    def _begin(self, parts: Sequence[Part]) -> _Rows:
        inputs = torch.cat([part.inputs for part in parts])
        hidden = (inputs.to(torch.float32, copy=True) if self._embedding is None else self._embed(inputs)).numpy()
        positions = np.concatenate([part.cache.slots.positions[part.slots] for part in parts])
        turns = [rotations(positions, *turned) for turned in self._frequencies.values()]
        cos, sin = (np.stack(each) for each in zip(*turns, strict=True))
        return _Rows(hidden, (cos, sin), self._heads(len(hidden)), self._attended(len(hidden)))

    def _run(self, rows: _Rows, tables: NDArray[np.int64], begin: int, end: int) -> int:
        """Up to the layer ``end``, or to an earlier one: experts have a kernel of their own."""
        with_experts = self._with_experts
        end = next((i for i in range(begin, end) if with_experts[i] != with_experts[begin]), end)
        run = layer_kernel.run_expert_layers if with_experts[begin] else layer_kernel.run_layers
        of_rows = *rows.rotations, rows.heads, rows.attended, rows.hidden
        run(self._team.mailbox, self._records, begin, end, tables, *of_rows)
        return end

    def _embed(self, token_ids: Tensor) -> Tensor:
        assert self._embedding is not None, "the first stage has it"
        return (self._embedding[token_ids].to(self.dtype) * self._embedding_scale.to(self.dtype)).float()

    def _heads(self, num_rows: int) -> Heads:
        query, key, value = (
            np.empty((num_rows, count, self.attention.head_dim), np.float32)
            for count in (self.attention.num_heads, self.attention.num_kv_heads, self.attention.num_kv_heads)
        )
        return query, key, value

    def _attended(self, num_rows: int) -> Floats:
        return np.empty((num_rows, self.attention.num_heads * self.attention.head_dim), np.float32)

    def _warm_up(self, count: int) -> None:
        """Have the kernels compiled, or read, that so many rows need."""
        rows = torch.zeros(count, self.hidden_size) if self.layers.start else torch.zeros(count, dtype=torch.long)
        cache = self.open_cache()
        forward(self, rows, cache.slots.append_prefix(range(count)), cache)


class _Rows(NamedTuple):
    """Of a forward."""

    hidden: Floats  # [n, H]
    rotations: tuple[Floats, Floats]  # cosines and sines [rotations, n, r]
    heads: Heads
    attended: Floats  # [n, heads * d]


def _rows_of(parts: Sequence[Part], window: int | None) -> list[RequestRows]:
    requests: list[RequestRows] = []
    num_rows = 0
    for part in parts:
        positions = part.cache.slots.positions
        paths = {name: Paths.of(mask, positions) for name, mask in masks_of(part, window).items()}
        requests.append(RequestRows(num_rows, part.slots, paths, part.cache))
        num_rows += len(part.slots)
    return requests


class CompiledLinear:
    """A matrix by itself; what a row's product is does not depend on the rows beside it."""

    def __init__(self, weight: Weight) -> None:
        """``weight`` [N, K]."""
        self._matrix = CompiledMatrix([weight])
        self._num_outputs = weight.shape[0]
        self._team = team_of(torch.get_num_threads())

    @torch.inference_mode()
    def __call__(self, rows: Tensor) -> Tensor:
        """[n, K] -> float32 [n, N]."""
        products = self._matrix(rows.to("cpu", torch.float32).contiguous().numpy(), self._team.mailbox)
        return torch.from_numpy(products)[:, : self._num_outputs]


class CompiledHead:
    """The target's lm_head, or a draft's; what a row's logits are does not depend on the rows beside it."""

    def __init__(self, weight: Weight) -> None:
        """``weight`` [V, H]."""
        self._linear = CompiledLinear(weight)

    @classmethod
    def load(cls, source: TensorSource, precision: Precision, token_ids: Tensor | None = None) -> CompiledHead:
        """``token_ids``: of these tokens alone. Raises as ``CompiledStage.load`` does."""
        weight = source.lm_head_weight(precision)
        return cls(weight if token_ids is None else weight.rows(token_ids.numpy()))

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, V]."""
        return self._linear(hidden)


def _norm(source: TensorSource) -> Floats:
    """What the final norm multiplies by [H]."""
    name = f"{PREFIX}norm.weight"
    ((_, weight),) = source.tensors([name], "float32", "cpu")
    source.check_shape(name, weight, (source.hidden_size,))
    return norm_scale(source.config, weight).numpy()
