"""What every training loop here shares: learning-rate schedule, steps, checkpoints, progress. Knows no model."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from flowspec.errors import ModelError

logger = logging.getLogger("flowspec.train")

_LOG_INTERVAL_S = 60.0


def learning_rate_factor(done: float, warmup: float) -> float:
    """Linear warm-up, then linear decay to 0; ``done`` and ``warmup`` are shares of the whole run."""
    if done < warmup:
        return done / warmup
    return max(0.0, (1.0 - done) / (1.0 - warmup))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a sibling file and move it into place, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.chmod(0o644)  # some writers make files that only their owner may read
    os.replace(partial, path)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda partial: torch.save(state, partial))


def load_checkpoint(path: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The state saved at ``path``, or None when there is none; it must come from the same recipe."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the broken bytes lead to
        raise ModelError(f"checkpoint {path} cannot be read ({error}); delete it to start again") from error
    if state.get("recipe") != recipe:
        raise ModelError(f"checkpoint {path} belongs to a run with other settings; delete it or use those settings")
    return state


class StepRecipe(Protocol):
    """What ``run_steps`` asks of a recipe."""

    @property
    def num_steps(self) -> int: ...
    @property
    def step_tokens(self) -> int: ...
    @property
    def warmup_share(self) -> float: ...
    @property
    def max_gradient(self) -> float: ...


def run_steps(
    title: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: StepRecipe,
    learn: Callable[[int], dict[str, float]],
    checkpoint: Path,
    identity: dict[str, Any],
    save: Callable[[], object],
    *,
    checkpoint_interval_s: float,
    stop_after: int | None,
) -> None:
    """Take the recipe's steps, from ``checkpoint`` on where it exists; it must come from the same ``identity``.

    ``learn(step)`` adds the gradients of a step to the module's, and returns figures to report; what it does should
    depend on the step and the weights alone. The optimiser's own learning rate is the highest. ``save`` is called with
    every checkpoint and at the end. ``stop_after``: the step to interrupt this run at.
    """
    rate = optimizer.param_groups[0]["lr"]
    step = 0
    if (saved := load_checkpoint(checkpoint, identity)) is not None:
        module.load_state_dict(saved["head"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    num_steps, step_tokens = recipe.num_steps, recipe.step_tokens
    last_step = num_steps if stop_after is None else min(stop_after, num_steps)
    last_save = time.monotonic()
    with TrainingProgress(title, num_steps * step_tokens, step * step_tokens) as progress:
        while step < last_step:
            done = (step + 0.5) / num_steps
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(done, recipe.warmup_share)
            figures = learn(step)
            nn.utils.clip_grad_value_(module.parameters(), recipe.max_gradient)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress.update(step * step_tokens, **figures)
            if time.monotonic() - last_save > checkpoint_interval_s or step == last_step:
                state = {"recipe": identity, "step": step, "head": module.state_dict()}
                save_checkpoint(checkpoint, state | {"optimizer": optimizer.state_dict()})
                save()
                last_save = time.monotonic()
    save()


class TrainingProgress:
    """A progress bar on a terminal, one log line a minute elsewhere."""

    def __init__(self, title: str, num_tokens: int, num_done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._num_tokens = num_tokens
        self._num_done = num_done
        self._clock = clock
        self._start = self._last_log = clock()
        self._start_tokens = num_done
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[report]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> TrainingProgress:
        if self._bar.console.is_terminal:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._num_tokens, completed=self._num_done, report="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._task is not None:  # rich ends a bar that was never drawn with an empty line
            self._bar.stop()

    def update(self, num_done: int, **metrics: float) -> None:
        self._num_done = num_done
        now = self._clock()
        speed = (num_done - self._start_tokens) / max(now - self._start, 1e-9)
        report = "  ".join([f"{speed:.0f} tokens/s", *(f"{name} {value:.4g}" for name, value in metrics.items())])
        if self._task is not None:
            self._bar.update(self._task, completed=num_done, report=report)
        elif now - self._last_log >= _LOG_INTERVAL_S or num_done >= self._num_tokens:
            self._last_log = now
            logger.info("%s: %d of %d tokens  %s", self._title, num_done, self._num_tokens, report)
