"""The benchmark of kernels, in a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_kernel_is_measured_and_integer_ones_are_invariant() -> None:
    sizes = ("--shape", "tiny", "--rows", "1,3", "--repeat", "1", "--json")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "kernels.py"), *sizes], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {each["kernel"]: each for each in json.loads(done.stdout)}
    assert found.keys() >= {"torch float32", "OpenVINO int8", "OpenVINO int4"}
    assert all(min(each["ms"].values()) > 0 and each["times_the_bound"] > 0 for each in found.values())
    assert found["OpenVINO int8"]["invariant"] and found["OpenVINO int4"]["invariant"]
