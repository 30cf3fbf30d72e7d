"""Stages against transformers: slices, pipelines, trees in segments, commits, prunes and slot reuse."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowspec.core import DType, Partition
from flowspec.model import forward_rows
from flowspec.model.forward_rows import masks_of
from flowspec.model.loader import Checkpoint
from flowspec.model.slots import SlotTable
from flowspec.model.stage import Part, forward
from flowspec.model.torch_stage import TorchStage
from tiny_models import FAMILIES, VOCAB_SIZE, make_checkpoint, plain_model

NUM_LAYERS = 6
TOLERANCE = 1e-4  # of logits whose standard deviation is about 1.7; float32 leaves 1e-5 of it
PARTITIONS = ("0:6", "0:2,2:5,5:6", "0:1,1:2,2:3,3:4,4:5,5:6")


@dataclass
class Reference:
    """A checkpoint, and what transformers makes of it."""

    checkpoint: Checkpoint
    model: Any

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> Tensor:
        return self.model(torch.tensor([token_ids])).logits[0]


def read_reference(directory: Path) -> Reference:
    model = plain_model(directory)
    return Reference(Checkpoint.open(directory), model)


@pytest.fixture(scope="session")
def references(checkpoint_dir: Callable[[str], Path]) -> dict[str, Reference]:
    return {family: read_reference(checkpoint_dir(family)) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def reference(request: pytest.FixtureRequest, references: dict[str, Reference]) -> Reference:
    return references[request.param]


@pytest.fixture(params=["mistral", "qwen2"])
def windowed(request: pytest.FixtureRequest, references: dict[str, Reference]) -> Reference:
    """A model whose windows are shorter than the prompts here."""
    return references[request.param]


class Pipeline:
    """Stages in a row, and the tokens of every node, so that each node's path can be run alone by transformers."""

    def __init__(self, reference: Reference, partition: str, prompt: list[int], chunk: int = 7) -> None:
        checkpoint = reference.checkpoint
        self.reference = reference
        ranges = Partition.parse(partition).stages
        self.stages = [TorchStage.load(checkpoint, layers, "float32", "cpu") for layers in ranges]
        self.lm_head = checkpoint.load_lm_head("float32", "cpu")
        self.root_id = 1000
        self.caches = [stage.open_cache(self.root_id) for stage in self.stages]
        self.texts: dict[int, list[int]] = {}  # node id -> all tokens up to and including it
        self.prompt = prompt
        self.prompt_logits = torch.cat(
            [self._prefill(start, prompt[start : start + chunk]) for start in range(0, len(prompt), chunk)]
        )

    def _prefill(self, start: int, token_ids: list[int]) -> Tensor:
        hidden = torch.tensor(token_ids)
        for stage, cache in zip(self.stages, self.caches, strict=True):
            slots = cache.slots.append_prefix(range(start, start + len(token_ids)))
            hidden = forward(stage, hidden, slots, cache)
        return hidden @ self.lm_head.T

    def run(self, rows: list[tuple[int, int, int]]) -> float:
        """Run a segment of (node id, parent id, token id); return how far its logits are from transformers'."""
        node_ids, parent_ids, token_ids = (list(column) for column in zip(*rows, strict=True))
        for node_id, parent_id, token_id in rows:
            above = self.prompt if node_id == self.root_id and parent_id not in self.texts else self.texts[parent_id]
            self.texts[node_id] = [*above, token_id]
        positions = [len(self.texts[node_id]) - 1 for node_id in node_ids]
        hidden = torch.tensor(token_ids)
        for stage, cache in zip(self.stages, self.caches, strict=True):
            kept, slots = cache.slots.place(node_ids, parent_ids, positions)
            assert len(kept) == len(node_ids)
            hidden = forward(stage, hidden, slots, cache)
            cache.slots.check_integrity()
        wanted = torch.stack([self.reference.logits(self.texts[node_id])[-1] for node_id in node_ids])
        return (hidden @ self.lm_head.T - wanted).abs().max().item()

    def commit(self, prefix_ids: list[int], root_id: int) -> int:
        self.root_id = root_id
        return max(len(cache.slots.commit(prefix_ids, root_id)) for cache in self.caches)

    def is_alive(self, node_id: int) -> bool:
        return self.caches[0].slots.slot_of(node_id) is not None


def random_tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=count)


def worst_mismatch(pipeline: Pipeline, seed: int, num_rounds: int) -> float:
    """Grow a random tree in segments of 1 to 8 rows, commit random paths, reuse slots; return the largest mismatch."""
    draw = random.Random(seed)
    worst, num_freed, next_id = 0.0, 0, pipeline.root_id + 1
    parents = {pipeline.root_id: -1}
    worst = pipeline.run([(pipeline.root_id, -1, draw.randrange(VOCAB_SIZE))])
    for _ in range(num_rounds):
        for num_rows in (draw.randint(2, 8), 1, draw.randint(1, 8)):
            rows = []
            for _ in range(num_rows):
                parents[next_id] = draw.choice([*parents][-12:])
                rows.append((next_id, parents[next_id], draw.randrange(VOCAB_SIZE)))
                next_id += 1
            worst = max(worst, pipeline.run(rows))
        path = [draw.choice([*parents])]
        while path[-1] != pipeline.root_id:
            path.append(parents[path[-1]])
        path.reverse()
        children = [node_id for node_id, parent_id in parents.items() if parent_id == path[-1]]
        if children and draw.random() < 0.5:
            num_freed += pipeline.commit(path, children[0])
        else:
            num_freed += pipeline.commit(path, next_id)
            worst = max(worst, pipeline.run([(next_id, path[-1], draw.randrange(VOCAB_SIZE))]))
            parents[next_id] = path[-1]
            next_id += 1
        parents = {node_id: parent_id for node_id, parent_id in parents.items() if pipeline.is_alive(node_id)}
    assert num_freed > 0, "the random trees never pruned anything"
    assert pipeline.caches[0].slots.high_water < len(pipeline.prompt) + len(pipeline.texts), "no slot was used again"
    return worst


