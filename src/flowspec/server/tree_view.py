"""Draft trees for the page: copied on the engine's thread while somebody looks, turned into nodes in the event loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np

from flowspec.request.generation import Generation

PATH_LEN = 4  # tokens before the root that are shown
MAX_NODES = 100  # of the live tree
MAX_DRAFTED = 25  # of them that were not sent: most never will be
INTERVAL_S = 0.2  # between two snapshots of a request, at least

State = Literal["accepted", "in_flight", "drafted", "pruned"]


class Node(TypedDict):
    id: int
    parent: int | None
    token: str
    state: State
    probability: float  # of the whole path


@dataclass(frozen=True)
class Snapshot:
    """A tree as it was just before a result: parents first, the text's last tokens and the root before all else."""

    time_s: float
    node_ids: list[int]
    parent_ids: list[int | None]
    token_ids: list[int]
    states: list[State]
    probabilities: list[float]

    @classmethod
    def of(cls, generation: Generation, time_s: float) -> Snapshot:
        """The root counts as accepted: its token is output already."""
        tree, prompt, num_before = generation.tree, generation.request.prompt_ids, generation.prefix_len
        places = range(max(0, num_before - PATH_LEN), num_before)
        # Prompt tokens have their positions as ids; accepted ids begin with the prompt's last token.
        ids = [i if i < len(prompt) else generation.accepted_ids[i - len(prompt) + 1] for i in places]
        tokens = [prompt[i] if i < len(prompt) else generation.output_ids[i - len(prompt)] for i in places]
        # Sent nodes first, each kind best first: any beginning of this order is a tree, the root included.
        num_shown = min(MAX_NODES, int(tree.sent.sum()) + MAX_DRAFTED)
        rows = np.sort(np.lexsort((-tree.scores, ~tree.sent))[:num_shown])
        live_ids = tree.node_ids[rows].tolist()
        parents = tree.node_ids[tree.parents[rows[1:]]].tolist()
        states: list[State] = ["accepted"] * (len(ids) + 1)
        for is_sent in tree.sent[rows[1:]]:
            states.append("in_flight" if is_sent else "drafted")
        return cls(
            time_s,
            ids + live_ids,
            [None, *ids, *parents],
            tokens + tree.token_ids[rows].tolist(),
            states,
            [1.0] * len(ids) + np.exp(tree.scores[rows]).tolist(),
        )

    def nodes(self, before: Snapshot | None, text: Callable[[int], str]) -> list[Node]:
        """With those that were in flight ``before`` and have died since, where their parents are still shown."""
        listed = set(self.node_ids)
        nodes = self._nodes(text)
        for node in before._nodes(text) if before is not None else []:
            if node["state"] == "in_flight" and node["id"] not in listed and node["parent"] in listed:
                listed.add(node["id"])
                nodes.append({**node, "state": "pruned"})
        return nodes

    def _nodes(self, text: Callable[[int], str]) -> list[Node]:
        columns = zip(self.node_ids, self.parent_ids, self.token_ids, self.states, self.probabilities, strict=True)
        return [
            {"id": node_id, "parent": parent, "token": text(token), "state": state, "probability": probability}
            for node_id, parent, token, state, probability in columns
        ]


class TreeWatch:
    """The two newest snapshots of each watched request. ``look`` runs on the engine's thread, the rest elsewhere."""

    def __init__(self) -> None:
        self._watched: frozenset[int] = frozenset()
        self._pairs: dict[int, tuple[Snapshot, Snapshot | None]] = {}  # newest and the one before, by request id

    def watch(self, request_ids: frozenset[int]) -> None:
        self._watched = request_ids
        for request_id in list(self._pairs):
            if request_id not in request_ids:
                self._pairs.pop(request_id, None)

    def look(self, generation: Generation, time_s: float) -> None:
        request_id = generation.request.request_id
        if request_id not in self._watched:
            return
        newest, _ = self._pairs.get(request_id, (None, None))
        if newest is None or time_s - newest.time_s >= INTERVAL_S:
            self._pairs[request_id] = Snapshot.of(generation, time_s), newest

    def nodes(self, request_id: int, text: Callable[[int], str]) -> list[Node] | None:
        pair = self._pairs.get(request_id)
        return None if pair is None else pair[0].nodes(pair[1], text)
