"""DSpark heads: the published arithmetic, every published form, and a clear word for all others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flowspec.errors import ModelError
from flowspec.model.draft_files import DraftFiles
from flowspec.model.dspark_format import DSparkFormat
from flowspec.model.dspark_head import DSparkHead
from flowspec.model.head_kind import kind_of
from tiny_dspark import DSparkForm, Reference, write_dspark
from tiny_eagle3 import LAYERS, TARGET, VOCAB

FORMS = {
    "speculators": DSparkForm(),
    "speculators, few tokens": DSparkForm(num_draft=40, own_embedding=True),
    "speculators, a first row that guesses nothing": DSparkForm(samples_anchor=False),
    "specforge": DSparkForm("specforge", num_layers=1, tapped=(3,)),
    "deepspec": DSparkForm("deepspec", block_size=7),
    "deepspec's DFlash": DSparkForm("deepspec", rank=0, confidence="none"),
    "gated": DSparkForm(variant="gated", confidence="row"),
    "recurrent": DSparkForm("specforge", variant="rnn", confidence="none"),
    "no Markov head": DSparkForm(rank=0, confidence="row"),
}


def read(directory: Path) -> DSparkFormat:
    files = DraftFiles(directory)
    assert kind_of(files) == "dspark"
    return DSparkFormat.read(files, LAYERS, TARGET, VOCAB)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_guesses_behind_a_chain_are_those_of_the_paper(tmp_path: Path, form: DSparkForm) -> None:
    weights, generator = write_dspark(tmp_path, form), torch.Generator().manual_seed(5)
    embedding, lm_head = (torch.randn(VOCAB, TARGET, generator=generator) for _ in range(2))
    streams = [torch.randn(13, TARGET, generator=generator) for _ in form.tapped]
    found = read(tmp_path)
    assert found.layer_ids == form.tapped and found.num_levels == form.num_levels
    head = DSparkHead.load(found, embedding, "float32", "cpu")
    assert isinstance(head, DSparkHead)
    cache = head.open_cache()
    blocks = [found.block(layer, torch.float32) for layer in found.layer_ids]
    head.read(torch.stack([rows @ block.T for rows, block in zip(streams, blocks, strict=True)]).sum(0), cache)
    path = torch.randint(0, VOCAB, (form.num_levels,), generator=generator).tolist()
    rows, states = head.guess(path[0], cache), head.first_states(1)
    reference, ids = Reference(form, weights, embedding, lm_head), found.token_ids(VOCAB)
    for level in range(form.num_levels):
        latents, states, rates = head.behind(rows[level : level + 1], torch.tensor([path[level]]), states)
        few = rows[level] @ weights.get("lm_head.weight", lm_head).T + (_added(head, latents[0]) if form.rank else 0)
        logits, rate = reference.behind(streams, path[: level + 1])
        assert torch.allclose(few, logits if ids is None else logits[ids], atol=1e-4)
        assert float(rates) == pytest.approx(math.log(rate), abs=1e-4)


def _added(head: DSparkHead, latent: torch.Tensor) -> torch.Tensor:
    assert head.markov_head is not None
    return head.markov_head.markov_w2(latent)


def test_older_files_of_specforge_hold_the_heads_in_a_wrapper(tmp_path: Path) -> None:
    form = DSparkForm("specforge")
    plain = write_dspark(tmp_path / "plain", form)
    wrapped = {f"logit_head.{name}": tensor for name, tensor in plain.items() if name.startswith(("markov", "conf"))}
    bare = DSparkForm("specforge", rank=0, confidence="none", config=_heads_of(form))
    write_dspark(tmp_path / "old", bare, 1, **wrapped)
    assert read(tmp_path / "old").rank == form.rank and read(tmp_path / "old").has_confidence


def _heads_of(form: DSparkForm) -> dict[str, Any]:
    from tiny_dspark import make_config

    return {"dflash_config": make_config(form)["dflash_config"]}


@pytest.mark.parametrize(
    ("form", "more", "problem"),
    [
        (DSparkForm(config={"markov_rank": 8}), {}, "markov_rank is 8, but by the tensors in .* it is 16"),
        (DSparkForm(config={"markov_head_type": "gated"}), {}, "markov_head_type is 'gated', but .* it is 'vanilla'"),
        (DSparkForm(config={"enable_confidence_head": False}), {}, "enable_confidence_head is False"),
        (DSparkForm("specforge", variant="gated", config={}), {"markov_head__joint_proj__weight": torch.zeros(2)},
         "has unknown tensors markov_head.joint_proj.weight"),
        (DSparkForm(confidence="row", config={"confidence_head_with_markov": True}), {}, "confidence_head_with_markov"),
        (DSparkForm(), {"markov_head__markov_w1__weight": torch.zeros(90, 16)}, r"but \[96, 16\] is needed"),
        (DSparkForm(num_draft=40), {"markov_head__markov_w2__weight": torch.zeros(96, 16)}, r"but \[40, 16\] is"),
        (DSparkForm(), {"confidence_head__proj__weight": torch.zeros(1, 50)}, r"but \[1, 48\] is needed"),
        (DSparkForm(), {"confidence_head__extra__weight": torch.zeros(1)}, "unknown tensors confidence_head.extra"),
        (DSparkForm(variant="rnn", samples_anchor=False), {}, "recurrent Markov head and rows that guess"),
        (DSparkForm(config={"mask_token_id": None}), {}, "mask_token_id is missing"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_said(
    tmp_path: Path, form: DSparkForm, more: dict[str, torch.Tensor], problem: str
) -> None:
    write_dspark(tmp_path, form, 1, **more)
    with pytest.raises(ModelError, match=problem):
        DSparkHead.load(read(tmp_path), torch.zeros(VOCAB, TARGET), "float32", "cpu")


def test_a_matrix_that_is_missing_is_said(tmp_path: Path) -> None:
    write_dspark(
        tmp_path, DSparkForm(rank=0, confidence="none"), 1, markov_head__markov_w2__weight=torch.zeros(VOCAB, 16)
    )
    with pytest.raises(ModelError, match=r"lacks markov_head\.markov_w1\.weight; this is no DSpark head"):
        read(tmp_path)
