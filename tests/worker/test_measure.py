"""What workers measure at start-up, and the costs that come of it: on virtual clocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowspec.config import ScheduleConfig
from flowspec.core import LayerRange
from flowspec.model.loader import Checkpoint
from flowspec.model.torch_stage import TorchStage
from flowspec.schedule.catalogue import make_schedule
from flowspec.schedule.pace import MeasuredCosts, Pace, free_rows
from flowspec.wire.messages import Echo, Ready, Result, Timing
from flowspec.worker.measure import LinkMeter, measure_forward
from tiny_models import VOCAB_SIZE

STEEP = [(1, 2.6), (2, 3.0), (4, 3.2), (8, 3.5), (16, 4.2), (32, 5.2), (64, 7.6), (128, 13.0)]  # a processor's


def costs(*tables: list[tuple[int, float]], bytes_per_s: float | None = None, row_bytes: int = 1000) -> MeasuredCosts:
    return MeasuredCosts([Ready(i, 0, 0, table, bytes_per_s) for i, table in enumerate(tables, 1)], row_bytes)


def ticking_clock(step_s: float) -> Callable[[], float]:
    ticks = count()
    return lambda: next(ticks) * step_s


@pytest.mark.parametrize("layers", [LayerRange(0, 1), LayerRange(1, 3)], ids=["first", "last"])
def test_a_forward_is_measured_for_as_many_rows_as_there_is_time(
    checkpoint_dir: Callable[[str], Path], layers: LayerRange
) -> None:
    stage = TorchStage.load(Checkpoint.open(checkpoint_dir("llama")), layers, "float32", "cpu")
    assert [rows for rows, _ in measure_forward(stage, VOCAB_SIZE, clock=ticking_clock(1e-4))] == [
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        128,
    ]
    # Every look at the clock takes 0.1 s: too slow for all counts.
    few = [rows for rows, _ in measure_forward(stage, VOCAB_SIZE, clock=ticking_clock(0.1))]
    assert few and few == [1, 2, 4, 8, 16, 32, 64, 128][: len(few)] and len(few) < 8
    assert [rows for rows, _ in measure_forward(stage, VOCAB_SIZE, clock=ticking_clock(10.0))] == [1]


@pytest.mark.parametrize("layers", [LayerRange(0, 2), LayerRange(1, 2)], ids=["first", "second"])
def test_rows_of_a_measurement_need_different_experts(
    checkpoint_dir: Callable[[str], Path], layers: LayerRange
) -> None:
    stage = TorchStage.load(Checkpoint.open(checkpoint_dir("qwen3_moe")), layers, "float32", "cpu")
    routed: dict[int, set[int]] = {}

    def note(module: torch.nn.Module, rows: Any, results: Any) -> None:
        routed.setdefault(len(results[2]), set()).update(results[2].flatten().tolist())

    router = next(module for name, module in stage._layers[-1].named_modules() if name == "mlp.gate")
    router.register_forward_hook(note)
    measure_forward(stage, VOCAB_SIZE, clock=ticking_clock(1e-4))
    assert len(routed[1]) == 3 and routed[64] == set(range(8))


@dataclass
class SlowLink:
    """Runs a meter over a link, and counts the seconds."""

    bytes_per_s: float
    latency_s: float
    loading_s: float = 0.0  # until then the next worker answers nothing

    def measure(self) -> tuple[LinkMeter, float]:
        meter, now, arrivals = LinkMeter(), 0.0, list[tuple[float, int]]()
        for now in self._ticks():
            while arrivals and arrivals[0][0] <= now:
                arrived_s, number = arrivals.pop(0)
                meter.on_echo(Echo(number), arrived_s)
            if (probe := meter.next_probe(now)) is not None:
                trip_s = 2 * self.latency_s + len(probe.payload) / self.bytes_per_s
                arrivals.append((max(now, self.loading_s) + trip_s, probe.number))
            if meter.is_done:
                break
        return meter, now

    @staticmethod
    def _ticks() -> Iterator[float]:
        return (tick / 100 for tick in range(10_000))


@given(st.floats(1e4, 1e9), st.floats(0.0, 0.3))
def test_a_link_is_measured_in_time(bytes_per_s: float, latency_s: float) -> None:
    meter, took_s = SlowLink(bytes_per_s, latency_s).measure()
    assert meter.is_done and took_s < 3.5
    assert meter.latency_s == pytest.approx(latency_s, abs=0.002)
    assert meter.bytes_per_s is not None and meter.bytes_per_s > 0


def test_rate_and_latency_of_a_link_are_found_even_if_the_next_worker_is_late() -> None:
    meter, took_s = SlowLink(1.25e6, 0.01, loading_s=30.2).measure()
    assert meter.bytes_per_s == pytest.approx(1.25e6, rel=0.05)
    assert meter.latency_s == pytest.approx(0.01, rel=0.1)
    assert took_s < 31.7


def test_a_next_worker_that_falls_silent_does_not_hold_up_the_start() -> None:
    meter = LinkMeter()
    probe = meter.next_probe(0.0)
    assert probe is not None
    meter.on_echo(Echo(probe.number), 0.1)
    assert meter.next_probe(0.1) is not None
    assert meter.next_probe(0.5) is None and not meter.is_done
    assert meter.next_probe(1.2) is None and meter.is_done
    assert meter.bytes_per_s is None


def test_a_schedule_that_is_made_changes_nothing_but_itself() -> None:
    """It measured the pace of all requests anew, and was made at every step while another request waited."""
    measured = costs([(1, 1.0), (128, 1.1)])
    pace = Pace(measured)
    before = pace.segment_len, pace.slot_s
    for _ in range(50):
        measured.note([Timing(1, 1, 0.0, 4.0, 0, 1)])
    make_schedule("auto", ScheduleConfig(), 1, pace=pace)
    assert (pace.segment_len, pace.slot_s) == before
    pace.measure()
    assert pace.slot_s > before[1]


def test_costs_are_those_of_the_slowest_stage_and_link() -> None:
    ready = [Ready(1, 0, 0, [(1, 1.0), (2, 1.0), (4, 5.0)], 2e6), Ready(2, 0, 0, [(1, 2.0), (4, 2.0)], 1e6)]
    measured = MeasuredCosts([*ready, Ready(3, 0, 0, [(1, 0.5)])], 1000)
    assert [measured.stage_s(n) for n in (1, 2, 3, 4)] == [2.0, 2.0, 3.0, 5.0]
    assert measured.stage_s(10) == pytest.approx(17.0)  # as from 2 to 4 rows
    assert measured.wire_s(16) == pytest.approx(0.016)
    assert measured.way_s(4) == pytest.approx(5.0 + 2.0 + 2.0 + 3 * 0.004)
    assert costs([(1, 0.5)]).stage_s(3) == 1.5  # nothing else is known
    assert costs([(1, 0.5)]).wire_s(16) == 0.0  # there is no link between workers


def test_costs_follow_what_forwards_take() -> None:
    measured = costs([(1, 1.0), (128, 1.0)], [(1, 0.9), (128, 0.9)])
    for _ in range(100):
        measured.note([Timing(1, 0, 0.0, 9.0, 0, 0), Timing(2, 4, 10.0, 11.8, 0, 7)])
    assert measured.stage_s(1) == pytest.approx(1.8, rel=0.01)
    for _ in range(100):
        measured.note([Timing(2, 7, 10.0, 10.1, 0, 7)])
    assert measured.stage_s(1) == 1.0  # no longer the second stage's, which is at its 0.9 again


def test_free_rows_are_those_that_cost_nothing_or_are_worth_their_time() -> None:
    assert free_rows(costs([(1, 1.0), (64, 1.0), (128, 3.0)])) == 67
    assert free_rows(costs([(1, 1.0), (128, 1.0)], bytes_per_s=1e6, row_bytes=4999)) == 70  # 0.35 s on the wire
    assert 8 <= free_rows(costs(STEEP)) <= 16
    assert free_rows(costs([(1, 1.0), (128, 128.0)])) == 1


def test_a_segment_takes_along_the_rows_that_save_more_than_they_delay() -> None:
    scores = np.log([0.5, 0.3, 0.11, 0.09])
    pace = Pace(costs([(1, 1.0), (128, 13.7)]))  # each further row costs a tenth of the first
    assert pace.num_worth(scores) == pace.num_worth(scores - 3.0) == 3  # those above a fifth of the best
    assert Pace(costs([(1, 1.0), (128, 1.0)])).num_worth(scores) == 4
    assert Pace(costs([(1, 1.0), (128, 128.0)])).num_worth(scores) == 1


def test_a_segment_on_long_hops_takes_more_rows_along() -> None:
    pace = Pace(costs([(1, 1.0), (128, 13.7)]))
    pace.note_result(Result(0, 0, 0, [], 0, torch.zeros(0, 1), [Timing(1, 1, 1.0, 2.0, 0, 1)]), 0.0, 3.0)
    assert pace.num_worth(np.log([0.5, 0.3, 0.11, 0.09, 0.03])) == 4


def test_trees_hold_less_probable_nodes_where_rows_are_cheap_and_stages_many() -> None:
    flat, dear = [(1, 1.0), (128, 1.0)], [(1, 1.0), (128, 128.0)]
    times = [Pace(costs(*tables)).tree_times for tables in ([flat], [flat] * 4, [dear], [dear] * 4)]
    assert times == pytest.approx([2.0, 8.0, 1.0, 1.0])
