"""DFlash heads: the published arithmetic, every published form, and a clear word for all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flowspec.errors import ModelError
from flowspec.model.dflash_format import DFlashFormat
from flowspec.model.dflash_head import DFlashHead
from flowspec.model.draft_files import DraftFiles
from flowspec.model.head_kind import kind_of
from tiny_dflash import LAYERS, MASK, TAPPED, TARGET, VOCAB, DFlashForm, Reference, write_dflash

FORMS = (
    DFlashForm(),
    DFlashForm("z-lab-nested", block_size=5, num_layers=1, tapped=(3,)),
    DFlashForm("speculators", num_draft=40),
    DFlashForm("speculators", num_layers=3, tapped=(4, 1), samples_anchor=True, own_embedding=True),
    DFlashForm(window=6),
    DFlashForm(window=12, is_causal=False),
    DFlashForm("speculators", window=6),
    DFlashForm("speculators", window=9, is_causal=False),
)
SIZES = (LAYERS, TARGET, VOCAB)


def read(directory: Path, draft_layers: tuple[int, ...] | None = None) -> DFlashFormat:
    files = DraftFiles(directory)
    assert kind_of(files) == "dflash"
    return DFlashFormat.read(files, *SIZES, draft_layers)


@pytest.mark.parametrize(
    "form", FORMS, ids=lambda form: f"{form.dialect}-{form.num_levels}-{form.window}-{form.is_causal}"
)
@pytest.mark.parametrize("cuts", [(), (1,), (4, 9)])
def test_a_block_guesses_as_the_paper_says_however_the_text_came(
    tmp_path: Path, form: DFlashForm, cuts: tuple[int, ...]
) -> None:
    weights, generator = write_dflash(tmp_path, form), torch.Generator().manual_seed(5)
    embedding, lm_head = (torch.randn(VOCAB, TARGET, generator=generator) for _ in range(2))
    streams = [torch.randn(13, TARGET, generator=generator) for _ in form.tapped]
    found = read(tmp_path)
    assert found.layer_ids == form.tapped and found.num_levels == form.num_levels
    head = DFlashHead.load(found, embedding, "float32", "cpu")
    blocks = [found.block(layer, torch.float32) for layer in found.layer_ids]
    sums = torch.stack([rows @ block.T for rows, block in zip(streams, blocks, strict=True)]).sum(0)
    cache = head.open_cache()
    for part in torch.tensor_split(sums, cuts):
        head.read(part, cache)
        head.guess(3, cache)  # leaves nothing behind
    few = head.guess(7, cache) @ weights.get("lm_head.weight", lm_head).T
    expected = Reference(form, weights, embedding, lm_head).logits(streams, 7)
    ids = found.token_ids(VOCAB)
    assert torch.allclose(few, expected if ids is None else expected[:, ids], atol=1e-4)


def test_the_text_has_room_beyond_what_there_was_at_first(tmp_path: Path) -> None:
    form, generator = DFlashForm(), torch.Generator().manual_seed(6)
    write_dflash(tmp_path, form)
    head = DFlashHead.load(read(tmp_path), torch.randn(VOCAB, TARGET, generator=generator), "float32", "cpu")
    sums, caches = torch.randn(700, TARGET, generator=generator), (head.open_cache(), head.open_cache())
    head.read(sums, caches[0])
    for part in sums.split(90):
        head.read(part, caches[1])
    assert torch.allclose(head.guess(7, caches[0]), head.guess(7, caches[1]), atol=1e-5)


def test_a_head_that_does_not_say_reads_the_layers_that_its_authors_choose(tmp_path: Path) -> None:
    write_dflash(tmp_path, DFlashForm(num_layers=3, config={"dflash_config": {"mask_token_id": MASK}}))
    files = DraftFiles(tmp_path)
    # Outputs 1, 2, 3 of six layers: from the second layer to the last but two.
    assert DFlashFormat.read(files, *SIZES).layer_ids == (2, 3, 4)
    assert read(tmp_path, (1, 2, 6)).layer_ids == (1, 2, 6)


@pytest.mark.parametrize(
    ("config", "more", "problem"),
    [
        ({}, {"mask_embedding": torch.zeros(TARGET)}, "has unknown tensors mask_embedding"),
        ({"speculators_model_type": "mtp"}, {}, "of the kind 'mtp'"),
        ({}, {"mtp__fc__weight": torch.zeros(2)}, "of the kind 'mtp'"),
        ({}, {"model__layers__6__eh_proj__weight": torch.zeros(2)}, "of the kind 'mtp'"),
        ({}, {"gru__weight": torch.zeros(2)}, "has unknown tensors gru.weight"),
        ({}, {"layers__0__self_attn__q_proj__bias": torch.zeros(32)}, r"unknown tensors layers\.0\.self_attn"),
        ({"block_size": None}, {}, "block_size is missing"),
        ({"block_size": 2}, {}, "so a block guesses one token"),
        ({"block_size": 1}, {}, "block_size is 1; it must be a whole number in 2..256"),
        ({"dflash_config": {"target_layer_ids": [0, 2, 4], "mask_token_id": VOCAB}}, {}, "mask_token_id is 96"),
        ({"causal": "yes"}, {}, "causal is 'yes'; it must be true or false"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, {}, "reads 3 layers of the target, but 2"),
        ({"num_target_layers": 36}, {}, "is for a target with 36 layers, this one has 6"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, {}, "attention slides, but sliding_window and"),
        ({"hidden_size": 64}, {}, r"fc.weight has shape \[32, 96\]"),
        ({"vocab_size": 97}, {}, "a vocabulary of 97, the target of 96"),
        ({"input_embedding_scale": "x"}, {}, "input_embedding_scale is 'x'"),
    ],
)  # fmt: skip
def test_what_is_no_head_for_this_target_is_said(
    tmp_path: Path, config: dict[str, Any], more: dict[str, torch.Tensor], problem: str
) -> None:
    write_dflash(tmp_path, DFlashForm(config=config), 1, **more)
    with pytest.raises(ModelError, match=problem):
        DFlashHead.load(read(tmp_path), torch.zeros(VOCAB, TARGET), "float32", "cpu")


def test_a_missing_tensor_is_said(tmp_path: Path) -> None:
    form = DFlashForm(num_layers=1, tapped=TAPPED)
    weights = write_dflash(tmp_path, form)
    save_file({n: w for n, w in weights.items() if "k_norm" not in n}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks layers\.0\.self_attn\.k_norm\.weight; this is no DFlash head"):
        DFlashHead.load(read(tmp_path), torch.zeros(VOCAB, TARGET), "float32", "cpu")
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 1
