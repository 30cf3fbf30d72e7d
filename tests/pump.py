"""Runs driver and workers in one process while the caller decides the order of everything."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from flowspec.config import LockstepConfig, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.core import LayerRange, Partition, SamplingParams
from flowspec.draft.base import DraftSource, Levels
from flowspec.draft.catalogue import choose_draft, load_draft, read_taps
from flowspec.draft.eagle import EagleSource
from flowspec.draft.memory import Memory
from flowspec.draft.ngram import NgramSource
from flowspec.driver import Driver
from flowspec.model.backends import make_taps
from flowspec.model.eagle_head import EagleHead
from flowspec.model.head_tensors import HeadTensors
from flowspec.model.hint_head import HintHead
from flowspec.model.loader import Checkpoint
from flowspec.model.stage import Stage
from flowspec.model.taps import Taps
from flowspec.model.target_head import TargetHead
from flowspec.model.torch_stage import TorchStage
from flowspec.request.generation import Generation
from flowspec.request.request import Common, Request
from flowspec.schedule.catalogue import make_schedule
from flowspec.wire.transport import DRIVER, InprocNetwork
from flowspec.worker.actor import Worker

HEADS = ("eagle3", "peagle", "dflash", "dflash2", "dspark")  # that read several layers


class Apart(Protocol):
    """What the draft's passes are made on, beside the pipeline."""

    @property
    def has_work(self) -> bool: ...

    def work(self) -> None:
        """Make one step; the draft may hear of it."""


Choose = Callable[[int], int]  # the number of possible next events -> which one happens


def first(num_choices: int) -> int:
    """The plain order: whatever has waited longest at the lowest place."""
    return 0


