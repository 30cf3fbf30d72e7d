"""A segment on its way through one stage: which of its rows live, in which slots, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowspec.model.stage import Part
from flowspec.wire.messages import Guesses, Result, Segment, Timing
from flowspec.worker.hints import Hinter
from flowspec.worker.requests import OpenRequest

Ints: TypeAlias = NDArray[np.int64]


@dataclass
class Placed:
    """A segment whose living rows have slots."""

    segment: Segment
    request: OpenRequest
    rows: Ints  # of the segment, that are run
    slots: Ints

    def part(self) -> Part:
        """What the stage runs."""
        segment = self.segment
        inputs = torch.tensor(segment.token_ids) if segment.hidden is None else segment.hidden
        if len(self.rows) < len(segment.node_ids):
            inputs = inputs[torch.from_numpy(self.rows)]
        return Part(inputs, self.slots, self.request.cache)

    def features(self, width: int, dtype: torch.dtype) -> Tensor:
        """What the stages before have added up for the rows that are run; zeros for a request that wants none."""
        features = self.segment.features
        if features is None:
            return torch.zeros(len(self.rows), width, dtype=dtype)
        return features if len(self.rows) == len(features) else features[torch.from_numpy(self.rows)]

    def living(self) -> Ints:
        """Which of the rows are alive; prefix rows live as long as the request."""
        if self.request.is_over:
            return np.zeros(0, dtype=np.int64)
        ids, num_prefix, slots = self.segment.node_ids, self.segment.num_prefix, self.request.cache.slots
        is_alive = [row < num_prefix or slots.slot_of(ids[row]) is not None for row in self.rows.tolist()]
        return np.flatnonzero(is_alive)

    def passed_on(self, rows: Ints, hidden: Tensor, timing: Timing, features: Tensor | None) -> Segment:
        """For the next worker: these rows, their hidden states, and the draft's features as far as they are known."""
        segment = self.segment
        return Segment(
            segment.request_id,
            segment.epoch,
            segment.segment_id,
            [segment.node_ids[row] for row in rows],
            [segment.parent_ids[row] for row in rows],
            [segment.positions[row] for row in rows],
            segment.num_prefix,
            token_ids=None,
            hidden=hidden,
            timings=[*segment.timings, timing],
            gate=None if segment.gate is None else segment.gate + 1,
            features=features,
        )

    def result(self, rows: Ints, hidden: Tensor, timing: Timing, features: Tensor | None) -> Result:
        """For the driver: these rows, and their final hidden states; those of the prefix only where they are wanted.

        A draft with features of its own has no use for the prefix's hidden states.
        """
        segment = self.segment
        node_ids, num_prefix = [segment.node_ids[row] for row in rows], segment.num_prefix
        if not self.request.want_features:
            node_ids = node_ids[num_prefix:]
        if not self.request.want_features or features is not None:
            hidden = hidden[num_prefix:]
        timings, ids = [*segment.timings, timing], (segment.request_id, segment.epoch, segment.segment_id)
        return Result(*ids, node_ids, num_prefix, hidden, timings, features)

    def guesses(self, rows: Ints, hidden: Tensor, guesser: Hinter, num_best: int) -> Guesses:
        """A draft model's answer, by the rows' final hidden states; an empty one, where all are of the prefix."""
        segment, num_prefix = self.segment, self.segment.num_prefix
        token_ids, logprobs = torch.zeros(0, 1), torch.zeros(0, 1)
        if len(rows) > num_prefix:
            token_ids, logprobs = guesser.guess(hidden[num_prefix:], num_best)
        node_ids = [segment.node_ids[row] for row in rows[num_prefix:]]
        return Guesses(segment.request_id, segment.epoch, node_ids, token_ids.int(), logprobs)


def place(segment: Segment, request: OpenRequest) -> Placed | None:
    """Give slots to the rows that are alive; ``None`` if none is, unless the segment travels for the beat."""
    if request.is_over:
        none = np.zeros(0, dtype=np.int64)
        return None if segment.gate is None else Placed(segment, request, none, none)
    table, num_prefix = request.cache.slots, segment.num_prefix
    prefix_slots = table.append_prefix(segment.positions[:num_prefix])
    kept, slots = table.place(
        segment.node_ids[num_prefix:], segment.parent_ids[num_prefix:], segment.positions[num_prefix:]
    )
    rows = np.concatenate([np.arange(num_prefix), kept + num_prefix])
    if not len(rows) and segment.gate is None:
        return None
    return Placed(segment, request, rows, np.concatenate([prefix_slots, slots]))
