"""The blocks of a draft's first matrix that a worker gets from its driver, until it has all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from flowspec.core import LayerRange, TapShape
from flowspec.errors import ProtocolError
from flowspec.model.backends import make_taps
from flowspec.model.stage import Stage
from flowspec.model.taps import Taps
from flowspec.wire.messages import Configure, TapBlock

_MOST_TIMES = 8  # as wide as the model


class TapBlocks:
    """Of one session: what has come of the matrices of this stage's tapped layers."""

    def __init__(self, configure: Configure, shape: TapShape, stage: Stage) -> None:
        """``shape``: of ``configure``, which has passed ``checks.check_configure``.

        Raises ``ProtocolError`` for features that are wider than any draft of this model.
        """
        if shape.num_outputs > _MOST_TIMES * stage.hidden_size:
            raise ProtocolError(f"features of width {shape.num_outputs} are wanted, of a model of {stage.hidden_size}")
        self.shape = shape
        self._layers = LayerRange(configure.start_layer, configure.end_layer)
        self._stage = stage
        own = shape.of_stage(self._layers, stage.is_last)
        self._num_rows = dict.fromkeys(own, 0)  # that have come
        self._blocks: dict[int, Tensor] = {}

    @property
    def is_complete(self) -> bool:
        return all(num_rows == self.shape.num_outputs for num_rows in self._num_rows.values())

    def take(self, message: TapBlock) -> None:
        """Raises ``ProtocolError`` for rows that this stage has no use for."""
        layer, weight, stage, most = message.layer, message.weight, self._stage, self.shape.num_outputs
        if layer not in self._num_rows or message.first_row != self._num_rows[layer]:
            raise ProtocolError(f"rows {message.first_row} of layer {layer}'s block are not wanted")
        end = message.first_row + len(weight) if weight.ndim == 2 else 0
        fits = weight.ndim == 2 and weight.shape[1] == stage.hidden_size and weight.dtype == stage.dtype
        if not fits or not message.first_row < end <= most:
            raise ProtocolError(
                f"a part of layer {layer}'s block is {weight.dtype} {list(weight.shape)}; it must be {stage.dtype} of "
                f"width {stage.hidden_size}, and at most {most - message.first_row} rows"
            )
        if layer not in self._blocks:
            self._blocks[layer] = torch.empty(most, stage.hidden_size, dtype=stage.dtype)
        self._blocks[layer][message.first_row : end] = weight
        self._num_rows[layer] = end

    def make_taps(self, configure: Configure, device: str) -> Taps:
        """Once all have come."""
        assert self.is_complete, "some rows are missing"
        return make_taps(self.shape, self._layers, self._blocks, configure.dtype, configure.weights, device)
