"""Training EAGLE-3 heads: what is trained is what drafting computes, it learns, and its files are as published."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import clockwork as clockwork_model
from flowspec import LLM, SamplingParams
from flowspec.cli.main import app
from flowspec.draft.acceptance import ReadText, measure
from flowspec.draft.catalogue import load_draft, read_taps
from flowspec.draft.eagle import EagleSource
from flowspec.engine import draft_check
from flowspec.errors import ModelError, UsageError
from flowspec.model.eagle3_format import Eagle3Format
from flowspec.model.loader import Checkpoint
from flowspec.model.taps import Taps, TapSum, TorchLinear
from flowspec.model.target_head import LogitsHead, TargetHead
from flowspec.sampling import Sampler
from flowspec.train.corpus import Tokens
from flowspec.train.draft import draft_vocabulary, frequencies_of, train_draft
from flowspec.train.eagle3 import Eagle3Recipe, Eagle3Shape, Eagle3Trainee, level_losses, train_eagle3_head
from flowspec.train.frozen_target import Target, head_config
from flowspec.train.hints import HintRecipe
from flowspec.train.unroll import unroll
from flowspec.train.windows import DraftRecipe
from flowspec.tree import DraftTree
from tiny_models import VOCAB_SIZE, make_checkpoint, random_stream, write_target_and_text

WINDOWS = DraftRecipe(
    num_tokens=100 * 128, batch_tokens=128, context_len=32, generated_share=0.0, prompt_len=8, learning_rate=1e-3
)
RECIPE = Eagle3Recipe(WINDOWS, num_levels=3)
SHAPES = {
    "as the authors'": Eagle3Shape(),
    "3.1": Eagle3Shape(fc_norm=True, norm_output=True),
    "some tokens": Eagle3Shape(num_tokens=40),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("target"), "qwen3")


@pytest.fixture(scope="module")
def target(directory: Path) -> Target:
    return Target.open(directory)


def known_tokens(shape: Eagle3Shape) -> Tensor | None:
    return None if shape.num_tokens is None else torch.arange(VOCAB_SIZE)[-shape.num_tokens :]


def untrained(target: Target, shape: Eagle3Shape) -> Eagle3Trainee:
    """With weights that float16 holds exactly."""
    torch.manual_seed(3)
    head = Eagle3Trainee(head_config(target.config), shape, shape.tapped(6), target, known_tokens(shape))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1)).half())
        head.lm_head = head.lm_head.half().float()
    return head.eval()


def load_source(directory: Path, draft: Path) -> tuple[Eagle3Format, EagleSource]:
    """As an engine loads it."""
    checkpoint = Checkpoint.open(directory)
    form = read_taps(draft, checkpoint)
    assert isinstance(form, Eagle3Format)
    own = TargetHead(checkpoint.load_lm_head("float32", "cpu"))
    source = load_draft(draft, checkpoint, own, "float32", "cpu", taps=form)
    assert isinstance(source, EagleSource)
    return form, source


class Overheard:
    """An lm_head that keeps what it has said."""

    def __init__(self, inner: LogitsHead) -> None:
        self._inner = inner
        self.said: list[Tensor] = []

    def logits(self, hidden: Tensor) -> Tensor:
        self.said.append(self._inner.logits(hidden))
        return self.said[-1]


def drafted_logits(
    source: EagleSource, token_ids: Sequence[int], sums: Tensor, root: int, num_levels: int
) -> list[Tensor]:
    """Of the root at a place of a text, and of the tokens behind it as guesses, level by level; [V] each."""
    heard = Overheard(source.lm_head)
    listening = EagleSource(source.head, heard)
    draft = listening.open(token_ids[: root + 1], Sampler(SamplingParams()), VOCAB_SIZE)
    draft.read_prompt(range(root), sums[:root])
    tree = DraftTree(root, token_ids[root], num_levels * VOCAB_SIZE + 1)
    row = 0
    for level in range(num_levels):
        assert draft.expand(tree, np.array([row]))
        found = tree.find(row, token_ids[root + 1 + level])
        if found is None:
            break  # a token that it does not guess
        row = found
    return [logits[-1] for logits in heard.said]


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_the_trained_arithmetic_is_that_of_drafting(directory: Path, target: Target, tmp_path: Path, name: str) -> None:
    """At every root of a text, at each level, through the published form on disk and the cache of the draft."""
    trainee, num_levels = untrained(target, SHAPES[name]), 4
    trainee.save(tmp_path)
    form, source = load_source(directory, tmp_path)
    assert form.layer_ids == (1, 3, 5)
    token_ids = [*range(60, 96), *range(70, 74)][:20]
    text = torch.tensor([token_ids])
    streams, _ = target.tapped_streams(text, trainee.tapped)
    source.head.embedding = target.embedding  # the training's target has rounded its own
    levels = unroll(trainee.head, text, trainee.read(streams)[:, :-1], num_levels)
    wanted = [trainee.logits(states)[0] for states in levels]
    sums = summed(form, streams[0])
    num_compared = 0
    for root in range(1, len(token_ids) - num_levels):
        found = drafted_logits(source, token_ids, sums, root, num_levels)
        assert len(found) == num_levels
        for level, logits in enumerate(found):
            expected = wanted[level][root - 1 + level]
            assert torch.equal(logits.isfinite(), expected.isfinite())
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            num_compared += 1
    assert num_compared == 15 * num_levels
    known = known_tokens(SHAPES[name])
    assert wanted[0].isfinite().sum(-1).tolist() == [VOCAB_SIZE if known is None else len(known)] * 19


def summed(form: Eagle3Format, streams: Tensor) -> Tensor:
    """What the target's stages would send of tapped streams [T, n H]: [T, width]."""
    blocks = {layer: TorchLinear(form.block(layer, torch.float32), "cpu") for layer in form.taps.layers}
    total = TapSum(Taps(form.taps, blocks, torch.float32, is_begun=False), None)
    for layer, rows in zip(form.layer_ids, streams.chunk(len(form.layer_ids), dim=-1), strict=True):
        total(layer, rows)
    assert total.total is not None
    return total.total


