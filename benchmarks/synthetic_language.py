"""Shows how the synthetic language is calibrated, for each draft quality: prints tables, or one JSON object.

    python benchmarks/synthetic_language.py [--json] [--quality block] [--contexts 40000] [--num-prompts 20]
        [--max-new-tokens 256]

docs/METHODOLOGY.md defines the figures, and says what they are calibrated against.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowspec.bench.report import markdown_table
from flowspec.bench.runner import PairSpec, run_simulated
from flowspec.config import LockstepConfig, ScheduleConfig, TreeConfig
from flowspec.core import Partition, SamplingParams
from flowspec.emulation.costs import Device, DriverCosts, EmulatedModel, LinkModel, TensorParallel
from flowspec.emulation.description import ClusterDescription
from flowspec.emulation.experiment import Experiment
from flowspec.model.synthetic import QUALITIES, Language, quality

STEPS = (1, 2, 3, 5, 8, 12)
# (nodes without the root, levels, nodes of a level that get children); EAGLE's code counts a level less
TREES = ((60, 6, 10), (60, 7, 10), (80, 6, 10), (80, 7, 10), (80, 15, 10), (7, 7, 1), (15, 15, 1))
BATCH = 4000  # contexts at once


@dataclass(frozen=True)
class Hits:
    """Of the draft's most probable token, after so many steps of extrapolation; 1 is fresh."""

    step: int
    hit_rate: float  # it is the target's greedy token
    predicted: float  # mean of its probability by the draft's own account


def measure_hits(language: Language, num_contexts: int) -> list[Hits]:
    """Over random contexts of random texts."""
    hits, predicted = np.zeros(len(STEPS)), np.zeros(len(STEPS))
    rng = np.random.default_rng(0)
    for start in range(0, num_contexts, BATCH):
        num = min(BATCH, num_contexts - start)
        contexts = rng.integers(-(2**63), 2**63, size=(num, 2), dtype=np.int64)
        targets = language.target_logits(contexts).argmax(axis=1)
        for i, step in enumerate(STEPS):
            token_ids, logprobs = language.draft(contexts, np.full(num, step), top_k=1)
            hits[i] += (token_ids[:, 0] == targets).sum()
            predicted[i] += np.exp(logprobs[:, 0]).sum()
    return [
        Hits(*row)
        for row in zip(STEPS, (hits / num_contexts).tolist(), (predicted / num_contexts).tolist(), strict=True)
    ]


def single_stage() -> ClusterDescription:
    """One stage; what it costs does not change how many tokens a pass yields."""
    link, costs = LinkModel("link", 0.0, 1000.0), DriverCosts(1.0, 1.0, 1.0, block_pass_ms=1.0)
    return ClusterDescription(
        "single", EmulatedModel("model", 1, 1, 1, 1, 1), (Device("device", 1.0, 1.0),), (link, link), link,
        Partition.even(1, 1), costs, costs, TensorParallel(),
    )  # fmt: skip


def tokens_per_pass(
    quality_name: str, shape: tuple[int, int, int], temperature: float, num_prompts: int, max_new_tokens: int
) -> float:
    """Tokens that one pass of the target over a whole EAGLE-2 tree yields, the bonus token included."""
    num_nodes, num_levels, width = shape
    tree = TreeConfig(width, width, num_levels, max_depth=num_levels, size=num_nodes + 1, min_probability=0.0)
    config = ScheduleConfig(lockstep=LockstepConfig(tree))
    experiment = Experiment(single_stage(), config, SamplingParams(max_new_tokens, temperature, seed=0))
    prompts = [f"0 {index}" for index in range(num_prompts)]  # those of ``flowspec simulate``
    records = run_simulated(experiment, PairSpec(draft_quality=quality_name), ["serial"], prompts)["serial"]
    return sum(record.num_decoded for record in records) / sum(record.segments for record in records)


def measure(quality_name: str, num_contexts: int, num_prompts: int, max_new_tokens: int) -> dict[str, Any]:
    hits = measure_hits(Language(quality(quality_name)), num_contexts)
    trees = [
        {
            "nodes": nodes,
            "levels": levels,
            "width": width,
            "temperature": temperature,
            "tokens_per_pass": tokens_per_pass(
                quality_name, (nodes, levels, width), temperature, num_prompts, max_new_tokens
            ),
        }
        for temperature in (0.0, 1.0)
        for nodes, levels, width in TREES
    ]
    return {"hits": [vars(row) for row in hits], "trees": trees}


def shape_text(row: dict[str, Any]) -> str:
    if row["width"] == 1:
        return f"chain of {row['nodes']}"
    return f"{row['nodes']} nodes, {row['levels']} levels"


def print_tables(name: str, figures: dict[str, Any]) -> None:
    hits = [[row["step"], f"{row['hit_rate']:.3f}", f"{row['predicted']:.3f}"] for row in figures["hits"]]
    trees = [[shape_text(row), f"{row['temperature']:g}", f"{row['tokens_per_pass']:.2f}"] for row in figures["trees"]]
    print(f"{name}\n\n{markdown_table(['step', 'hit rate', 'predicted'], hits)}\n")
    print(f"{markdown_table(['tree', 'temperature', 'tokens per pass'], trees)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quality", action="append", choices=list(QUALITIES), help="only this one; may be repeated")
    parser.add_argument("--contexts", type=int, default=40000, help="contexts behind each hit rate")
    parser.add_argument("--num-prompts", type=int, default=20, help="texts behind each number of tokens per pass")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (arguments.contexts, arguments.num_prompts, arguments.max_new_tokens)
    figures = {name: measure(name, *sizes) for name in arguments.quality or QUALITIES}
    if arguments.json:
        print(json.dumps(figures, indent=2))
    else:
        for name, of_quality in figures.items():
            print_tables(name, of_quality)


if __name__ == "__main__":
    main()
