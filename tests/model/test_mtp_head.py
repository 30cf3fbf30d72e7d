"""MTP layers: found beside their model, computed as published, and what is wrong with them is named."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowspec.core import LayerRange
from flowspec.draft.catalogue import choose_draft, load_draft, read_taps
from flowspec.draft.eagle import EagleSource
from flowspec.errors import ModelError, UsageError
from flowspec.model.backends import open_checkpoint
from flowspec.model.draft_files import DraftFiles
from flowspec.model.head_kind import kind_of
from flowspec.model.loader import Checkpoint
from flowspec.model.mtp_head import MtpHead, MtpLayers
from flowspec.model.target_head import TargetHead
from tiny_gguf import write_text_gguf
from tiny_models import VOCAB_SIZE, make_checkpoint, make_draft_head, plain_model
from tiny_mtp import PREFIX, MtpReference, make_mtp_weights, write_as_mimo, write_mtp
from tiny_quantised import FORMS, write_quantised
from tree_growth import check_that_a_tree_grows

HEADS = ("draft", "eagle3", "peagle", "dflash", "dflash2", "dspark")  # folders of the others


@pytest.fixture
def model(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to be changed, with no other draft."""
    shutil.copytree(checkpoint_dir("mimo"), tmp_path / "model", ignore=shutil.ignore_patterns(*HEADS))
    return tmp_path / "model"


def load(target: Path, draft: str = "auto", **settings: Any) -> EagleSource:
    checkpoint = Checkpoint.open(target)
    chosen = choose_draft(checkpoint, draft)
    assert isinstance(chosen, MtpLayers)
    head = TargetHead(checkpoint.load_lm_head("float32", "cpu"))
    source = load_draft(chosen, checkpoint, head, "float32", "cpu", **settings)
    assert isinstance(source, EagleSource) and isinstance(source.head, MtpHead) and source.name == "mtp"
    return source


class Published:
    """The target as transformers runs it, and its MTP layer as its authors describe it."""

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.model = plain_model(directory).requires_grad_(False)
        self.reference = MtpReference(config, make_mtp_weights(config), self.model.model.embed_tokens.weight)

    def hidden(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] before the last norm, and behind it."""
        before: list[Tensor] = []
        handle = self.model.model.norm.register_forward_pre_hook(lambda module, inputs: before.append(inputs[0][0]))
        behind = self.model.model(token_ids[None]).last_hidden_state[0]
        handle.remove()
        return before[0], behind

    def logits(self, states: Tensor) -> Tensor:
        return self.model.lm_head(states)


def test_logits_are_those_of_the_published_arithmetic(model: Path) -> None:
    """50 contexts, at the first level and at three more, where the layer reads what it has put out itself."""
    source, published = load(model), Published(model)
    generator = torch.Generator().manual_seed(5)
    for context in range(50):
        tokens = torch.randint(VOCAB_SIZE, (2 + context % 12,), generator=generator)
        hidden, normed = published.hidden(tokens)
        features = source.head.features_of(normed)
        following = [*tokens[1:].tolist(), 7]
        for level in range(4):
            rows = torch.tensor(following)
            num = len(rows)
            mask = torch.ones(num, num, dtype=torch.bool).tril()[None, None]
            with torch.inference_mode():
                states = source.head(rows[None], features[None], torch.arange(num)[None], mask)[0]
                logits = source.lm_head.logits(states)
            expected = published.reference.states(rows, hidden)
            wanted = published.logits(expected)
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
            features = torch.cat([features, source.head.fed_back(states[-1:])])
            hidden = torch.cat([hidden, expected[-1:]])
            following.append(int(wanted[-1].argmax()) if level % 2 else int(tokens[0]))


def test_a_draft_grows_its_tree_from_true_states_and_its_own(model: Path) -> None:
    """Prompt, a pass of the root, one below it, a commit, and a pass from the new root."""
    source, published = load(model), Published(model)
    text = torch.randint(VOCAB_SIZE, (9,), generator=torch.Generator().manual_seed(1))

    def read(tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden, normed = published.hidden(tokens)
        return normed, hidden

    def wanted(tokens: list[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of the last row: log-probabilities, and what is fed back."""
        states = published.reference.states(torch.tensor(tokens), hidden)
        return published.logits(states)[-1].log_softmax(-1), states[-1:]

    check_that_a_tree_grows(source, text, read, wanted)


