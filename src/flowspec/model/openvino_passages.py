"""What rows pass through between a stage's attentions, with packed weights: graphs, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from flowspec.core import LayerRange
from flowspec.model.families import PREFIX, layer_prefix
from flowspec.model.openvino_graph import Between, Buffer, Graph, LeftOut, Template, Weight
from flowspec.model.packed import Bits
from flowspec.model.packed_experts import PackedExperts
from flowspec.model.source import TensorSource
from flowspec.model.stage_weights import check_nothing_ignored


class Passage(Protocol):
    """The rest of a layer behind its attention, and the beginning of the next one, or the final norm."""

    def __call__(
        self, num_rows: int, hidden: Buffer, attended: Buffer, rotation: Sequence[Buffer], results: Sequence[Buffer]
    ) -> None:
        """``results``: as of ``Between``. Buffers may have more rows than ``num_rows``, which do not matter."""
        ...


class PlainPassage:
    """One graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    def __call__(
        self, num_rows: int, hidden: Buffer, attended: Buffer, rotation: Sequence[Buffer], results: Sequence[Buffer]
    ) -> None:
        self._graph([hidden, attended, *rotation], results)


class MixturePassage:
    """A graph, the layer's experts, which no graph chooses, and what follows them."""

    def __init__(self, graph: Graph, experts: PackedExperts, then: Graph | None, is_normed: bool) -> None:
        """``then``: a graph from hidden states to the next attention, or the final norm if ``is_normed``."""
        self._graph = graph
        self._experts = experts
        self._then = then
        self._is_normed = is_normed
        self._rows: dict[int, Buffer] = {}  # that go into the experts, by their number

    def __call__(
        self, num_rows: int, hidden: Buffer, attended: Buffer, rotation: Sequence[Buffer], results: Sequence[Buffer]
    ) -> None:
        count, width = hidden.rows.shape
        if count not in self._rows:
            self._rows[count] = Buffer(count, width)
        first, *others = results
        whole = others[0] if self._is_normed else first
        self._graph([hidden, attended, *rotation], [whole, self._rows[count]])
        self._experts.add(self._rows[count].rows[:num_rows], whole.rows[:num_rows])
        if self._then is not None:
            self._then([whole, *rotation], [first] if self._is_normed else others)


class Passages:
    """Of a stage: a graph before its first attention, and a passage behind each."""

    def __init__(
        self,
        source: TensorSource,
        layers: LayerRange,
        bits: Bits,
        model: Any,
        rotary_dim: int,
        progress: Callable[[float], None] | None,
    ) -> None:
        """``model``: on the meta device; mixtures are taken out of it.

        Raises ``ModelError`` for what the source does not hold, or the kernels cannot take.
        """
        self.weights_bytes = 0
        self._source = source
        self._bits: Bits = bits
        self._rotary_dim = rotary_dim
        own = [model.layers[index] for index in range(layers.start, layers.end)]
        self.scaling: float = own[0].self_attn.scaling  # of attention's scores
        norm = model.norm if layers.end == source.num_layers else None
        shapes = {
            layer_prefix(index) + name: tuple(parameter.shape)
            for index, layer in enumerate(own, layers.start)
            for name, parameter in layer.named_parameters()
        }
        check_nothing_ignored(source, layers, shapes)
        prefix = layer_prefix(layers.start)
        experts, weights = self._take_experts(prefix, own[0]), self._load(prefix, own[0], "after")
        self.first = self._graph(Between(None, own[0], None), weights, own[0])
        self.others: list[Passage] = []
        for index, layer in enumerate(own, layers.start):
            before = {name.replace("after.", "before.", 1): weight for name, weight in weights.items()}
            mixture, experts, following = experts, None, None
            if index + 1 < layers.end:
                following, prefix = own[index + 1 - layers.start], layer_prefix(index + 1)
                experts, weights = self._take_experts(prefix, following), self._load(prefix, following, "after")
            else:
                weights = {} if norm is None else self._load(f"{PREFIX}norm.", norm, "norm")
            self.others.append(self._passage(layer, mixture, before, following, None if following else norm, weights))
            if progress is not None:
                progress((len(self.others) + 1) / (len(own) + 1))

    def _passage(
        self,
        layer: nn.Module,
        mixture: PackedExperts | None,
        before: Mapping[str, Weight],
        following: nn.Module | None,
        norm: nn.Module | None,
        after: Mapping[str, Weight],
    ) -> Passage:
        """``before``, ``after``: the weights of ``layer`` and of what follows, a layer, the final norm, or nothing."""
        if mixture is None:
            return PlainPassage(self._graph(Between(layer, following, norm), {**before, **after}, following or layer))
        graph, then = self._graph(Between(layer, None, None), before, layer), None
        if following is not None or norm is not None:
            then = self._graph(Between(None, following, norm), after, following or layer)
        return MixturePassage(graph, mixture, then, is_normed=norm is not None)

    def _graph(self, between: Between, weights: Mapping[str, Weight], attention_of: Any) -> Graph:
        template = _template(between, attention_of.self_attn, self._rotary_dim, self._source)
        return template.filled(weights, torch.get_num_threads())

    def _take_experts(self, prefix: str, layer: Any) -> PackedExperts | None:
        """A layer's mixture, if it has one, out of the layer."""
        if not hasattr(layer.mlp, "experts"):
            return None
        experts = PackedExperts(self._source, f"{prefix}mlp.", layer.mlp, self._bits)
        layer.mlp = LeftOut()
        self.weights_bytes += experts.nbytes
        return experts

    def _load(self, prefix: str, module: nn.Module, place: str) -> dict[str, Weight]:
        """A module's weights, by the names in ``Between``: those of linear layers packed."""
        linear_weights = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)}
        weights: dict[str, Weight] = {}
        for name, parameter in module.named_parameters():
            if name in linear_weights:
                weight: Weight = self._source.packed(prefix + name, self._bits)
            else:
                ((_, weight),) = self._source.tensors([prefix + name], "float32", "cpu")
            self._source.check_shape(prefix + name, weight, tuple(parameter.shape))
            self.weights_bytes += weight.nbytes
            weights[f"{place}.{name}"] = weight
        return weights


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
