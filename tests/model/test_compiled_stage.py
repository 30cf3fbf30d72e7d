"""Stages of integer kernels: close to the same weights in floats, and the same bits whatever comes with a row."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from flowspec.core import LayerRange, Partition, SamplingParams
from flowspec.errors import ModelError, UsageError
from flowspec.llm import LLM
from flowspec.model.backends import choose_weights, is_compiled, load_stage, open_checkpoint
from flowspec.model.compiled_stage import CompiledHead, CompiledStage
from flowspec.model.loader import Checkpoint
from flowspec.model.packed import GROUP, PackedWeight, pack
from flowspec.model.received import make_manifest, stage_shapes
from flowspec.model.stage import Part, forward
from flowspec.model.stage_size import stage_bytes
from flowspec.model.torch_stage import TorchStage
from tiny_gguf import write_gguf
from tiny_models import FAMILIES, VOCAB_SIZE, make_checkpoint, make_model

SCHEDULES = ("serial", "chunked", "pipedec", "lockstep", "flow")


class Rounded(Checkpoint):
    """A checkpoint whose matrices are what they are once they were packed."""

    bits: Any = 8

    def tensors(self, names: Any, dtype: Any, device: Any) -> Any:
        for name, tensor in super().tensors(names, dtype, device):
            is_linear = "_proj" in name and name.endswith("weight")
            yield name, pack(tensor, self.bits).unpacked() if is_linear else tensor


@pytest.fixture(params=FAMILIES)
def directory(request: pytest.FixtureRequest, checkpoint_dir: Callable[[str], Path]) -> Path:
    return checkpoint_dir(request.param)


def run_alone(stage: Any, token_ids: list[int]) -> Tensor:
    """A token at a time: plain decoding."""
    cache = stage.open_cache()
    rows = [
        forward(stage, torch.tensor([token]), cache.slots.append_prefix([position]), cache)
        for position, token in enumerate(token_ids)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_move_by_half_a_scale(bits: Any) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 3 * GROUP) * torch.logspace(-6, 1, 70)[:, None]
    weight[5] = 0
    weight[6, :GROUP] = 1.0  # no zero among them
    packed = pack(weight, bits)
    assert packed.shape == tuple(weight.shape) and packed.bits == bits
    moved = (packed.unpacked() - weight).abs().reshape(70, 3, GROUP)
    assert (moved <= torch.from_numpy(packed.scales).float().abs() * 0.502 + 1e-7).all()
    assert torch.equal(packed.unpacked()[5], weight[5])
    assert packed.nbytes * 8 / weight.numel() == pytest.approx(bits + 16 / GROUP)


def test_a_stage_is_as_close_as_activations_of_8_bits_are(directory: Path) -> None:
    layers = LayerRange(1, 2)
    wanted = TorchStage.load(Rounded.open(directory), layers, "float32", "cpu")
    stage = CompiledStage.load(Checkpoint.open(directory), layers, "float32", 8)
    assert (2 * stage.slot_bytes, stage.is_first, stage.is_last) == (wanted.slot_bytes, False, False)
    torch.manual_seed(0)
    rows = torch.randn(20, stage.hidden_size)
    found = []
    for each in (stage, wanted):
        cache = each.open_cache()
        found.append(forward(each, rows, cache.slots.append_prefix(range(20)), cache))
    error = (found[0] - found[1]).norm() / found[1].norm()
    assert 0 < error < 0.04


@pytest.mark.parametrize("family", FAMILIES)
def test_floats_are_those_of_torch(checkpoint_dir: Callable[[str], Path], family: str) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir(family))
    layers = LayerRange(0, checkpoint.num_layers)
    found = run_alone(CompiledStage.load(checkpoint, layers, "float32", "float32"), list(range(30)))
    wanted = run_alone(TorchStage.load(checkpoint, layers, "float32", "cpu"), list(range(30)))
    assert 0 < (found - wanted).norm() < 1e-5 * wanted.norm()
    logits = CompiledHead.load(checkpoint, "float32").logits(wanted)
    assert torch.allclose(logits, wanted @ checkpoint.load_lm_head("float32", "cpu").T, rtol=1e-4, atol=1e-5)


def test_floats_are_as_narrow_as_the_files_have_them(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 2, "intermediate_size": 256}
    make_checkpoint(tmp_path, "llama", **sizes)
    model: Any = make_model("llama", **sizes)
    model.to(torch.bfloat16)
    query = model.model.layers[1].self_attn.q_proj
    query.weight.data = torch.randn(query.weight.shape) / 20  # a file may mix them, among what is one matrix here
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    halves, layers = Checkpoint.open(tmp_path), LayerRange(0, 2)
    found = load_stage(halves, layers, "float32", "float", "cpu")
    wanted = TorchStage.load(halves, layers, "float32", "cpu")
    assert isinstance(found, CompiledStage) and found.weights_bytes < 0.65 * wanted.weights_bytes
    manifest, _ = make_manifest(halves, layers, lambda stored: f"{stored.offset:064x}")
    expected = stage_bytes(stage_shapes(manifest), "float32", "float", is_compiled(512, "cpu"))
    assert found.weights_bytes == pytest.approx(expected, rel=0.01)
    packed = load_stage(halves, layers, "float32", "int8", "cpu").weights_bytes
    assert packed == pytest.approx(stage_bytes(stage_shapes(manifest), "float32", "int8"), rel=0.01)
    rows = [run_alone(stage, list(range(20))) for stage in (found, wanted)]
    assert 0 < (rows[0] - rows[1]).norm() < 1e-5 * rows[1].norm()
    other = Checkpoint.open(make_checkpoint(tmp_path / "gelu", "llama", hidden_act="gelu", **sizes))
    assert isinstance(load_stage(other, layers, "float32", "float", "cpu"), TorchStage)


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        *((family, 8) for family in FAMILIES), ("llama", 4), ("mixtral", 4),
        ("llama", "float32"), ("gemma3_text", "bfloat16"), ("qwen3_moe", "float32"),
    ],
)  # fmt: skip
def test_rows_do_not_change_each_others_bits(checkpoint_dir: Callable[[str], Path], family: str, bits: Any) -> None:
    """A tree in random segments, with commits, dead rows and slots that are used again, against plain decoding."""
    checkpoint = Checkpoint.open(checkpoint_dir(family))
    stage = CompiledStage.load(checkpoint, LayerRange(0, 6), "float32", bits)
    draw = random.Random(1)
    prompt = draw.choices(range(VOCAB_SIZE), k=20)
    cache = stage.open_cache(1000)
    forward(stage, torch.tensor(prompt), cache.slots.append_prefix(range(20)), cache)
    root_id, next_id, num_reused = 1000, 1001, 0
    texts = {1000: [*prompt, 7]}
    cache.slots.root_id = root_id
    found: dict[int, Tensor] = {}

    def send(rows: list[tuple[int, int]]) -> None:
        nonlocal num_reused
        high_water = cache.slots.high_water
        positions = [len(texts[node]) - 1 for node, _ in rows]
        kept, slots = cache.slots.place([node for node, _ in rows], [parent for _, parent in rows], positions)
        assert len(kept) == len(rows)
        num_reused += int((slots < high_water).sum())
        hidden = forward(stage, torch.tensor([texts[node][-1] for node, _ in rows]), slots, cache)
        found.update(zip((node for node, _ in rows), hidden, strict=True))

    send([(1000, -1)])
    alive = [1000]
    for _ in range(8):
        rows = []
        for _ in range(draw.randint(1, 12)):
            parent = draw.choice(alive[-8:])
            texts[next_id] = [*texts[parent], draw.randrange(VOCAB_SIZE)]
            rows.append((next_id, parent))
            alive.append(next_id)
            next_id += 1
        send(rows)
        child = next((node for node, parent in rows if parent == root_id), None)
        if child is not None:
            cache.slots.commit([root_id], child)
            root_id = child
            alive = [node for node in alive if cache.slots.slot_of(node) is not None]
    assert num_reused > 2
    for node in draw.sample(sorted(found), 8):
        assert torch.equal(run_alone(stage, texts[node])[-1], found[node]), texts[node]


@pytest.mark.parametrize("family", ["qwen3", "granite"])
def test_any_number_of_rows_has_the_same_bits(checkpoint_dir: Callable[[str], Path], family: str) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir(family))
    stage = CompiledStage.load(checkpoint, LayerRange(2, 6), "float32", 8)
    head = CompiledHead.load(checkpoint, 8)
    torch.manual_seed(0)
    rows = torch.randn(70, stage.hidden_size)
    cache = stage.open_cache()
    whole = forward(stage, rows, cache.slots.append_prefix(range(70)), cache)
    logits = head.logits(whole)
    wanted = (whole @ checkpoint.load_lm_head("float32", "cpu").T).numpy()
    assert np.abs(logits.numpy() - wanted).max() < 0.05 * np.abs(wanted).max()
    for count in range(1, 65):
        cache = stage.open_cache()
        some = forward(stage, rows[:count], cache.slots.append_prefix(range(count)), cache)
        assert torch.equal(some, whole[:count]) and torch.equal(head.logits(some), logits[:count])
    assert head.logits(whole[:0]).shape == (0, VOCAB_SIZE)


def test_the_lm_head_has_8_bits_unless_its_own_have_4(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "qwen3", GGMLQuantizationType.Q4_0)
    own = open_checkpoint(tmp_path / "model.gguf")
    for checkpoint, bits in ((open_checkpoint(checkpoint_dir("llama")), 8), (own, 4)):
        assert checkpoint.packed_lm_head(4).bits == bits and checkpoint.packed_lm_head(8).bits == 8
        assert checkpoint.packed("model.layers.0.mlp.up_proj.weight", 4).bits == 4


def test_requests_in_one_forward_have_the_bits_that_they_have_alone(checkpoint_dir: Callable[[str], Path]) -> None:
    stage = CompiledStage.load(Checkpoint.open(checkpoint_dir("mistral")), LayerRange(0, 3), "float32", 8)
    texts = [[1, 2, 3, 4, 5], list(range(30)), [9]]
    parts = []
    for text in texts:
        cache = stage.open_cache()
        parts.append(Part(torch.tensor(text), cache.slots.append_prefix(range(len(text))), cache))
    *_, together = stage.steps(parts)
    assert together is not None
    assert torch.equal(together, torch.cat([run_alone(stage, text) for text in texts]))


def test_a_forward_may_be_given_up_between_layers(checkpoint_dir: Callable[[str], Path]) -> None:
    stage = CompiledStage.load(Checkpoint.open(checkpoint_dir("llama")), LayerRange(0, 4), "float32", 8)
    wanted = run_alone(stage, [5, 6])
    cache = stage.open_cache()
    given_up = stage.steps([Part(torch.tensor([5]), cache.slots.append_prefix([0]), cache)])
    assert next(given_up) is None
    given_up.close()
    assert torch.equal(run_alone(stage, [5, 6]), wanted)


def test_halves_on_the_way_are_the_same_for_every_partition(checkpoint_dir: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("llama"))
    texts = []
    for partition in ("0:6", "0:1,1:4,4:6"):
        rows = torch.tensor([3, 1, 4, 1, 5])
        for layers in Partition.parse(partition).stages:
            stage = CompiledStage.load(checkpoint, layers, "bfloat16", 8)
            assert stage.dtype == torch.bfloat16 and stage.slot_bytes == 2 * 2 * 2 * 8 * len(layers)
            cache = stage.open_cache()
            rows = forward(stage, rows, cache.slots.append_prefix(range(5)), cache)
        texts.append(rows)
    assert texts[0].dtype == torch.bfloat16
    assert (texts[0].float() - texts[1].float()).norm() < 0.05 * texts[0].float().norm()


@pytest.mark.parametrize(
    ("family", "weights", "partition"),
    [
        ("qwen2", "int8", "0:6"),
        ("llama", "int8", "0:2,2:5,5:6"),
        ("llama", "int4", "0:3,3:6"),
        ("mixtral", "int4", "0:1,1:6"),
    ],
)
def test_every_schedule_gives_the_tokens_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path], family: str, weights: Any, partition: str
) -> None:
    directory = checkpoint_dir(family)
    prompt = random.Random(0).choices(range(VOCAB_SIZE), k=15)
    sampled = SamplingParams(max_tokens=24, temperature=0.8, seed=3)
    with LLM(directory, weights=weights, partition=partition, in_process=True) as llm:
        for params in (SamplingParams(max_tokens=24), sampled):
            wanted = llm.generate(prompt, params, schedule="ar").token_ids
            for schedule in SCHEDULES:
                assert llm.generate(prompt, params, schedule=schedule).token_ids == wanted, schedule


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_schedule_gives_these_tokens_in_floats_too(dtype: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 3, "intermediate_size": 256}
    directory = make_checkpoint(tmp_path, "qwen3", **sizes)
    prompt = random.Random(0).choices(range(VOCAB_SIZE), k=15)
    with LLM(directory, dtype=dtype, draft="ngram", partition="0:1,1:3", in_process=True) as llm:
        for params in (SamplingParams(max_tokens=24), SamplingParams(max_tokens=24, temperature=0.8, seed=3)):
            wanted = llm.generate(prompt, params, schedule="ar").token_ids
            for schedule in SCHEDULES:
                assert llm.generate(prompt, params, schedule=schedule).token_ids == wanted, schedule


def test_what_the_kernels_cannot_take_is_an_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "llama", hidden_size=40, head_dim=10))
    with pytest.raises(ModelError, match="has 40 inputs, which 4-bit kernels cannot take in groups of 32; use int8"):
        CompiledStage.load(checkpoint, LayerRange(0, 2), "float32", 4)
    stage = CompiledStage.load(checkpoint, LayerRange(0, 2), "float32", 8)
    rows = torch.tensor([1, 2, 3, 4, 5, 6, 7])
    cache = stage.open_cache()
    assert torch.equal(
        forward(stage, rows, cache.slots.append_prefix(range(7)), cache), run_alone(stage, rows.tolist())
    )


def test_what_this_machine_lacks_is_an_error(
    checkpoint_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("llama"))
    assert choose_weights(checkpoint, "auto", "cpu") == "float"
    assert choose_weights(checkpoint, "int4", "cpu") == "int4"
    with pytest.raises(UsageError, match="int8 weights are for processors, and the device is cuda:0"):
        choose_weights(checkpoint, "int8", "cuda:0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"int8 weights need numba, which is not installed; install flowspec\[cpu\]"):
        choose_weights(checkpoint, "int8", "cpu")


def test_packed_weights_hold_negative_scales() -> None:
    codes = np.arange(16, dtype=np.uint8).repeat(2).reshape(1, 1, GROUP)
    half = np.full((1, 1, 1), -0.5, dtype=np.float16)
    weight = PackedWeight(codes, half, np.full((1, 1, 1), 8, dtype=np.uint8))
    assert torch.equal(weight.unpacked()[0, :4], torch.tensor([4.0, 4.0, 3.5, 3.5]))
