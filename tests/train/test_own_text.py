"""The text that a target writes for its draft head: conversations by its template, and heads trained on them alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaConfig, LlamaForCausalLM

from flowspec.chat_template import ChatTemplate
from flowspec.errors import UsageError
from flowspec.model.backends import open_checkpoint
from flowspec.model.eagle_head import EagleHead
from flowspec.train.draft import CHAT_RECIPE, recipe_for, train_draft
from flowspec.train.frozen_target import load_model
from flowspec.train.hints import HintRecipe
from flowspec.train.own_text import MAX_QUESTION_LEN, Conversations, converse
from flowspec.train.windows import DraftRecipe
from tiny_gguf import write_text_gguf
from tiny_models import make_text_checkpoint, make_text_tokenizer

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TINY = DraftRecipe(
    num_tokens=4 * 64, batch_tokens=64, context_len=32, prompt_len=8, num_generated_tokens=64, generation_batch=2
)
PLAN = Conversations([5, 6], [2, 7, 8], [2, 9], [2], [[10, 11]], [[12]])


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_what_stands_between_turns_comes_from_the_template() -> None:
    tokenizer = make_text_tokenizer("byte-level")
    tokenizer.chat_template = CHATML
    begin, to_answer, to_question = ChatTemplate(tokenizer, "tiny").between_turns()
    assert (begin, to_answer, to_question) == ("<|user|>", "</s>\n<|assistant|>", "</s>\n<|user|>")
    tokenizer.chat_template = "always the same"
    with pytest.raises(UsageError, match="leaves out what is said"):
        ChatTemplate(tokenizer, "tiny").between_turns()


def test_conversations_follow_the_plan_and_answers_are_the_models_own() -> None:
    model, length = tiny_model(), 160
    beginnings = [([10, 11], False), ([], False), ([12, 20, 21, 22, 23, 24, 25], True)]
    rows = converse(model, PLAN, beginnings, length, torch.zeros(3), torch.Generator().manual_seed(0))
    assert rows.shape == (3, length) and (rows[:, :2] == torch.tensor(PLAN.begin)).all()
    assert rows[0, 2:4].tolist() == [10, 11]
    assert rows[2, 2:12].tolist() == [12, 20, 21, 22, 23, 24, 25, *PLAN.to_answer]
    assert rows[2, 12:].tolist() != rows[0, 12:].tolist()
    answers = PLAN.answers(rows)
    assert answers.any(1).all() and not answers[:, :5].any()
    for row, is_answer in zip(rows, answers, strict=True):
        questions = "".join("a" if flag else "q" for flag in is_answer.tolist()).split("a")
        assert max(map(len, questions)) <= MAX_QUESTION_LEN + 8  # and what stands around it
        with torch.inference_mode():
            logits = model(input_ids=row[None]).logits[0]  # by transformers' own attention
        chosen = logits[:-1].gather(-1, row[1:, None])[:, 0]
        assert (chosen >= logits[:-1].max(-1).values - 1e-4)[is_answer[1:]].all()  # greedy


def test_the_seed_decides_about_beginnings() -> None:
    passages = np.arange(1000, dtype=np.int32)
    found = PLAN.beginnings(200, passages, 3)
    assert found == PLAN.beginnings(200, passages, 3) != PLAN.beginnings(200, passages, 4)
    kinds = {(ids[0] if ids else None, is_whole) for ids, is_whole in found}
    assert kinds == {(None, False), (10, False), (12, True)}
    assert not any(is_whole for _, is_whole in PLAN.beginnings(200, np.empty(0, np.int32), 3))


def test_a_gguf_chat_model_gets_a_head_without_any_given_text(tmp_path: Path) -> None:
    path = tmp_path / "chat.gguf"
    write_text_gguf(path, Kind.Q8_0, num_hidden_layers=2)
    assert recipe_for(path, 1000).generated_share == CHAT_RECIPE.generated_share == 1
    assert load_model(path, torch.float32).lm_head.weight.shape[0] == open_checkpoint(path).config.vocab_size
    recipe = recipe_for(path, 256, batch_tokens=64)
    assert (recipe.num_generated_tokens, recipe.unroll_len) == (64, CHAT_RECIPE.unroll_len)
    out = tmp_path / "draft"
    tiny = replace(TINY, generated_share=1.0)
    train_draft(path, out, [], tiny, tmp_path / "work", hints=HintRecipe(rank=2, num_tokens=64, batch_tokens=64))
    config = open_checkpoint(path).config
    head = EagleHead.load(out, torch.zeros(config.vocab_size, config.hidden_size), "float32", "cpu")
    assert len(head.config.hit_rates) == 8 and all(0 <= rate <= 1 for rate in head.config.hit_rates)
    assert (out / "hints.safetensors").is_file()

    with pytest.raises(UsageError, match="leave out --generated-share"):
        train_draft(path, out, [], TINY, tmp_path / "work")


def test_a_model_without_a_template_needs_text(tmp_path: Path) -> None:
    directory = make_text_checkpoint(tmp_path / "plain")
    assert recipe_for(directory, 1000) == DraftRecipe(num_tokens=1000)
    with pytest.raises(UsageError, match="--data"):
        train_draft(directory, tmp_path / "draft", [], TINY, tmp_path / "work")