def test_several_layers_draft_with_the_first(model: Path) -> None:
    first = load(model).head.state_dict()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 2}))
    write_mtp(model, num_layers=2)
    again = load(model).head.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items()) and first.keys() == again.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_layer_loads_in_half_precision(model: Path, dtype: Any) -> None:
    checkpoint = Checkpoint.open(model)
    head = MtpHead.load(MtpLayers.read(checkpoint), checkpoint, checkpoint.load_embedding(dtype, "cpu"), dtype, "cpu")
    whole = load(model).head
    given = torch.arange(5)[None], torch.arange(5)[None], torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    read = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, wanted = (each(given[0], each.features_of(read)[None], *given[1:])[0].float() for each in (head, whole))
    assert head.fed_back(found.to(getattr(torch, dtype))).dtype == getattr(torch, dtype)
    assert 0 < (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("form", ["gptq", "awq", "fp8"])
def test_a_quantised_layer_is_what_its_codes_mean(tmp_path: Path, form: str) -> None:
    """Its norms are floats there, as the model's own. The model is in one file."""
    write_quantised(tmp_path, form, "mimo", hidden_size=64, intermediate_size=128)
    write_as_mimo(tmp_path)
    weights = make_mtp_weights(json.loads((tmp_path / "config.json").read_text()))
    meant, changes = dict(weights), {}
    for name in (name for name in weights if name.endswith("_proj.weight")):
        meant[name], parts = FORMS[form][1](weights[name])
        changes |= {f"0.{name}": None} | {f"0.{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
    write_mtp(tmp_path, changes=changes)
    head = load(tmp_path, str(tmp_path)).head.state_dict()
    for name, tensor in meant.items():
        torch.testing.assert_close(head.get(name, head.get(f"layers.0.{name}")), tensor.float(), atol=1e-6, rtol=1e-5)


# --- which model's ---


def test_a_models_own_layers_draft_unless_a_head_lies_with_it(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    for draft in ("auto", str(model)):
        chosen = choose_draft(checkpoint, draft, draft_dtype="int8")
        assert isinstance(chosen, MtpLayers) and chosen.source.full_name == checkpoint.full_name
    make_draft_head(model / "draft")
    assert choose_draft(checkpoint, "auto") == model / "draft"
    assert choose_draft(checkpoint, "ngram") == "ngram"


def test_a_copy_without_layers_takes_those_of_another_copy(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a quantised copy, whose config still speaks of them."""
    other = tmp_path / "original"
    shutil.copytree(model, other)
    write_mtp(model, num_layers=0)
    caplog.set_level(logging.WARNING, "flowspec.draft")
    assert choose_draft(Checkpoint.open(model), "auto") == "ngram"
    (told,) = (record.getMessage() for record in caplog.records)
    assert "says 1 MTP layer (num_nextn_predict_layers), but its files hold none" in told and "\n" not in told
    assert told.endswith("with --draft the original's directory gives its own. N-grams draft instead")
    with pytest.raises(ModelError, match="its files hold none"):
        choose_draft(Checkpoint.open(model), str(model))
    found, wanted = load(model, str(other)).head.state_dict(), load(other).head.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())


def test_a_gguf_file_takes_those_of_the_original(tmp_path: Path) -> None:
    """Such a file calls itself Qwen2's, and has none."""
    model = write_text_gguf(tmp_path / "model.gguf", Kind.Q8_0, family="qwen2")
    sizes = {name: getattr(model.config, name) for name in ("vocab_size", "hidden_size")}
    original = make_checkpoint(tmp_path / "original", "mimo", **sizes)
    target = open_checkpoint(tmp_path / "model.gguf")
    assert choose_draft(target, "auto") == "ngram"
    chosen = choose_draft(target, str(original))
    assert isinstance(chosen, MtpLayers)
    head = MtpHead.load(chosen, target, target.load_embedding("float32", "cpu"), "float32", "cpu")
    assert torch.equal(head.embedding, target.load_embedding("float32", "cpu"))
    torch.testing.assert_close(head.scale, head.hidden_layernorm.weight / model.model.norm.weight)


def test_another_model_with_layers_drafts_as_a_whole(model: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "small", "mimo", num_hidden_layers=2)
    assert isinstance(choose_draft(Checkpoint.open(model), str(other)), Checkpoint)


def test_a_config_that_speaks_of_none_is_believed(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    for value in (0, None):
        (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": value}))
        assert choose_draft(Checkpoint.open(model), "auto") == "ngram"


def test_layers_without_their_model_are_named(model: Path, tmp_path: Path) -> None:
    """As some programs keep them: the model's folder is what is wanted."""
    shutil.copy(model / "model-mtp.safetensors", tmp_path / "model.safetensors")
    shutil.copy(model / "config.json", tmp_path)
    with pytest.raises(ModelError, match="of the kind 'mtp'"):
        kind_of(DraftFiles(tmp_path))


def test_they_read_no_layers_of_the_users_choice(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    chosen = choose_draft(checkpoint, "auto")
    assert read_taps(chosen, checkpoint) is None
    with pytest.raises(UsageError, match="draft_layers are for EAGLE-3"):
        read_taps(chosen, checkpoint, (1, 2, 3))


# --- what is wrong ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.input_proj.weight": None}, r"MTP layer lack model\.mtp_layers\.0\.input_proj\.weight; download"),
        ({"0.self_attn.q_proj.bias": None}, r"lack .*q_proj\.bias"),
        ({"0.final_layernorm.weight": None, "0.token_layernorm.weight": None}, r"lack .*final.*, .*token_layernorm"),
        ({"0.self_attn.q_norm.weight": torch.ones(8)}, r"have unknown tensors model\.mtp_layers\.0.*q_norm\.weight"),
        ({"0.shared_head.head.weight": torch.ones(96, 32)}, r"unknown tensors .*shared_head"),
        ({"0.input_proj.weight": torch.ones(32, 32)}, r"input_proj\.weight with shape \(32, 32\), .* \(32, 64\)"),
        ({"0.hidden_layernorm.weight": torch.ones(16)}, r"hidden_layernorm\.weight with shape \(16,\), .* \(32,\)"),
        ({"0.mlp.down_proj.weight": torch.ones(64, 32)}, r"down_proj\.weight with shape \(64, 32\)"),
        ({"1.input_proj.weight": torch.ones(32, 64)}, r"says 1 MTP layer .*, but its files hold those numbered 0, 1;"),
    ],
)
def test_tensors_that_do_not_fit_are_one_line(model: Path, changes: dict[str, Tensor | None], message: str) -> None:
    write_mtp(model, changes=changes)
    for draft in ("auto", str(model)):
        with pytest.raises(ModelError, match=message) as raised:
            choose_draft(Checkpoint.open(model), draft)
        assert "\n" not in str(raised.value) and "choose another draft" in str(raised.value)
    assert choose_draft(Checkpoint.open(model), "ngram") == "ngram"


@pytest.mark.parametrize(
    ("num_layers", "message"),
    [
        (2, r"says 2 MTP layers \(num_nextn_predict_layers\), but its files hold those numbered 0;"),
        (-1, r"num_nextn_predict_layers is -1; it must be a whole number in 0\.\.64"),
        ("1", r"num_nextn_predict_layers is '1'; it must be a whole number"),
        (True, r"num_nextn_predict_layers is True; it must be a whole number"),
    ],
)
def test_a_number_of_layers_that_is_none_is_one_line(model: Path, num_layers: object, message: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": num_layers}))
    with pytest.raises(ModelError, match=message) as raised:
        choose_draft(Checkpoint.open(model), "auto")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("changes", [{"hidden_act": "magic"}, {"rope_scaling": {"rope_type": "magic", "factor": 2.0}}])
def test_a_config_of_which_no_layer_can_be_made_is_one_line(model: Path, changes: dict[str, Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=r"no MTP layer can be made by config\.json .*magic") as raised:
        choose_draft(Checkpoint.open(model), "auto")
    assert "\n" not in str(raised.value)


def test_a_channel_that_the_targets_norm_leaves_out_is_nothing(model: Path) -> None:
    """What it was before cannot be told, and no guess becomes NaN."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = model / index["weight_map"]["model.norm.weight"]
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = 0.0
    save_file(tensors, shard, {"format": "pt"})
    features = load(model).head.features_of(torch.tensor([[0.0, 1.0, 2.0, 0.0] * 8]))
    assert features.isfinite().all() and features[0, 3] == 0 and features[0, 1] != 0


def test_no_code_of_the_checkpoint_is_run_and_nobody_is_bothered(
    model: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """What lies beside the weights would end the process."""
    assert (model / "configuration_mimo.py").is_file()
    tokenizer = Checkpoint.open(model).load_tokenizer()
    assert tokenizer("t3", verbose=False).input_ids == [83, 18]
    assert "mimo" not in caplog.text + "".join(capfd.readouterr())


def test_stages_read_nothing_of_it(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    assert any(name.startswith(PREFIX) for name in checkpoint.tensor_names())
    assert not any(name.startswith(PREFIX) for name in checkpoint.names_of_stage(LayerRange(0, 6)))
