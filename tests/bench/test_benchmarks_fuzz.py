"""The fuzzing benchmark, for a moment: worker and driver outlive what it sends, and it says what that was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


def test_worker_and_driver_outlive_damaged_frames(checkpoint_dir: Callable[[str], Path]) -> None:
    command = [sys.executable, str(BENCHMARK), "--seconds", "1.5", "--model", str(checkpoint_dir("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["worker answers"] and told["log_lines"] < 100 and told["longest_log_line"] < 600
    assert told["strangers"]["frames"] > 100 and told["strangers"]["texts"] > 0
    assert told["driver"]["sessions"] > 0 and told["driver"]["messages"] > 0
    assert told["replies"]["replies"] > 0 and told["replies"]["refused at the edge"] > 0
