"""EAGLE-3 heads: every published form loads, computes what the papers describe, and what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flowspec.draft.catalogue import load_draft, read_taps
from flowspec.draft.eagle import EagleSource
from flowspec.errors import ModelError, UsageError
from flowspec.model.draft_files import DraftFiles
from flowspec.model.eagle3_format import Eagle3Format
from flowspec.model.eagle3_layers import find_layer_ids
from flowspec.model.loader import Checkpoint
from flowspec.model.taps import Taps, TapSum, TorchLinear
from flowspec.model.target_head import TargetHead
from tiny_eagle3 import LAYERS, TAPPED, TARGET, VOCAB, Eagle3Form, Reference, write_eagle3
from tree_growth import check_that_a_tree_grows

FORMS = {
    "eagle": Eagle3Form(),
    "eagle, binary": Eagle3Form(binary=True),
    "full vocabulary": Eagle3Form(num_draft=None),
    "the target's lm_head": Eagle3Form(num_draft=None, own_head=False),
    "own embedding": Eagle3Form(own_embedding=True),
    "own width": Eagle3Form(size=24),
    "biases": Eagle3Form(fc_bias=True, biases=True),
    "five layers tapped, in the file's order": Eagle3Form("speculators", tapped=(4, 0, 6, 2, 3)),
    "specforge": Eagle3Form("specforge"),
    "specforge 3.1": Eagle3Form("specforge", fc_norm=True, norm_output=True),
    "speculators": Eagle3Form("speculators"),
    "speculators, normed residual": Eagle3Form("speculators", norm_before_residual=True),
    "speculators, three layers": Eagle3Form("speculators", num_layers=3),
    "speculators, qwen3": Eagle3Form("speculators", head_norms=True, head_dim=16),
    "norm_before_fc": Eagle3Form("speculators", norm_before_fc=True, fc_bias=True),
    "norm_before_fc, fed back normed": Eagle3Form("speculators", norm_before_fc=True, norm_output=True),
}


@pytest.fixture
def target(checkpoint_dir: Callable[[str], Path]) -> Path:
    return checkpoint_dir("llama")


def load(
    target: Path, directory: Path, draft_layers: tuple[int, ...] | None = None
) -> tuple[Eagle3Format, EagleSource]:
    checkpoint = Checkpoint.open(target)
    form = read_taps(directory, checkpoint, draft_layers)
    assert isinstance(form, Eagle3Format)
    head = TargetHead(checkpoint.load_lm_head("float32", "cpu"))
    source = load_draft(directory, checkpoint, head, "float32", "cpu", taps=form)
    assert isinstance(source, EagleSource)
    return form, source


def layers_of(form: Eagle3Form) -> tuple[int, ...] | None:
    """What has to be said of the tapped layers: EAGLE's own files do not."""
    return form.tapped if form.dialect == "eagle" else None


def sums_of(form: Eagle3Format, streams: tuple[Tensor, ...]) -> Tensor:
    """What stages would add up; ``streams``: as transformers' ``output_hidden_states``."""
    blocks = {layer: TorchLinear(form.block(layer, torch.float32), "cpu") for layer in form.taps.layers}
    total = TapSum(Taps(form.taps, blocks, torch.float32, is_begun=False), None)
    for layer, rows in enumerate(streams):
        total(layer, rows)
    assert total.total is not None
    return total.total


def streams_of(model: Any, token_ids: Tensor) -> tuple[Tensor, ...]:
    """[T, H] each: what enters layer 0, 1, ..., and what leaves the last one, before the norm."""
    kept: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0][0]))
    with torch.inference_mode():
        states = model.model(token_ids[None], output_hidden_states=True).hidden_states
    handle.remove()
    return (*(rows[0] for rows in states[:-1]), kept[0])


