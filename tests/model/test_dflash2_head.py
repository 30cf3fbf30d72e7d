"""DFlash2 heads: the published arithmetic, both published forms, and a clear word for all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowspec.errors import ModelError
from flowspec.model.dflash2_format import DFlash2Format
from flowspec.model.dflash2_head import DFlash2Head, ScaledHead
from flowspec.model.draft_files import DraftFiles
from flowspec.model.head_kind import kind_of
from flowspec.model.target_head import TargetHead
from tiny_dflash2 import DFlash2Form, Reference, write_dflash2
from tiny_eagle3 import LAYERS, TARGET, VOCAB

FORMS = (
    DFlash2Form(window=5, is_causal=False, num_layers=1),
    DFlash2Form("z-lab-nested", taps=3, group=4, softcap=None, multiplier=1.0),
    DFlash2Form("speculators", block_size=4, window=9),
)


def read(directory: Path) -> DFlash2Format:
    files = DraftFiles(directory)
    assert kind_of(files) == "dflash2"
    return DFlash2Format.read(files, LAYERS, TARGET, VOCAB)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.dialect)
def test_guesses_behind_a_chain_are_those_of_the_authors(tmp_path: Path, form: DFlash2Form) -> None:
    weights, generator = write_dflash2(tmp_path, form), torch.Generator().manual_seed(5)
    embedding, lm_head = (torch.randn(VOCAB, TARGET, generator=generator) for _ in range(2))
    streams = [torch.randn(13, TARGET, generator=generator) for _ in form.tapped]
    found = read(tmp_path)
    head = DFlash2Head.load(found, embedding, "float32", "cpu")
    assert isinstance(head, DFlash2Head) and found.num_levels == form.block_size - 1
    cache = head.open_cache()
    blocks = [found.block(layer, torch.float32) for layer in found.layer_ids]
    head.read(torch.stack([rows @ block.T for rows, block in zip(streams, blocks, strict=True)]).sum(0), cache)
    path = torch.randint(0, VOCAB, (found.num_levels,), generator=generator).tolist()
    rows = head.guess(path[0], cache)
    logits = ScaledHead(TargetHead(lm_head), found.output_multiplier, found.softcap).logits(rows)
    latents, _, rates = head.behind(rows, torch.tensor(path), head.first_states(len(rows)))
    assert not rates.any()
    for level in range(found.num_levels):
        expected, _ = Reference(form, weights, embedding, lm_head).behind(streams, path[: level + 1])
        few = logits[level].topk(found.num_candidates).indices
        matrix = head.weights_of(few)
        assert matrix is not None
        corrected = torch.full_like(expected, -torch.inf)
        corrected[few] = logits[level][few] + matrix @ latents[level]
        assert torch.allclose(corrected, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "more", "problem"),
    [
        ({"conv_kernel_size": 3}, {}, "conv_kernel_size is 3, but by the tensors in model.safetensors it is 2"),
        ({"conv_group_size": 16}, {}, "conv_group_size is 16, but .* it is 8"),
        ({"selector_top_k": None}, {}, "selector_top_k is missing"),
        ({"output_multiplier": -1}, {}, "output_multiplier is -1; it must be a positive number"),
        ({}, {"layers__0__attention_conv__base_kernel": torch.zeros(2)}, "convolutions or its vocabulary are no"),
        ({}, {"layers__1__mlp_conv__base_kernel": torch.zeros(2, 3, TARGET)}, r"but \[2, 2, 32\] is needed"),
        ({}, {"candidate_selector__hidden_projection__weight": torch.zeros(8, TARGET)}, r"but \[16, 32\] is needed"),
        ({}, {"gru__weight": torch.zeros(2)}, "has unknown tensors gru.weight"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_said(
    tmp_path: Path, config: dict[str, Any], more: dict[str, torch.Tensor], problem: str
) -> None:
    write_dflash2(tmp_path, DFlash2Form("speculators", config=config), 1, **more)
    with pytest.raises(ModelError, match=problem):
        DFlash2Head.load(read(tmp_path), torch.zeros(VOCAB, TARGET), "float32", "cpu")


def test_a_head_without_its_selector_is_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_dflash2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "selector" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks candidate_selector\.successor_codebook; this is no DFlash2 head"):
        read(tmp_path)
