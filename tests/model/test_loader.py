"""Checkpoints on disk and on the hub: what is read, what is fetched, and what a user is told when it cannot be."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, GPT2Config, PreTrainedConfig

from flowspec import LLM, SamplingParams
from flowspec.errors import ModelError
from flowspec.model import hub, loader
from flowspec.model.demo_pair import demo_directory, demo_draft_directory
from flowspec.model.families import EMBEDDING, LM_HEAD
from flowspec.model.loader import Checkpoint
from tiny_models import VOCAB_SIZE, make_checkpoint, make_tokenizer_files


@pytest.fixture
def saved(checkpoint_dir: Callable[[str], Path]) -> Path:
    """An untied llama in many shards; tests copy it before they change it."""
    return checkpoint_dir("llama")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A llama in one file."""
    return make_checkpoint(tmp_path / "single", "llama", max_shard_size="1GB")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def all_weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_config_is_read(saved: Path) -> None:
    for name in (saved, str(saved)):
        checkpoint = Checkpoint.open(name)
        assert checkpoint.name == str(saved)
        assert (checkpoint.num_layers, checkpoint.hidden_size, checkpoint.vocab_size) == (6, 32, VOCAB_SIZE)
        assert checkpoint.max_positions == 256


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),  # Qwen's README
        ({"rope_type": "yarn", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),  # stated as scaled
        ({"rope_type": "linear", "factor": 4.0}, 1024),  # Vicuna 16k
        ({"rope_type": "default"}, 256),
    ],
)
def test_the_scaled_length_is_the_limit(copied: Path, rope: dict[str, Any], expected: int) -> None:
    edit_json(copied / "config.json", rope_parameters={"rope_theta": 10000.0, **rope})
    assert Checkpoint.open(copied).max_positions == expected


def test_a_model_saved_without_its_lm_head_is_read(tmp_path: Path) -> None:
    """As ``AutoModel`` saves it: the names lack ``model.``."""
    whole = make_checkpoint(tmp_path / "whole", "qwen2")
    AutoModel.from_pretrained(whole).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    make_tokenizer_files(tmp_path / "base", VOCAB_SIZE)
    assert not any(name.startswith("model.") for name in all_weights(tmp_path / "base"))
    texts = []
    for directory in (whole, tmp_path / "base"):
        with LLM(directory, stages=2, in_process=True) as llm:
            texts.append(llm.generate([1, 4, 2], SamplingParams(12)).token_ids)
    assert texts[0] == texts[1]


def test_an_untied_model_without_its_lm_head_is_refused(saved: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(saved).save_pretrained(tmp_path / "base")
    checkpoint = Checkpoint.open(tmp_path / "base")
    checkpoint.check_layers()
    with pytest.raises(ModelError, match=f"asks for {LM_HEAD}"):
        checkpoint.load_lm_head("float32", "cpu")


def test_a_model_has_the_name_that_people_know_it_by(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    assert Checkpoint.open(".").title == saved.name
    snapshot = tmp_path / "models--owner--Tiny-1B" / "snapshots" / "0a1b2c"
    shutil.copytree(saved, snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    assert Checkpoint.open(snapshot).title == Checkpoint.open(tmp_path / "link").title == "Tiny-1B"
    assert Checkpoint("owner/model", None, PreTrainedConfig()).title == "model"
    assert Checkpoint.open("demo").title == "demo"


def test_the_full_name_means_the_same_in_another_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert Checkpoint.open(saved.name).full_name == str(saved.resolve())
    assert Checkpoint.open("demo").full_name == "demo"
    assert Checkpoint("owner/model", None, PreTrainedConfig()).full_name == "owner/model"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(5, 7, {5}), ([5, 6], 7, {5, 6}), (None, 7, {7}), (None, [7, 8], {7, 8}), (None, None, set()), (0, None, {0})],
)
def test_eos_tokens_come_from_the_generation_config_first(
    copied: Path, generation: Any, config: Any, expected: set[int]
) -> None:
    edit_json(copied / "generation_config.json", eos_token_id=generation)
    edit_json(copied / "config.json", eos_token_id=config)
    assert Checkpoint.open(copied).eos_token_ids == expected


def test_eos_tokens_need_no_generation_config(copied: Path) -> None:
    (copied / "generation_config.json").unlink()
    edit_json(copied / "config.json", eos_token_id=7)
    assert Checkpoint.open(copied).eos_token_ids == {7}


@pytest.mark.parametrize("max_shard_size", ["20KB", "1GB"])
def test_tensors_come_one_at_a_time_and_converted(max_shard_size: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen2", max_shard_size=max_shard_size)
    checkpoint, weights = Checkpoint.open(tmp_path), all_weights(tmp_path)
    assert checkpoint.tensor_names() == weights.keys()
    for name, tensor in checkpoint.tensors(sorted(weights), "float32", "cpu"):
        assert torch.equal(tensor, weights.pop(name))
    assert not weights
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in checkpoint.tensors([EMBEDDING], "bfloat16", "cpu"))


def test_only_the_named_tensors_are_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = loader.read_tensor

    def recording(path: Path, name: str, *rest: Any) -> torch.Tensor:
        read.append(name)
        return original(path, name, *rest)

    monkeypatch.setattr(loader, "read_tensor", recording)
    tensors = Checkpoint.open(saved).tensors([EMBEDDING, LM_HEAD], "float32", "cpu")
    assert read == []
    next(tensors)
    assert read == [EMBEDDING]
    next(tensors)
    assert read == [EMBEDDING, LM_HEAD]


def test_tensors_outlive_their_file(single: Path) -> None:
    """They are no views of a mapped file, whose pages would count as memory and change with it."""
    ((_, tensor),) = Checkpoint.open(single).tensors([EMBEDDING], "float32", "cpu")
    before = tensor.clone()
    with (single / "model.safetensors").open("r+b") as file:
        file.write(bytes((single / "model.safetensors").stat().st_size))
    assert torch.equal(tensor, before)


def test_an_untied_lm_head_is_its_own(saved: Path) -> None:
    checkpoint, weights = Checkpoint.open(saved), all_weights(saved)
    assert not checkpoint.has_tied_embeddings
    assert torch.equal(checkpoint.load_embedding("float32", "cpu"), weights[EMBEDDING])
    assert torch.equal(checkpoint.load_lm_head("float32", "cpu"), weights[LM_HEAD])
    assert not torch.equal(weights[EMBEDDING], weights[LM_HEAD])


def test_a_tied_lm_head_is_the_embedding(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, "qwen3"))
    assert checkpoint.has_tied_embeddings
    assert LM_HEAD not in checkpoint.tensor_names()
    assert torch.equal(checkpoint.load_lm_head("float32", "cpu"), checkpoint.load_embedding("float32", "cpu"))