# --- it learns ---


@pytest.fixture(scope="module")
def clockwork(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose text goes round through all tokens."""
    directory = clockwork_model.write_target(tmp_path_factory.mktemp("clockwork") / "target")
    settings = '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t0"}'
    (directory / "tokenizer_config.json").write_text(settings)
    return directory


def round_trip(num_tokens: int) -> Tokens:
    """What the clockwork writes."""
    text = [0]
    while len(text) < num_tokens:
        text.append(clockwork_model.successor(text[-1]))
    return np.array(text, dtype=np.int32)


def acceptance(directory: Path, draft: Path) -> list[float]:
    """Shares of right guesses by level, along a text of the clockwork."""
    form, source = load_source(directory, draft)
    target = Target.open(directory)
    text = torch.from_numpy(round_trip(80)).long()
    streams, _ = target.tapped_streams(text[None], list(form.layer_ids))
    found = measure(source, ReadText(text.tolist(), 8, summed(form, streams[0])))
    return [right / max(1, made) for right, made in zip(found.num_right, found.num_made, strict=True)]


def test_it_learns_and_goes_on_where_it_was_interrupted(clockwork: Path, tmp_path: Path) -> None:
    target, tokens = Target.open(clockwork), round_trip(300)
    train_eagle3_head(target, tokens, RECIPE, tmp_path / "work", tmp_path / "early", stop_after=1)
    train_eagle3_head(target, tokens, RECIPE, tmp_path / "work", tmp_path / "half", stop_after=50)
    resumed = train_eagle3_head(target, tokens, RECIPE, tmp_path / "work", tmp_path / "resumed")
    whole = train_eagle3_head(target, tokens, RECIPE, tmp_path / "other", tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    untaught, taught = acceptance(clockwork, tmp_path / "early"), acceptance(clockwork, tmp_path / "whole")
    assert untaught[0] < 0.2 and min(taught) > 0.75
    longer, known = replace(RECIPE, num_levels=4), torch.arange(90)
    with pytest.raises(ModelError, match="other settings"):
        train_eagle3_head(target, tokens, longer, tmp_path / "work", tmp_path / "out")
    with pytest.raises(ModelError, match="other settings"):
        train_eagle3_head(target, tokens, RECIPE, tmp_path / "work", tmp_path / "out", token_ids=known)


def test_levels_that_are_trained_together_are_good(clockwork: Path, tmp_path: Path) -> None:
    """One level alone never meets what the head puts out itself."""
    target, tokens = Target.open(clockwork), round_trip(300)
    train_eagle3_head(target, tokens, replace(RECIPE, num_levels=1), tmp_path / "work", tmp_path / "out")
    first, second, _ = acceptance(clockwork, tmp_path / "out")
    assert first > 0.8 and second < 0.5


@pytest.mark.parametrize("name", SHAPES)
def test_the_loss_is_the_cross_entropy_over_what_it_guesses(target: Target, name: str) -> None:
    trainee = untrained(target, SHAPES[name])
    rows = torch.from_numpy(random_stream(24)).long().view(2, 12)
    streams, features = target.tapped_streams(rows, trainee.tapped)
    found, hits = level_losses(trainee, target.lm_head, rows, streams, features, 3)
    levels = unroll(trainee.head, rows, trainee.read(streams[:, :-1]), 3)
    truth = target.logits(features[:, 1:]).softmax(-1)
    for level, states in enumerate(levels):
        logits, wanted = trainee.logits(states[:, level:]), truth[:, level:]
        told = (wanted * logits.log_softmax(-1)).where(logits.isfinite(), torch.zeros(())).sum(-1)
        assert found[level].item() == pytest.approx(-told.mean().item(), rel=0.02)  # bfloat16
        right = wanted.where(logits.isfinite(), torch.zeros(())).argmax(-1) == logits.argmax(-1)
        assert hits[level].item() == pytest.approx(right.float().mean().item(), abs=0.05)


# --- what is written ---


def test_the_files_are_those_that_others_read(target: Target, tmp_path: Path) -> None:
    shape = Eagle3Shape(num_tokens=40, fc_norm=True)
    untrained(target, shape).save(tmp_path, [0.5, 0.25])
    tensors = load_file(tmp_path / "model.safetensors")
    attention = {f"midlayer.self_attn.{name}_proj.weight" for name in "qkvo"}
    mlp = {f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    norms = {f"midlayer.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
    own = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d", *(f"fc_norm.{i}.weight" for i in range(3))}
    assert tensors.keys() == attention | mlp | norms | own
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (64, 64) and tensors["fc.weight"].shape == (32, 96)
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert {t.dtype for name, t in tensors.items() if name not in ("d2t", "t2d")} == {torch.float16}
    known = torch.arange(40) + tensors["d2t"]
    assert torch.equal(known, torch.arange(56, 96)) and torch.equal(tensors["t2d"].nonzero()[:, 0], known)
    assert torch.equal(tensors["lm_head.weight"], target.lm_head[known].half())
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "vocab_size": VOCAB_SIZE,
        "draft_vocab_size": 40,
        "norm_before_residual": False,
        "fc_norm": True,
        "norm_output": False,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 2, 4]},
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "hit_rates": [0.5, 0.25],
    }
    assert {name: config[name] for name in expected} == expected
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in config if name[:5] != "eagle"}))
    with pytest.raises(ModelError, match="does not say which"):  # it was this entry that told
        load_source(make_checkpoint(tmp_path / "target", "qwen3"), tmp_path)


@pytest.mark.parametrize("own_place", [True, False])
def test_each_place_names_the_same_layers(directory: Path, target: Target, tmp_path: Path, own_place: bool) -> None:
    """speculators' and SpecForge's count differently."""
    untrained(target, Eagle3Shape()).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eagle_config" if own_place else "eagle_aux_hidden_state_layer_ids"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_source(directory, tmp_path)[0].layer_ids == (1, 3, 5)


def test_rope_is_written_for_readers_old_and_new(tmp_path: Path) -> None:
    target = Target.open(make_checkpoint(tmp_path / "target", "llama"))
    untrained(target, Eagle3Shape()).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 10000.0 and config["rope_scaling"]["rope_type"] == "llama3"
    new = load_source(tmp_path / "target", tmp_path)[1].head.config.rope_parameters
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_source(tmp_path / "target", tmp_path)[1].head.config.rope_parameters == new
    assert new["factor"] == 4.0 and new["rope_type"] == "llama3"


# --- the whole way ---


@pytest.mark.parametrize("num_tokens", [None, 60])
def test_a_trained_head_drafts_and_passes_its_check(
    clockwork: Path,
    tmp_path: Path,
    num_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(draft_check, "TEXT_S", 100.0)
    monkeypatch.setattr(draft_check, "GUESSES_S", 100.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text, out = tmp_path / "text.txt", tmp_path / "draft"
    text.write_text(" ".join(f"t{token_id}" for token_id in round_trip(400)))
    train_draft(clockwork, out, [text], WINDOWS, tmp_path / "work", shape=Eagle3Shape(num_tokens))
    config = json.loads((out / "config.json").read_text())
    least = 0.85 * (num_tokens or VOCAB_SIZE) / VOCAB_SIZE
    assert len(config["hit_rates"]) == 8 and config["hit_rates"][0] > least
    assert config["draft_vocab_size"] == (num_tokens or VOCAB_SIZE)
    assert load_source(clockwork, out)[1].hit_rates == config["hit_rates"]  # by which the check judges
    caplog.set_level(logging.WARNING, "flowspec.draft")
    for temperature in (0.0, 0.8):
        params = SamplingParams(24, temperature=temperature, seed=2, ignore_eos=True)
        with LLM(clockwork, draft=out, stages=2, in_process=True, draft_check="on") as llm:
            drafted = llm.generate([1, 4, 2, 3, 9], params, schedule="flow")
            plain = llm.generate([1, 4, 2, 3, 9], params, schedule="ar")
        assert drafted.token_ids == plain.token_ids
        assert drafted.stats.draft == "eagle3" and drafted.stats.accepted > 8
    assert not [record for record in caplog.records if record.name == "flowspec.draft"]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", SHAPES)
def test_no_token_hangs_on_it(tmp_path: Path, name: str, temperature: float) -> None:
    """Of a target whose text is not so easy, in windows that it has written itself."""
    model, text = write_target_and_text(tmp_path)
    recipe = replace(WINDOWS, num_tokens=512, generated_share=0.5, num_generated_tokens=256, generation_batch=4)
    train_draft(model, model / "draft", [text], recipe, tmp_path / "work", shape=SHAPES[name])
    params = SamplingParams(20, temperature=temperature, seed=2, ignore_eos=True)
    with LLM(model, stages=3, in_process=True, draft_check="off") as llm:
        plain = llm.generate([1, 4, 2, 3, 9], params, schedule="ar")
        for schedule in ("flow", "serial"):
            drafted = llm.generate([1, 4, 2, 3, 9], params, schedule=schedule)
            assert drafted.token_ids == plain.token_ids and drafted.stats.drafted > 0
            assert drafted.stats.draft == "eagle3"


def test_it_knows_the_tokens_of_the_training_text(tmp_path: Path) -> None:
    frequencies = frequencies_of(np.array([[90, 5, 5, 90], [7, 90, 5, 3]], dtype=np.int32), VOCAB_SIZE)
    assert frequencies[[5, 90, 7, 0]].tolist() == [0.375, 0.375, 0.125, 0]
    known = draft_vocabulary(frequencies, 6)
    assert known is not None and known.tolist() == [0, 1, 3, 5, 7, 90]  # and the first by id
    assert draft_vocabulary(frequencies) is None and draft_vocabulary(frequencies, VOCAB_SIZE) is None
    model, text = write_target_and_text(tmp_path)
    text.write_text(" ".join(f"t{token_id}" for token_id in [*range(20, 40), *range(60, 70)] * 30))
    recipe = replace(WINDOWS, num_tokens=128)
    train_draft(model, tmp_path / "draft", [text], recipe, tmp_path / "work", shape=Eagle3Shape(num_tokens=30))
    d2t = load_file(tmp_path / "draft" / "model.safetensors")["d2t"]
    assert (torch.arange(30) + d2t).tolist() == [*range(20, 40), *range(60, 70)]


def test_layers_to_read_are_the_authors_choice_where_there_are_so_many() -> None:
    shape = Eagle3Shape()
    assert shape.tapped(32) == [2, 16, 29] and shape.tapped(36) == [2, 18, 33] and shape.tapped(8) == [2, 4, 5]
    assert shape.tapped(7) == [2, 3, 4] and shape.tapped(6) == [1, 3, 5] and shape.tapped(2) == [1]
    with pytest.raises(UsageError, match="a single layer"):
        shape.tapped(1)


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot guess 0 tokens; name 1 at least \(--draft-vocab\)"):
        Eagle3Shape(0)
    with pytest.raises(UsageError, match="num_levels is 32; it must lie between 0 and 32"):
        replace(RECIPE, num_levels=32)
    with pytest.raises(UsageError, match="decay is 0"):
        replace(RECIPE, decay=0)
    command = ["train-draft", str(tmp_path), "--out", str(tmp_path), "--draft-vocab", "40", "--kind", "block"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code != 0 and "--draft-vocab is for EAGLE-3 heads" in result.output


@pytest.mark.parametrize("kind", ["eagle3", "eagle3.1"])
def test_the_command_trains_one_with_hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("flowspec.train.hints.HintRecipe", lambda: HintRecipe(rank=2, num_tokens=512))
    model, text = write_target_and_text(tmp_path)
    command = ["train-draft", str(model), "--data", str(text), "--out", str(tmp_path / "draft"), "--kind", kind]
    command += ["--tokens", "512", "--generated-share", "0", "--draft-vocab", "40", "--hints"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    form, _ = load_source(model, tmp_path / "draft")
    assert form.shape("lm_head.weight") == (40, 32)
    assert form.has_fc_norm == form.norm_output == (kind == "eagle3.1")
    params = SamplingParams(20, temperature=0.8, seed=2, ignore_eos=True)
    with LLM(model, draft=tmp_path / "draft", stages=4, in_process=True, draft_check="off", hints=True) as llm:
        hinted = llm.generate([1, 4, 2, 3, 9], params, schedule="flow")
        plain = llm.generate([1, 4, 2, 3, 9], params, schedule="ar")
    assert hinted.token_ids == plain.token_ids and hinted.stats.drafted > 0


def test_the_targets_distribution_is_that_of_its_family(tmp_path: Path) -> None:
    """Some divide their logits."""
    directory = make_checkpoint(tmp_path, "granite")
    loaded = Checkpoint.open(directory).load_lm_head("float32", "cpu")
    torch.testing.assert_close(Target.open(directory).lm_head.float(), loaded, rtol=0.01, atol=0.001)
