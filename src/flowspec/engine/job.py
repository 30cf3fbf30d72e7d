"""One request at an engine, from its submission to its end."""

from __future__ import annotations

from dataclasses import dataclass

from flowspec.core import Ending, FinishReason, TokenLogprobs
from flowspec.errors import FlowspecError
from flowspec.request.emissions import Emissions
from flowspec.request.generation import Generation
from flowspec.request.request import Request
from flowspec.request.stats import Stats
from flowspec.schedule.base import Schedule


@dataclass(eq=False)
class Job:
    """Written by its engine alone; the rest of its state is its generation's."""

    request: Request
    schedule: str
    emissions: Emissions
    name: str = ""  # as clients see it
    is_chat: bool = False
    draft: str = "none"  # the name of the source that it drafts with, once it is started
    generation: Generation | None = None  # ``None`` until it is started; the one before while it waits to go on
    ending: Ending | None = None
    error: FlowspecError | None = None  # what ended it, if it failed
    end_s: float | None = None  # on the driver's clock
    prepared: Schedule | None = None  # while it waits to be started

    @property
    def output_ids(self) -> list[int]:
        return self.generation.output_ids if self.generation is not None else []

    @property
    def output_logprobs(self) -> list[TokenLogprobs]:
        return self.generation.output_logprobs if self.generation is not None else []

    @property
    def stats(self) -> Stats | None:
        return self.generation.stats if self.generation is not None else None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.generation.finish_reason if self.generation is not None else None

    @property
    def num_cached(self) -> int:
        """Prompt tokens that an earlier request had computed."""
        return self.generation.num_cached if self.generation is not None else 0

    @property
    def is_finished(self) -> bool:
        return self.ending is not None

    @property
    def state(self) -> str:
        """``waiting``, ``running``, or how it has ended."""
        if self.ending is not None:
            return self.ending.value
        return "running" if self.generation is not None else "waiting"
