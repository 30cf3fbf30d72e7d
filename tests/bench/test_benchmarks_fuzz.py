"""The fuzzing benchmark, for a moment: worker and driver outlive what it sends, and it says what that was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmark_script import run_benchmark


@pytest.mark.parametrize("options", [(), ("--joined",)], ids=["open", "joined"])
def test_worker_and_driver_outlive_damaged_frames(
    checkpoint_dir: Callable[[str], Path], options: tuple[str, ...]
) -> None:
    sizes = ("--frames", "300", "--rate", "2000", "--model", str(checkpoint_dir("llama")))
    told = json.loads(run_benchmark("fuzz.py", *sizes, *options))
    assert told["worker answers"] and told["log_lines"] < 100 and told["longest_log_line"] < 600
    assert told["strangers"]["frames"] >= 150 and told["strangers"]["texts"] > 0
    assert (told["strangers"]["answers"] == 0) or not options
    assert told["driver"]["sessions"] > 0 and told["driver"]["messages"] >= 144
    assert told["replies"]["replies"] >= 6 and told["replies"]["requests"] > 0  # six may all have been let through
