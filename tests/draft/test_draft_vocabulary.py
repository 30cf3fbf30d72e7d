"""A draft that guesses some of the target's tokens alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowspec.core import SamplingParams
from flowspec.draft.catalogue import load_draft
from flowspec.draft.eagle import EagleSource
from flowspec.errors import ModelError
from flowspec.llm import LLM
from flowspec.model.backends import load_head, open_checkpoint
from flowspec.model.eagle_head import EagleHead
from flowspec.train.draft import MAX_VOCABULARY, draft_vocabulary, frequencies_of
from flowspec.train.frozen_target import head_config
from tiny_gguf import write_text_gguf

FEW = torch.arange(3, 300, 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with a draft head beside it that guesses every fifth token."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_text_gguf(path)
    config = open_checkpoint(path).config
    torch.manual_seed(1)
    head = EagleHead(head_config(config), torch.zeros(config.vocab_size, config.hidden_size))
    head.token_ids = FEW[config.vocab_size > FEW]
    head.save(path.parent / "draft")
    return path


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_the_draft_guesses_these_tokens_as_the_target_would(model: Path, weights: Any) -> None:
    checkpoint = open_checkpoint(model)
    head = load_head(checkpoint, "float32", weights, "cpu")
    source = load_draft(model.parent / "draft", checkpoint, head, "float32", "cpu", weights=weights)
    assert isinstance(source, EagleSource) and isinstance(source.head, EagleHead)
    assert source.head.token_ids is not None
    rows = torch.randn(4, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(0))
    whole, few = head.logits(rows), source.lm_head.logits(rows)
    kept = source.head.token_ids
    torch.testing.assert_close(few[:, kept], whole[:, kept], atol=1e-5, rtol=1e-5)
    others = torch.ones(checkpoint.vocab_size, dtype=torch.bool).index_fill_(0, kept, False)
    assert few.shape == whole.shape and (few[:, others] == -torch.inf).all()
    is_float = any(isinstance(module, torch.nn.Linear) for module in source.head.modules())
    assert is_float == (weights == "float")  # as the target is


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_text_is_that_of_plain_decoding(model: Path, temperature: float) -> None:
    texts: list[Any] = []
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=3, ignore_eos=True)
    for schedule, draft in (("ar", "none"), ("flow", "auto"), ("serial", "auto")):
        with LLM(str(model), draft=draft, schedule=schedule, stages=2, in_process=True) as llm:
            texts.append(llm.generate("hello world", params).token_ids)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 24


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"token_ids": torch.tensor([1, 5, 5])}, "must ascend"),
        ({"token_ids": torch.tensor([-1, 5])}, "must ascend"),
        ({"token_ids": torch.tensor([1, 10**6])}, "lie in a vocabulary of"),
        ({"token_ids": torch.zeros(2, 2)}, "holds no list of token_ids"),
        ({"token_ids": torch.zeros(0, dtype=torch.int64)}, "holds no list of token_ids"),
        ({"other": torch.tensor([1])}, "holds no list of token_ids"),
    ],
)
def test_a_broken_vocabulary_is_named(model: Path, tmp_path: Path, tensors: Any, message: str) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model.parent / "draft" / name).read_bytes())
    save_file(tensors, tmp_path / "vocabulary.safetensors")
    checkpoint = open_checkpoint(model)
    with pytest.raises(ModelError, match=message):
        EagleHead.load(tmp_path, checkpoint.load_embedding("float32", "cpu"), "float32", "cpu")


def test_frequent_tokens_are_worth_a_guess_and_early_ones() -> None:
    text = np.array([[49_000, 5], [49_000, 40_000]], dtype=np.int32)
    ids = draft_vocabulary(frequencies_of(text, 50_000))
    assert ids is not None and len(ids) == MAX_VOCABULARY
    assert ids.tolist() == [*range(MAX_VOCABULARY - 2), 40_000, 49_000]
    assert draft_vocabulary(frequencies_of(np.zeros((1, 4), np.int32), 2048)) is None
