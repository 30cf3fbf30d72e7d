"""All settings of an engine in one value, and the engine that follows from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch

from flowspec.config import EngineConfig, LinkConfig, ScheduleConfig
from flowspec.core import DraftCheck, DraftDType, DType, Partition, Weights
from flowspec.draft.base import DraftSource
from flowspec.draft.catalogue import ChosenDraft, choose_draft, read_taps
from flowspec.draft.ngram import NgramSource
from flowspec.draft.remote_passes import RemoteModelSource
from flowspec.engine.draft_check import check_draft
from flowspec.engine.draft_fit import draft_dtype_that_fits
from flowspec.engine.draft_worker import DraftWorker, open_draft_worker
from flowspec.engine.driver_model import DriverModel
from flowspec.engine.engine import Engine
from flowspec.engine.pipeline import PipelineSpec, choose_partition, open_pipeline
from flowspec.errors import DoesNotFitError, UsageError
from flowspec.model.backends import check_fits, open_checkpoint, weights_to_try
from flowspec.model.demo_pair import DEMO, draft_for_workers
from flowspec.model.loader import Checkpoint, check_device
from flowspec.model.mtp_head import MtpLayers
from flowspec.schedule.catalogue import AUTO, check_schedule
from flowspec.worker.memory import free_bytes

logger = logging.getLogger("flowspec.engine")

_WEIGHTS_SHARE = 0.95  # at most, of the memory that is free on this machine

Progress = Callable[[str, float], None]  # what is being done, and the share that is done


def untold(what: str, done: float) -> None:
    """Nobody wants to know how far it is."""


@dataclass(frozen=True)
class EngineSpec:
    """What ``llm.LLM`` is given; its docstring says what each field means. They are declared here alone."""

    model: str | Path = DEMO
    _: KW_ONLY
    draft: str | Path | DraftSource = "auto"
    draft_dtype: DraftDType = "auto"
    draft_layers: Sequence[int] | None = None
    draft_check: DraftCheck = "on"
    draft_worker: str | None = None
    stages: int | None = None
    partition: str | Partition | None = None
    workers: Sequence[str] | None = None
    names: Sequence[str] | None = None
    schedule: str = AUTO
    weights: Weights = "auto"
    dtype: DType = "float32"
    device: str = "cpu"
    schedule_config: ScheduleConfig = field(default_factory=ScheduleConfig)
    link: LinkConfig = field(default_factory=LinkConfig)
    config: EngineConfig = field(default_factory=EngineConfig)
    hints: bool | None = None
    in_process: bool = False
    progress: Progress = untold


def open_engine(spec: EngineSpec) -> Engine:
    """Bring up the workers and what the driver needs. Nothing is left running when it raises.

    Raises ``UsageError`` for what the caller can mend, ``WorkerError`` when a worker fails.
    """
    check_device(spec.device)
    check_schedule(spec.schedule)
    checkpoint = open_checkpoint(spec.model)
    _ = checkpoint.sampling_defaults  # bad ones are an error before anything starts
    num_workers = None if spec.workers is None else len(spec.workers)
    partition = choose_partition(checkpoint, spec.stages, spec.partition, num_workers)
    weights_in_turn = weights_to_try(checkpoint, spec.weights, spec.device)
    draft = choose_draft(checkpoint, spec.draft, spec.draft_dtype, is_local=spec.workers is None)
    taps = read_taps(draft, checkpoint, spec.draft_layers)
    places = spec.workers, spec.in_process
    where = PipelineSpec(
        checkpoint, partition, *places, spec.dtype, spec.device, weights_in_turn[-1], spec.link, spec.names, taps
    )
    hints = where.num_parallel == len(partition) if spec.hints is None else spec.hints
    if hints and isinstance(draft, Path):
        where = replace(where, hints=draft_for_workers(draft))
    for weights, smaller in pairwise(weights_in_turn):
        try:
            return _open_engine(spec, replace(where, weights=weights), draft)
        except DoesNotFitError as error:
            logger.warning("%s; as --weights is auto, they are to be %s", error, smaller)
    return _open_engine(spec, where, draft)


def _open_engine(spec: EngineSpec, where: PipelineSpec, draft: ChosenDraft) -> Engine:
    """Raises as ``open_engine`` does, and ``DoesNotFitError`` where weights of this kind are too large."""
    checkpoint, weights, taps = where.checkpoint, where.weights, where.taps
    draft_dtype = _draft_dtype(spec, where, draft)
    with ExitStack() as undo:
        draft_worker = _open_draft_worker(spec, draft)
        if draft_worker is not None:
            undo.callback(draft_worker.close)
        pipeline = open_pipeline(where)
        undo.callback(pipeline.close)
        how = spec.dtype, spec.device, draft_dtype, weights, taps, spec.config.memory_tokens
        model = DriverModel.load(checkpoint, draft, *how, port=None if draft_worker is None else draft_worker.session)
        pipeline.await_ready(lambda done: spec.progress("loading", done))
        if draft_worker is not None:
            assert isinstance(model.source, RemoteModelSource)
            draft_worker.await_ready(model.source, lambda done: spec.progress("loading the draft", done))
        settings = spec.schedule, spec.schedule_config, spec.config
        engine = Engine(pipeline, model, *settings, draft_worker=draft_worker)
        if draft_worker is not None:
            ngrams = NgramSource(memory=model.memory)
            draft_worker.on_change = lambda source: engine.use_source(source or ngrams)
        if spec.draft_check == "on" and isinstance(draft, (Path, MtpLayers, Checkpoint)):
            check_draft(engine, draft, spec.draft_layers, draft_dtype, spec.progress)
        if draft_worker is not None and engine.model.source is not model.source:
            draft_worker.close()  # its guesses are of no use
        undo.pop_all()
        return engine


def _draft_dtype(spec: EngineSpec, where: PipelineSpec, draft: ChosenDraft) -> DraftDType:
    """That there is memory for here, beside the model where its workers are here, too.

    Raises ``DoesNotFitError`` where narrower weights of the model would help, else ``UsageError``.
    """
    num_bytes = int(_WEIGHTS_SHARE * free_bytes(torch.device("cpu")))
    if spec.device != "cpu" or not num_bytes:  # or nobody can tell
        return spec.draft_dtype
    if where.workers is None:
        num_bytes -= check_fits(where.checkpoint, spec.dtype, where.weights, spec.device, num_bytes)
    if not isinstance(draft, Checkpoint) or spec.draft_worker is not None:
        return spec.draft_dtype
    try:
        return draft_dtype_that_fits(draft, spec.draft_dtype, spec.dtype, spec.device, num_bytes)
    except DoesNotFitError as error:
        if where.workers is None:
            raise
        raise UsageError(f"draft: {error}") from None


def _open_draft_worker(spec: EngineSpec, draft: ChosenDraft) -> DraftWorker | None:
    """It begins to load. Raises ``UsageError``."""
    if spec.draft_worker is None:
        return None
    if spec.in_process:
        raise UsageError("draft_worker: with in_process there are no other processes; leave one of the two out")
    how = spec.draft_dtype, spec.dtype, spec.device, spec.link, spec.config
    return open_draft_worker(spec.draft_worker, draft, *how, spec.workers)
