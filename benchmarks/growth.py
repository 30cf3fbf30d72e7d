"""How the engine's own work on one segment grows with the draft tree and with the context. Prints one JSON object.

    python benchmarks/growth.py [--runs 300] [--plot growth.png]

Each run takes a generation and one stage's slots through the life of one segment of 16 nodes, while the tree is full
and under way: a commit that keeps most of the tree, two draft passes, choosing and sending, codec, slots and mask. No
layer, lm_head or draft model is run: guesses come from a table, and the target draws what the draft finds best. The
driver's parts are the verbs of ``Generation`` as schedule ``flow`` calls them. Runs of all sizes take turns. A
part's time is the median of its runs, the total is the sum of these medians: a pause that the machine makes lengthens
single parts, and at some sizes more than half of the runs have one.

``exponent``: least-squares slope of log(total ms) against log(size) over the last four sizes; 1 is linear growth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowspec.bench import plots
from flowspec.bench.report import environment
from flowspec.config import PipelineConfig, TreeConfig
from flowspec.core import SamplingParams
from flowspec.draft.base import Accepted
from flowspec.model.slots import SlotTable
from flowspec.request.generation import Generation
from flowspec.request.request import Common, Request
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints
from flowspec.wire.codec import Codec
from flowspec.wire.messages import Commit, Result, Segment

NODES, NODES_CONTEXT = (32, 64, 128, 256, 512, 1024), 256
CONTEXTS, CONTEXTS_NODES = (256, 512, 1024, 2048, 4096, 8192), 80
SEGMENT_LEN = 16
HIDDEN_SIZE = 4096  # of the states that travel, in float16: those of a 7B model
FITTED_POINTS = 4
SHAPE = TreeConfig()

Times = dict[str, float]  # ms by part


class TableSource:
    """A draft that costs next to nothing: ``SHAPE.top_k`` guesses from a table, the best one always token 0."""

    name = "table"
    steady_steps = 1
    block_len = 1
    feature_layers: tuple[int, ...] = ()

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        num_rows, num_rest = 997, SHAPE.top_k - 1
        best = rng.uniform(0.7, 0.9, (num_rows, 1))
        rest = (1 - best) * np.sort(rng.dirichlet(np.full(num_rest, 0.5), num_rows))[:, ::-1]
        self.logprobs = np.log(np.concatenate([best, rest], axis=1) + 1e-6)
        others = np.stack([1 + rng.permutation(num_rest + 3)[:num_rest] for _ in range(num_rows)])
        self.token_ids = np.concatenate([np.zeros((num_rows, 1), dtype=np.int64), others], axis=1)

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> TableDraft:
        return TableDraft(self)


class TableDraft:
    def __init__(self, source: TableSource) -> None:
        self._source = source

    def read_prompt(self, node_ids: Sequence[int], features: torch.Tensor) -> None: ...

    def commit(self, accepted: Accepted, tree: DraftTree) -> None: ...

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """Guesses change with a node's staleness: a refreshed node keeps most of its children and gets new ones."""
        parents = tree.parents[rows]
        staleness = np.where(parents < 0, 0, tree.staleness[parents]) + 1
        entries = (7 * tree.node_ids[rows] + staleness) % len(self._source.logprobs)
        tree.expand(rows, self._source.token_ids[entries], self._source.logprobs[entries], staleness)
        return True


class BestHead:
    """A target that always draws token 0, at the price of no matrix product."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), SHAPE.top_k)
        logits[:, 0] = 1
        return logits


class Life:
    """A generation and one stage's slots, when the result comes that makes room for another segment.

    A prompt of ``context`` tokens is committed; of the best ``num_nodes`` nodes all but a segment are under way.
    """

    def __init__(self, source: TableSource, num_nodes: int, context: int) -> None:
        prompt_ids = tuple(range(context + 1))
        params = SamplingParams(max_tokens=1000)
        tree = TreeConfig(size=num_nodes, min_probability=0.0)
        self.generation = generation = Generation(
            Request(0, prompt_ids, params), Common(BestHead(), PipelineConfig(), 10**6, lambda: 0.0), source, tree
        )
        self.slots = SlotTable(root_id=context)
        self.codec = Codec()
        self._grow()
        generation.prefill(max_chunks=context)  # all at once: nothing comes back here
        prefill = self._take_segments()
        for segment in prefill:
            self.slots.append_prefix(segment.positions[: segment.num_prefix])
        self._place(prefill[-1], prefill[-1].num_prefix)
        self.first = self._send_first()
        generation.receive(result_of(prefill[-1]))
        self.commit()
        self.slots.commit(*self.take_commit())
        self._grow()
        while num_left := max(0, num_nodes - SEGMENT_LEN - int(generation.tree.sent.sum())):
            rows = generation.tree.best_unsent(min(SEGMENT_LEN, num_left))
            assert len(rows), "the tree has too few nodes"
            generation.send(rows)
            self._place(self.take_segment())

    def _grow(self) -> None:
        """Until no node is worth a draft pass."""
        while self.generation.propose(SHAPE.max_depth, self.generation.tree.size):
            pass

    def _send_first(self) -> Segment:
        """The root's best child and all its children but the best: a result that accepts one node."""
        tree = self.generation.tree
        best = tree.find(0, 0)
        assert best is not None
        others = np.flatnonzero((tree.parents == best) & (tree.token_ids != 0))
        self.generation.send(np.append(best, others))
        segment = self.take_segment()
        self._place(segment)
        return segment

    def _take_segments(self) -> list[Segment]:
        return [send.message for send in self.generation.take_outbox() if isinstance(send.message, Segment)]

    def _place(self, segment: Segment, start: int = 0) -> None:
        self.slots.place(segment.node_ids[start:], segment.parent_ids[start:], segment.positions[start:])

    def draft(self) -> None:
        """The new root's pass, which merges with the tree that is there, and one over the best nodes."""
        for _ in range(2):
            assert self.generation.propose(SHAPE.max_depth, SHAPE.width)

    def send(self) -> None:
        self.generation.send(self.generation.tree.best_unsent(SEGMENT_LEN))

    def take_segment(self) -> Segment:
        (segment,) = self._take_segments()
        return segment

    def commit(self) -> None:
        verdict = self.generation.verify()
        assert verdict is not None and verdict.new_root is not None and len(verdict.token_ids) == 1
        self.generation.commit(verdict)

    def take_commit(self) -> tuple[list[int], int]:
        (send,) = self.generation.take_outbox()
        assert isinstance(send.message, Commit)
        return send.message.prefix_ids, send.message.root_id


