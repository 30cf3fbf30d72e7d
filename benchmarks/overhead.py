"""What the engine itself costs: everything but layer arithmetic and drafting. Prints one JSON object.

    python benchmarks/overhead.py [--segments 200] [--stages 4] [--positions 100]

With one segment in flight nothing queues, so a segment's round trip less its stages' forwards is what sockets, codec,
scheduling and slots cost on all hops together; the masks, which a stage makes inside its forward, are measured by
themselves and added. Sampling is measured from logits on, by vocabulary. docs/METHODOLOGY.md defines the figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flowspec.cluster.connections import Connections, LoadProgress
from flowspec.cluster.trips import Trip
from flowspec.config import EngineConfig, PipelineConfig, ScheduleConfig, TreeConfig
from flowspec.core import LayerRange, SamplingParams
from flowspec.draft.base import Accepted
from flowspec.llm import LLM
from flowspec.model.loader import Checkpoint
from flowspec.model.torch_stage import TorchStage
from flowspec.sampling import Sampler
from flowspec.tree import UNDRAFTED, DraftTree, Ints
from flowspec.wire.actor import Send
from flowspec.wire.messages import Ready, Result, Segment, ToDriver

PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n"
VOCABULARIES = (32_000, 128_256, 262_144)  # Llama 2, Llama 3, Gemma 3
SETTINGS = {
    "greedy": SamplingParams(),
    "temperature 0.8, top-p 0.95": SamplingParams(temperature=0.8, top_p=0.95, seed=1),
    "temperature 1": SamplingParams(temperature=1.0, seed=1),
}
NUM_ROWS = 10  # of a draft pass, and children of each


class TimedConnections:
    """Connections that note when each segment left and when its result came back."""

    def __init__(self, inner: Connections) -> None:
        self._inner = inner
        self._sent: dict[tuple[int, int], float] = {}
        self.round_trips: list[tuple[float, Result]] = []  # round trip in seconds

    @property
    def link_bytes(self) -> int:
        return self._inner.link_bytes

    @property
    def trips(self) -> Mapping[int, Trip]:
        return self._inner.trips

    def send(self, sends: Iterable[Send]) -> None:
        sends = list(sends)
        for send in sends:
            if isinstance(send.message, Segment):
                self._sent[send.message.request_id, send.message.segment_id] = time.perf_counter()
        self._inner.send(sends)

    def receive(self, timeout_s: float) -> list[ToDriver]:
        received = self._inner.receive(timeout_s)
        now = time.perf_counter()
        for message in received:
            if isinstance(message, Result) and not message.num_prefix:
                self.round_trips.append((now - self._sent[message.request_id, message.segment_id], message))
        return received

    def await_ready(self, progress: LoadProgress) -> list[Ready]:
        return self._inner.await_ready(progress)

    def probe(self) -> None:
        self._inner.probe()

    def wake(self) -> None:
        self._inner.wake()

    def close(self) -> None:
        self._inner.close()


class FixedSource:
    """Guesses tokens 1 to 15 after every root: full segments at no cost, since drafting is not what is measured."""

    name = "fixed"
    steady_steps = 1
    block_len = 1
    feature_layers: tuple[int, ...] = ()

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> FixedDraft:
        return FixedDraft()


class FixedDraft:
    def read_prompt(self, node_ids: Sequence[int], features: torch.Tensor) -> None: ...

    def commit(self, accepted: Accepted, tree: DraftTree) -> None: ...

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        if rows[0] != 0:
            return False
        root, tokens = rows, np.arange(1, 16)[None]
        tree.expand(root, tokens, np.full(tokens.shape, np.log(1 / 16)), np.ones(1, dtype=np.int64))
        return True


def median_ms(work: Callable[[], object], num_runs: int) -> float:
    times: list[float] = []
    for _ in range(num_runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def measure_hops(num_stages: int, num_segments: int) -> dict[str, Any]:
    """Round trips of segments of 16 nodes through worker processes, one at a time."""
    one_by_one = ScheduleConfig(pipeline=PipelineConfig(segments_in_flight=1))
    config = EngineConfig(keeps_caches=False, memory_tokens=0)
    with LLM("demo", stages=num_stages, schedule_config=one_by_one, draft=FixedSource(), config=config) as llm:
        llm.generate(PROMPT, SamplingParams(max_tokens=16))  # warm-up
        llm.engine.pipeline.connections = timed = TimedConnections(llm.engine.pipeline.connections)
        while len(timed.round_trips) < num_segments:
            llm.generate(PROMPT, SamplingParams(max_tokens=128))
    engine = [trip - sum(t.end_s - t.start_s for t in result.timings) for trip, result in timed.round_trips]
    return {
        "segments": len(engine),
        "rows_per_segment": statistics.mean(len(result.node_ids) for _, result in timed.round_trips),
        "round_trip_ms": statistics.median(trip for trip, _ in timed.round_trips) * 1000,
        "forwards_ms": statistics.median(sum(t.end_s - t.start_s for t in r.timings) for _, r in timed.round_trips)
        * 1000,
        "sockets_codec_slots_ms_per_hop": statistics.median(engine) * 1000 / (num_stages + 1),
    }


def measure_masks(num_runs: int) -> float:
    """Mask of a segment of 16 nodes below a prefix of 256 tokens, as tensors of one stage, in ms."""
    stage = TorchStage.load(Checkpoint.open("demo"), LayerRange(0, 2), "float32", "cpu")
    cache = stage.open_cache(root_id=256)
    cache.slots.append_prefix(list(range(256)))
    ids = list(range(256, 272))
    _, slots = cache.slots.place(ids, [i - 1 - (i % 3 if i > 260 else 0) for i in ids], ids)

    def make_mask() -> None:
        torch.from_numpy(cache.slots.rows_mask(slots))[None, None]

    return median_ms(make_mask, num_runs)


def measure_tree(num_runs: int) -> dict[str, float]:
    """Bookkeeping of one EAGLE-2 tree of 80 nodes: expand, choose, cut into segments, re-root; no draft model."""
    rng = np.random.default_rng(0)
    config = TreeConfig()
    levels = [
        (np.stack([rng.permutation(2000)[:10] for _ in range(10)]), np.log(rng.dirichlet(np.full(10, 0.3), 10) + 1e-9))
        for _ in range(config.depth)
    ]

    def build() -> DraftTree:
        tree, rows = DraftTree(0, 5, config.size), np.zeros(1, dtype=np.int64)
        for token_ids, logprobs in levels:
            tree.expand(rows, token_ids[: len(rows)], logprobs[: len(rows)], np.ones(len(rows), dtype=np.int64))
            best = tree.best()
            rows = best[tree.staleness[best] == UNDRAFTED][: config.top_k]
        return tree

    trees = [build() for _ in range(num_runs)]

    def send_and_reroot() -> None:
        tree = trees.pop()
        while len(rows := tree.best_unsent(16)):
            tree.mark_sent(rows)
        tree.reroot(1)

    return {"build_ms": median_ms(build, num_runs), "send_and_reroot_ms": median_ms(send_and_reroot, num_runs)}


def make_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    """[rows, V]: an unsure model. A thousand tokens fall off as by Zipf's law, the others are noise far below them."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((num_rows, vocab_size), dtype=np.float32)
    for row in logits:
        row[rng.choice(vocab_size, 1000, replace=False)] = 18 - 1.25 * np.log(np.arange(1, 1001))
    return torch.from_numpy(logits)


