"""transformers' layers as OpenVINO graphs, cut at their attentions, with packed weights. Knows no caches and no slots.

Between two attentions a row needs nothing but itself: the rest of one layer and the beginning of the next are one
graph, which is called once. Attention itself is ours, between the graphs: it alone sees other rows.

Integer kernels with a scale for each row's own groups (OpenVINO's dynamic quantisation) make the same bits of a row
whatever other rows come with it, since sums of integers do not depend on their order.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import openvino
import openvino.op
import torch
from numpy.typing import NDArray
from openvino import opset13
from torch import Tensor, nn
from transformers import AttentionInterface

from flowspec.model.packed import GROUP, PackedWeight, stacked

op: Any = opset13
Model: Any = openvino.Model  # whose stubs do not fit themselves

CUT = "flowspec-cut"  # the name, at transformers, of an attention at which layers are cut

Weight: TypeAlias = Tensor | PackedWeight

_EXAMPLE_ROWS = 3
# A graph's first call with a new number of rows takes milliseconds: rows are filled up to one of these, or of 64.
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Buffer:
    """Rows that graphs read and write in place."""

    def __init__(self, *shape: int) -> None:
        """[n, ...], of zeros."""
        self.rows: NDArray[np.float32] = np.zeros(shape, dtype=np.float32)
        self.tensor = openvino.Tensor(self.rows, shared_memory=True)


class Graph:
    """One compiled graph."""

    def __init__(self, model: Any, widths: Sequence[int], threads: int) -> None:
        """``model``: of OpenVINO, with a dynamic number of rows. ``widths``: of its inputs.

        It is called with each small number of rows once.
        """
        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,
        }
        self.widths = list(widths)
        self._request = _core().compile_model(model, "CPU", options).create_infer_request()
        self._inputs: list[Buffer | None] = [None] * len(widths)
        self._results: list[Buffer | None] = [None] * len(model.outputs)
        self._shapes = [[size.get_length() for size in list(each.partial_shape)[1:]] for each in model.outputs]
        for count in _ROWS:
            self([Buffer(count, width) for width in widths], self.results(count))

    def results(self, count: int) -> list[Buffer]:
        """New buffers for the results of so many rows."""
        return [Buffer(count, *shape) for shape in self._shapes]

    def __call__(self, inputs: Sequence[Buffer], results: Sequence[Buffer]) -> None:
        """Buffers of as many rows, none of them twice. Only those that are not the last call's cost time to name."""
        _bind(self._request.set_input_tensor, self._inputs, inputs)
        _bind(self._request.set_output_tensor, self._results, results)
        self._request.infer()


def _bind(name: Callable[[int, openvino.Tensor], None], bound: list[Buffer | None], buffers: Sequence[Buffer]) -> None:
    for index, buffer in enumerate(buffers):
        if bound[index] is not buffer:
            name(index, buffer.tensor)
            bound[index] = buffer


