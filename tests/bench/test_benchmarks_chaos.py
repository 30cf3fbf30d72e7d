"""The benchmark that kills workers, in a small size."""

from __future__ import annotations

import json

import pytest

from benchmark_script import run_benchmark


@pytest.mark.parametrize("options", [(), ("--elsewhere",)], ids=["here", "elsewhere"])
def test_texts_are_the_same_when_workers_are_lost(options: tuple[str, ...]) -> None:
    sizes = ("--requests", "2", "--faults", "2", "--stages", "2", "--max-new-tokens", "24", "--seed", "5")
    figures = json.loads(run_benchmark("chaos.py", *options, *sizes, "--heartbeat-timeout", "1", "--json"))
    assert sum(count for name, count in figures.items() if name.startswith("faults_")) == 2
    assert figures["recoveries"] > 0 and figures["tokens"] > 40 and figures["differences"] == 0
    assert 0 < figures["seconds_without_token_median"] <= figures["seconds_without_token_max"]


def test_no_text_changes_whatever_happens_to_simulated_devices() -> None:
    figures = json.loads(run_benchmark("simulated_chaos.py", "--seeds", "24", "--jobs", "1", "--json"))
    assert figures["failed"] == 0 and figures["tokens"] > 1000 and figures["recoveries"] > 9
    assert all(figures[kind] for kind in ("kill", "stop", "cut", "gone"))


def test_a_recovery_is_held_against_its_parts() -> None:
    figures = json.loads(run_benchmark("recovery.py", "--kills", "1", "--stages", "2", "--json"))
    parts = sum(figures[name] for name in ("start alone", "load alone", "prefill alone"))
    assert figures["recovery"] > 0 and figures["ratio"] == pytest.approx(figures["recovery"] / parts)
