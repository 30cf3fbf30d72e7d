"""Plain decoding: one token at a time through the whole pipeline. The reference that every schedule must equal."""

from __future__ import annotations

from flowspec.config import TreeConfig
from flowspec.request.generation import Generation
from flowspec.schedule.base import AT_ONCE, NEVER
from flowspec.wire.messages import Result


class Autoregressive:
    name = "ar"
    uses_draft = False
    wants_hints = False
    wants_ngrams = False
    awaits_passes = False

    def __init__(self, tree: TreeConfig) -> None:
        self.tree_config = tree

    def on_result(self, generation: Generation, result: Result) -> None:
        generation.receive(result)
        if verdict := generation.verify():
            generation.commit(verdict)

    def on_idle(self, generation: Generation) -> float:
        if generation.tree.sent[0]:
            return NEVER
        generation.send(generation.tree.best(1))
        return AT_ONCE