@pytest.mark.parametrize("name", FORMS)
def test_logits_are_those_of_the_published_description(target: Path, tmp_path: Path, name: str) -> None:
    """20 contexts, at the first level and at three more, where the head reads what it has put out itself."""
    form = FORMS[name]
    weights = write_eagle3(tmp_path, form)
    found, source = load(target, tmp_path, layers_of(form))
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval().requires_grad_(False)
    reference = Reference(form, weights, model.model.embed_tokens.weight, model.lm_head.weight)
    generator = torch.Generator().manual_seed(5)
    for context in range(20):
        tokens = torch.randint(VOCAB, (2 + context % 12,), generator=generator)
        streams = streams_of(model, tokens)
        features, expected = (
            source.head.features_of(sums_of(found, streams)),
            reference.fused([streams[k] for k in form.tapped]),
        )
        torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
        following = [*tokens[1:].tolist(), 7]
        for level in range(4):
            rows = torch.tensor(following)
            num = len(rows)
            mask = torch.ones(num, num, dtype=torch.bool).tril()[None, None]
            with torch.inference_mode():
                states = source.head(rows[None], features[None], torch.arange(num)[None], mask)[0]
                raw = reference.states(rows, expected)
                logits, wanted = source.lm_head.logits(states), reference.logits(raw)
            known = wanted.isfinite()
            assert torch.equal(logits.isfinite(), known)
            torch.testing.assert_close(logits[known], wanted[known], atol=1e-4, rtol=1e-4)
            features = torch.cat([features, states[-1:]])
            expected = torch.cat([expected, reference.fed_back(raw)[-1:]])
            following.append(int(wanted[-1].argmax()) if level % 2 else int(tokens[0]))