def measure_sampling(vocab_size: int, params: SamplingParams, num_positions: int) -> dict[str, float]:
    """A text, position by position: one draft pass whose rows guess the two tokens ahead, and one token drawn.

    A pass needs noise of one position that the pass before did not; a token pays for its noise itself.
    """
    logits = make_logits(NUM_ROWS, vocab_size)
    drafter, verifier = Sampler(params), Sampler(params)
    draft_s: list[float] = []
    token_s: list[float] = []
    for position in range(num_positions + 1):
        ahead = np.repeat([position + 1, position + 2], NUM_ROWS // 2)
        start = time.perf_counter()
        drafter.draft_children(logits, ahead, NUM_ROWS)
        drafted = time.perf_counter()
        verifier.token(logits[position % NUM_ROWS], position)
        token_s.append(time.perf_counter() - drafted)
        draft_s.append(drafted - start)
        drafter.token(logits[0], position)  # what is drawn needs no noise any more
    # The first pass makes the noise of both of its positions.
    return {
        "token_ms": statistics.median(token_s[1:]) * 1000,
        "draft_pass_ms": statistics.median(draft_s[1:]) * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--segments", type=int, default=200, help="segments to measure")
    parser.add_argument("--stages", type=int, default=4, help="worker processes")
    parser.add_argument("--positions", type=int, default=100, help="tokens to sample of each vocabulary")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hops = measure_hops(arguments.stages, arguments.segments)
    mask_ms = measure_masks(arguments.segments)
    figures = {
        "stages": arguments.stages,
        **hops,
        "mask_ms": mask_ms,
        "engine_ms_per_hop": hops["sockets_codec_slots_ms_per_hop"] + mask_ms,
        "tree": measure_tree(arguments.segments),
        "sampling_by_vocabulary": {
            size: {name: measure_sampling(size, params, arguments.positions) for name, params in SETTINGS.items()}
            for size in VOCABULARIES
        },
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
