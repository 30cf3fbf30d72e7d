"""Hint heads: the logit lens they begin as, their file and its errors, their training, and the demo's own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from flowspec.cli.main import app
from flowspec.core import LayerRange
from flowspec.errors import ModelError, UsageError
from flowspec.model.demo_pair import demo_directory, demo_draft_directory
from flowspec.model.eagle_head import EagleHead
from flowspec.model.families import norm_scale
from flowspec.model.hint_head import HintHead, save_hints
from flowspec.model.loader import Checkpoint
from flowspec.model.stage import forward
from flowspec.model.torch_stage import TorchStage
from flowspec.train.demo import load_hints
from flowspec.train.draft import train_draft
from flowspec.train.evaluate import EvaluationConfig, evaluate
from flowspec.train.frozen_target import Target, embedding_of, head_config, load_model
from flowspec.train.hints import HintRecipe, train_hints
from flowspec.train.windows import DraftRecipe
from tiny_models import FAMILIES, VOCAB_SIZE, make_checkpoint, make_model, random_stream, write_target_and_text

HIDDEN, NUM_LAYERS, RANK = 32, 6, 3
EPS = 1e-6
WINDOWS = DraftRecipe(context_len=16, prompt_len=6, num_tokens=128, num_generated_tokens=64, generation_batch=2)
RECIPE = HintRecipe(rank=RANK, num_tokens=8 * 64, batch_tokens=64)


@pytest.fixture
def lm_head() -> Tensor:
    return torch.randn(VOCAB_SIZE, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def heads(lm_head: Tensor) -> list[HintHead]:
    torch.manual_seed(0)
    return [HintHead(num_layers, lm_head, RANK, EPS).requires_grad_(False) for num_layers in range(1, NUM_LAYERS)]


def load(directory: Path, num_layers: int, lm_head: Tensor) -> HintHead | None:
    return HintHead.load(directory, num_layers, lm_head, EPS, "float32", "cpu")


def loss(target: Target, head: HintHead) -> float:
    """Against the target's distribution, on text that no training here reads."""
    rows = torch.from_numpy(random_stream(8600)[8000:].reshape(-1, 20)).long()
    *hidden, features = target.hidden_states(rows)
    wanted = target.logits(features).softmax(-1).flatten(0, 1)
    return F.cross_entropy(head(hidden[head.num_layers - 1]).flatten(0, 1), wanted).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_head_is_the_logit_lens(family: str) -> None:
    model = make_model(family).requires_grad_(False)
    norm, weight = model.base_model.norm, model.get_output_embeddings().weight  # type: ignore[union-attr]
    scale = norm_scale(model.config, norm.weight)  # type: ignore[union-attr, arg-type]
    head = HintHead.logit_lens(2, scale, weight, RANK, model.config.rms_norm_eps)  # type: ignore[union-attr, arg-type]
    hidden = torch.randn(5, HIDDEN)
    torch.testing.assert_close(head(hidden), F.linear(norm(hidden), weight))  # type: ignore[operator, arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_the_hidden_states_that_workers_send(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(tmp_path, family))
    token_ids = torch.from_numpy(random_stream(12)).long()
    hidden_states = Target(load_model(tmp_path, torch.bfloat16)).hidden_states(token_ids[None])
    assert len(hidden_states) == NUM_LAYERS
    for num_layers in (1, 4, NUM_LAYERS):
        stage = TorchStage.load(checkpoint, LayerRange(0, num_layers), "bfloat16", "cpu")
        cache, ids = stage.open_cache(root_id=0), np.arange(12)
        _, slots = cache.slots.place(ids, ids - 1, ids)
        sent = forward(stage, token_ids, slots, cache).float()
        trained_on = hidden_states[num_layers - 1][0]
        similarity = F.cosine_similarity(sent, trained_on).sort().values
        assert similarity[1] > 0.99, "of all rows but one, which rounding may send to another expert"


def test_guesses_are_the_best_tokens_in_order(heads: list[HintHead]) -> None:
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(2))
    token_ids, logprobs = heads[0].guess(hidden, 4)
    everything = heads[0](hidden).log_softmax(-1)
    assert token_ids.tolist() == everything.argsort(-1, descending=True)[:, :4].tolist()
    torch.testing.assert_close(logprobs, everything.gather(-1, token_ids))
    assert [tensor.shape for tensor in heads[0].guess(hidden[:0], 4)] == [(0, 4), (0, 4)]


