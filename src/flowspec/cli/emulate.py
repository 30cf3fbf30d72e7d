"""The command ``emulate``: a cluster file played by real processes, next to what the simulator says of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from flowspec.cli.options import (
    AsJson,
    AsPublished,
    ClusterFile,
    DraftDtype,
    DraftDtypeOption,
    MaxNewTokens,
    NumPrompts,
    PromptsFile,
    RealDraft,
    Seed,
    Temperature,
    Verbose,
)
from flowspec.cli.study import SYNTHETIC, check_costs_known, comma_list, wanted_prompts
from flowspec.cli.terminal import errors_in_one_line, print_table, progress_bar, stdout, write_json
from flowspec.config import ScheduleConfig
from flowspec.core import SamplingParams
from flowspec.errors import UsageError


def emulate(
    cluster_file: ClusterFile,
    schedule: Annotated[str, typer.Option(help="Comma list, as for simulate, without the tp ones.")] = "lockstep,flow",
    model: Annotated[
        str, typer.Option(help="Gives the tokens: demo, smollm2, a directory, a .gguf file, or a hub name.")
    ] = "demo",
    draft: RealDraft = None,
    draft_dtype: DraftDtypeOption = DraftDtype.auto,
    prompts: PromptsFile = None,
    num_prompts: NumPrompts = 2,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    as_published: AsPublished = False,
    time_scale: Annotated[
        float, typer.Option(help="Wall clock seconds in a virtual second; more where the machine cannot keep up.")
    ] = 1.0,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Play a described cluster with processes on this machine."""
    with errors_in_one_line(verbose), progress_bar() as progress:
        assert max_new_tokens is not None and temperature is not None
        if not (math.isfinite(time_scale) and time_scale > 0):
            raise UsageError(f"--time-scale is {time_scale:g}; it must be positive")
        check_costs_known(draft_dtype)
        if model == SYNTHETIC:
            raise UsageError("emulate moves real hidden states; use --model demo, or a directory")
        names, is_int8 = comma_list(schedule, "--schedule"), draft_dtype == DraftDtype.int8
        indexed = list(enumerate(wanted_prompts(model, prompts, num_prompts, seed or 0)))
        import torch

        from flowspec.bench.emulated import run_emulated
        from flowspec.bench.report import results_cells, results_json
        from flowspec.bench.study import check_schedules
        from flowspec.emulation.checkpoint_pair import CheckpointPair
        from flowspec.emulation.description import ClusterDescription
        from flowspec.emulation.experiment import Experiment

        check_schedules(names, is_simulated=False)
        cluster = ClusterDescription.load(cluster_file)
        text = Path(cluster_file).read_text(encoding="utf-8")
        params = SamplingParams(max_new_tokens, temperature, seed=seed)
        experiment = Experiment(cluster, ScheduleConfig(), params, as_published, int8_draft=is_int8)
        torch.set_num_threads(1)
        pair = CheckpointPair(model, draft or "auto", is_coupled=not as_published, draft_dtype=draft_dtype.value)
        emulated = run_emulated(
            experiment, text, pair, names, indexed, time_scale, lambda done: progress("emulating", done)
        )
        results = [one.result for one in emulated]
        remarks = {one.result.schedule: one.remark() for one in emulated}
        progress.stop()
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "num_prompts": len(indexed),
            "as_published": as_published, "draft": draft or "auto", "int8_draft": is_int8,
            "time_scale": time_scale,
        }  # fmt: skip
        if as_json:
            write_json(results_json(cluster.name, model, seed or 0, settings, results) | {"emulation": remarks})
            return
        print_table(results_cells(results))
        for name, remark in remarks.items():
            stdout.print(
                f"{name}: {remark['emulated_to_simulated']:.3f} times the simulator's "
                f"{remark['simulated_tokens_per_s']:.2f} tokens/s; largest lag {remark['max_lag_ms']:.1f} ms",
                markup=False,
                highlight=False,
            )
