"""Which models a fingerprint tells apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flowspec.core import LayerRange
from flowspec.errors import ModelError
from flowspec.model.backends import open_checkpoint
from flowspec.model.fingerprint import fingerprint
from flowspec.model.tensor_files import stored_tensors
from tiny_gguf import write_gguf
from tiny_models import make_checkpoint

STAGE = LayerRange(2, 4)


def test_copies_are_alike_and_other_weights_of_the_same_shape_are_not(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = checkpoint_dir("llama")
    copy = shutil.copytree(directory, tmp_path / "copy")
    other = make_checkpoint(tmp_path / "other", "llama", seed=7)
    own = fingerprint(open_checkpoint(directory), STAGE)
    assert own == fingerprint(open_checkpoint(copy), STAGE) != fingerprint(open_checkpoint(other), STAGE)
    assert own != fingerprint(open_checkpoint(directory), LayerRange(0, 2))


def test_another_config_over_the_same_tensors_is_another_model(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = checkpoint_dir("llama")
    copy = shutil.copytree(directory, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))
    assert fingerprint(open_checkpoint(directory), STAGE) != fingerprint(open_checkpoint(copy), STAGE)


def test_a_directory_without_the_stages_files_tells_nothing(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint_dir("llama"), tmp_path / "copy")
    checkpoint = open_checkpoint(copy)
    (copy / checkpoint.shard_of("model.layers.2.mlp.up_proj.weight")).unlink()
    assert fingerprint(checkpoint, STAGE) == ""


def test_gguf_files_are_told_apart(tmp_path: Path) -> None:
    for name, seed in (("own", 1), ("copy", 1), ("other", 2)):
        write_gguf(tmp_path / f"{name}.gguf", seed=seed)
    own, copy, other = (
        fingerprint(open_checkpoint(tmp_path / f"{name}.gguf"), STAGE) for name in ("own", "copy", "other")
    )
    assert own == copy != other


def test_a_damaged_header_is_an_error(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 40, (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b'{"a":{}}}'):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="truncated or damaged"):
            stored_tensors(tmp_path / "model.safetensors")