def test_saved_heads_come_back_without_the_lm_head(heads: list[HintHead], lm_head: Tensor, tmp_path: Path) -> None:
    assert load(tmp_path, 1, lm_head) is None
    save_hints(tmp_path, heads)
    stored = load_file(tmp_path / "hints.safetensors")
    assert stored.keys() == {
        f"layers.{num_layers}.{name}.weight" for num_layers in range(1, NUM_LAYERS) for name in ("norm", "down", "up")
    }
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(2))
    for head in heads:
        loaded = load(tmp_path, head.num_layers, lm_head)
        assert loaded is not None and loaded.num_layers == head.num_layers
        assert loaded.lm_head.data_ptr() == lm_head.data_ptr()
        torch.testing.assert_close(loaded(hidden), head(hidden), atol=0.02, rtol=0.01)
        half = HintHead.load(tmp_path, head.num_layers, lm_head, EPS, "bfloat16", "cpu")
        assert half is not None and half(hidden).dtype == torch.float32
        torch.testing.assert_close(half(hidden), head(hidden), atol=0.3, rtol=0.1)


def test_a_truncated_file_is_named(heads: list[HintHead], lm_head: Tensor, tmp_path: Path) -> None:
    save_hints(tmp_path, heads)
    path = tmp_path / "hints.safetensors"
    content = path.read_bytes()
    for size in (len(content) - 1, 20, 0):
        path.write_bytes(content[:size])
        with pytest.raises(ModelError, match=r"hints\.safetensors is truncated or damaged .* copy it again"):
            load(tmp_path, 1, lm_head)


def test_hints_of_another_target_are_named(heads: list[HintHead], lm_head: Tensor, tmp_path: Path) -> None:
    save_hints(tmp_path, heads)
    with pytest.raises(ModelError, match=r"layers\.6\.down\.weight.* no hints after 6 layers; train hints"):
        load(tmp_path, NUM_LAYERS, lm_head)
    with pytest.raises(ModelError, match=r"layers\.2\.norm\.weight has shape \[32\], but \[16\] is needed; train"):
        load(tmp_path, 2, lm_head[:, :16])


