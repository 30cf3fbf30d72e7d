"""What depends on the family: the types of its layers, and what cannot be a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowspec.core import LayerRange
from flowspec.errors import ModelError
from flowspec.model.families import FAMILIES, FULL, SLIDING
from flowspec.model.loader import Checkpoint
from flowspec.model.torch_stage import TorchStage
from tiny_models import make_checkpoint


def test_layer_types_follow_each_familys_own_rule(tmp_path: Path) -> None:
    def types(family: str, **overrides: Any) -> list[str]:
        name = f"{family}{len(list(tmp_path.iterdir()))}"
        config = Checkpoint.open(make_checkpoint(tmp_path / name, family, **overrides)).config
        return FAMILIES[family].layer_types(config)

    assert types("llama") == [FULL] * 6
    assert types("mistral") == [SLIDING] * 6
    assert types("mistral", sliding_window=None) == [FULL] * 6
    assert types("qwen2") == [FULL] * 3 + [SLIDING] * 3
    assert types("qwen3") == [FULL] * 6


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_scalings_that_depend_on_the_length_are_refused(rope_type: str, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if rope_type == "longrope" else {}
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    make_checkpoint(tmp_path, "llama", rope_parameters=rope | factors)
    with pytest.raises(ModelError, match=f"'{rope_type}' depends on the length"):
        TorchStage.load(Checkpoint.open(tmp_path), LayerRange(0, 6), "float32", "cpu")