def test_an_lm_head_in_the_file_overrules_a_tied_config(copied: Path) -> None:
    """As in transformers, which does not tie what it finds twice with different values."""
    edit_json(copied / "config.json", tie_word_embeddings=True)
    lm_head = Checkpoint.open(copied).load_lm_head("float32", "cpu")
    assert torch.equal(lm_head, all_weights(copied)[LM_HEAD])


def test_the_tokenizer_is_loaded(saved: Path) -> None:
    tokenizer = Checkpoint.open(saved).load_tokenizer()
    assert tokenizer("t3 t1 t95")["input_ids"] == [3, 1, 95]
    assert tokenizer.decode([3, 1]) == "t3 t1"


def test_the_demo_is_found_by_its_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo_directory().parts[-3:] == ("flowspec", "demo", "target")
    assert demo_draft_directory() == demo_directory().parent / "draft"
    monkeypatch.setattr(loader, "demo_directory", lambda: saved)
    assert Checkpoint.open("demo").vocab_size == VOCAB_SIZE
    monkeypatch.setattr(loader, "demo_directory", lambda: tmp_path)
    with pytest.raises(ModelError, match="reinstall flowspec"):
        Checkpoint.open("demo")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model_type is 'gpt2'.*Llama, Mistral, Qwen2, Qwen3"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised by 'hqq'"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'; it must be a whole number"),
        ({"model_type": None}, "model_type is None"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(copied: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(copied / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(copied)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_broken_config_file_is_named(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json (is no JSON file|holds no JSON object)"):
        Checkpoint.open(copied)


def test_what_is_no_model_directory_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    for name in (tmp_path / "missing", str(tmp_path / "missing"), "./missing", "a/b/c"):
        with pytest.raises(ModelError, match=r"is not a directory; give a model's directory, a hub name"):
            Checkpoint.open(name)


def test_a_missing_tokenizer_is_said_so(copied: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    with pytest.raises(ModelError, match=r"tokenizer cannot be loaded .*tokenizer\.json"):
        Checkpoint.open(copied).load_tokenizer()


def test_a_missing_shard_is_named(copied: Path) -> None:
    checkpoint = Checkpoint.open(copied)
    shard = checkpoint.shard_of(LM_HEAD)
    (copied / shard).unlink()
    with pytest.raises(ModelError, match=f"{shard} is missing"):
        checkpoint.load_lm_head("float32", "cpu")


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.99])
def test_a_truncated_shard_is_named(copied: Path, keep: float) -> None:
    checkpoint = Checkpoint.open(copied)
    path = copied / checkpoint.shard_of(LM_HEAD)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(ModelError, match=f"{path.name} is truncated or damaged"):
        checkpoint.load_lm_head("float32", "cpu")


def test_a_single_file_that_is_truncated_is_named(single: Path) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or damaged"):
        Checkpoint.open(single).tensor_names()


def test_a_tensor_that_its_shard_lacks_is_named(copied: Path) -> None:
    checkpoint = Checkpoint.open(copied)
    shard = checkpoint.shard_of(LM_HEAD)
    save_file({"other": torch.zeros(1)}, copied / shard)
    with pytest.raises(ModelError, match=rf"{shard}: tensor lm_head\.weight cannot be read"):
        checkpoint.load_lm_head("float32", "cpu")


def test_tensors_that_are_no_floats_are_refused(single: Path) -> None:
    path = single / "model.safetensors"
    save_file(load_file(path) | {LM_HEAD: torch.zeros(VOCAB_SIZE, 32, dtype=torch.int8)}, path)
    with pytest.raises(ModelError, match=r"model\.safetensors: tensor lm_head.weight has type torch.int8"):
        Checkpoint.open(single).load_lm_head("float32", "cpu")


def test_a_vocabulary_matrix_of_the_wrong_size_is_refused(single: Path) -> None:
    path = single / "model.safetensors"
    save_file(load_file(path) | {LM_HEAD: torch.zeros(VOCAB_SIZE - 1, 32)}, path)
    with pytest.raises(ModelError, match=rf"shape \({VOCAB_SIZE - 1}, 32\).* asks for \({VOCAB_SIZE}, 32\)"):
        Checkpoint.open(single).load_lm_head("float32", "cpu")


def test_a_directory_without_safetensors_is_said_so(copied: Path) -> None:
    index = copied / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ModelError, match="no weight_map"):
        Checkpoint.open(copied).tensor_names()
    index.unlink()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Checkpoint.open(copied).tensor_names()


class FakeHub:
    """Serves the files of one directory as one repository, and remembers which were asked for."""

    def __init__(self, directory: Path, missing: type[Exception] = EntryNotFoundError) -> None:
        self.directory = directory
        self.missing = missing
        self.fetched: list[str] = []

    def __call__(self, repository: str, filename: str, **options: object) -> str:
        self.fetched.append(filename)
        path = self.directory / filename
        if not path.is_file():
            raise self.missing(f"no {filename} in {repository}")
        return str(path)


def test_a_hub_name_fetches_only_what_is_used(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(saved)
    monkeypatch.setattr(hub, "hf_hub_download", fake)
    checkpoint = Checkpoint.open("owner/model")
    assert fake.fetched == ["config.json"]
    checkpoint.load_embedding("float32", "cpu")
    shard = checkpoint.shard_of(EMBEDDING)
    assert fake.fetched == ["config.json", "model.safetensors", "model.safetensors.index.json", shard]
    in_shard = [name for name in checkpoint.tensor_names() if checkpoint.shard_of(name) == shard]
    assert len([*checkpoint.tensors(in_shard, "float32", "cpu")]) > 1
    assert all(checkpoint.stored(name) for name in in_shard)
    assert fake.fetched.count(shard) == 1, "a hub is asked once, however many tensors a file has"
    assert checkpoint.eos_token_ids == frozenset()


def test_files_that_the_hub_does_not_have_are_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in (EntryNotFoundError, LocalEntryNotFoundError):
        monkeypatch.setattr(hub, "hf_hub_download", FakeHub(saved, missing))
        with pytest.raises(ModelError, match=r"owner/model: other\.json is missing"):
            Checkpoint.open("owner/model").path("other.json")


def test_a_hub_name_that_is_not_reachable_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"the hub cannot be reached; connect once .* directory of a downloaded model"):
        Checkpoint.open("flowspec/no-such-model")


def test_a_hub_that_refuses_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repository: str, filename: str, **options: object) -> str:
        raise OSError("401 Unauthorized\nand a long page")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(ModelError, match=r"does not give it \(401 Unauthorized\); check the name"):
        Checkpoint.open("owner/model")


def test_the_memory_benchmark_runs() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "stage_memory.py"
    spec = importlib.util.spec_from_file_location("stage_memory", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    stage, whole = benchmark.run(small=True)["rows"]
    assert (stage["layers"], whole["layers"]) == ("0:2", "whole model")
    assert 0 < stage["weights_bytes"] < whole["weights_bytes"]
    assert all(row["peak_rss_bytes"] >= row["anonymous_bytes"] > 0 for row in (stage, whole))