def filled_up(num_rows: int) -> int:
    """How many rows a graph is called with instead."""
    return next((count for count in _ROWS if count >= num_rows), -(-num_rows // 64) * 64)


class _Cut(Exception):  # noqa: N818 - not an error
    """A layer has come to its attention."""

    def __init__(self, *rows: Tensor) -> None:
        """Queries, keys and values [1, heads, n, d]."""
        super().__init__()
        self.rows = rows


def _cut_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """transformers' attention interface: give what was attended to, or end the layer here."""
    if module.attended is None:
        raise _Cut(query, key, value)
    return module.attended, None


AttentionInterface.register(CUT, _cut_attention)


class LeftOut(nn.Module):
    """In the place of a layer's mixture of experts, which no graph chooses: it keeps the rows, and adds nothing."""

    rows: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        self.rows = rows
        return torch.zeros_like(rows)


class Between(nn.Module):
    """From the attention of one layer to that of the next, with all weights as inputs, for tracing.

    Inputs, a row each: hidden states behind the layer before (or of the embedding), what was attended to, cosines and
    sines of the positions. Results: hidden states, then queries, keys and values of the next attention, by heads. At
    the ends of a stage, the attended and the hidden states, or queries, keys and values, are left out. Where the final
    norm is, the hidden states that go into it are the second result. Where a mixture is ``LeftOut`` the graph ends, and
    the rows that go into the mixture are the second result; another graph goes on behind it.
    """

    def __init__(self, before: nn.Module | None, after: nn.Module | None, norm: nn.Module | None) -> None:
        """Layers on the meta device are enough. ``norm``: behind the model's last layer."""
        super().__init__()
        given = {"before": before, "after": after, "norm": norm}
        parts = nn.ModuleDict({name: copy.deepcopy(part) for name, part in given.items() if part is not None})
        self.shapes = {name: tuple(weight.shape) for name, weight in parts.named_parameters()}
        self._places = [(parts.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in self.shapes]
        for owner, name in self._places:
            delattr(owner, name)
        self._parts = dict(parts)  # no modules of this one, and without parameters: all weights are inputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        num_rows = len(inputs) - len(self._places)
        for (owner, name), weight in zip(self._places, inputs[num_rows:], strict=True):
            setattr(owner, name, weight)
        hidden, *attended, cos, sin = inputs[:num_rows]
        hidden, rotation = hidden[None], (cos[None], sin[None])
        results: list[Tensor] = []
        if before := self._parts.get("before"):
            hidden = _run(before, hidden, rotation, attended[0])
            norm = self._parts.get("norm")
            results.append((hidden if norm is None else norm(hidden))[0])
            if norm is not None:
                results.append(hidden[0])
            if isinstance(mixture := getattr(before, "mlp", None), LeftOut):
                results.append(mixture.rows[0])
        elif norm := self._parts.get("norm"):
            results.append(norm(hidden)[0])
        if after := self._parts.get("after"):
            try:
                _run(after, hidden, rotation, None)
            except _Cut as cut:
                results += [rows[0].transpose(0, 1) for rows in cut.rows]
        return tuple(results)


def _run(layer: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor], attended: Tensor | None) -> Tensor:
    attention = layer.self_attn
    attention.attended = None if attended is None else attended[None].unflatten(2, (-1, attention.head_dim))
    try:
        return layer(hidden, attention_mask=None, position_ids=None, position_embeddings=rotation)
    finally:
        attention.attended = None


class Template:
    """A ``Between`` as a graph that lacks its weights."""

    def __init__(self, between: Between, widths: Sequence[int]) -> None:
        """``widths``: of the inputs that come by rows."""
        self.widths = list(widths)
        rows = [torch.zeros(_EXAMPLE_ROWS, width) for width in widths]
        weights = [torch.zeros(1).expand(shape) for shape in between.shapes.values()]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's of its own tracing, by which OpenVINO reads modules
            self._model = openvino.convert_model(between, example_input=(*rows, *weights))
        parameters = self._model.get_parameters()
        for parameter, width in zip(parameters, widths, strict=False):
            parameter.set_partial_shape(openvino.PartialShape([-1, width]))
        for parameter, (name, shape) in zip(parameters[len(widths) :], between.shapes.items(), strict=True):
            parameter.set_friendly_name(name)
            parameter.set_partial_shape(openvino.PartialShape(list(shape)))
        self._joined = _join_products(self._model)

    def filled(self, weights: Mapping[str, Weight], threads: int) -> Graph:
        """``weights``: by the names of ``Between.shapes``; those that nothing reads may be left out."""
        model = self._model.clone()
        for parameter in model.get_parameters()[len(self.widths) :]:
            if parameter.output(0).get_target_inputs():
                name = parameter.get_friendly_name()
                parts = [weights[part] for part in self._joined.get(name, [name])]
                parameter.output(0).replace(_constant(parts[0] if len(parts) == 1 else _stacked(parts)).output(0))
            model.remove_parameter(parameter)
        model.validate_nodes_and_infer_types()
        return Graph(model, self.widths, threads)


def _join_products(model: Any) -> dict[str, list[str]]:
    """Where several weights read the same rows, make them one, of whose product each takes its part.

    A call costs some 40 us beside reading its weights, where these are in no cache of the processor. Returns which
    weights those that take their place consist of, by name.
    """
    by_rows: dict[tuple[str, int], list[Any]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and node.input_value(1).get_node().get_type_name() == "Parameter":
            rows = node.input_value(0)
            by_rows.setdefault((rows.get_node().get_name(), rows.get_index()), []).append(node)
    joined: dict[str, list[str]] = {}
    for products in by_rows.values():
        if len(products) == 1:
            continue
        weights = [product.input_value(1).get_node() for product in products]
        names = [weight.get_friendly_name() for weight in weights]
        heights = [weight.get_partial_shape()[0].get_length() for weight in weights]
        width = weights[0].get_partial_shape()[1].get_length()
        whole = op.parameter([sum(heights), width], np.float32, name="+".join(names))
        product = op.matmul(products[0].input_value(0), whole, False, True)
        parts = op.variadic_split(product, op.constant(-1), op.constant(heights))
        for index, before in enumerate(products):
            before.output(0).replace(parts.output(index))
        model.add_parameters([whole])
        joined[whole.get_friendly_name()] = names
    return joined


def _stacked(weights: Sequence[Weight]) -> Weight:
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    assert len(packed) == len(weights), "they are of linear layers"
    return stacked(packed)


def linear(weight: PackedWeight, threads: int) -> Graph:
    """Rows [n, K] -> their products with the weight [n, N]."""
    rows = op.parameter([-1, weight.shape[1]], np.float32)
    product = op.matmul(rows, _constant(weight), False, True)
    return Graph(Model([product], [rows]), [weight.shape[1]], threads)


def _constant(weight: Weight) -> Any:
    """A node of a weight; a packed one is unpacked by what OpenVINO takes as one with the product that reads it."""
    if isinstance(weight, Tensor):
        return op.constant(weight.float().numpy())
    half = np.float16
    if weight.zero_points is None:
        node = op.convert(op.constant(weight.codes), half)
    else:
        codes, zeros = (op.convert(_nibbles(array), half) for array in (weight.codes, weight.zero_points))
        node = op.subtract(codes, zeros)
    node = op.multiply(node, op.constant(weight.scales))
    node = op.reshape(node, op.constant(np.array(weight.shape, dtype=np.int64)), False)
    return op.convert(node, np.float32)


def _nibbles(values: NDArray[np.uint8]) -> Any:
    """A constant of 4 bits each, in pairs, the first one low."""
    flat = np.pad(values.reshape(-1), (0, values.size % 2))
    pairs = flat[0::2] | (flat[1::2] << 4)
    tensor = openvino.Tensor(pairs, openvino.Shape(values.shape), openvino.Type.u4)
    return openvino.op.Constant(tensor, shared_memory=False)


@cache
def _core() -> openvino.Core:
    return openvino.Core()
