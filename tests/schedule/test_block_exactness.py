"""With a head that guesses blocks, every schedule and every number of stages gives the tokens of plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import tiny_peagle
from flowspec.draft.base import BlockDraft
from flowspec.draft.dflash import DFlashSource
from flowspec.schedule.catalogue import AUTO, SCHEDULES
from pump import Pump, prompt_of
from tapped import NUM_TOKENS, SMALL, Plain, check_that_a_kept_prompt_is_taken_over, in_turn, params_at
from tiny_dflash import DFlashForm, Reference, make_weights
from tiny_peagle import PEagleForm

BLOCKS = ("dflash", "peagle", "dflash2", "dspark")
PEAGLE = PEagleForm(num_levels=4)
FORM = DFlashForm(block_size=5)  # of the checkpoints: blocks that end within a tree


@pytest.mark.parametrize(
    ("draft", "schedule", "num_stages", "temperature"),
    [
        *(("dflash", *rung) for rung in in_turn([*(name for name in SCHEDULES if name != "ar"), AUTO], (1, 3))),
        *((draft, schedule, 3, at) for schedule, draft, at in in_turn(["flow", "serial", "pipedec"], BLOCKS[1:])),
    ],
)
def test_tokens_are_those_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path], plain: Plain, draft: str, schedule: str, num_stages: int, temperature: float
) -> None:
    pump = Pump(checkpoint_dir("qwen3"), num_stages, draft, schedule, pipeline=SMALL)
    generation = pump.submit(prompt_of(20), params_at(temperature))
    pump.run()
    assert generation.output_ids == plain(temperature, 20, NUM_TOKENS)
    assert generation.stats.draft_passes and generation.stats.drafted


@pytest.mark.parametrize(("draft", "prompt_len"), [("dflash", 1), ("dflash", 8), ("peagle", 1), ("dspark", 1)])
def test_prompts_of_any_length_are_exact(
    checkpoint_dir: Callable[[str], Path], plain: Plain, draft: str, prompt_len: int
) -> None:
    pump = Pump(checkpoint_dir("qwen3"), 3, draft, pipeline=SMALL)
    generation = pump.submit(prompt_of(prompt_len), params_at(0.0, 12))
    pump.run()
    assert generation.output_ids == plain(0.0, prompt_len, 12)


@settings(max_examples=10)
@given(st.randoms(use_true_random=False), st.sampled_from(BLOCKS), st.sampled_from(["flow", "lockstep", "pipedec"]))
def test_any_order_of_events_gives_the_same_tokens(
    checkpoint_dir: Callable[[str], Path], plain: Plain, random: Random, draft: str, schedule: str
) -> None:
    pump = Pump(checkpoint_dir("qwen3"), 3, draft, schedule, pipeline=SMALL)
    generation = pump.submit(prompt_of(9), params_at(0.8, 12))
    pump.run(random.randrange)
    assert generation.output_ids == plain(0.8, 9, 12)


@pytest.mark.parametrize("draft", ["dflash", "peagle", "dspark"])
def test_a_prompt_that_was_kept_is_taken_over_with_its_features(
    checkpoint_dir: Callable[[str], Path], draft: str
) -> None:
    check_that_a_kept_prompt_is_taken_over(checkpoint_dir("qwen3"), draft)


class Recorder:
    """A head, and what each of its blocks was asked for and gave: anchor's token, text before it, rows."""

    def __init__(self, head: Any) -> None:
        self._head = head
        self.num_levels, self.open_cache, self.read = head.num_levels, head.open_cache, head.read
        self.min_text = head.min_text
        self.blocks: list[tuple[int, int, torch.Tensor]] = []

    def guess(self, token_id: int, cache: Any) -> torch.Tensor:
        rows = self._head.guess(token_id, cache)
        self.blocks.append((token_id, cache.num_rows, rows))
        return rows


@pytest.mark.parametrize(
    ("draft", "schedule"), [("dflash", "flow"), ("dflash", "serial"), ("dflash", "lockstep"), ("peagle", "flow")]
)
def test_every_block_is_that_of_the_text_before_its_anchor(
    checkpoint_dir: Callable[[str], Path], draft: str, schedule: str
) -> None:
    """Whatever was pruned under way, its guesses are those of the published arithmetic on transformers' own streams."""
    directory = checkpoint_dir("llama")
    pump = Pump(directory, 3, draft, schedule, pipeline=SMALL)
    source: Any = pump.driver._source
    source.head = recorder = Recorder(source.head)
    prompt = prompt_of(20)
    generation = pump.submit(prompt, params_at(0.8))
    pump.run()
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)
    text = [*prompt, *generation.output_ids]
    states = model(torch.tensor([text]), output_hidden_states=True).hidden_states
    own = model.model.embed_tokens.weight, model.lm_head.weight
    dflash = Reference(FORM, make_weights(FORM, seed=1), *own)
    peagle = tiny_peagle.Reference(PEAGLE, tiny_peagle.make_weights(PEAGLE, seed=1), *own)
    assert len(recorder.blocks) > 3
    for token_id, num_rows, rows in recorder.blocks:
        assert text[num_rows] == token_id
        streams = [states[layer][0][:num_rows] for layer in FORM.tapped]
        if draft == "dflash":
            expected = dflash.logits(streams, token_id)
        else:
            expected = peagle.guesses(streams, text[1 : num_rows + 1])
        torch.testing.assert_close(source.lm_head.logits(rows), expected, atol=2e-3, rtol=2e-3)


def test_flow_goes_on_with_the_last_block_where_nobody_foresaw_the_root(
    checkpoint_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pump = Pump(checkpoint_dir("qwen3"), 3, "dflash", pipeline=SMALL)
    source = pump.driver._source
    assert isinstance(source, DFlashSource) and source.block_len == 4
    generation = pump.submit(prompt_of(20), params_at(0.8))
    draft: Any = generation._draft
    assert isinstance(draft, BlockDraft)
    rereads: list[tuple[int, int]] = []
    original = draft.reread

    def reread(tree: Any) -> None:
        original(tree)
        rereads.append((int(tree.staleness[0]), len(np.flatnonzero(tree.parents == 0))))

    monkeypatch.setattr(draft, "reread", reread)
    pump.run()
    assert rereads and all(2 <= level <= 4 and num for level, num in rereads)
