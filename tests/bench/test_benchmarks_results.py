"""The benchmarks that simulate, in a small size: they must work and repeat themselves, whatever they measure."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmark_script import BENCHMARKS, run_benchmark
from flowspec.model.synthetic import QUALITIES


def run_results(out: Path, *sections: str) -> None:
    only = [argument for name in sections for argument in ("--only", name)]
    run_benchmark("results.py", "--quick", "--jobs", "1", "--out", str(out), *only)


def read_results(out: Path, section: str) -> list[dict[str, Any]]:
    return json.loads((out / "results" / f"{section}.json").read_text())


def test_results_are_written_between_the_markers_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n\n<!-- simulated: begin -->\nold\n<!-- simulated: end -->\n\nafter\n")
    run_results(tmp_path, "published", "depth", "ablation")
    text = page.read_text()
    assert text.startswith("before\n\n<!-- simulated: begin -->\n")
    assert text.endswith("<!-- simulated: end -->\n\nafter\n")
    assert "\nold\n" not in text
    titles = ("against the paper, greedy", "Depth of the trees", "without one of its mechanisms")
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert "| 7b-nano-150m " in text and "flowspec simulate clusters/" in text

    published, depth, ablation = (read_results(tmp_path, name) for name in ("published", "depth", "ablation"))
    assert {result["schedule"] for result in published[0]["results"]} == {
        "chunked", "pipedec", "lockstep", "serial", "ar"
    }  # fmt: skip
    assert all(result["tokens_per_s"] > 0 and result["num_tokens"] == 48 for result in published[0]["results"])
    assert len(depth) == 6 + 6 + 1  # diagonal, the rest of 4..6, a corner
    assert len(ablation[0]["results"]) == 4
    assert 0 < (tmp_path / "results" / "depth.png").stat().st_size < 150_000

    before = (tmp_path / "results" / "ablation.json").read_bytes()
    run_results(tmp_path, "ablation")
    assert (tmp_path / "results" / "ablation.json").read_bytes() == before
    assert page.read_text() == text, "one section alone changed the others, or itself"


def test_rivals_are_tuned_and_every_figure_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    results, tuning = (importlib.import_module(name) for name in ("results", "simulated.tuning"))
    monkeypatch.setattr(tuning, "NUM_TOKENS", 24)  # of each of more than fifty settings
    sizes = ("--quick", "--jobs", "1", "--out", str(tmp_path), "--keep", str(tmp_path / "keep"))
    monkeypatch.setattr(sys, "argv", ["results.py", *sizes, "--only", "fair"])
    results.main()
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| best rival |" in text and "flow / best rival" in text
    assert re.search(r"^Simulated on \d{4}-\d\d-\d\d with commit \w+\.$", text, re.MULTILINE)
    written = (tmp_path / "results" / "fair.json").read_bytes()
    assert {result["schedule"] for entry in json.loads(written) for result in entry["results"]} > {"flow"}
    results.main()  # from what was kept
    assert (tmp_path / "results" / "fair.json").read_bytes() == written


def test_the_whole_is_the_product_of_its_causes(tmp_path: Path) -> None:
    run_results(tmp_path, "whole")
    (row,) = re.findall(r"^\| 7b-agx-1g +\| (.*) \|$", (tmp_path / "RESULTS.md").read_text(), re.MULTILINE)
    published, *factors, product, ours = (float(cell) for cell in row.split("|"))
    assert math.prod(factors) == pytest.approx(product, rel=0.05) == pytest.approx(ours / published, rel=0.05)


def test_quick_results_never_reach_the_documentation() -> None:
    command = [sys.executable, str(BENCHMARKS / "results.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "--out" in done.stderr


def test_the_synthetic_language_is_calibrated() -> None:
    sizes = ("--contexts", "4000", "--num-prompts", "1", "--max-new-tokens", "32")
    own = [name for name in QUALITIES if name == "eagle1-clairvoyant" or not name.endswith("-clairvoyant")]
    chosen = (word for name in own for word in ("--quality", name))
    figures = json.loads(run_benchmark("synthetic_language.py", "--json", *sizes, *chosen))
    aims = {1: 0.744, 3: 0.703, 5: 0.647, 8: 0.562, 12: 0.468}
    rates = {row["step"]: row["hit_rate"] for row in figures["eagle1"]["hits"]}
    assert all(abs(rates[step] - aim) < 0.03 for step, aim in aims.items())
    assert all(abs(row["hit_rate"] - 0.83) < 0.03 for row in figures["ideal"]["hits"])
    trees = [row for quality in figures.values() for row in quality["trees"]]
    assert all(row["tokens_per_pass"] > (1.5 if row["nodes"] < 60 else 2) for row in trees), "a chain has fewer nodes"


def test_the_growth_benchmark_prints_json_and_draws(tmp_path: Path) -> None:
    figures = json.loads(run_benchmark("growth.py", "--runs", "2", "--plot", str(tmp_path / "growth.png")))
    for axis in ("nodes", "context"):
        points = figures[axis]["points"]
        assert len(points) == 6 and isinstance(figures[axis]["exponent"], float)
        assert all(set(point["parts_ms"]) == set(points[0]["parts_ms"]) for point in points)
        assert all(time_ms > 0 for point in points for time_ms in point["parts_ms"].values())
    assert 0 < (tmp_path / "growth.png").stat().st_size < 150_000
