"""Training: data, resuming, the smoke of the whole, and that the shipped pair is sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from flowspec.errors import ModelError, UsageError
from flowspec.model.eagle_head import EagleHead
from flowspec.train import corpus, demo
from flowspec.train.draft import train_draft
from flowspec.train.eagle import train_head
from flowspec.train.evaluate import EvaluationConfig, draft_tree, evaluate
from flowspec.train.frozen_target import Target, embedding_of, head_config
from flowspec.train.losses import expected_rows, log_partition
from flowspec.train.target import TargetData, TargetRecipe, save_target, save_tokenizer, train_target, train_tokenizer
from flowspec.train.unroll import unroll
from flowspec.train.windows import DraftRecipe, generate_windows

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "naïve café ☕ 日本語 🎉\r\n\ttabs\0",
    "",
    "   \n\n  <|endoftext|> ",
    "\u202e\ufeff",
]
DEMO = Path(demo.__file__).parents[1] / "demo"
MAX_DEMO_BYTES = 20_000_000


class KilledError(Exception):
    """Stands for a run that is killed."""


def interrupt_at(number: int) -> Callable[[object], None]:
    """A checkpoint callback that kills the run at the given checkpoint."""
    calls: list[object] = []

    def on_checkpoint(model: object) -> None:
        calls.append(model)
        if len(calls) == number:
            raise KilledError

    return on_checkpoint


def tiny_target_recipe() -> TargetRecipe:
    return TargetRecipe(
        num_tokens=6 * 64,
        batch_tokens=64,
        context_len=16,
        long_context_len=32,
        long_share=0.34,
        vocab_size=300,
        num_layers=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        num_kv_heads=1,
    )


def tiny_draft_recipe() -> DraftRecipe:
    return DraftRecipe(
        num_tokens=6 * 64,
        batch_tokens=64,
        context_len=16,
        prompt_len=6,
        num_generated_tokens=64,
        generation_batch=2,
        unroll_len=3,
        unroll_share=0.4,
    )


def random_stream(num_tokens: int = 400, vocab_size: int = 300) -> corpus.Tokens:
    return np.random.default_rng(0).integers(0, vocab_size, num_tokens).astype(np.int32)


def tiny_target() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_target_recipe().model_config()).eval().requires_grad_(False)


def tiny_head(target: PreTrainedModel) -> EagleHead:
    torch.manual_seed(1)
    return EagleHead(head_config(target.config), embedding_of(target)).eval().requires_grad_(False)


def causal_mask(num_rows: int) -> torch.Tensor:
    return torch.ones(num_rows, num_rows, dtype=torch.bool).tril()[None, None]


def assert_same_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, right.state_dict()[name]), name


def test_foreign_notices_are_seen() -> None:
    assert corpus.has_foreign_notice("# Copyright (c) 1999 by Secret Labs AB\n")
    assert corpus.has_foreign_notice("# Permission to use, copy, modify\n")
    assert not corpus.has_foreign_notice("# Copyright (C) 2001-2007 Python Software Foundation\n")
    assert not corpus.has_foreign_notice(
        "# Copyright 2007 Google, Inc.\n# Licensed to PSF under a Contributor Agreement.\n"
    )
    assert not corpus.has_foreign_notice("def show_copyright(): ...\n")


def test_held_out_is_decided_by_the_name_alone() -> None:
    documents = [corpus.Document(f"a/{i}.py", "x") for i in range(1000)]
    split = corpus.split_documents(documents, 0.04)
    assert 20 <= len(split.held_out) <= 60
    assert corpus.split_documents(reversed(documents), 0.04).held_out == tuple(reversed(split.held_out))
    assert {*split.train, *split.held_out} == {*documents}


def test_windows_of_an_epoch_tile_the_stream_and_do_not_depend_on_the_batch() -> None:
    stream = np.arange(103, dtype=np.int32)
    epoch = corpus.windows(stream, 10, 0, 10, seed=3)
    begins = sorted(epoch[:, 0].tolist())
    assert begins == [begins[0] + 10 * i for i in range(10)]
    assert (epoch == epoch[:, :1] + np.arange(10)).all()
    one_by_one = [corpus.windows(stream, 10, i, 1, seed=3) for i in range(25)]
    assert (np.concatenate(one_by_one) == corpus.windows(stream, 10, 0, 25, seed=3)).all()
    with pytest.raises(UsageError, match="add more text"):
        corpus.windows(stream[:5], 10, 0, 1, seed=3)


def test_data_is_read_from_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("words")
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / "image.bin").write_bytes(b"\xff\xd8\0")
    assert corpus.read_documents([tmp_path]) == [corpus.Document("sub/a.txt", "words")]
    assert corpus.read_documents([tmp_path / ".hidden"]) == [corpus.Document(".hidden", "secret")]
    with pytest.raises(UsageError, match="does not exist"):
        corpus.read_documents([tmp_path / "none"])
    with pytest.raises(UsageError, match="no UTF-8 text"):
        corpus.read_documents([tmp_path / "image.bin"])


def test_a_trained_tokenizer_returns_every_text() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_resumed_target_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    recipe, data = tiny_target_recipe(), TargetData(random_stream(), random_stream(100), random_stream(50))
    whole = train_target(recipe, data, tmp_path / "whole", compiled=False)
    with pytest.raises(KilledError):
        train_target(
            recipe,
            data,
            tmp_path / "parts",
            compiled=False,
            checkpoint_interval_s=0,
            on_checkpoint=interrupt_at(3),
        )
    resumed = train_target(recipe, data, tmp_path / "parts", compiled=False)
    assert_same_weights(whole, resumed)
    with pytest.raises(ModelError, match="other settings"):
        train_target(TargetRecipe(), data, tmp_path / "parts", compiled=False)


def test_a_resumed_head_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    recipe, target, stream = tiny_draft_recipe(), Target(tiny_target()), random_stream()
    whole = train_head(target, stream, recipe, tmp_path / "whole", tmp_path / "head")
    train_head(target, stream, recipe, tmp_path / "parts", tmp_path / "head", stop_after=4)
    assert_same_weights(whole, train_head(target, stream, recipe, tmp_path / "parts", tmp_path / "head"))
    with pytest.raises(ModelError, match="other settings"):
        train_head(target, stream[::-1], recipe, tmp_path / "parts", tmp_path / "head")


def test_the_token_loss_is_the_cross_entropy_against_the_whole_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lm_head, truth, guess = (torch.randn(n, 16, generator=generator) for n in (300, 40, 40))
    plain, ours = guess.clone().requires_grad_(), guess.clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(plain @ lm_head.T, (truth @ lm_head.T).softmax(-1))
    wanted.backward()
    monkeypatch.setattr("flowspec.train.losses.MAX_LOGITS", 300 * 7)  # so that it is taken in parts
    expected, true_best = expected_rows(truth, lm_head)
    sums, best = log_partition(ours, lm_head)
    found = sums.mean() - (ours * expected).sum(-1).mean()
    found.backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours.grad, plain.grad)
    assert torch.equal(true_best, (truth @ lm_head.T).argmax(-1))
    assert torch.equal(best, (guess @ lm_head.T).argmax(-1))


def test_generated_windows_go_on_from_the_text_and_are_kept(tmp_path: Path) -> None:
    recipe, target, stream = tiny_draft_recipe(), Target(tiny_target()), random_stream()
    rows = generate_windows(target, stream, recipe, tmp_path)
    assert rows.shape == (4, recipe.context_len + 1)
    assert (rows[:2, : recipe.prompt_len] == corpus.windows(stream, recipe.prompt_len, 0, 2, recipe.seed + 2)).all()
    greedy = torch.from_numpy(rows[:1, :-1]).long()
    for end in range(recipe.prompt_len, recipe.context_len):
        logits = target.model(input_ids=greedy[:, :end]).logits[0, -1]
        assert logits[rows[0, end]] >= logits.max() - 0.02  # bfloat16 may break a tie otherwise
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert (generate_windows(target, stream, recipe, tmp_path) == rows).all()
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_a_broken_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "draft.pt").write_bytes(b"half a file")
    with pytest.raises(ModelError, match="delete it to start again"):
        train_head(Target(tiny_target()), random_stream(), tiny_draft_recipe(), tmp_path, tmp_path / "head")


def test_train_draft_makes_a_head_for_a_target_of_another_family(tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "target")
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "target", 64)
    text = tmp_path / "text.txt"
    text.write_text("some words to train on\n" * 20)
    out = tmp_path / "draft"
    train_draft(tmp_path / "target", out, [text], tiny_draft_recipe(), tmp_path / "work")
    head = EagleHead.load(out, torch.zeros(300, 16), "float32", "cpu")
    assert head.config.to_dict()["rope_parameters"]["rope_theta"] == 5000.0
    assert len(head.config.hit_rates) == 8 and all(0 <= rate <= 1 for rate in head.config.hit_rates)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]

    with pytest.raises(ModelError, match="director"):
        train_draft(tmp_path / "nothing", out, [text], tiny_draft_recipe(), tmp_path / "work")


def test_unrolled_levels_are_what_drafting_computes() -> None:
    target = tiny_target()
    head = tiny_head(target)
    token_ids = torch.from_numpy(random_stream(9)).long()[None]
    features = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(2))
    levels = unroll(head, token_ids, features[:, :-1], 3)
    # Drafting by hand with token 5 as root: true rows up to its own, then rows fed with what was predicted.
    cache = DynamicCache()
    predicted = head(token_ids[:, 1:6], features[:, :5], torch.arange(5)[None], causal_mask(5), cache)[:, -1:]
    torch.testing.assert_close(predicted, levels[0][:, 4:5])
    for level in (1, 2):
        token, position = token_ids[:, 5 + level : 6 + level], torch.tensor([[4 + level]])
        mask = torch.ones(1, 1, 1, 5 + level, dtype=torch.bool)
        predicted = head(token, predicted, position, mask, cache)
        torch.testing.assert_close(predicted, levels[level][:, 4 + level : 5 + level])


def test_a_tree_of_single_children_is_the_greedy_draft() -> None:
    target = tiny_target()
    head, lm_head = tiny_head(target), torch.nn.Linear(16, 300, bias=False).requires_grad_(False)
    token_ids = torch.from_numpy(random_stream(6)).long()[None]
    features = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(2))

    def root_feature(cache: DynamicCache) -> torch.Tensor:
        return head(token_ids[:, 1:], features[:, :-1], torch.arange(5)[None], causal_mask(5), cache)[0, -1]

    cache, drafted = DynamicCache(), list[int]()
    feature = root_feature(cache)
    for level in range(4):
        drafted.append(int(lm_head(feature).argmax()))
        mask = torch.ones(1, 1, 1, 6 + level, dtype=torch.bool)
        token, position = torch.tensor([drafted[-1:]]), torch.tensor([[5 + level]])
        feature = head(token, feature[None, None], position, mask, cache)[0, -1]
    cache = DynamicCache()
    tree = draft_tree(head, lm_head, cache, root_feature(cache), 5, EvaluationConfig(top_k=1, depth=4, size=5))
    assert list(tree) == list(zip([-1, 0, 1, 2], drafted, strict=True))


def test_evaluation_counts_every_new_token_once() -> None:
    target = tiny_target()
    config = EvaluationConfig(num_prompts=2, prompt_len=8, num_new_tokens=12, num_levels=3, loss_window_len=16)
    result = evaluate(target, tiny_head(target), random_stream(), config)
    assert 1.0 <= result.greedy.tokens_per_pass <= config.depth + 1
    assert len(result.sampled.hit_rates) == 3
    assert result.held_out_loss == pytest.approx(np.log(300), abs=0.2)  # an untrained model knows nothing
    assert "tokens per target pass" in result.to_markdown()


def test_the_demo_build_runs_through(tmp_path: Path) -> None:
    demo.build(demo.DemoBuild.smoke(), tmp_path / "work", tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert {"target/model.safetensors", "target/MODEL_CARD.md", "draft/MODEL_CARD.md", "evaluation.json"} <= names


def test_a_model_card_names_the_command_that_was_run() -> None:
    assert demo.command_of(demo.DemoBuild()) == demo.COMMAND
    short = demo.DemoBuild(draft=DraftRecipe(num_tokens=1000))
    assert demo.command_of(short) == f"{demo.COMMAND} --draft-tokens 1000"


def test_the_shipped_pair_loads_and_is_small() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_DEMO_BYTES
    target = AutoModelForCausalLM.from_pretrained(DEMO / "target", dtype=torch.float32, local_files_only=True)
    assert isinstance(target.config, LlamaConfig)
    head = EagleHead.load(DEMO / "draft", embedding_of(target), "float32", "cpu")
    token_ids = torch.tensor([[1, 2, 3]])
    features = target.model(input_ids=token_ids).last_hidden_state
    assert head(token_ids, features, torch.arange(3)[None], causal_mask(3)).isfinite().all()
    assert (DEMO / "target" / "generation_config.json").is_file()


def test_the_shipped_tokenizer_returns_every_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "target", local_files_only=True)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == FastTokenizer.from_file(str(DEMO / "target" / "tokenizer.json")).token_to_id(
        "<|endoftext|>"
    )


def test_saving_leaves_the_tied_head_out(tmp_path: Path) -> None:
    target = tiny_target()
    assert isinstance(target, LlamaForCausalLM)
    save_target(target, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    torch.testing.assert_close(loaded.lm_head.weight, target.lm_head.weight, atol=1e-4, rtol=1e-3)
