"""Messages through the codec and back, whole and damaged."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowspec.core import FINAL, StageManifest, TapShape, TensorEntry
from flowspec.errors import ProtocolError
from flowspec.wire.codec import Codec
from flowspec.wire.messages import (
    Alive,
    Broken,
    Busy,
    Chunk,
    Close,
    Closed,
    Commit,
    Configure,
    Echo,
    Emulation,
    End,
    Failed,
    Failure,
    Fetching,
    Hint,
    Loading,
    Manifest,
    Message,
    Open,
    Probe,
    Ready,
    Reserve,
    Result,
    Segment,
    Stamped,
    Step,
    Stop,
    TapBlock,
    Timing,
    WantChunk,
    WantManifest,
)

IDS = st.lists(st.integers(0, 2**40), max_size=20, unique=True).map(sorted)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def wire(message: Message) -> list[bytearray]:
    return [bytearray(frame) for frame in Codec().encode(message)]


def assert_equal(left: Message, right: Message) -> None:
    assert type(left) is type(right)
    for name in left.__struct_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a == b


@given(IDS, DTYPES, st.integers(0, 8), st.booleans())
def test_a_segment_survives_the_wire(ids: list[int], dtype: torch.dtype, width: int, has_tokens: bool) -> None:
    hidden = None if has_tokens else torch.randn(len(ids), width).to(dtype)
    segment = Segment(
        3, 1, 9, ids, [i - 1 for i in ids], ids, len(ids) // 2, ids if has_tokens else None, hidden,
        [Timing(1, 16, 0.25, 0.5, 77, 20)], width - 4,
    )  # fmt: skip
    assert_equal(Codec().decode_to_worker(wire(segment)), segment)
    stamped = Codec().decode_to_worker(wire(Stamped(1.5, 0.0, segment)))
    assert isinstance(stamped, Stamped) and stamped.arrival_s == 1.5
    assert_equal(stamped.message, segment)


@given(IDS, DTYPES, st.integers(0, 8))
def test_a_result_survives_the_wire(ids: list[int], dtype: torch.dtype, width: int) -> None:
    result = Result(3, 0, 2, ids, 0, torch.randn(len(ids), width).to(dtype), [])
    assert_equal(Codec().decode_to_driver(wire(result)), result)


@given(IDS, DTYPES, st.integers(0, 8), st.integers(0, 8))
def test_features_survive_the_wire(ids: list[int], dtype: torch.dtype, width: int, num_prefix: int) -> None:
    num_prefix = min(num_prefix, len(ids))
    features, hidden = torch.randn(len(ids), width).to(dtype), torch.randn(len(ids), 4).to(dtype)
    segment = Segment(3, 1, 9, ids, [i - 1 for i in ids], ids, num_prefix, None, hidden, [], features=features)
    assert_equal(Codec().decode_to_worker(wire(segment)), segment)
    result = Result(3, 0, 2, ids, num_prefix, hidden[num_prefix:], [], features)
    assert_equal(Codec().decode_to_driver(wire(result)), result)
    block = TapBlock(4, 7, hidden)
    assert_equal(Codec().decode_to_worker(wire(block)), block)


@pytest.mark.parametrize(("num_hidden", "num_features"), [(3, 3), (1, 2), (0, 3)])
def test_a_result_whose_features_and_states_do_not_fit_its_rows_is_refused(num_hidden: int, num_features: int) -> None:
    with pytest.raises(ValueError, match="result: "):
        Result(0, 0, 0, [1, 2, 3], 2, torch.ones(num_hidden, 4), [], torch.ones(num_features, 5))


@given(IDS, DTYPES, st.integers(0, 8), st.integers(-9, 9))
def test_hidden_states_in_int8_are_at_most_half_a_scale_off(
    ids: list[int], dtype: torch.dtype, width: int, exponent: int
) -> None:
    hidden = (torch.randn(len(ids), width) * 2.0**exponent).to(dtype)
    segment = Segment(3, 1, 9, ids, [i - 1 for i in ids], ids, 0, None, hidden, [])
    frames = [bytearray(frame) for frame in Codec(int8_wire=True).encode(segment)]
    assert len(frames[1]) == hidden.numel() + 4 * len(hidden)
    received = Codec().decode_to_worker(frames)
    assert isinstance(received, Segment) and received.hidden is not None
    assert received.hidden.dtype == dtype and received.hidden.shape == hidden.shape
    if hidden.numel():
        errors = (received.hidden.float() - hidden.float()).abs()
        largest = hidden.float().abs().amax(dim=1, keepdim=True)
        assert (errors <= largest * (0.5 / 127 + torch.finfo(dtype).eps) * 1.001).all()


@pytest.mark.parametrize(
    "message",
    [
        Configure(1, 2, "demo", 0, 2, "float32", "10.0.0.2:7070", 2.0),
        Configure(1, 4, "demo", 6, 8, "bfloat16", None, 2.0),
        Configure(1, 1, "demo", 0, 8, "float32", None, 2.0, taps=TapShape((1, 4), 65, 1e-5, has_squares=True)),
        Configure(1, 1, "demo", 0, 8, "float32", None, 2.0, Emulation("[model]", 2.5, 17.25, 4.0)),
        Manifest(StageManifest("gguf", b"\x80", "", [TensorEntry("a", "Q8_0", (2, 32), 68, "0" * 64)], [])),
        Chunk(3, 2**40, bytes(1000)),
        Commit(5, 0, [3, 7], 9),
        Step(5, 0, 2**62),
        End(5, 1),
        Reserve(5, 0, 4096),
        Stamped(3.5, 0.25, Step(5, 0, 2)),
        Stop(),
        Open(5, 0, 3, [FINAL]),
        Close(5, 0),
        Probe(3, bytes(1000)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_every_message_to_a_worker_survives_the_wire(message: Message) -> None:
    assert_equal(Codec().decode_to_worker(wire(message)), message)


@pytest.mark.parametrize(
    "message",
    [
        WantManifest(),
        WantChunk(3, 2**40),
        Fetching(5, 2**40),
        Loading(0.5),
        Ready(1, 1000, 2000),
        Hint(5, 0, [3, 7], [[1, 2], [9, 8]], [[-0.5, -1.0], [-0.25, -4.0]]),
        Ready(1, 1000, 2000, [(1, 0.125), (2, 0.25)], 1e6, 64, 1000),
        Closed(5, 0),
        Broken(5, 0, 2, "4:8", [3, 7]),
        Failed(5, 0, 2, "no memory", "trace"),
        Alive(),
        Busy("x"),
        Failure("t", "trace", False),
        Echo(3),
    ],
    ids=lambda m: type(m).__name__,
)
def test_every_message_to_the_driver_survives_the_wire(message: Message) -> None:
    assert_equal(Codec().decode_to_driver(wire(message)), message)


@given(st.lists(st.binary(max_size=64), max_size=4))
def test_garbage_is_a_protocol_error_and_nothing_else(frames: list[bytes]) -> None:
    codec = Codec()
    with pytest.raises(ProtocolError):
        codec.decode_to_worker([bytearray(frame) for frame in frames])


@given(st.data())
def test_a_damaged_message_is_a_protocol_error_or_still_a_message(data: st.DataObject) -> None:
    segment = Segment(0, 0, 0, [1, 2], [0, 1], [4, 5], 0, None, torch.ones(2, 3), [])
    frames = [bytearray(frame) for frame in Codec(data.draw(st.booleans())).encode(segment)]
    frame = frames[data.draw(st.integers(0, 1))]
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        assert isinstance(Codec().decode_to_worker(frames), Message)


def test_tensor_frames_must_fit_what_is_stated() -> None:
    frames = wire(Result(0, 0, 0, [1], 0, torch.ones(1, 4), []))
    for broken in (frames[:1], [frames[0], frames[1][:-1]], [*frames, bytearray(b"more")]):
        with pytest.raises(ProtocolError):
            Codec().decode_to_driver(broken)


def test_a_message_for_the_other_side_is_refused() -> None:
    with pytest.raises(ProtocolError):
        Codec().decode_to_worker(wire(Alive()))
    with pytest.raises(ProtocolError):
        Codec().decode_to_driver(wire(Stop()))
