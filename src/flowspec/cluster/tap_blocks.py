"""The blocks of a draft's first matrix on their way to the workers that multiply by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from torch import Tensor

from flowspec.core import LayerRange
from flowspec.wire.messages import Configure, TapBlock

Blocks: TypeAlias = Callable[[int], Tensor]  # a layer -> what the stream that enters it is multiplied by, [D, H]

_PART_BYTES = 2**22  # of one message: heartbeats find a way between them, on a slow link too


def tap_blocks(asked: Configure, is_last: bool, blocks: Blocks) -> Iterator[TapBlock]:
    """What a worker gets that was asked for these layers; nothing, where its session's draft reads none of them."""
    if asked.taps is None:
        return
    for layer in asked.taps.of_stage(LayerRange(asked.start_layer, asked.end_layer), is_last):
        block = blocks(layer)
        num_rows = max(1, _PART_BYTES // (block.shape[1] * block.itemsize))
        for first_row in range(0, len(block), num_rows):
            yield TapBlock(layer, first_row, block[first_row : first_row + num_rows])
