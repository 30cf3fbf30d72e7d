"""Training block heads: what is trained is what the published arithmetic computes, and it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowspec import LLM, SamplingParams
from flowspec.errors import UsageError
from flowspec.model.draft_files import DraftFiles
from flowspec.model.dspark_format import DSparkFormat
from flowspec.model.dspark_head import DSparkHead
from flowspec.train.block import (
    BlockRecipe,
    BlockShape,
    BlockTrainee,
    anchors_at,
    block_config,
    learn_blocks,
    level_rates,
    train_block_head,
)
from flowspec.train.draft import train_draft
from flowspec.train.frozen_target import Target
from flowspec.train.windows import DraftRecipe
from tiny_models import VOCAB_SIZE, make_checkpoint, random_stream, write_target_and_text

SHAPE = BlockShape(block_size=4, num_layers=2, num_taps=2, rank=8)
WINDOWS = DraftRecipe(num_tokens=40 * 64, batch_tokens=64, context_len=32, generated_share=0.0, prompt_len=8)
RECIPE = BlockRecipe(WINDOWS, SHAPE, anchors=8)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.open(make_checkpoint(tmp_path_factory.mktemp("target"), "qwen3"))


def untrained(target: Target) -> BlockTrainee:
    torch.manual_seed(3)
    head = BlockTrainee(block_config(target.config, SHAPE), SHAPE, SHAPE.tapped(6), target.embedding)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_((torch.randn_like(parameter) * 0.2).half())
    return head.eval()


@torch.inference_mode()
def test_the_trained_arithmetic_is_that_of_drafting(target: Target, tmp_path: Path) -> None:
    """Row by row, at every anchor of a text, through the published form on disk."""
    trainee = untrained(target)
    trainee.save(tmp_path)
    form = DSparkFormat.read(DraftFiles(tmp_path), 6, 32, VOCAB_SIZE)
    assert form.layer_ids == tuple(trainee.tapped) and form.num_levels == 4 and form.has_confidence
    head = DSparkHead.load(form, target.embedding, "float32", "cpu")
    assert isinstance(head, DSparkHead)
    token_ids = torch.arange(3, 23)[None]
    streams, _ = target.tapped_streams(token_ids, trainee.tapped)
    anchors = torch.arange(1, 15)[None]
    rows = trainee(streams[:, :-1], token_ids, anchors)[0]
    above = trainee.tokens_above(token_ids, anchors)[0]
    latents = trainee.markov_head.markov_w1(above)
    rates = torch.nn.functional.logsigmoid(trainee.confidence_head.proj(torch.cat((rows, latents), dim=-1)))[..., 0]
    sums = streams[0] @ trainee.fc.weight.T
    for place, anchor in enumerate(anchors[0].tolist()):
        cache = head.open_cache()
        head.read(sums[:anchor], cache, token_ids[0, 1 : anchor + 1].tolist())
        found = head.guess(int(token_ids[0, anchor]), cache)
        assert torch.allclose(found, rows[place], atol=2e-4)
        behind, _, told = head.behind(found, above[place], head.first_states(4))
        assert torch.allclose(behind, latents[place]) and torch.allclose(told, rates[place], atol=2e-3)


def test_it_learns_and_goes_on_where_it_was_interrupted(target: Target, tmp_path: Path) -> None:
    tokens = random_stream(36)  # nearly the same window, over and over
    recipe = replace(RECIPE, windows=replace(WINDOWS, learning_rate=4e-4))
    train_block_head(target, tokens, recipe, tmp_path / "work", tmp_path / "out", stop_after=25)
    resumed = train_block_head(target, tokens, recipe, tmp_path / "work", tmp_path / "out")
    whole = train_block_head(target, tokens, recipe, tmp_path / "other", tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    rows, anchors = torch.from_numpy(tokens[:33]).long()[None].repeat(2, 1), anchors_at(RECIPE, 99)
    before, after = (
        learn_blocks(head.requires_grad_(), target, recipe, rows, anchors) for head in (untrained(target), whole)
    )
    assert after["accepted"] > before["accepted"] + 0.1 and after["top1"] > before["top1"] + 0.2


@torch.inference_mode()
def test_rates_are_shares_of_right_guesses(target: Target) -> None:
    """Of a head that always guesses one token, in a text where every third token is that one."""
    head = untrained(target)
    head.markov_head.markov_w1.weight.fill_(1.0)
    head.markov_head.markov_w2.weight.zero_()[7] = 1e4
    text = torch.tensor([[1, 2, 7] * 8])
    rates = level_rates(head, target, text, torch.ones_like(text, dtype=torch.bool))
    assert rates == pytest.approx([1 / 3] * 4, abs=0.06)
    assert (
        level_rates(head, target, text, text == 7) == [1.0] * 4 and level_rates(head, target, text, text == 5)[0] == 0
    )


def test_a_trained_head_drafts(tmp_path: Path) -> None:
    model, text = write_target_and_text(tmp_path)
    recipe = replace(WINDOWS, num_tokens=256, generated_share=0.5, generation_batch=4)
    train_draft(model, model / "draft", [text], recipe, tmp_path / "work", shape=SHAPE)
    params = SamplingParams(16, temperature=0.8, seed=2, ignore_eos=True)
    with LLM(model, stages=2, in_process=True, draft_check="off") as llm:
        drafted = llm.generate([1, 4, 2, 3, 9], params, schedule="flow")
        plain = llm.generate([1, 4, 2, 3, 9], params, schedule="ar")
    assert drafted.token_ids == plain.token_ids and drafted.stats.drafted > 0 and drafted.stats.draft == "dspark"


def test_anchors_leave_room_for_their_blocks() -> None:
    anchors = anchors_at(RECIPE, 7)
    assert anchors.shape == (2, 8) and torch.equal(anchors, anchors_at(RECIPE, 7))
    assert int(anchors.min()) >= 1 and int(anchors.max()) + SHAPE.block_size <= WINDOWS.context_len
    assert all(len(set(row.tolist())) == 8 for row in anchors) and not torch.equal(anchors, anchors_at(RECIPE, 8))


def test_layers_to_read_are_spread_over_the_target() -> None:
    assert BlockShape().tapped(30) == [2, 14, 27] and BlockShape(num_taps=1).tapped(6) == [2]
    assert BlockShape(num_taps=5).tapped(36) == [2, 10, 18, 25, 33] and BlockShape().tapped(7) == [2, 3, 4]
    assert BlockShape().tapped(6) == [1, 3, 5] and BlockShape().tapped(3) == [1, 2] and BlockShape().tapped(2) == [1]
    with pytest.raises(UsageError, match="a single layer"):
        BlockShape().tapped(1)


def test_wrong_shapes_are_refused(target: Target, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="block_size is 1; it must be at least 2"):
        BlockShape(block_size=1)
    stream = random_stream()
    long = replace(RECIPE, shape=replace(SHAPE, block_size=20))
    with pytest.raises(UsageError, match="blocks of 20 do not fit into windows of 32"):
        train_block_head(target, stream, long, tmp_path, tmp_path)
