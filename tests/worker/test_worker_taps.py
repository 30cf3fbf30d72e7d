"""What a worker takes of a draft that reads several layers: no more than it was told of, and of no other layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from flowspec.core import FINAL, LayerRange, TapShape
from flowspec.errors import ProtocolError
from flowspec.model.loader import Checkpoint
from flowspec.model.taps import Taps, TorchLinear
from flowspec.model.torch_stage import TorchStage
from flowspec.wire.actor import Route
from flowspec.wire.messages import PROTOCOL_VERSION, Configure, Failed, Open, Result, Segment, TapBlock, Timing
from flowspec.worker.actor import Worker
from flowspec.worker.checks import check_configure
from flowspec.worker.taps import TapBlocks

SHAPE = TapShape((1, 3, 5), 24)
CONFIGURE = Configure(PROTOCOL_VERSION, 2, "demo", 3, 6, "float32", None, 2.0, taps=SHAPE)


class SmallStage:
    """As far as blocks ask."""

    hidden_size, dtype, is_last = 32, torch.float32, True


def blocks() -> TapBlocks:
    return TapBlocks(CONFIGURE, SHAPE, SmallStage())  # type: ignore[arg-type]


def part(layer: int, first_row: int, num_rows: int, width: int = 32, dtype: torch.dtype = torch.float32) -> TapBlock:
    return TapBlock(layer, first_row, torch.ones(num_rows, width, dtype=dtype))


def test_blocks_come_in_parts_until_the_stage_has_those_of_its_layers() -> None:
    found = blocks()
    for message in (part(3, 0, 10), part(5, 0, 24), part(3, 10, 14)):
        assert not found.is_complete
        found.take(message)
    assert found.is_complete
    taps = found.make_taps(CONFIGURE, "cpu")
    assert taps.is_begun and taps.num_blocks
    share = taps.share(5, torch.ones(2, 32))
    assert share is not None and torch.equal(share, torch.full((2, 24), 32.0))
    assert taps.share(4, torch.ones(2, 32)) is None


@pytest.mark.parametrize(
    "message",
    [
        part(1, 0, 24),  # the first stage's
        part(6, 0, 24),
        part(3, 1, 4),  # not the next rows
        part(3, -1, 4),
        part(3, 0, 25),
        part(3, 0, 0),
        part(3, 0, 4, width=31),
        part(3, 0, 4, dtype=torch.bfloat16),
        TapBlock(3, 0, torch.ones(32)),
        TapBlock(3, 0, torch.ones(2, 2, 32)),
        TapBlock(3, 0, torch.tensor(1.0)),
    ],
    ids=str,
)
def test_parts_that_nobody_asked_for_are_refused(message: TapBlock) -> None:
    with pytest.raises(ProtocolError, match="layer"):
        blocks().take(message)


@pytest.mark.parametrize(
    "shape",
    [
        TapShape((), 24),
        TapShape((3, 1), 24),
        TapShape((1, 1), 24),
        TapShape((-1, 2), 24),
        TapShape(tuple(range(65)), 24),
        TapShape((1,), 0),
        TapShape((1,), 1, has_squares=True),
        TapShape((1,), 2**16 + 1),
        TapShape((1,), 24, norm_eps=0.0),
        TapShape((1,), 24, norm_eps=float("nan")),
    ],
)
def test_features_of_impossible_sizes_are_refused(shape: TapShape) -> None:
    check_configure(CONFIGURE, "tcp://127.0.0.1:1")
    with pytest.raises(ProtocolError):
        check_configure(replace(CONFIGURE, taps=shape), "tcp://127.0.0.1:1")


def test_features_wider_than_any_draft_are_refused_before_memory_is_asked_for() -> None:
    with pytest.raises(ProtocolError, match="of width 257 are wanted, of a model of 32"):
        TapBlocks(CONFIGURE, TapShape((3,), 257), SmallStage())  # type: ignore[arg-type]


# --- a worker with features ---

OPEN = Open(0, 0, 2, [1, 3, 5])
TIMING = [Timing(1, 3, 0.1, 0.2, 9, 3)]
PROMPT = Segment(
    0, 0, 0, [0, 1, 2], [-1, 0, 1], [0, 1, 2], 2, None, torch.ones(3, 32), TIMING, features=torch.ones(3, 24)
)


def worker_of(checkpoint_dir: Callable[[str], Path], shape: TapShape | None = SHAPE) -> Worker:
    """The second of two stages."""
    layers = LayerRange(3, 6)
    stage = TorchStage.load(Checkpoint.open(checkpoint_dir("llama")), layers, "float32", "cpu")
    taps = None
    if shape is not None:
        own = {layer: TorchLinear(torch.ones(24, 32), "cpu") for layer in shape.of_stage(layers, is_last=True)}
        taps = Taps(shape, own, torch.float32, is_begun=shape.layers[0] < 3)
    return Worker(stage, 2, lambda: 0.0, taps=taps)


def run(worker: Worker, *messages: Any) -> list[Any]:
    sends = [send for message in messages for send in worker.on_message(message)]
    while (more := worker.on_idle()) is not None:
        sends += more
    return [send.message for send in sends if send.route is Route.DRIVER]


def test_prefix_rows_come_back_with_features_and_without_hidden_states(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    (result,) = run(worker_of(checkpoint_dir), OPEN, PROMPT)
    assert isinstance(result, Result) and result.features is not None
    assert result.node_ids == [0, 1, 2] and result.features.shape == (3, 24) and result.hidden.shape == (1, 32)
    assert not torch.equal(result.features, torch.ones(3, 24)), "this stage has added its own"


def test_a_request_that_wants_no_features_gets_none(checkpoint_dir: Callable[[str], Path]) -> None:
    plain = replace(PROMPT, features=None)
    (result,) = run(worker_of(checkpoint_dir), replace(OPEN, feature_layers=[FINAL]), plain)
    assert isinstance(result, Result) and result.features is None and result.hidden.shape == (3, 32)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (replace(PROMPT, features=None), "lacks features"),
        (replace(PROMPT, features=torch.ones(3, 25)), r"features are torch.float32 \[3, 25\]"),
        (replace(PROMPT, features=torch.ones(3, 24).bfloat16()), r"features are torch.bfloat16"),
        (replace(PROMPT, features=torch.ones(3, 24, 1)), "features are"),
    ],
)
def test_features_that_do_not_fit_end_the_request(
    checkpoint_dir: Callable[[str], Path], message: Segment, problem: str
) -> None:
    (failed,) = run(worker_of(checkpoint_dir), OPEN, message)
    assert isinstance(failed, Failed)
    with pytest.raises(ProtocolError, match=problem):
        raise ProtocolError(failed.text)


def test_features_where_nobody_reads_them_end_the_request(checkpoint_dir: Callable[[str], Path]) -> None:
    plain = replace(OPEN, feature_layers=[FINAL])
    (failed,) = run(worker_of(checkpoint_dir), plain, PROMPT)
    assert isinstance(failed, Failed) and "has features of the stages before" in failed.text
    (failed,) = run(worker_of(checkpoint_dir, None), plain, PROMPT)
    assert isinstance(failed, Failed) and "of width 0" in failed.text


@pytest.mark.parametrize("layers", [[1, 3], [1, 3, 5, FINAL], [3, 1, 5], [2, 3, 5]])
def test_layers_that_the_session_does_not_tap_are_refused(
    checkpoint_dir: Callable[[str], Path], layers: list[int]
) -> None:
    (failed,) = run(worker_of(checkpoint_dir), replace(OPEN, feature_layers=layers))
    assert isinstance(failed, Failed) and "wants outputs of layers" in failed.text
