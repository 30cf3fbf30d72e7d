"""What `make demo` and the benchmarks run, in a small size: they must work, whatever they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

from flowspec import LLM, SamplingParams
from flowspec.core import Partition

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_the_demo_checks_its_own_text() -> None:
    command = [sys.executable, "-m", "flowspec", "demo", "--model", "demo", "--stages", "2", "--max-new-tokens", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "The text is the same as plain autoregressive decoding" in done.stdout
    for row in ("tokens/s", "time to first token", "accepted", "restarts", "bytes on the links"):
        assert row in done.stdout


def test_the_demo_pair_speculates_well_over_eight_stages() -> None:
    prompt = "class Queue:\n    def __init__(self, maxsize=0):\n"
    params = SamplingParams(max_tokens=48)
    with LLM("demo", partition=Partition.even(8, 8), in_process=True) as llm:
        flow, plain = llm.generate(prompt, params), llm.generate(prompt, params, schedule="ar")
    assert flow.token_ids == plain.token_ids
    assert flow.text == plain.text != ""
    assert flow.stats.draft == "eagle" and flow.stats.accepted > 15


def test_streams_that_are_read_in_turn_lose_nothing() -> None:
    params = SamplingParams(max_tokens=20)
    with LLM("demo", stages=2, in_process=True) as llm:
        alone = [llm.generate(prompt, params).text for prompt in ("import os", "class A:")]
        streams = [llm.stream(prompt, params) for prompt in ("import os", "class A:")]
        texts = ["", ""]
        for chunks in zip_longest(*streams):
            texts = [text + (chunk.text if chunk else "") for text, chunk in zip(texts, chunks, strict=True)]
        # One ends in the other's steps, and is read afterwards.
        short = llm.stream("import os", SamplingParams(max_tokens=6))
        long = llm.stream("class A:", SamplingParams(max_tokens=60))
        begun = next(short).text
        assert sum(len(chunk.token_ids) for chunk in long) == 60
        assert begun + "".join(chunk.text for chunk in short) == llm.generate("import os", SamplingParams(6)).text
    assert texts == alone


def test_the_overhead_benchmark_prints_json() -> None:
    command = [sys.executable, str(BENCHMARKS / "overhead.py"), "--segments", "5", "--stages", "2", "--positions", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["segments"] >= 5 and figures["engine_ms_per_hop"] > 0 and figures["tree"]["build_ms"] > 0
    assert figures["sampling_by_vocabulary"].keys() == {"32000", "128256", "262144"}
    for by_setting in figures["sampling_by_vocabulary"].values():
        assert len(by_setting) == 3 and all(min(ms.values()) > 0 for ms in by_setting.values())


def test_the_draft_dtype_benchmark_prints_json() -> None:
    command = [sys.executable, str(BENCHMARKS / "draft_dtype.py"), "--prompts", "1", "--runs", "0"]
    command += ["--new-tokens", "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    guesses = json.loads(done.stdout)["guesses"]
    on_torch = ["float32", "float32, int8 weights"]
    assert list(guesses) == [*on_torch, *(f"{name} on our kernels" for name in on_torch)]
    assert all(figures["sampled"]["tokens_per_pass"] > 1 for figures in guesses.values())


def test_the_speed_benchmark_prints_json() -> None:
    command = [sys.executable, str(BENCHMARKS / "demo_speed.py"), "--repeat", "1", "--stages", "2"]
    done = subprocess.run([*command, "--max-new-tokens", "12"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["greedy"]["num_tokens"] == 12 and figures["temperature 0.8"]["ratio"] > 0


def test_the_server_benchmark_prints_json() -> None:
    command = [sys.executable, str(BENCHMARKS / "server.py"), "--stages", "1", "--clients", "1,3", "--requests", "2"]
    command += ["--max-tokens", "12", "--pairs", "2", "--warm-up", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert [figures["load_by_clients"][n]["tokens"] for n in ("1", "3")] == [24, 72]
    overhead = figures["http_overhead"]
    assert overhead["client"]["ttft_ms"] > overhead["server_engine"]["ttft_ms"] > 0
    assert overhead["in_process"]["ms_per_token"] > 0