def result_of(segment: Segment) -> Result:
    node_ids = segment.node_ids[segment.num_prefix :]
    return Result(0, 0, segment.segment_id, node_ids, 0, torch.zeros(len(node_ids), 1), [])


def passed_on(segment: Segment) -> Segment:
    """The segment as one worker gives it to the next."""
    hidden = torch.zeros(len(segment.node_ids), HIDDEN_SIZE, dtype=torch.float16)
    return Segment(
        0, 0, segment.segment_id, segment.node_ids, segment.parent_ids, segment.positions, 0, None, hidden, []
    )


def live(source: TableSource, num_nodes: int, context: int) -> Times:
    """One run: what each part took."""
    life, times = Life(source, num_nodes, context), Times()

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        times[part] = 1000 * (time.perf_counter() - start_s)

    result = result_of(life.first)
    with timed("verify and re-root"):
        life.generation.receive(result)
        life.commit()
    prefix_ids, root_id = life.take_commit()
    with timed("commit slots"):
        life.slots.commit(prefix_ids, root_id)
    with timed("draft passes"):
        life.draft()
    with timed("choose and send"):
        life.send()
    segment = passed_on(life.take_segment())
    assert len(segment.node_ids) == SEGMENT_LEN
    with timed("codec"):
        life.codec.decode_to_worker(life.codec.encode(segment))
    with timed("slots"):
        _, slots = life.slots.place(segment.node_ids, segment.parent_ids, segment.positions)
    with timed("mask"):
        torch.from_numpy(life.slots.rows_mask(slots))[None, None]
    return times


def measure(sizes: Sequence[int], run: Callable[[int], Times], num_runs: int) -> dict[str, Any]:
    """Medians by size, and how the total grows."""
    run(sizes[0])  # warm-up
    all_times: defaultdict[int, list[Times]] = defaultdict(list)
    for _ in range(num_runs):
        for size in sizes:
            all_times[size].append(run(size))
    points: list[dict[str, Any]] = []
    for size, runs in all_times.items():
        parts_ms = {part: statistics.median(times[part] for times in runs) for part in runs[0]}
        points.append({"size": size, "total_ms": sum(parts_ms.values()), "parts_ms": parts_ms})
    last = points[-FITTED_POINTS:]
    slope, _ = np.polyfit(np.log([point["size"] for point in last]), np.log([point["total_ms"] for point in last]), 1)
    return {"points": points, "exponent": float(slope)}


def draw(path: Path, axes: dict[str, dict[str, Any]]) -> None:
    panels: dict[str, plots.Growth] = {}
    for label, axis in axes.items():
        points = axis["points"]
        parts = {part: [point["parts_ms"][part] for point in points] for part in points[0]["parts_ms"]}
        title = f"exponent {axis['exponent']:.2f}"
        panels[label] = plots.Growth(
            [point["size"] for point in points], [point["total_ms"] for point in points], parts, title
        )
    plots.growth(path, panels, f"The engine's own work on one segment of {SEGMENT_LEN} nodes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=300, help="runs of each size; medians count")
    parser.add_argument("--plot", type=Path, help="draw both axes into this PNG file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = TableSource()
    nodes = measure(NODES, lambda size: live(source, size, NODES_CONTEXT), arguments.runs)
    contexts = measure(CONTEXTS, lambda size: live(source, CONTEXTS_NODES, size), arguments.runs)
    if arguments.plot:
        tree_label = f"nodes of the tree (context {NODES_CONTEXT})"
        draw(arguments.plot, {tree_label: nodes, f"tokens of context (tree of {CONTEXTS_NODES} nodes)": contexts})
    figures = {
        "runs": arguments.runs,
        "segment_len": SEGMENT_LEN,
        "environment": environment(),
        "nodes": {"context": NODES_CONTEXT, **nodes},
        "context": {"nodes": CONTEXTS_NODES, **contexts},
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
