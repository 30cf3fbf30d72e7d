"""A device that stays away: its layers go to the others, as far as there is memory, and the same texts go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engines import engine_of, run
from flowspec.config import LinkConfig
from flowspec.core import Partition, SamplingParams
from flowspec.engine.pipeline import PipelineSpec
from flowspec.engine.reassign import share_out, without
from flowspec.errors import WorkerError
from flowspec.model.backends import open_checkpoint
from flowspec.wire.messages import Ready
from worker_process import WorkerProcess

PROMPT = (1, 4, 2, 1, 4, 2, 3)
ENOUGH = float("inf")


def test_lost_layers_go_where_they_add_least() -> None:
    assert share_out([4, 4], 4, [ENOUGH, ENOUGH]) == [6, 6]
    assert share_out([8, 2], 5, [ENOUGH, ENOUGH]) == [12, 3], "a device that was given little is weak"
    assert share_out([4, 4], 4, [1, ENOUGH]) == [5, 7]
    assert share_out([4, 4], 4, [1.9, 2.9]) is None, "half a layer is none"
    assert share_out([1], 7, [ENOUGH]) == [8]
    for num_lost in range(9):
        assert sum(share_out([3, 1, 2], num_lost, [ENOUGH] * 3) or []) == 6 + num_lost


def test_who_is_left_holds_the_whole_model(checkpoint_dir: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(str(checkpoint_dir("llama")))
    spec = PipelineSpec(checkpoint, Partition.parse("0:1,1:4,4:6"), ["a:1", "b:1", "c:1"], names=["x", "y", "z"])
    ready = [Ready(stage, 1000 * len(layers), 0) for stage, layers in enumerate(spec.partition.stages, start=1)]
    left = without(spec, ready, {2})
    assert left is not None
    assert str(left.partition) == "0:2,2:6" and left.workers == ["a:1", "c:1"] and left.names == ["x", "z"]
    alone = without(spec, ready, {1, 3})
    assert alone is not None and str(alone.partition) == "0:6" and alone.workers == ["b:1"]
    assert without(spec, ready, {1, 2, 3}) is None, "nobody"
    # 2000 bytes free, of which caches need some: one layer of 1000 bytes more, and not two.
    small = [Ready(one.stage, one.weight_bytes, 0, free_bytes=2000) for one in ready]
    assert without(spec, small, {2}) is None
    left = without(spec, small, {1})
    assert left is not None and sorted(map(len, left.partition.stages)) == [2, 4]


def test_a_device_that_stays_away_is_done_without(checkpoint_dir: Callable[[str], Path]) -> None:
    """One after the other, with a draft that reads features, until nobody is left."""
    directory = checkpoint_dir("llama")
    params = [SamplingParams(60), SamplingParams(60, temperature=0.8, seed=5, frequency_penalty=0.2)]
    with engine_of(directory, stages=1, in_process=True, draft="none", schedule="ar") as engine:
        expected = [engine.submit(PROMPT, one) for one in params]
        run(engine, expected)
    workers = [WorkerProcess() for _ in range(3)]
    link = LinkConfig(
        start_timeout_s=60, stall_timeout_s=60, heartbeat_timeout_s=1.5, rejoin_timeout_s=5, reassign_after_s=1.5
    )
    places = {"workers": [worker.address for worker in workers], "names": ["kitchen", "attic", "hall"]}
    try:
        with engine_of(directory, draft=directory / "draft", schedule="flow", link=link, **places) as engine:
            for gone, partition, devices in ((1, "0:3,3:6", ["kitchen", "hall"]), (0, "0:6", ["hall"])):
                jobs = [engine.submit(PROMPT, one) for one in params]
                while not all(job.output_ids for job in jobs):
                    engine.step()
                workers[gone].kill()
                run(engine, jobs)
                assert [job.output_ids for job in jobs] == [job.output_ids for job in expected]
                assert str(engine.partition) == partition
                assert [stage.device for stage in engine.status().stages] == devices
                assert all(stage.state == "up" for stage in engine.status().stages)
            workers[2].kill()
            with pytest.raises(WorkerError, match=r"worker 1 \(hall\) was away for 5 s"):
                run(engine, [engine.submit(PROMPT, params[0])])
    finally:
        for worker in workers:
            worker.kill()
