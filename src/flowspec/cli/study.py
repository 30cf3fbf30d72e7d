"""What ``simulate``, ``bench`` and ``emulate`` share: from options to a study, and its title."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowspec.cli.options import (
    COMPARED_NAMES,
    AsPublished,
    DraftDtype,
    DraftDtypeOption,
    MaxNewTokens,
    MinProbability,
    NumPrompts,
    PromptsFile,
    RealDraft,
    ScheduleNames,
    Seed,
    SegmentLen,
    TreeDepth,
    TreeTopK,
    tree_changes,
)
from flowspec.config import PUBLISHED_TREE, LockstepConfig, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.core import SamplingParams
from flowspec.errors import UsageError

if TYPE_CHECKING:
    from flowspec.bench.study import Study
    from flowspec.emulation.description import ClusterDescription
    from flowspec.emulation.experiment import Slowdown

SYNTHETIC = "synthetic"
_NUM_SYNTHETIC_PROMPTS = 40
_DEFAULT_QUALITY = "eagle1"


def check_costs_known(draft_dtype: DraftDtype) -> None:
    """Of what is played. Raises ``UsageError``."""
    if draft_dtype == DraftDtype.int4:
        raise UsageError("--draft-dtype int4 is for runs in real time; a cluster file says what int8 costs")


@dataclass(frozen=True)
class StudyOptions:
    """What ``simulate`` and ``bench`` can be told of a study."""

    schedule: ScheduleNames = None
    model: Annotated[
        str | None,
        typer.Option(
            help="Gives the tokens: synthetic (simulated only), demo, smollm2, a directory, a .gguf file, a hub name.",
            show_default="synthetic; on this machine demo",
        ),
    ] = None
    draft_quality: Annotated[
        str | None,
        typer.Option(
            help="Of the synthetic model: eagle1, eagle3, block, weak, demo or ideal.", show_default=_DEFAULT_QUALITY
        ),
    ] = None
    draft: RealDraft = None
    draft_dtype: DraftDtypeOption = DraftDtype.auto
    prompts: PromptsFile = None
    num_prompts: NumPrompts = None
    max_new_tokens: MaxNewTokens = 256
    seed: Seed = 0
    as_published: AsPublished = False
    no_score_order: Annotated[
        bool, typer.Option("--no-score-order", help="lockstep sends its tree level by level.")
    ] = False
    no_prune: Annotated[bool, typer.Option("--no-prune", help="lockstep prunes nothing before a round ends.")] = False
    no_expand: Annotated[bool, typer.Option("--no-expand", help="lockstep does not let its tree grow in flight.")] = (
        False
    )
    tree_top_k: TreeTopK = None
    tree_depth: TreeDepth = None
    tree_size: Annotated[
        int | None,
        typer.Option(
            help="Nodes of the draft tree, the root excluded.",
            show_default=f"{TreeConfig.size - 1} for flow, {PUBLISHED_TREE.size - 1} for the others",
        ),
    ] = None
    min_probability: MinProbability = None
    segment_len: SegmentLen = PipelineConfig.segment_len
    jobs: Annotated[int | None, typer.Option(help="Processes that simulate.", show_default="the usable cores")] = None
    bandwidth: Annotated[
        float | None, typer.Option(help="Mbps of every link.", metavar="MBPS", show_default="the cluster's")
    ] = None
    latency: Annotated[
        float | None,
        typer.Option(help="Milliseconds of every link, one way.", metavar="MS", show_default="the cluster's"),
    ] = None
    delay: Annotated[
        float, typer.Option(help="A fault: every message is late by up to this many ms.", metavar="MS")
    ] = 0.0
    slow: Annotated[
        str | None,
        typer.Option(help="A fault: from FROM_S on a worker takes TIMES as long.", metavar="WORKER:FROM_S:TIMES"),
    ] = None

    @property
    def is_int8(self) -> bool:
        return self.draft_dtype == DraftDtype.int8

    def params(self, temperature: float = 0.0) -> SamplingParams:
        """Raises ``UsageError``."""
        assert self.max_new_tokens is not None
        return SamplingParams(self.max_new_tokens, temperature, seed=self.seed)

    def study(self, cluster_file: str, stages: int | None, temperature: float = 0.0) -> Study:
        """Raises ``UsageError``."""
        params, model = self.params(temperature), self.model or SYNTHETIC
        is_real = model != SYNTHETIC
        check_costs_known(self.draft_dtype)
        if is_real and self.draft_quality is not None:
            raise UsageError(f"--draft-quality is of the synthetic model; {model} has --draft")
        if not is_real and self.draft is not None:
            raise UsageError("--draft is for a real model; the synthetic one has --draft-quality")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs is {self.jobs}; it must be at least 1")
        if not (math.isfinite(self.delay) and self.delay >= 0):
            raise UsageError(f"--delay is {self.delay:g}; it must be 0 or positive")
        config, cluster = self.schedule_config(), self._cluster(cluster_file, stages)
        names = schedule_names(self.schedule, is_simulated=True)
        if (self.no_score_order or self.no_prune or self.no_expand) and "lockstep" not in names:
            raise UsageError("--no-score-order, --no-prune and --no-expand are for lockstep, which is not to run")
        slowdown = _slowdown(self.slow, cluster.num_stages) if self.slow is not None else None
        seed = params.seed or 0
        prompts = wanted_prompts(model, self.prompts, self.num_prompts, seed)
        quality_name = self.draft_quality or _DEFAULT_QUALITY
        import torch

        from flowspec.bench.runner import PairSpec
        from flowspec.bench.study import Study
        from flowspec.cluster.local import num_cores
        from flowspec.emulation.experiment import Experiment, Faults
        from flowspec.model.synthetic import quality

        quality(quality_name)
        torch.set_num_threads(1)  # as in the processes of other jobs
        return Study(
            Experiment(
                cluster, config, params, self.as_published, Faults(self.delay, slowdown, seed), int8_draft=self.is_int8
            ),
            PairSpec(
                model,
                quality_name,
                self.draft or "auto",
                is_coupled=not self.as_published,
                draft_dtype=self.draft_dtype.value,
            ),
            names,
            prompts,
            num_cores() if self.jobs is None else self.jobs,
        )

    def overrides(self, stages: int | None) -> dict[str, float | None]:
        """Of the cluster file."""
        return {"bandwidth_mbps": self.bandwidth, "latency_ms": self.latency, "num_stages": stages}

    def title(self, study: Study, stages: int | None, varied: str | None = None) -> str:
        """What a plot shows, with all that is not as the cluster file and the defaults have it.

        ``varied`` is left out: the plot shows several.
        """
        experiment = study.experiment
        slowdown = experiment.faults.slowdown
        parts = {
            "": f"{experiment.cluster.name}, {study.pair.name}, {counts(len(study.prompts), experiment.params)}",
            "costs": "as published" if experiment.as_published else None,
            "draft": "draft in int8" if experiment.int8_draft else None,
            "temperature": f"temperature {experiment.params.temperature:g}",
            "bandwidth": self.bandwidth and f"bandwidth {self.bandwidth:g} Mbps",
            "latency": self.latency is not None and f"latency {self.latency:g} ms",
            "stages": stages and f"{stages} stages",
            "tree": ", ".join(self.tree_title()),
            "delay": self.delay and f"messages late by up to {self.delay:g} ms",
            "slow": slowdown
            and f"worker {slowdown.worker} {slowdown.times:g} times as slow from {slowdown.from_s:g} s on",
        }
        return ", ".join(part for name, part in parts.items() if part and name != varied)

    def tree_title(self) -> list[str]:
        """What a plot shows of trees and segments that are not as the defaults have them."""
        parts = {
            "{} children a node": self.tree_top_k,
            "tree depth {}": self.tree_depth,
            "tree size {}": self.tree_size,
            "guesses of {:g} and more": self.min_probability,
            "segments of at most {}": self.segment_len or None,
        }
        return [text.format(value) for text, value in parts.items() if value is not None]

    def _cluster(self, file: str, stages: int | None) -> ClusterDescription:
        from flowspec.emulation.description import ClusterDescription

        cluster = ClusterDescription.load(file)
        if stages is not None:
            cluster = cluster.with_stages(stages)
        if self.bandwidth is not None:
            cluster = cluster.with_bandwidth(self.bandwidth)
        return cluster if self.latency is None else cluster.with_latency(self.latency)

    def schedule_config(self) -> ScheduleConfig:
        """A comparison changes all trees; what is not given stays as each schedule has it. Raises ``UsageError``."""
        if self.tree_size is not None and self.tree_size < 1:
            raise UsageError(f"--tree-size is {self.tree_size}; it must be positive")
        size = None if self.tree_size is None else self.tree_size + 1
        changes = tree_changes(self.tree_top_k, self.tree_depth, size, self.min_probability)
        return ScheduleConfig(
            flow=replace(TreeConfig(), **changes),
            lockstep=LockstepConfig(
                replace(PUBLISHED_TREE, **changes),
                score_order=not self.no_score_order,
                prune=not self.no_prune,
                expand=not self.no_expand,
            ),
            pipeline=PipelineConfig(segment_len=self.segment_len),
        )


def schedule_names(text: str | None, is_simulated: bool) -> list[str]:
    from flowspec.bench.study import check_schedules

    names = comma_list(text or COMPARED_NAMES, "--schedule")
    check_schedules(names, is_simulated)
    return names


def comma_list(text: str, option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if not name:
            raise UsageError(f"{option} {text!r} has an empty place; write A,B,C")
        if names.count(name) > 1:
            raise UsageError(f"{option} names {name} twice")
    return names


def _slowdown(text: str, num_stages: int) -> Slowdown:
    from flowspec.emulation.experiment import Slowdown

    try:
        worker, from_s, times = text.split(":")
        slowdown = Slowdown(int(worker), float(from_s), float(times))
    except ValueError:
        raise UsageError(f"--slow {text!r} is not WORKER:FROM_S:TIMES, as in 2:1.5:3") from None
    if not 1 <= slowdown.worker <= num_stages:
        raise UsageError(f"--slow names worker {slowdown.worker}; the cluster has workers 1 to {num_stages}")
    if not (math.isfinite(slowdown.from_s) and slowdown.from_s >= 0):
        raise UsageError(f"--slow begins at {slowdown.from_s:g} s; it must be 0 or later")
    if not (math.isfinite(slowdown.times) and slowdown.times > 0):
        raise UsageError(f"--slow is {slowdown.times:g} times; it must be positive")
    return slowdown


def wanted_prompts(model: str, file: Path | None, num: int | None, seed: int) -> list[str]:
    from flowspec.bench.prompts import BUILT_IN_PROMPTS, read_prompts

    if num is not None and num < 1:
        raise UsageError(f"--num-prompts is {num}; it must be at least 1")
    if file is not None:
        return [prompt.turns[0] for prompt in read_prompts(file, num)]
    if model == SYNTHETIC:
        return [f"{seed} {i}" for i in range(_NUM_SYNTHETIC_PROMPTS if num is None else num)]
    return list(BUILT_IN_PROMPTS[:num])


def counts(num_prompts: int, params: SamplingParams) -> str:
    return f"{num_prompts} prompts of up to {params.max_tokens} tokens"


def driver_costs(study: Study) -> str:
    if study.experiment.as_published:
        return "driver costs: [driver.published] of the cluster file, for flow [driver.ours]"
    return "driver costs: [driver.ours] of the cluster file for all schedules"


def check_place(file: Path | None) -> None:
    """Before minutes of work, not after them."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UsageError(f"cannot write {file}: give a file in a directory that exists")
