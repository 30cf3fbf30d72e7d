"""A stage on a processor's integer kernels: OpenVINO graphs between attentions, which are torch's, over the slots.

The rows of a segment do not change each other's bits, whatever slots they have: what plain decoding with the same
weights gives, every schedule gives. The graphs compute in float32; ``dtype`` is that of hidden states and caches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowspec.core import DType, LayerRange
from flowspec.model.attention import attend
from flowspec.model.families import EMBEDDING, PREFIX, layer_prefix
from flowspec.model.forward_rows import ForwardRows, LayersStage
from flowspec.model.openvino_graph import CUT, Between, Graph, Template, Weight, filled_up, linear
from flowspec.model.packed import Bits, PackedWeight
from flowspec.model.source import TensorSource
from flowspec.model.stage import Part, Watch
from flowspec.model.stage_weights import bare_model, check_nothing_ignored, checked_config, rotary_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CPU = torch.device("cpu")


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
        self.weights_bytes = graphs.weights_bytes + (0 if embedding is None else embedding.nbytes)
        self._graphs = graphs.compiled
        self._scaling = graphs.scaling
        self._embedding = embedding
        self._rotary = rotary

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
        graphs = _Graphs(source, layers, bits, model, progress)
        embedding = source.load_embedding(dtype, "cpu") if layers.start == 0 else None
        return cls(config, layers, dtype, graphs, embedding, rotary_of(model, config))

    @torch.inference_mode()
    def steps(self, parts: Sequence[Part], watch: Watch | None = None) -> Generator[Tensor | None]:
        """With a pause before each attention but the first."""
        if not len(parts[0].slots):
            yield torch.empty(0, self.hidden_size, dtype=self.dtype)
            return
        rows = ForwardRows.of(parts, self.attention, _CPU)
        num_rows = len(rows.inputs)
        hidden = rows.inputs if self._embedding is None else self._embedding[rows.inputs]
        cos, sin = (_filled(part[0]) for part in self._rotary(torch.empty(0), rows.positions))
        states = _filled(hidden.float())
        heads = self._graphs[0]([states, cos, sin])
        for index, (graph, layer_type) in enumerate(zip(self._graphs[1:], self.attention.types, strict=True)):
            if index:
                yield None
            if watch is not None:
                watch(self.layers.start + index, torch.from_numpy(states)[:num_rows])
            query, key, value = (torch.from_numpy(part)[:num_rows].transpose(0, 1)[None] for part in heads)
            keys, values = rows.cache.update(key.to(self.dtype), value.to(self.dtype), self.layers.start + index)
            attended = attend(query, keys, values, rows.masks[layer_type], self._scaling, is_order_free=True)
            states, *heads = graph([states, _filled(attended.reshape(num_rows, -1)), cos, sin])
        if watch is not None and self.is_last:
            watch(self.layers.end, torch.from_numpy(heads[0])[:num_rows])
        yield torch.from_numpy(states)[:num_rows].to(self.dtype, copy=True)


class OpenVinoLinear:
    """A matrix on the integer kernels; what a row's product is does not depend on the rows beside it."""

    def __init__(self, weight: PackedWeight) -> None:
        """``weight`` [N, K]."""
        self._graph = linear(weight, torch.get_num_threads())

    @torch.inference_mode()
    def __call__(self, rows: Tensor) -> Tensor:
        """[n, K] -> float32 [n, N]."""
        (product,) = self._graph([_filled(rows.cpu().float())])
        return torch.from_numpy(product)[: len(rows)].clone()


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
        progress: Callable[[float], None] | None,
    ) -> None:
        self.compiled: list[Graph] = []
        self.weights_bytes = 0
        own = [model.layers[index] for index in range(layers.start, layers.end)]
        self.scaling: float = own[0].self_attn.scaling  # of attention's scores
        norm = model.norm if layers.end == source.num_layers else None
        names = {
            layer_prefix(index) + name
            for index, layer in enumerate(own, layers.start)
            for name, _ in layer.named_parameters()
        }
        check_nothing_ignored(source, layers, names | {EMBEDDING, f"{PREFIX}norm.weight"})
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
            template = _template(between, own[0].self_attn, source)
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


# By the model's config and the graph's weights: layers are alike, and so are the stages of one process.
_templates: dict[tuple[str, Any], Template] = {}


def _template(between: Between, attention: Any, source: TensorSource) -> Template:
    key = source.config.to_json_string(), tuple(between.shapes.items())
    if key not in _templates:
        widths = [source.hidden_size, attention.head_dim, attention.head_dim]
        if any(name.startswith("before.") for name in between.shapes):
            widths.insert(1, attention.o_proj.in_features)
        _templates[key] = Template(between, widths)
    return _templates[key]


def _filled(rows: Tensor) -> Any:
    """Rows [n, ...] as an array, with as many behind them as a graph wants."""
    count = filled_up(len(rows))
    if count > len(rows):
        rows = torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
    return rows.contiguous().numpy()
