"""Runs in real time: whose clock is whose."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import workers_of
from flowspec import LLM, SamplingParams
from flowspec.bench.local import run_local
from flowspec.cluster.inproc import InprocConnections
from flowspec.cluster.trips import Trip

PROMPT = "t1 t4 t2"


@pytest.mark.parametrize("offsets_s", [(0.0, 0.0), (1000.0, -2000.0)], ids=["one clock", "clocks of their own"])
def test_forwards_lie_within_their_run_whatever_the_workers_clocks_say(
    checkpoint_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, offsets_s: tuple[float, float]
) -> None:
    """The forwards of workers elsewhere lay outside of the run, so that no stage had been busy."""
    trips = {stage: Trip(0.01, offset_s) for stage, offset_s in enumerate(offsets_s, start=1)}
    monkeypatch.setattr(InprocConnections, "trips", trips)
    with LLM(checkpoint_dir("llama"), stages=2, in_process=True, draft="none") as llm:
        for worker, offset_s in zip(workers_of(llm.engine), offsets_s, strict=True):
            worker._clock = lambda offset_s=offset_s: time.perf_counter() - offset_s
        (record,) = run_local(llm, ["ar"], [PROMPT], SamplingParams(8, ignore_eos=True))["ar"]
    assert {span.place for span in record.spans} == {1, 2}
    assert all(0 <= span.start_s <= span.end_s <= record.end_s for span in record.spans)
    assert all(0 < busy_s < record.decode_s for busy_s in record.busy_s[1:])
    # A token is one pass through both stages: in the order of the stages, on the driver's clock.
    assert [span.place for span in sorted(record.spans, key=lambda span: span.start_s)][-4:] == [1, 2, 1, 2]
