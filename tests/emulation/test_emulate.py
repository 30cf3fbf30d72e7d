"""Emulated clusters: real processes and sockets that keep the simulator's time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import apart_from_progress

CLUSTERS = Path(__file__).parents[2] / "clusters"
TWO_SLOW_STAGES = """
[model]
name = "small"
num_layers = 8
hidden_size = 256
vocab_size = 8000
layer_params = 1e9
kv_size = 512

[device.slow]
memory_gb_s = 40.0
compute_tflops = 10.0

[link.lan]
latency_ms = 5.0
bandwidth_mbps = 100

[pipeline]
devices = ["slow", "slow"]
links = "lan"

[driver.published]
draft_pass_ms = 40.0
lm_head_ms = 10.0
verify_ms = 10.0
broadcast = "tree"
broadcast_messages = 2

[driver.ours]
draft_pass_ms = 40.0
lm_head_ms = 10.0
verify_ms = 1.0
"""


def run_emulate(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    cluster = tmp_path / "slow.toml"
    cluster.write_text(TWO_SLOW_STAGES)
    command = [sys.executable, "-m", "flowspec", "emulate", str(cluster)]
    options = ("--max-new-tokens", "8", *(() if "--num-prompts" in options else ("--num-prompts", "1")), *options)
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)


def test_emulated_schedules_give_the_simulators_tokens_and_times(tmp_path: Path) -> None:
    # At half speed: other tests take the cores now and then.
    options = ("--schedule", "ar,lockstep,flow", "--temperature", "0.8", "--time-scale", "2", "--json")
    result = run_emulate(tmp_path, *options)
    assert result.returncode == 0, result.stderr
    value: dict[str, Any] = json.loads(result.stdout)
    assert [entry["schedule"] for entry in value["results"]] == ["ar", "lockstep", "flow"]
    for name, remark in value["emulation"].items():
        # Both go by virtual time: the wall clock only shows as a lag, which is bounded by a stage's 200 ms.
        assert remark["emulated_to_simulated"] == pytest.approx(1, abs=0.1), name
        assert 0 <= remark["max_lag_ms"] < 200


def test_a_machine_that_cannot_keep_up_is_told_so(tmp_path: Path) -> None:
    result = run_emulate(tmp_path, "--schedule", "ar", "--time-scale", "0.001")
    assert result.returncode == 1
    assert "cannot keep up" in result.stderr and "--time-scale" in result.stderr
    assert apart_from_progress(result.stderr).count("\n") == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--model", "synthetic"], "real hidden states"),
        (["--time-scale", "0"], "--time-scale is 0"),
        (["--schedule", "tp-galaxy"], "simulator only"),
        (["--schedule", "fast"], "is none of"),
        (["--num-prompts", "0"], "--num-prompts is 0"),
        (["--draft-dtype", "int4"], "--draft-dtype int4 is for runs in real time; a cluster file says what int8 costs"),
        (["--draft-dtype", "int8"], "slow has no int8_draft_pass_ms in [driver.ours]"),
    ],
)
def test_wrong_inputs_are_one_line(tmp_path: Path, options: list[str], problem: str) -> None:
    result = run_emulate(tmp_path, *options)
    assert result.returncode == 2
    assert problem in result.stderr
    assert apart_from_progress(result.stderr).count("\n") == 1


def test_a_model_with_too_few_layers_is_refused() -> None:
    command = [sys.executable, "-m", "flowspec", "emulate", str(CLUSTERS / "7b-agx-16.toml"), "--num-prompts", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "too few for 16 stages" in result.stderr
