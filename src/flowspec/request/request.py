"""What a request asks for, and what it has in common with all others of its driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flowspec.config import PipelineConfig
from flowspec.core import SamplingParams
from flowspec.model.target_head import LogitsHead
from flowspec.request.work import OnWork, unwatched


@dataclass(frozen=True)
class Request:
    """One generation to run; ``params.seed`` is set when the temperature is above 0."""

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Common:
    """What all requests of one driver have in common."""

    head: LogitsHead
    pipeline: PipelineConfig
    max_positions: int  # that the model has room for, the answer included
    clock: Callable[[], float]  # in seconds
    on_work: OnWork = unwatched
    keeps_caches: bool = False  # the caches of a request stay when it ends
