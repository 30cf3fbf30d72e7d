"""What a worker keeps from one session to the next: its stage, as long as drivers ask for the same one."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from flowspec.core import LayerRange
from flowspec.model.backends import is_compiled, load_head, load_stage
from flowspec.model.fingerprint import fingerprint
from flowspec.model.hint_head import gives_hints, load_hinter
from flowspec.model.loader import Checkpoint
from flowspec.model.stage import Stage
from flowspec.model.stage_size import StageShapes, shapes_of, stage_bytes
from flowspec.model.target_head import BestTokens
from flowspec.model.torch_stage import TorchStage
from flowspec.wire.messages import Configure
from flowspec.worker.checks import Limits
from flowspec.worker.hints import Hinter
from flowspec.worker.measure import measure_forward
from flowspec.worker.memory import ADVICE, DRAFT_ADVICE, Allowance

logger = logging.getLogger("flowspec.worker")

_Key: TypeAlias = tuple[object, ...]


@dataclass(frozen=True)
class Loaded:
    """A stage with what belongs to it."""

    stage: Stage
    hinter: Hinter | None
    guesser: Hinter | None  # of a draft model, its lm_head
    forward_s: list[tuple[int, float]]  # as in ``Ready``; empty for a device that is played
    limits: Limits
    fingerprint: str  # as in ``Ready``


class StageLoader:
    """Loads what drivers ask for; one that asks for what the last one had gets that."""

    def __init__(self, device: str, memory: Allowance | None = None) -> None:
        """``memory``: that may be used; by default what is free."""
        self.device = device
        self.memory = memory or Allowance(device)
        self._threads = torch.get_num_threads()
        self._kept: tuple[_Key, Loaded] | None = None

    def load(self, configure: Configure, source: Checkpoint, progress: Callable[[float], None]) -> Loaded:
        """``source``: the model that is asked for.

        Raises ``ModelError`` and ``UsageError``, also for what is more than the device may hold; whatever interrupts it
        leaves nothing half loaded.
        """
        key = _key(configure, source.files())
        if self._kept is not None and self._kept[0] == key:
            logger.info("layers %d:%d of %s are still here", *key[1:3], configure.model)
            return self._kept[1]
        self._kept = None  # there may be no room for both
        layers = LayerRange(configure.start_layer, configure.end_layer)
        has_hints = configure.hints is not None and gives_hints(configure.hints, source, layers.end)
        self.check_fits(configure, shapes_of(source, layers, with_lm_head=has_hints or configure.num_best > 0))
        torch.set_num_threads(self._threads)
        stage = load_stage(source, layers, configure.dtype, configure.weights, self.device, progress)
        hinter = None
        if configure.hints is not None:
            hinter = load_hinter(configure.hints, source, layers.end, configure.dtype, self.device)
        guesser = None
        if configure.num_best:
            guesser = BestTokens(load_head(source, configure.dtype, configure.weights, self.device))
        # Compiled kernels have threads of their own, and what is between them is too small to be shared.
        if not isinstance(stage, TorchStage):
            torch.set_num_threads(1)
        forward_s = measure_forward(stage, source.vocab_size) if configure.emulation is None else []
        loaded = Loaded(stage, hinter, guesser, forward_s, Limits.of(source), fingerprint(source, layers))
        self._kept = key, loaded
        return loaded

    def check_fits(self, configure: Configure, shapes: StageShapes) -> None:
        """Before anything is loaded, or fetched. Raises ``DoesNotFitError``."""
        shapes = shapes.with_lm_head() if configure.num_best else shapes
        where, advice = f"worker {configure.stage} ({socket.gethostname()}, {self.device})", ADVICE
        what = f"layers {configure.start_layer}:{configure.end_layer}"
        if configure.num_best:
            what, advice = "the draft model's layers and lm_head", DRAFT_ADVICE
        compiled = is_compiled(shapes.hidden_size, self.device)
        num_bytes = stage_bytes(shapes, configure.dtype, configure.weights, compiled, has_logits=configure.num_best > 0)
        self.memory.check_fits(num_bytes, f"{where}: {what}", advice)

    def forget(self) -> None:
        """What is kept may be damaged."""
        self._kept = None


def _key(configure: Configure, files: list[Path]) -> _Key:
    """Equal for the same stage of the same files; a file that was written again is another one."""
    wanted = (
        configure.model, configure.start_layer, configure.end_layer, configure.dtype, configure.weights,
        configure.hints, configure.emulation is None, configure.num_best > 0,
    )  # fmt: skip
    if configure.hints is not None:
        files = [*files, *_files_of(Path(configure.hints))]
    return (*wanted, *(_stamp(path) for path in files))


def _files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []


def _stamp(path: Path) -> tuple[str, int, int, int]:
    found = os.stat(path)
    return str(path), found.st_size, found.st_mtime_ns, found.st_ino
