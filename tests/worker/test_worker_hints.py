"""Which of the segments that a worker passes on are hinted at."""

from __future__ import annotations

import torch
from torch import Tensor

from flowspec.wire.messages import Segment
from flowspec.worker.hints import Hints

HIDDEN = torch.arange(12.0).view(3, 4)


class SlowHinter:
    """Takes a second, on a clock of its own, and names the row's first number."""

    def __init__(self) -> None:
        self.now = 0.0

    def guess(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        self.now += 1.0
        return hidden[:, :1].long(), torch.zeros(len(hidden), 1)


def segment(num_prefix: int) -> Segment:
    return Segment(3, 1, 9, [5, 6, 7], [4, 5, 6], [5, 6, 7], num_prefix, None, HIDDEN, [])


def make_hints(share: float) -> Hints:
    hinter = SlowHinter()
    return Hints(hinter, share, lambda: hinter.now)


def test_rows_of_the_prompt_are_not_hinted_at() -> None:
    hints = make_hints(1.0)
    hints.offer(segment(num_prefix=3), 1.0)
    assert hints.take() is None
    hints.offer(segment(num_prefix=1), 1.0)
    passed_on = hints.take()
    assert passed_on is not None
    hint = hints.hint_at(passed_on)
    assert (hint.request_id, hint.epoch, hint.node_ids, hint.token_ids) == (3, 1, [6, 7], [[4], [8]])


def test_hints_are_made_only_where_forwards_take_much_longer() -> None:
    hints = make_hints(0.25)
    for _ in range(3):  # until it is known what one takes
        hints.offer(segment(0), 0.5)
        passed_on = hints.take()
        assert passed_on is not None
        hints.hint_at(passed_on)
    hints.offer(segment(0), 3.9)
    assert hints.take() is None
    hints.offer(segment(0), 4.0)
    assert hints.take() is not None