@pytest.mark.parametrize("shape", [(HIDDEN, RANK + 1), (HIDDEN,), ()])
@pytest.mark.parametrize("name", ["norm", "down", "up"])
def test_wrong_shapes_are_named(
    heads: list[HintHead], lm_head: Tensor, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    if (name, shape) == ("norm", (HIDDEN,)):
        return
    save_hints(tmp_path, heads)
    path = tmp_path / "hints.safetensors"
    save_file(load_file(path) | {f"layers.3.{name}.weight": torch.zeros(shape)}, path)
    with pytest.raises(ModelError, match=r"layers\.3\.\w+\.weight has shape"):
        load(tmp_path, 3, lm_head)
    assert load(tmp_path, 2, lm_head) is not None


def test_training_lowers_the_loss_of_every_boundary(tmp_path: Path) -> None:
    target = Target(make_model("llama"))
    recipe = HintRecipe(rank=8, num_tokens=100 * 64, batch_tokens=64)
    trained = train_hints(target, random_stream(8000), recipe, WINDOWS, tmp_path / "work", tmp_path / "draft")
    assert [head.num_layers for head in trained] == [1, 2, 3, 4, 5]
    eps = target.config.rms_norm_eps
    for head in trained:
        start = HintHead.logit_lens(head.num_layers, target.final_norm, target.lm_head, 8, eps)
        assert loss(target, head) < loss(target, start) - 0.02
        saved = HintHead.load(tmp_path / "draft", head.num_layers, target.lm_head, eps, "float32", "cpu")
        assert saved is not None and loss(target, saved) == pytest.approx(loss(target, head), abs=0.02)


def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    target, stream = Target(make_model("llama")), random_stream()
    train_hints(target, stream, RECIPE, WINDOWS, tmp_path / "whole", tmp_path / "a")
    train_hints(target, stream, RECIPE, WINDOWS, tmp_path / "parts", tmp_path / "b", stop_after=3)
    train_hints(target, stream, RECIPE, WINDOWS, tmp_path / "parts", tmp_path / "b")
    whole, parts = (load_file(tmp_path / name / "hints.safetensors") for name in "ab")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    with pytest.raises(ModelError, match="other settings"):
        train_hints(target, stream, HintRecipe(), WINDOWS, tmp_path / "parts", tmp_path / "b")


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rank is 0"):
        HintRecipe(rank=0)
    single = Target(make_model("llama", num_hidden_layers=1))
    with pytest.raises(ModelError, match="single layer"):
        train_hints(single, random_stream(), RECIPE, WINDOWS, tmp_path, tmp_path)


def test_train_draft_adds_hints_to_a_finished_head(tmp_path: Path) -> None:
    target, text = write_target_and_text(tmp_path)
    out, work_dir = tmp_path / "draft", tmp_path / "work"
    train_draft(target, out, [text], WINDOWS, work_dir)
    head, written = (out / "model.safetensors").read_bytes(), (work_dir / "draft.pt").stat().st_mtime_ns
    assert not (out / "hints.safetensors").exists()
    train_draft(target, out, [text], WINDOWS, work_dir, hints=RECIPE)
    assert (out / "hints.safetensors").is_file()
    assert (out / "model.safetensors").read_bytes() == head
    assert (work_dir / "draft.pt").stat().st_mtime_ns == written


def test_the_command_trains_hints_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowspec.train.hints.HintRecipe", lambda: HintRecipe(rank=RANK, num_tokens=512))
    target, text = write_target_and_text(tmp_path)
    command = ["train-draft", str(target), "--data", str(text), "--out", str(tmp_path / "draft")]
    command += ["--tokens", "512", "--generated-share", "0"]
    hints = tmp_path / "draft" / "hints.safetensors"
    for options, exist in (([], False), (["--hints"], True)):
        result = CliRunner().invoke(app, [*command, *options])
        assert result.exit_code == 0, result.output
        assert hints.exists() == exist


def model_without_last_layer() -> PreTrainedModel:
    """What its last layer adds is zero."""
    model = make_model("llama").requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith((f"{NUM_LAYERS - 1}.self_attn.o_proj.weight", f"{NUM_LAYERS - 1}.mlp.down_proj.weight")):
            parameter.zero_()
    return model


def test_a_hint_behind_the_last_useful_layer_hits_every_greedy_token() -> None:
    target = Target(model_without_last_layer())
    model = target.model.float()
    torch.manual_seed(1)
    draft = EagleHead(head_config(target.config), embedding_of(model)).eval().requires_grad_(False)
    weight = model.get_output_embeddings().weight
    hints = [
        HintHead.logit_lens(num_layers, model.model.norm.weight, weight, RANK, target.config.rms_norm_eps)
        for num_layers in (1, NUM_LAYERS - 1)
    ]
    config = EvaluationConfig(num_prompts=3, prompt_len=8, num_new_tokens=12, num_levels=2, loss_window_len=16)
    result = evaluate(model, draft, random_stream(), config, hints)
    for text in (result.greedy, result.sampled):
        assert text.draft_wrong == pytest.approx(1 - text.hit_rates[0])
        assert text.draft_lacks < text.draft_wrong
    first, last = result.greedy.hints
    for rate in (last.all_tokens, last.draft_wrong, last.draft_lacks):
        assert rate.top_1 == rate.top_4 == 1
    assert first.all_tokens.top_1 < 0.9
    assert "| 5 | 1.00 / 1.00 | 1.00 / 1.00 | 1.00 / 1.00 |" in result.hints_to_markdown()


def test_the_demos_hints_grow_better_with_every_layer() -> None:
    model = load_model(demo_directory(), torch.float32).requires_grad_(False)
    hints = load_hints(demo_draft_directory(), model)
    assert len(hints) == model.config.num_hidden_layers - 1
    tokenizer = AutoTokenizer.from_pretrained(demo_directory(), local_files_only=True)
    token_ids = torch.tensor([tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))[:512]])
    states = model.base_model(token_ids, output_hidden_states=True).hidden_states
    best = model.get_output_embeddings()(states[-1]).argmax(-1)  # type: ignore[operator, misc]
    hits = [(hint(states[hint.num_layers]).argmax(-1) == best).float().mean().item() for hint in hints]
    assert hits[0] > 0.1  # chance is 1 / 2048
    assert hits[-1] > 0.5
    assert all(later > earlier - 0.02 for earlier, later in pairwise(hits))