def test_a_draft_grows_its_tree_from_true_features_and_its_own(target: Path, tmp_path: Path) -> None:
    """Prompt, a pass of the root, one below it, a commit, and a pass from the new root."""
    form = Eagle3Form("specforge", fc_norm=True, norm_output=True)
    weights = write_eagle3(tmp_path, form)
    found, source = load(target, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval().requires_grad_(False)
    reference = Reference(form, weights, model.model.embed_tokens.weight, model.lm_head.weight)
    text = torch.randint(VOCAB, (9,), generator=torch.Generator().manual_seed(1))

    def read(tokens: Tensor) -> tuple[Tensor, Tensor]:
        streams = streams_of(model, tokens)
        return sums_of(found, streams), reference.fused([streams[layer] for layer in form.tapped])

    def wanted(tokens: list[int], features: Tensor) -> tuple[Tensor, Tensor]:
        """Of the last row: log-probabilities, and what is fed back."""
        states = reference.states(torch.tensor(tokens), features)
        return reference.logits(states)[-1].log_softmax(-1), reference.fed_back(states)[-1:]

    check_that_a_tree_grows(source, text, read, wanted)


# --- which layers ---


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 3], "target_layer_ids": [4]}, (1, 2, 3)),
        ({"dflash_config": {"target_layer_ids": [1, 5]}, "target_layer_ids": [4]}, (2, 6)),
        ({"dspark_target_layer_ids": [0, 11], "target_layer_ids": [4]}, (1, 12)),
        ({"target_layer_ids": [3, 1]}, (4, 2)),
        ({"eagle_config": {"layer_ids": [3, 1]}}, (3, 1)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8]}}, (2, 6, 9)),
        ({"eagle_aux_hidden_state_layer_ids": [0, 12]}, (0, 12)),
        ({}, (2, 6, 9)),
    ],
)
def test_layers_are_looked_up_in_the_order_that_others_use(
    tmp_path: Path, config: dict[str, Any], expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_layer_ids(DraftFiles(tmp_path), 12) == expected
    assert find_layer_ids(DraftFiles(tmp_path), 12, [7, 3]) == (7, 3)


@pytest.mark.parametrize(
    ("config", "num_layers", "message"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 13]}, 12, r"outside the target's 0\.\.12 \(1, 2, 13\)"),
        ({"eagle_aux_hidden_state_layer_ids": [-1, 2]}, 12, "outside"),
        ({"target_layer_ids": [12]}, 12, "outside"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 1]}, 12, "twice"),
        ({"eagle_aux_hidden_state_layer_ids": "all"}, 12, "must be a list of layers"),
        ({"eagle_aux_hidden_state_layer_ids": []}, 12, "must be a list of layers"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1.5]}}, 12, "must be a list of layers"),
        ({}, 6, "its authors' own choice names a layer twice .*--draft-layers"),
    ],
)
def test_layers_that_the_target_has_not_are_refused(
    tmp_path: Path, config: dict[str, Any], num_layers: int, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        find_layer_ids(DraftFiles(tmp_path), num_layers)


def test_the_users_layers_are_checked_too(tmp_path: Path, target: Path) -> None:
    write_eagle3(tmp_path)
    for layers in ((1, 2, 9), (1, 2, 2), ()):
        with pytest.raises(UsageError, match="draft_layers"):
            load(target, tmp_path, layers)
    with pytest.raises(ModelError, match=r"reads 3 layers of the target, but 2 are named \(1, 2\)"):
        load(target, tmp_path, (1, 2))
    with pytest.raises(UsageError, match="draft_layers are for EAGLE-3, P-EAGLE, DFlash and DSpark heads"):
        read_taps(target / "draft", Checkpoint.open(target), (1, 2, 3))


# --- what is wrong ---


def change(directory: Path, **changes: Tensor | None) -> None:
    """Replace tensors, or drop them; dots are written as double underscores."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"midlayer__hidden_norm__weight": None}, r"lacks layers\.0\.hidden_norm\.weight"),
        ({"lm_head__weight": None}, r"lacks lm_head\.weight"),
        ({"d2t": None}, "lacks d2t"),
        ({"fc__weight": None}, r"lacks fc\.weight"),
        ({"norm__weight": None}, r"lacks norm\.weight"),
        ({"midlayer__extra__weight": torch.zeros(3)}, r"unknown tensors midlayer\.extra\.weight"),
        ({"layers__2__mlp__up_proj__weight": torch.zeros(3)}, "layers count from 0"),
        ({"layers__0__hidden_norm__weight": torch.zeros(TARGET)}, "which mean the same"),
        ({"fc__weight": torch.zeros(TARGET, 3 * TARGET + 1)}, r"fc\.weight has shape \[32, 97\], but \[32, 96\]"),
        ({"midlayer__self_attn__k_proj__weight": torch.zeros(16, TARGET)}, r"k_proj\.weight has shape \[16, 32\]"),
        ({"lm_head__weight": torch.zeros(59, TARGET)}, r"lm_head\.weight has shape \[59, 32\], but \[60, 32\]"),
        ({"embed_tokens__weight": torch.zeros(VOCAB, 8)}, r"embed_tokens\.weight has shape \[96, 8\]"),
        ({"d2t": torch.zeros(60, dtype=torch.long)}, "d2t is all zeros"),
        ({"d2t": torch.full((60,), 40)}, "d2t leads to tokens outside the target's vocabulary of 96"),
        ({"d2t": torch.full((60,), -1)}, "d2t leads to tokens outside"),
        ({"d2t": -torch.arange(60) + 3}, "d2t leads to the same token twice"),
        ({"d2t": torch.zeros(60)}, r"d2t has numbers of type torch\.float32"),
        ({"d2t": torch.zeros(59, dtype=torch.long)}, r"d2t has shape \[59\], but \[60\]"),
        ({"mask_hidden": torch.zeros(1, 96)}, "mask_token_id is missing"),
        ({"markov_head__markov_w1__weight": torch.zeros(3)}, "block_size is missing"),
        ({"hidden_norm__weight": torch.zeros(TARGET)}, r"has unknown tensors hidden_norm\.weight"),
        ({"input_norm__weight": torch.ones(5)}, r"input_norm\.weight has shape \[5\]"),
        ({"fc_norm__0__weight": torch.ones(TARGET)}, r"lacks fc_norm\.1\.weight"),
    ],
)
def test_tensors_that_are_wrong_are_named(
    target: Path, tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    write_eagle3(tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        load(target, tmp_path, TAPPED)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Eagle3Form(config={"hidden_size": 16}), r"fc\.weight has shape \[32, 96\], but \[16, 96\]"),
        (Eagle3Form(config={"vocab_size": 97}), "vocabulary of 97, the target of 96"),
        (Eagle3Form(config={"draft_vocab_size": 97}), "knows 97 tokens, the target 96"),
        (Eagle3Form(config={"draft_vocab_size": "all"}), "knows 'all' tokens"),
        (Eagle3Form(config={"target_hidden_size": 64}), "features of width 64, the target's are 32"),
        (Eagle3Form(config={"fc_norm": True}), r"lacks fc_norm\.0\.weight, and fc_norm in config"),
        (Eagle3Form(fc_norm=True, config={"fc_norm": False}), r"has fc_norm\.0\.weight, and fc_norm in config"),
        (Eagle3Form(config={"norm_before_fc": True}), r"lacks input_norm\.weight, and norm_before_fc"),
        (Eagle3Form(fc_norm=True, norm_before_fc=True), "exclude each other"),
        (Eagle3Form(config={"norm_output": "yes"}), "norm_output is 'yes'; it must be true or false"),
        (Eagle3Form(config={"num_attention_heads": 0}), "num_attention_heads is 0"),
        (Eagle3Form(config={"layer_types": ["sliding_attention"]}), "attention slides"),
        (Eagle3Form("speculators", config={"norm_before_residual": None}), "does not say norm_before_residual"),
        (Eagle3Form("speculators", config={"transformer_layer_config": None}), "no transformer_layer_config"),
        (Eagle3Form("speculators", config={"speculators_model_type": "mtp"}), "of the kind 'mtp'"),
    ],
)
def test_configs_that_contradict_the_tensors_are_named(
    target: Path, tmp_path: Path, form: Eagle3Form, message: str
) -> None:
    write_eagle3(tmp_path, form)
    with pytest.raises(ModelError, match=message):
        load(target, tmp_path, layers_of(form))


def test_files_that_are_broken_are_named(target: Path, tmp_path: Path) -> None:
    write_eagle3(tmp_path, Eagle3Form(binary=True))
    torch.save({"fc.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is truncated or holds more than tensors"):
        load(target, tmp_path, TAPPED)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        load(target, tmp_path, TAPPED)


def test_a_head_of_a_wider_target_is_refused(target: Path, tmp_path: Path) -> None:
    write_eagle3(tmp_path, replace(FORMS["specforge"], config={"hidden_size": 64}))
    with pytest.raises(ModelError, match="fetch the head again"):
        load(target, tmp_path)


def test_quantised_heads_guess_nearly_the_same(target: Path, tmp_path: Path) -> None:
    form = Eagle3Form("specforge")
    write_eagle3(tmp_path, form)
    found, plain = load(target, tmp_path)
    checkpoint = Checkpoint.open(target)
    head = TargetHead(checkpoint.load_lm_head("float32", "cpu"))
    source = load_draft(tmp_path, checkpoint, head, "float32", "cpu", draft_dtype="int8", taps=found)
    assert isinstance(source, EagleSource)
    rows, features = torch.arange(8), torch.randn(8, TARGET, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    with torch.inference_mode():
        logits = [
            each.lm_head.logits(each.head(rows[None], features[None], rows[None], mask)[0]).softmax(-1)
            for each in (plain, source)
        ]
    torch.testing.assert_close(logits[0], logits[1], atol=0.2, rtol=0)
    assert not torch.equal(logits[0], logits[1])


def test_the_tiny_target_has_as_many_layers_as_these_tests_think(target: Path) -> None:
    assert Checkpoint.open(target).num_layers == LAYERS