def prompt_of(length: int, seed: int = 3) -> list[int]:
    # A short alphabet repeats itself, which gives the n-gram draft something to find.
    return torch.randint(0, 6, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@functools.cache  # a stage keeps nothing of its requests
def stage_of(directory: Path, layers: LayerRange) -> TorchStage:
    return TorchStage.load(Checkpoint.open(directory), layers, "float32", "cpu")


class Pump:
    """A driver and its workers; ``run`` plays events until all requests have left the pipeline."""

    def __init__(
        self,
        directory: Path,
        num_stages: int,
        draft: str | DraftSource = "none",
        schedule: str = "flow",
        tree: TreeConfig | None = None,
        pipeline: PipelineConfig | None = None,
        patience_s: float | None = 0.0,  # a commit may come after every layer
        hints: bool = True,  # of untrained heads: they lead the draft astray, and the tokens must not care
        shares_forwards: bool = True,  # whatever waits runs together
        keeps_caches: bool = False,
        wrap_stage: Callable[[Stage], Any] = lambda stage: stage,
        memory: Memory | None = None,
        apart: Apart | None = None,
    ) -> None:
        self.apart = apart
        # Random models guess so badly that nothing would be worth a row: here everything is.
        tree, pipeline = tree or TreeConfig(min_probability=0.0), pipeline or PipelineConfig()
        checkpoint = Checkpoint.open(directory)
        partition = Partition.even(checkpoint.num_layers, num_stages)
        lm_head = checkpoint.load_lm_head("float32", "cpu")
        directory_of_head = directory / draft if isinstance(draft, str) else directory
        taps = read_taps(directory_of_head, checkpoint) if draft in HEADS else None
        self.workers: list[Worker] = []
        self.stages: list[Any] = []
        for index, layers in enumerate(partition.stages, start=1):
            stage = stage_of(directory, layers)
            self.stages.append(wrap_stage(stage))
            lens = HintHead.logit_lens(layers.end, torch.ones(stage.hidden_size), lm_head, 1, 1e-6).eval()
            hinter, forward_s = lens if hints else None, (lambda num_rows: 1.0) if shares_forwards else None
            when = time.perf_counter, patience_s, hinter, math.inf, forward_s
            self.workers.append(Worker(self.stages[-1], index, *when, taps=_taps_of(taps, layers, stage)))
        head = TargetHead(lm_head)
        if taps is not None:
            source = load_draft(directory_of_head, checkpoint, head, "float32", "cpu", taps=taps)
        else:
            source = draft if not isinstance(draft, str) else _source(draft, directory, checkpoint, head, memory)
        config = ScheduleConfig(tree, lockstep=LockstepConfig(replace(tree, size=tree.size + 1)), pipeline=pipeline)
        positions = checkpoint.max_positions
        common = Common(head, pipeline, positions, time.perf_counter, keeps_caches=keeps_caches)
        tapped = () if taps is None else taps.taps.layers
        self.driver = Driver(common, source, tapped=tapped, memory=memory)
        self.make_schedule = lambda: make_schedule(schedule, config, num_stages, levels=Levels.of(source))
        self.network = InprocNetwork(num_stages)
        self.generations: list[Generation] = []

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams) -> Generation:
        request = Request(len(self.generations), tuple(prompt_ids), params)
        generation, sends = self.driver.submit(request, self.make_schedule())
        self.generations.append(generation)
        self.network.post(DRIVER, sends)
        return generation

    def cancel(self, generation: Generation) -> None:
        self.network.post(DRIVER, self.driver.cancel(generation))

    def run(self, choose: Choose = first, max_events: int = 100_000, is_final: bool = True) -> None:
        """Each event is one message delivered, one worker's piece of work, or one of the driver's.

        ``is_final``: all requests have to leave the pipeline within ``max_events``.
        """
        idle: set[int] = set()  # places that had no work when last asked, and have got no message since
        for _ in range(max_events):
            if not self.driver.num_open:
                self.check_integrity()
                for generation in self.generations:
                    if generation.error is not None:
                        raise generation.error
                assert not any(worker.num_open for worker in self.workers), "a cache has leaked"
                return
            events: list[Callable[[], int | None]] = [
                *(lambda link=link: self.deliver(link) for link in self.network.waiting()),
                *(lambda place=place: self._work(place) for place in range(len(self.workers) + 1) if place not in idle),
            ]
            if self.apart is not None and self.apart.has_work:
                events.append(self._work_apart)
            assert events, "the pipeline has stalled"
            changed = events[choose(len(events))]()
            if changed is None:
                continue
            if changed < 0:
                idle.add(-changed - 1)
            else:
                idle.discard(changed)
        assert not is_final, f"not finished after {max_events} events"

    def deliver(self, link: object) -> int:
        message = self.network.take(link)  # type: ignore[arg-type]
        target = link.target  # type: ignore[attr-defined]
        sends = self.driver.on_message(message) if target == DRIVER else self.workers[target - 1].on_message(message)
        self.network.post(target, sends)
        return target

    def _work_apart(self) -> int:
        assert self.apart is not None
        self.apart.work()
        return DRIVER

    def _work(self, place: int) -> int | None:
        sends = self.driver.on_idle() if place == DRIVER else self.workers[place - 1].on_idle()
        if sends is None:
            return -place - 1
        self.network.post(place, sends)
        return None

    def check_integrity(self) -> None:
        for worker in self.workers:
            worker.check_integrity()


def _taps_of(form: HeadTensors | None, layers: LayerRange, stage: Stage) -> Taps | None:
    if form is None:
        return None
    blocks = {layer: form.block(layer, torch.float32) for layer in form.taps.of_stage(layers, stage.is_last)}
    return make_taps(form.taps, layers, blocks, "float32", "float", "cpu")


def _source(
    name: str, directory: Path, checkpoint: Checkpoint, head: TargetHead, memory: Memory | None
) -> DraftSource | None:
    match name:
        case "none":
            return None
        case "ngram":
            return NgramSource(memory=memory)
        case "mtp":
            return load_draft(choose_draft(checkpoint, str(directory)), checkpoint, head, "float32", "cpu")
        case _:
            embedding = checkpoint.load_embedding("float32", "cpu")
            return EagleSource(EagleHead.load(directory / "draft", embedding, "float32", "cpu"), head)