@pytest.mark.parametrize("partition", PARTITIONS)
def test_a_slice_equals_transformers_layers(reference: Reference, partition: str) -> None:
    token_ids = random_tokens(20, seed=0)
    with torch.no_grad():
        # One entry before each layer, and the last one after the final norm.
        wanted = reference.model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states
    for layers in Partition.parse(partition).stages:
        stage = TorchStage.load(reference.checkpoint, layers, "float32", "cpu")
        assert (stage.is_first, stage.is_last) == (layers.start == 0, layers.end == NUM_LAYERS)
        inputs = torch.tensor(token_ids) if stage.is_first else wanted[layers.start][0]
        cache = stage.open_cache()
        hidden = forward(stage, inputs, cache.slots.append_prefix(range(20)), cache)
        torch.testing.assert_close(hidden, wanted[layers.end][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_chunked_prefill_over_stages_gives_transformers_logits(reference: Reference, partition: str) -> None:
    prompt = random_tokens(40, seed=1)
    pipeline = Pipeline(reference, partition, prompt)
    torch.testing.assert_close(pipeline.prompt_logits, reference.logits(prompt), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_trees_in_segments_equal_each_path_alone(reference: Reference, seed: int) -> None:
    """Through commits, prunes and slot reuse, with one-row segments whose siblings are in the cache."""
    partition = PARTITIONS[seed % len(PARTITIONS)]
    pipeline = Pipeline(reference, partition, random_tokens(20, seed))
    assert worst_mismatch(pipeline, seed, num_rounds=3) < TOLERANCE


ROPE = {"rope_theta": 10000.0, "factor": 2.0}


@pytest.mark.parametrize(
    "rope_parameters",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        {"rope_type": "linear", **ROPE},
        {"rope_type": "yarn", "original_max_position_embeddings": 32, **ROPE},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_rotary_scalings_equal_transformers(rope_parameters: dict[str, Any], tmp_path: Path) -> None:
    reference = read_reference(make_checkpoint(tmp_path, "llama", rope_parameters=rope_parameters))
    pipeline = Pipeline(reference, "0:3,3:6", random_tokens(48, seed=2))  # past the original 32 positions
    torch.testing.assert_close(pipeline.prompt_logits, reference.logits(pipeline.prompt), rtol=0, atol=TOLERANCE)
    assert worst_mismatch(pipeline, seed=0, num_rounds=1) < TOLERANCE


def test_a_missing_window_would_be_noticed(windowed: Reference, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(windowed.checkpoint.name, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "sliding_window": 10**6}))
    pipeline = Pipeline(replace(windowed, checkpoint=Checkpoint.open(copy)), "0:2,2:6", random_tokens(20, seed=3))
    assert pipeline.run([(1000, -1, 5)]) > 1000 * TOLERANCE


def test_a_window_over_slots_instead_of_positions_would_be_noticed(
    windowed: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_slot(part: Part, window: int | None) -> Any:
        table = part.cache.slots
        positions, table.positions = table.positions, np.arange(table.capacity)
        mask = masks_of(part, window)
        table.positions = positions
        return mask

    pipeline = Pipeline(windowed, "0:6", random_tokens(20, seed=3))
    pipeline.run([(1000, -1, 5), *((1001 + i, 1000, i) for i in range(8))])
    monkeypatch.setattr(forward_rows, "masks_of", by_slot)
    assert pipeline.run([(1010, 1001, 5)]) > 1000 * TOLERANCE


def test_a_one_row_segment_that_saw_its_siblings_would_be_noticed(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault of the paper's public code: no ancestor mask for a segment of one row."""
    pipeline = Pipeline(reference, "0:3,3:6", random_tokens(20, seed=4))
    assert pipeline.run([(1000, -1, 5), (1001, 1000, 6), (1002, 1000, 7)]) < TOLERANCE
    assert pipeline.run([(1003, 1001, 8)]) < TOLERANCE
    monkeypatch.setattr(SlotTable, "rows_mask", lambda self, slots: np.ones((len(slots), self.high_water), dtype=bool))
    assert pipeline.run([(1004, 1001, 8)]) > 1000 * TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stages_equal_transformers_in_that_precision(reference: Reference, dtype: DType) -> None:
    token_ids = random_tokens(20, seed=5)
    model = plain_model(reference.checkpoint.name, dtype, experts_implementation="eager")
    with torch.no_grad():
        wanted = model.model(torch.tensor([token_ids])).last_hidden_state[0]
    hidden = torch.tensor(token_ids)
    for layers in Partition.even(NUM_LAYERS, 2).stages:
        stage = TorchStage.load(reference.checkpoint, layers, dtype, "cpu")
        assert stage.dtype == getattr(torch, dtype)
        cache = stage.open_cache()
        # The wire may carry another type than the stage computes in.
        hidden = forward(stage, hidden, cache.slots.append_prefix(range(20)), cache).float()
    torch.testing.assert_close(hidden, wanted.float(), rtol=0, atol=0.05)
