"""The command ``emulate``: a cluster file played by real processes, next to what the simulator says of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from flowspec.cli_bench import (
    AsPublished,
    Draft,
    Int8Draft,
    PromptsFile,
    Seed,
    comma_list,
    progress_bar,
    wanted_prompts,
    write_json,
)
from flowspec.cli_common import Verbose, errors_in_one_line, print_table, stdout
from flowspec.config import ScheduleConfig
from flowspec.core import SamplingParams
from flowspec.errors import UsageError


def emulate(
    cluster_file: Annotated[str, typer.Argument(metavar="CLUSTER.toml", help="The cluster; see clusters/.")],
    schedule: Annotated[str, typer.Option(help="Comma list, as for simulate, without the tp ones.")] = "lockstep,flow",
    model: Annotated[str, typer.Option(help="Gives the tokens: demo, or a directory.")] = "demo",
    draft: Draft = None,
    int8_draft: Int8Draft = False,
    prompts: PromptsFile = None,
    num_prompts: Annotated[int, typer.Option(help="Prompts at most.")] = 2,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Seed = 0,
    as_published: AsPublished = False,
    time_scale: Annotated[
        float, typer.Option(help="Wall clock seconds in a virtual second; more where the machine cannot keep up.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a cluster file in real processes that are as slow as its devices, and compare with the simulator."""
    with errors_in_one_line(verbose), progress_bar() as progress:
        if not (math.isfinite(time_scale) and time_scale > 0):
            raise UsageError(f"--time-scale is {time_scale:g}; it must be positive")
        if model == "synthetic":
            raise UsageError("emulate moves real hidden states; use --model demo, or a directory")
        names = comma_list(schedule, "--schedule")
        indexed = list(enumerate(wanted_prompts(model, prompts, num_prompts, seed)))
        import torch

        from flowspec.bench.report import results_json, results_table
        from flowspec.bench.study import check_same_tokens, check_schedules
        from flowspec.cluster import ClusterSpec
        from flowspec.emulator import Emulator
        from flowspec.records import ScheduleResult
        from flowspec.simulator import CheckpointPair, Experiment, simulate

        check_schedules(names, is_simulated=False)
        cluster = ClusterSpec.load(cluster_file)
        text = Path(cluster_file).read_text(encoding="utf-8")
        params = SamplingParams(max_new_tokens, temperature, seed=seed)
        experiment = Experiment(cluster, ScheduleConfig(), params, as_published, int8_draft=int8_draft)
        torch.set_num_threads(1)
        pair = CheckpointPair(
            model, draft or "auto", ScheduleConfig().flow.top_k, is_coupled=not as_published,
            draft_dtype="int8" if int8_draft else "auto",
        )  # fmt: skip
        results: list[ScheduleResult] = []
        remarks: dict[str, dict[str, float]] = {}
        for place, name in enumerate(names):
            progress("emulating", place / len(names))
            simulated = simulate(experiment, pair, name, indexed)
            with Emulator(experiment, text, name, pair, time_scale) as emulator:
                emulated = emulator.run(indexed)
            check_same_tokens({f"{name} simulated": simulated, f"{name} emulated": emulated.records})
            results.append(ScheduleResult.of(name, emulated.records))
            expected = ScheduleResult.of(name, simulated).tokens_per_s
            remarks[name] = {
                "simulated_tokens_per_s": float(f"{expected:.6g}"),
                "emulated_to_simulated": float(f"{results[-1].tokens_per_s / expected:.6g}"),
                "max_lag_ms": float(f"{emulated.max_lag_s * 1000:.6g}"),
            }
        progress.stop()
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "num_prompts": len(indexed),
            "as_published": as_published, "draft": draft or "auto", "int8_draft": int8_draft,
            "time_scale": time_scale,
        }  # fmt: skip
        if as_json:
            write_json(results_json(cluster.name, model, seed, settings, results) | {"emulation": remarks})
            return
        print_table(results_table(results))
        for name, remark in remarks.items():
            stdout.print(
                f"{name}: {remark['emulated_to_simulated']:.3f} times the simulator's "
                f"{remark['simulated_tokens_per_s']:.2f} tokens/s; largest lag {remark['max_lag_ms']:.1f} ms",
                markup=False,
                highlight=False,
            )
