"""The benchmark that kills workers, in a small size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("options", [(), ("--elsewhere",)], ids=["here", "elsewhere"])
def test_texts_are_the_same_when_workers_are_lost(options: tuple[str, ...]) -> None:
    sizes = ("--requests", "2", "--faults", "2", "--stages", "2", "--max-new-tokens", "24", "--seed", "5")
    command = [sys.executable, str(BENCHMARKS / "chaos.py"), *options, *sizes, "--heartbeat-timeout", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert sum(count for name, count in figures.items() if name.startswith("faults_")) == 2
    assert figures["recoveries"] > 0 and figures["tokens"] > 40 and figures["differences"] == 0
    assert 0 < figures["seconds_without_token_median"] <= figures["seconds_without_token_max"]


def test_no_text_changes_whatever_happens_to_simulated_devices() -> None:
    command = [sys.executable, str(BENCHMARKS / "simulated_chaos.py"), "--seeds", "24", "--jobs", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert figures["failed"] == 0 and figures["tokens"] > 1000 and figures["recoveries"] > 9
    assert all(figures[kind] for kind in ("kill", "stop", "cut", "gone"))


def test_a_recovery_is_held_against_its_parts() -> None:
    command = [sys.executable, str(BENCHMARKS / "recovery.py"), "--kills", "1", "--stages", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    parts = sum(figures[name] for name in ("start alone", "load alone", "prefill alone"))
    assert figures["recovery"] > 0 and figures["ratio"] == pytest.approx(figures["recovery"] / parts)
