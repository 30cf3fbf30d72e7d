"""P-EAGLE heads: the published arithmetic, every published form, and a clear word for all others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowspec.errors import ModelError
from flowspec.model.draft_files import DraftFiles
from flowspec.model.head_kind import kind_of
from flowspec.model.peagle_format import PEagleFormat
from flowspec.model.peagle_head import PEagleHead
from flowspec.model.taps import Taps, TapSum, TorchLinear
from tiny_eagle3 import LAYERS, TARGET, VOCAB, Eagle3Form, write_eagle3
from tiny_peagle import PEagleForm, Reference, make_config, write_peagle

FORMS = {
    "speculators": PEagleForm(num_levels=5),
    "speculators, four layers and few tokens": PEagleForm(num_layers=4, num_draft=40),
    "speculators, 3.1": PEagleForm(fc_norm=True, norm_output=True, norm_before_residual=True),
    "speculators, normed together": PEagleForm(norm_before_fc=True, num_layers=1, head_norms=True, head_dim=16),
    "specforge": PEagleForm("specforge", tapped=(4, 0, 2)),
    "amazon": PEagleForm("amazon", biases=True, fc_bias=True),
}


def read(directory: Path) -> PEagleFormat:
    files = DraftFiles(directory)
    assert kind_of(files) == "peagle"
    return PEagleFormat.read(files, LAYERS, TARGET, VOCAB)


def sums_of(form: PEagleFormat, streams: list[Tensor]) -> Tensor:
    blocks = {layer: TorchLinear(form.block(layer, torch.float32), "cpu") for layer in form.layer_ids}
    total = TapSum(Taps(form.taps, blocks, torch.float32, False), None)
    for layer in form.taps.layers:
        total(layer, streams[form.layer_ids.index(layer)])
    assert total.total is not None
    return total.total


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("cuts", [(), (1,), (19, 20, 22)])
def test_a_pass_guesses_as_the_paper_says_however_the_text_came(
    tmp_path: Path, form: PEagleForm, cuts: tuple[int, ...]
) -> None:
    """Few rows wait for the next guess, many are run at once; and rows of masks leave nothing behind."""
    weights, generator = write_peagle(tmp_path, form), torch.Generator().manual_seed(5)
    embedding, lm_head = (torch.randn(VOCAB, TARGET, generator=generator) for _ in range(2))
    streams = [torch.randn(23, TARGET, generator=generator) for _ in form.tapped]
    next_ids = torch.randint(0, VOCAB, (23,), generator=generator).tolist()
    found = read(tmp_path)
    assert found.num_levels == form.num_levels
    head = PEagleHead.load(found, embedding, "float32", "cpu")
    cache, start = head.open_cache(), 0
    for part in torch.tensor_split(sums_of(found, streams), cuts):
        end = start + len(part)
        head.read(part, cache, next_ids[start:end])
        few = head.guess(next_ids[end - 1], cache) @ weights["lm_head.weight"].T
        reference = Reference(form, weights, embedding, lm_head)
        expected = reference.guesses([rows[:end] for rows in streams], next_ids[:end])
        ids = found.token_ids(VOCAB)
        assert torch.allclose(few, expected if ids is None else expected[:, ids], atol=1e-4)
        start = end


def test_a_text_that_was_cut_goes_on_with_another_token(tmp_path: Path) -> None:
    form, generator = PEagleForm(), torch.Generator().manual_seed(6)
    weights = write_peagle(tmp_path, form)
    embedding = torch.randn(VOCAB, TARGET, generator=generator)
    streams = [torch.randn(40, TARGET, generator=generator) for _ in form.tapped]
    next_ids = torch.randint(0, VOCAB, (40,), generator=generator).tolist()
    found = read(tmp_path)
    head, sums = PEagleHead.load(found, embedding, "float32", "cpu"), sums_of(found, streams)
    cache = head.open_cache()
    head.read(sums[:30], cache, next_ids[:30])
    head.guess(next_ids[29], cache)
    cache.cut(12, 7)
    assert cache.num_rows == 12
    head.read(sums[30:], cache, next_ids[30:])
    kept = [torch.cat([rows[:12], rows[30:]]) for rows in streams]
    expected = Reference(form, weights, embedding, embedding).guesses(kept, [*next_ids[:11], 7, *next_ids[30:]])
    guesses = head.guess(next_ids[-1], cache) @ weights["lm_head.weight"].T
    assert torch.allclose(guesses, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "more", "problem"),
    [
        (PEagleForm(config={"mask_token_id": None}), {}, "mask_token_id is missing; it must be a token of the target"),
        (PEagleForm("amazon", config={"ptd_token_id": VOCAB}), {}, "mask_token_id is 96"),
        (PEagleForm(num_levels=1), {}, "speculative_tokens is 1; it must be a whole number in 2..64"),
        (PEagleForm(), {"mask_hidden": torch.zeros(1, 1, 64)}, r"mask_hidden has shape \[1, 1, 64\], but \[1, 1, 96\]"),
        (PEagleForm(), {"gate__weight": torch.zeros(2)}, r"has unknown tensors gate\.weight"),
        (PEagleForm(config={"norm_before_residual": None}), {}, "does not say norm_before_residual"),
        (PEagleForm(config={"fc_norm": True}), {}, r"lacks fc_norm\.0\.weight"),
    ],
)
def test_what_is_no_head_for_this_target_is_said(
    tmp_path: Path, form: PEagleForm, more: dict[str, Tensor], problem: str
) -> None:
    write_peagle(tmp_path, form, 1, **more)
    with pytest.raises(ModelError, match=problem):
        PEagleHead.load(read(tmp_path), torch.zeros(VOCAB, TARGET), "float32", "cpu")


def test_a_head_without_its_masks_is_said(tmp_path: Path) -> None:
    write_eagle3(tmp_path, Eagle3Form("speculators", num_draft=None, config=make_config(PEagleForm())))
    with pytest.raises(ModelError, match="lacks mask_hidden; this is no P-EAGLE head"):
        read(tmp_path)
