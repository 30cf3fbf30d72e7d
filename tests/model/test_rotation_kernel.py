"""By how much heads turn: as nearly as float32 has it, and as transformers turns them."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flowspec.model.forward_rows import frequencies_of
from flowspec.model.rotation_kernel import rotations

POSITIONS = np.concatenate([np.arange(3000), np.random.default_rng(0).integers(3000, 1_000_000, 3000)])
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 1e6}


def rotary_of(**settings: object) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=512, num_attention_heads=8, **settings))  # type: ignore[arg-type]


def test_cosines_and_sines_are_the_nearest_ones() -> None:
    frequencies = rotary_of().inv_freq.numpy()
    found = rotations(POSITIONS, frequencies, np.float32(1))
    angles = (POSITIONS.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    for turned, wanted in zip(found, (np.cos(angles), np.sin(angles)), strict=True):
        assert np.array_equal(turned[:, :32], turned[:, 32:])
        off = turned[:, :32] != wanted.astype(np.float32)
        assert off.sum() < 3, "but for what lies between two floats, within the error of the system's"
        assert np.abs(turned[:, :32] - wanted).max() < 2**-24


def test_heads_turn_as_transformers_turns_them() -> None:
    for rotary in (rotary_of(), rotary_of(rope_scaling=YARN)):
        wanted = rotary(torch.empty(0), torch.from_numpy(POSITIONS[:3000])[None])
        (turns,) = frequencies_of(rotary, ["full_attention"]).values()
        for turned, other in zip(rotations(POSITIONS[:3000], *turns), wanted, strict=True):
            assert np.abs(turned - other[0].numpy()).max() < 2e-7
