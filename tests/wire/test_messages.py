"""Messages that contradict themselves."""

from __future__ import annotations

import msgspec
import pytest

from flowspec.errors import ProtocolError
from flowspec.wire.codec import Codec
from flowspec.wire.messages import Hint


@pytest.mark.parametrize(
    "fields",
    [([3], [[1, 2]], [[-0.5]]), ([3, 7], [[1]], [[-0.5]]), ([3, 7], [[1], [1, 2]], [[-0.5], [-0.5, -1.0]])],
)
def test_a_hint_whose_lists_differ_in_length_is_refused(
    fields: tuple[list[int], list[list[int]], list[list[float]]],
) -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Hint(5, 0, *fields)


def bad_segments() -> list[tuple[str, list[object]]]:
    good: list[object] = ["Segment", 0, 0, 0, [1, 2], [0, 1], [4, 5], 0, [9, 9], None, []]
    changes = {
        "ids that do not grow": (4, [2, 1]),
        "a parent above its child": (5, [5, 1]),
        "lists of different lengths": (6, [4]),
        "more prefix rows than rows": (7, 3),
        "neither tokens nor hidden states": (8, None),
        "too few tokens": (8, [9]),
        "text for a number": (1, "x"),
    }
    return [(name, [*good[:i], value, *good[i + 1 :]]) for name, (i, value) in changes.items()]


@pytest.mark.parametrize(("name", "fields"), bad_segments(), ids=[name for name, _ in bad_segments()])
def test_a_segment_that_contradicts_itself_is_refused(name: str, fields: list[object]) -> None:
    with pytest.raises(ProtocolError):
        Codec().decode_to_worker([bytearray(msgspec.msgpack.encode(fields))])
