"""What a schedule is: the algorithm that decides what is drafted, sent and verified when. One page each."""

from __future__ import annotations

import math
from typing import Final, Protocol

from flowspec.config import TreeConfig
from flowspec.request.generation import Generation
from flowspec.wire.messages import Result

AT_ONCE: Final = -math.inf  # something was done, and there may be more
NEVER: Final = math.inf  # nothing can be done before a message comes


class Schedule(Protocol):
    """One object for one request. The driver calls it; it changes nothing but itself and the generation."""

    name: str
    uses_draft: bool
    wants_hints: bool  # of workers, see ``messages.Hint``
    wants_ngrams: bool  # beside the draft, see ``draft.lookup``
    awaits_passes: bool  # a draft pass may end after it was asked for: see ``Generation.is_drafting``
    tree_config: TreeConfig  # what the request's tree may look like

    def on_result(self, generation: Generation, result: Result) -> None:
        """A segment came back from the last worker."""

    def on_idle(self, generation: Generation) -> float:
        """Nothing is waiting to be read: do one thing, send a segment or make a draft pass.

        Returns when to be asked again on the driver's clock, if no message comes before: ``AT_ONCE`` when it has done
        something, ``NEVER`` or a time when there was nothing to do.
        """
        ...
