"""The benchmark of kernels, in a small size."""

from __future__ import annotations

import json

from benchmark_script import run_benchmark


def test_every_kernel_is_measured_and_integer_ones_are_invariant() -> None:
    sizes = ("--shape", "tiny", "--rows", "1,3", "--repeat", "1", "--json")
    found = {each["kernel"]: each for each in json.loads(run_benchmark("kernels.py", *sizes))}
    assert found.keys() >= {"torch float32", "flowspec int8", "flowspec int4"}
    assert all(min(each["ms"].values()) > 0 and each["times_the_bound"] > 0 for each in found.values())
    assert found["flowspec int8"]["invariant"] and found["flowspec int4"]["invariant"]


def test_attention_is_measured_with_keys_in_both_floats() -> None:
    sizes = ("--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--layers", "1", "--slots", "40", "--rows", "1,3")
    found = json.loads(run_benchmark("attention.py", *sizes, "--repeat", "2", "--json"))
    assert [(each["kept_in"], each["rows"]) for each in found] == [
        (kept_in, rows) for rows in (1, 3) for kept_in in ("float32", "float16")
    ]
    assert all(each["ms"] > 0 and each["times_the_bound"] > 0 for each in found)
