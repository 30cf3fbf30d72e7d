"""A stage as whoever runs it sees it, whatever its layers are made of. No layers and no weights here."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.model.slots import SlotTable

# The stream [all rows, H] that enters a layer, by the model's index of it; behind the last layer: the number of layers.
Watch: TypeAlias = Callable[[int, Tensor], None]


class StageCache(Protocol):
    """What one request has left on a stage, by slot."""

    slots: SlotTable


class Part(NamedTuple):
    """One request's rows in a forward that may be shared with others'."""

    inputs: Tensor  # token ids [n] on the first stage, hidden states [n, H] on the others
    slots: NDArray[np.int64]  # [n]
    cache: Any  # as the stage's own ``open_cache`` makes it


class Stage(Protocol):
    """A range of a model's layers: ``TorchStage``, or what stands in for it.

    It keeps nothing between forwards but its weights; what it has to remember of a request is in the request's cache.
    """

    is_first: bool  # takes token ids
    is_last: bool
    hidden_size: int
    dtype: torch.dtype  # of hidden states
    weights_bytes: int
    slot_bytes: int  # what one row leaves in a cache

    def open_cache(self, root_id: int | None = None) -> StageCache:
        """An empty cache for one request."""
        ...

    def steps(self, parts: Sequence[Part], watch: Watch | None = None) -> Generator[Tensor | None]:
        """Rows that have slots -> their hidden states [all rows, H], part by part, after a ``None`` for each pause.

        ``watch`` is shown what enters each layer, and on the last stage what leaves the last one, before the norm; it
        may keep nothing of what it is shown.

        Only a part that is alone may be empty, and no cache may occur twice. Until it ends, nothing may be placed in
        the caches; what is committed meanwhile does not concern it.
        """
        ...


def forward(stage: Stage, inputs: Tensor, slots: NDArray[np.int64], cache: StageCache) -> Tensor:
    """One request's rows through the stage without a pause: a ``Part`` in, hidden states [n, H] out."""
    *_, hidden = stage.steps([Part(inputs, slots, cache)])
    assert hidden is not None, "a stage's last step has hidden states"
    return hidden
