"""Layers of devices that are gone, given to those that are left. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from flowspec.core import LayerRange, Partition
from flowspec.engine.pipeline import PipelineSpec
from flowspec.wire.messages import Ready

_MEMORY_SHARE = 0.8  # of what is free on a device; its caches need some of it too


def share_out(sizes: Sequence[int], num_lost: int, room: Sequence[float]) -> list[int] | None:
    """Layers that each device has then; ``None`` when they do not fit.

    ``sizes``: that it has; ``room``: more that it has memory for. Each lost layer goes where the work grows least,
    counted in what the device was given at first: whoever has cut the model knew how strong it is.
    """
    new = list(sizes)
    for _ in range(num_lost):
        able = [place for place in range(len(new)) if new[place] - sizes[place] + 1 <= room[place]]
        if not able:
            return None
        new[min(able, key=lambda place: ((new[place] + 1) / sizes[place], place))] += 1
    return new


def without(spec: PipelineSpec, ready: Sequence[Ready], lost: Collection[int]) -> PipelineSpec | None:
    """The same model without these stages' devices; ``None`` when the others have not the memory, or nobody is left.

    ``ready``: what all had said of their stages.
    """
    kept = [stage for stage in range(1, len(spec.partition) + 1) if stage not in lost]
    if spec.workers is None or not kept:
        return None
    stages = [spec.partition.stages[stage - 1] for stage in kept]
    said = [ready[stage - 1] for stage in kept]
    num_lost = spec.partition.num_layers - sum(map(len, stages))
    room = [_room(one, len(stage)) for one, stage in zip(said, stages, strict=True)]
    if (sizes := share_out([len(stage) for stage in stages], num_lost, room)) is None:
        return None
    ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
    partition = Partition(tuple(LayerRange(*pair) for pair in zip([0, *ends], ends, strict=False)))
    names = None if spec.names is None else [spec.names[stage - 1] for stage in kept]
    return replace(spec, partition=partition, workers=[spec.workers[stage - 1] for stage in kept], names=names)


def _room(ready: Ready, num_layers: int) -> float:
    """Layers more that a device has memory for, as it said when its stage was loaded."""
    if not ready.free_bytes or not ready.weight_bytes:
        return math.inf
    return _MEMORY_SHARE * ready.free_bytes / (ready.weight_bytes / num_layers)
