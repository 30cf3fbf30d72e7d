"""What depends on the family: the types of its layers, and what cannot be a stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flowspec.core import LayerRange, SamplingParams
from flowspec.errors import ModelError
from flowspec.model.families import FAMILIES, FULL, SLIDING
from flowspec.model.loader import Checkpoint
from flowspec.model.torch_stage import TorchStage
from pump import Pump, prompt_of
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
    assert types("phi3") == [SLIDING] * 6
    assert types("smollm3", use_sliding_window=True, sliding_window=8) == [FULL, SLIDING] * 3
    assert types("granite") == [FULL] * 6
    assert types("mixtral") == types("qwen3_moe", use_sliding_window=True, sliding_window=8) == [SLIDING] * 6
    assert types("mixtral", sliding_window=None) == types("qwen3_moe") == [FULL] * 6


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_scalings_that_depend_on_the_length_are_refused(rope_type: str, tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if rope_type == "longrope" else {}
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    make_checkpoint(tmp_path, "llama", rope_parameters=rope | factors)
    with pytest.raises(ModelError, match=f"'{rope_type}' depends on the length"):
        TorchStage.load(Checkpoint.open(tmp_path), LayerRange(0, 6), "float32", "cpu")


def test_texts_end_before_other_frequencies_begin(checkpoint_dir: Callable[[str], Path]) -> None:
    """Of a model that has some for short texts and some for long ones; trees reach beyond the end of the text."""
    checkpoint = Checkpoint.open(checkpoint_dir("phi3"))
    assert (checkpoint.config.max_position_embeddings, checkpoint.max_positions) == (256, 128)
    prompt = prompt_of(112)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint_dir("phi3"), dtype=torch.float32)
    mask = torch.ones(1, len(prompt))
    wanted = model.generate(torch.tensor([prompt]), attention_mask=mask, max_new_tokens=16, do_sample=False)
    pump = Pump(checkpoint_dir("phi3"), 3, "eagle", "flow")
    generation = pump.submit(prompt, SamplingParams(max_tokens=16))
    pump.run()
    assert generation.output_ids == wanted[0, 112:].tolist()


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("phi3", "rope_parameters", {"partial_rotary_factor": 1.5}),
        ("phi3", "rope_parameters", {"rope_type": "longrope", "short_factor": [1.0]}),
        ("granite", "logits_scaling", 0),
        ("granite", "embedding_multiplier", "12"),
        ("smollm3", "no_rope_layers", [1, 0]),
        ("qwen3_moe", "num_experts_per_tok", 9),
        ("qwen3_moe", "num_experts_per_tok", 0),
        ("qwen3_moe", "num_local_experts", 16),
        ("qwen3_moe", "mlp_only_layers", [1, 3]),
        ("qwen3_moe", "mlp_only_layers", "1"),
        ("mixtral", "num_local_experts", 2),
        ("mixtral", "intermediate_size", 32),
    ],
)
def test_odd_traits_of_a_family_are_one_line(family: str, field: str, value: Any, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, family)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ModelError) as raised:
        TorchStage.load(Checkpoint.open(tmp_path), LayerRange(0, 6), "float32", "cpu")
    assert "\n" not in str(raised.value) and "config" in str(raised.value)
