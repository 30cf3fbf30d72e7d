"""What a stage reads of its source, whatever that is, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowspec.core import DType, LayerRange, Partition
from flowspec.errors import ModelError
from flowspec.model import tensor_files
from flowspec.model.families import PREFIX
from flowspec.model.loader import Checkpoint
from flowspec.model.source import TensorSource
from flowspec.model.stage import forward
from flowspec.model.torch_stage import TorchStage
from tiny_models import FAMILIES, make_checkpoint

NUM_LAYERS = 6


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, checkpoint_dir: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(checkpoint_dir(request.param))


class InMemory(TensorSource):
    """A model whose tensors are in no file."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.name = "a model in memory"
        self.config = checkpoint.config
        self.stored = dict(checkpoint.tensors(checkpoint.tensor_names(), "float32", "cpu"))

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self.stored)

    def shard_of(self, tensor_name: str) -> str:
        return "memory"

    def tensors(self, names: Iterable[str], dtype: DType, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            yield name, self.stored[name].to(device, getattr(torch, dtype), copy=True)


def test_any_source_gives_the_same_stage_and_heads(checkpoint: Checkpoint) -> None:
    source, hidden = InMemory(checkpoint), []
    for each in (checkpoint, source):
        stage = TorchStage.load(each, LayerRange(0, NUM_LAYERS), "float32", "cpu")
        cache = stage.open_cache()
        hidden.append(forward(stage, torch.arange(9), cache.slots.append_prefix(range(9)), cache))
    assert torch.equal(*hidden)
    assert torch.equal(source.load_lm_head("float32", "cpu"), checkpoint.load_lm_head("float32", "cpu"))
    assert torch.equal(source.load_embedding("float32", "cpu"), checkpoint.load_embedding("float32", "cpu"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("as_modules", [False, True], ids=["by kind", "as modules"])
def test_experts_may_be_stored_together(checkpoint_dir: Callable[[str], Path], family: str, as_modules: bool) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir(family))
    source = InMemory(checkpoint)
    wanted = TorchStage.load(checkpoint, LayerRange(4, 6), "float32", "cpu")
    if as_modules:
        layers = {PREFIX + f"layers.{index}.": layer for index, layer in enumerate(wanted._layers, 4)}
        source.stored = {n: w for n, w in source.stored.items() if ".experts." not in n and ".block_sparse_" not in n}
        source.stored |= {p + n: w for p, layer in layers.items() for n, w in layer.named_parameters()}
    else:
        kinds: dict[str, list[Tensor]] = {}
        for name in sorted(name for name in source.stored if ".experts." in name):
            kinds.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(source.stored.pop(name))
        source.stored |= {name: torch.stack(tensors) for name, tensors in kinds.items()}
    found = TorchStage.load(source, LayerRange(4, 6), "float32", "cpu")
    rows, hidden = torch.randn(9, wanted.hidden_size, generator=torch.Generator().manual_seed(0)), []
    for stage in (wanted, found):
        cache = stage.open_cache()
        hidden.append(forward(stage, rows, cache.slots.append_prefix(range(9)), cache))
    assert torch.equal(*hidden)


class RecordingFile:
    """safe_open, with a list of what was read."""

    names: list[str]

    def __init__(self, path: Path, **kwargs: Any) -> None:
        self._file = safe_open(path, **kwargs)

    def __enter__(self) -> RecordingFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_tensor(self, name: str) -> Tensor:
        self.names.append(name)
        return self._file.get_tensor(name)


@pytest.mark.parametrize("layers", ["0:2", "2:4", "4:6"])
def test_a_stage_reads_only_its_own_tensors(
    checkpoint: Checkpoint, layers: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage_range = Partition.even(NUM_LAYERS, 3).stages[int(layers[0]) // 2]
    assert str(stage_range) == layers
    names = checkpoint.tensor_names()
    wanted = {
        name
        for name in names
        if name.startswith(tuple(f"model.layers.{i}." for i in range(*map(int, layers.split(":")))))
    }
    wanted |= {"model.embed_tokens.weight"} if layers == "0:2" else set()
    wanted |= {"model.norm.weight"} if layers == "4:6" else set()
    monkeypatch.setattr(RecordingFile, "names", [], raising=False)
    monkeypatch.setattr(tensor_files, "safe_open", RecordingFile)
    progress: list[float] = []
    stage = TorchStage.load(checkpoint, stage_range, "float32", "cpu", progress.append)
    assert sorted(RecordingFile.names) == sorted(wanted)
    assert progress[-1] == 1.0
    assert progress == sorted(progress)
    mixtures = {name.partition(".experts.")[0] for name in wanted if ".experts." in name}
    assert len(progress) == len([name for name in wanted if ".experts." not in name]) + 2 * len(mixtures)
    monkeypatch.undo()
    loaded = dict(checkpoint.tensors(wanted, "float32", "cpu"))
    assert stage.weights_bytes == sum(tensor.nbytes for tensor in loaded.values())


def test_a_stage_needs_only_the_shards_of_its_layers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = Path(checkpoint.name)
    needed = {checkpoint.shard_of(n) for n in checkpoint.tensor_names() if ".layers.3." in n}
    for path in source.iterdir():
        if path.suffix != ".safetensors" or path.name in needed:
            (tmp_path / path.name).symlink_to(path)
    assert len(list(tmp_path.glob("*.safetensors"))) < len(list(source.glob("*.safetensors")))
    TorchStage.load(Checkpoint.open(tmp_path), LayerRange(3, 4), "float32", "cpu")
    with pytest.raises(ModelError, match=r"model-\d+-of-\d+\.safetensors is missing"):
        TorchStage.load(Checkpoint.open(tmp_path), LayerRange(0, 6), "float32", "cpu")


def test_a_layer_range_beyond_the_model_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelError, match="has 6 layers; there is no layer range 4:7"):
        TorchStage.load(checkpoint, LayerRange(4, 7), "float32", "cpu")


def change_weights(directory: Path, change: dict[str, Tensor | None]) -> Checkpoint:
    weights: dict[str, Any] = load_file(directory / "model.safetensors") | change
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, directory / "model.safetensors")
    return Checkpoint.open(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": torch.zeros(64, 31)}, r"up_proj\.weight with shape \(64, 31\)"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "none of the safetensors files holds it"),
        ({"model.norm.weight": None}, r"asks for model\.norm\.weight"),
        ({"model.layers.6.mlp.up_proj.weight": torch.zeros(64, 32)}, "says 6 layers, but the safetensors files hold 7"),
        ({"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)}, "q_proj.bias, which config.json has no place for"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, "llama", max_shard_size="1GB")
    checkpoint = change_weights(tmp_path, change)
    with pytest.raises(ModelError, match=message):
        TorchStage.load(checkpoint, LayerRange(0, 6), "float32", "cpu")


def test_rotary_frequencies_in_old_files_are_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", max_shard_size="1GB")
    checkpoint = change_weights(tmp_path, {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    TorchStage.load(checkpoint, LayerRange(0, 6), "float32", "cpu")
