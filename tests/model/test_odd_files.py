"""Model directories that say something odd: one line that names the file, no traceback, and nothing large is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowspec import LLM
from flowspec.core import LayerRange
from flowspec.errors import FlowspecError, ModelError
from flowspec.model.backends import load_stage
from flowspec.model.loader import Checkpoint
from flowspec.model.stage_weights import bare_model

SIZES = ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "intermediate_size")
INDEX = "model.safetensors.index.json"
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name} {value!r}": ("config.json", {name: value}) for name in SIZES for value in (0, -3, 10**9, "8", 2.5)},
    **{
        f"{name} {value!r}": ("config.json", {name: value})
        for name, value in (
            ("num_hidden_layers", None),
            ("num_hidden_layers", True),
            ("num_key_value_heads", 3),
            ("num_key_value_heads", -1),
            ("head_dim", 0),
            ("head_dim", 7),
            ("rms_norm_eps", "small"),
            ("rms_norm_eps", -1.0),
            ("rope_parameters", "llama3"),
            ("rope_parameters", {"rope_type": "llama3", "factor": "8"}),
            ("rope_parameters", {"rope_type": "yarn"}),
            ("rope_parameters", {"rope_type": 5}),
            ("rope_parameters", {"rope_type": "linear", "rope_theta": 0.0}),
            ("max_position_embeddings", -1),
            ("max_position_embeddings", "many"),
            ("hidden_act", "no such"),
            ("hidden_act", 5),
            ("tie_word_embeddings", "yes"),
            ("attention_bias", 3),
            ("eos_token_id", "x"),
            ("eos_token_id", {"a": 1}),
            ("model_type", ["llama"]),
            ("layer_types", 5),
            ("dtype", 5),
        )
    },
    "index to the folder above": (INDEX, {"weight_map": {"lm_head.weight": "../x.safetensors"}}),
    "index to another place": (INDEX, {"weight_map": {"lm_head.weight": "/etc/passwd"}}),
    "index to no text": (INDEX, {"weight_map": {"lm_head.weight": 5}}),
    "index of nothing": (INDEX, {"weight_map": {}}),
    "index that is a list": (INDEX, {"weight_map": []}),
    "temperature": ("generation_config.json", {"temperature": "hot", "do_sample": True}),
    "top_k": ("generation_config.json", {"top_k": [5], "do_sample": True}),
    "generation eos": ("generation_config.json", {"eos_token_id": ["a"]}),
    "tokenizer model": ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": 5}}),
    "tokenizer of another version": ("tokenizer.json", {"version": 7}),
    "tokenizer pattern": ("tokenizer.json", {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}),
    "tokenizer class": ("tokenizer_config.json", {"tokenizer_class": 5}),
    "added tokens": ("tokenizer_config.json", {"added_tokens_decoder": {"x": 5}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def copied(checkpoint_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(checkpoint_dir("llama"), tmp_path_factory.mktemp("odd") / "model"))


def load_all(directory: Path) -> None:
    """What a driver and a worker read of a model."""
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.sampling_defaults is not None and checkpoint.all_eos_token_ids is not None
    assert checkpoint.max_positions > 0
    checkpoint.load_tokenizer()
    checkpoint.load_lm_head("float32", "cpu")
    load_stage(checkpoint, LayerRange(0, 6), "float32", "float", "cpu")


@pytest.mark.parametrize(("filename", "changes"), ODD.values(), ids=list(ODD))
def test_odd_values_are_one_line(copied: Path, filename: str, changes: dict[str, Any]) -> None:
    path = copied / filename
    original = path.read_bytes()
    path.write_text(json.dumps(json.loads(original) | changes))
    try:
        with pytest.raises(FlowspecError) as raised:
            load_all(copied)
    finally:
        path.write_bytes(original)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700


BROKEN = {"not JSON": b"{", "a list": b"[]", "not UTF-8": b"\xff\xfe{}", "empty": b"", "deep": b"[" * 100_000}
FILES = ("config.json", "generation_config.json", INDEX, "tokenizer.json")


@pytest.mark.parametrize("filename", FILES)
@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_broken_files_are_one_line(copied: Path, filename: str, content: bytes) -> None:
    original = (copied / filename).read_bytes()
    (copied / filename).write_bytes(content)
    try:
        with pytest.raises(ModelError) as raised:
            load_all(copied)
    finally:
        (copied / filename).write_bytes(original)
    assert "\n" not in str(raised.value)


DRAFT_ODD: tuple[dict[str, Any], ...] = (
    *({name: value} for name in SIZES for value in (0, -3, 10**9, "8")),
    {"rope_scaling": 5},
    {"rope_parameters": {"rope_type": "llama3"}},
    {"hidden_act": []},
    {"rms_norm_eps": None},
    {"num_key_value_heads": 3},
    {"hit_rates": "often"},
    {"hit_rates": [2.0, -1.0, "x"]},
)


@pytest.mark.parametrize("changes", DRAFT_ODD, ids=str)
def test_odd_drafts_are_one_line_or_serve(copied: Path, changes: dict[str, Any]) -> None:
    path = copied / "draft" / "config.json"
    original = path.read_bytes()
    path.write_text(json.dumps(json.loads(original) | changes))
    try:
        told = load_with_draft(copied)
    finally:
        path.write_bytes(original)
    assert "\n" not in told and ("draft" in told or not told)


def load_with_draft(directory: Path) -> str:
    """The error, or nothing."""
    try:
        with LLM(directory, stages=1, in_process=True, draft=directory / "draft") as llm:
            assert llm.engine.model.source is not None
    except FlowspecError as error:
        return str(error)
    return ""


def test_a_model_never_runs_code_of_its_own(copied: Path) -> None:
    """transformers would ask at the terminal whether it may, and run it."""
    (copied / "code.py").write_text("raise SystemExit('code of the model has run')\n")
    auto = {"AutoConfig": "code.X", "AutoModelForCausalLM": "code.X", "AutoTokenizer": ["code.X", "code.X"]}
    for filename in ("config.json", "tokenizer_config.json"):
        path = copied / filename
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto}))
    load_all(copied)
    bare_model(Checkpoint.open(copied).config, "sdpa")
