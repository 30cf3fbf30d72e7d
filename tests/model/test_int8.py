"""int8 drafts: how far their weights are off, what stays as it was, and that no token depends on them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig

from flowspec import LLM, SamplingParams
from flowspec.config import LinkConfig
from flowspec.errors import UsageError
from flowspec.model.eagle_head import EagleHead
from flowspec.model.int8 import Int8Linear, Int8TargetHead, quantize_head, quantize_rows

VOCAB, HIDDEN = 48, 16
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_head(**changes: Any) -> EagleHead:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return EagleHead(LlamaConfig(**(sizes | changes)), torch.randn(VOCAB, HIDDEN)).eval().requires_grad_(False)


@given(
    seed=st.integers(0, 2**32),
    num_rows=st.integers(1, 9),
    exponent=st.integers(-20, 10),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_weight_is_within_half_a_scale_of_its_row(
    seed: int, num_rows: int, exponent: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(num_rows, 33, generator=generator) * 2.0**exponent).to(dtype)
    quantised, scales = quantize_rows(weight)
    assert quantised.dtype == torch.int8 and scales.dtype == torch.bfloat16
    errors = (weight.float() - quantised.float() * scales.float()[:, None]).abs().amax(dim=1)
    assert (errors <= scales.float() * 0.5001).all()
    assert (scales.float() <= weight.float().abs().amax(dim=1) / 126).all(), "the whole range is used"


def test_rows_of_zeros_stay_zeros() -> None:
    quantised, scales = quantize_rows(torch.zeros(3, 16))
    assert not quantised.any() and not scales.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_computes_with_the_quantised_weights_in_any_dtype(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias, rows = torch.randn(33, 48), torch.randn(33), torch.randn(2, 5, 48)
    layer = Int8Linear(weight.to(dtype), bias.to(dtype) if has_bias else None)
    result = layer(rows.to(dtype))
    assert result.shape == (2, 5, 33) and result.dtype == dtype
    expected = rows @ (layer.weight.float() * layer.scales.float()[:, None]).mT + (bias if has_bias else 0)
    torch.testing.assert_close(result.float(), expected, atol=0.02 * expected.std().item(), rtol=0.02)
    assert torch.equal(layer(rows[0, 0].to(dtype)), layer(rows[0, :1].to(dtype))[0]), "a lone row will do"


def test_the_heads_projections_are_replaced_and_nothing_else() -> None:
    head = make_head(qkv_bias=True)
    before = copy.deepcopy(head)
    quantize_head(head)
    names = {name for name, module in head.named_modules() if isinstance(module, Int8Linear)}
    assert names == {name for name, module in before.named_modules() if isinstance(module, nn.Linear)}
    assert len(names) == 8 and not any(isinstance(module, nn.Linear) for module in head.modules())
    kept, old = head.state_dict(), before.state_dict()
    assert all(torch.equal(kept[name], old[name]) for name in old if name.endswith("bias") or "norm" in name)
    assert torch.equal(head.embedding, before.embedding)

    token_ids, features = torch.randint(VOCAB, (1, 6)), torch.randn(1, 6, HIDDEN)
    inputs = (token_ids, features, torch.arange(6)[None], torch.ones(6, 6, dtype=torch.bool).tril()[None, None])
    difference = (head(*inputs) - before(*inputs)).norm() / before(*inputs).norm()
    assert 0 < difference < 0.03


def test_the_int8_logits_order_tokens_as_the_target_does() -> None:
    weight, hidden = torch.randn(VOCAB, HIDDEN), torch.randn(200, HIDDEN)
    own, full = Int8TargetHead(weight).logits(hidden), hidden @ weight.mT
    assert (own.argmax(-1) == full.argmax(-1)).float().mean() > 0.95


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_is_that_of_plain_decoding_and_most_guesses_stay_right(temperature: float) -> None:
    params = SamplingParams(max_tokens=48, temperature=temperature, seed=3 if temperature else None)
    with LLM("demo", stages=2, in_process=True) as llm:
        plain, full = llm.generate(PROMPT, params, schedule="ar"), llm.generate(PROMPT, params)
    with LLM("demo", stages=2, in_process=True, draft_dtype="int8") as llm:
        int8 = llm.generate(PROMPT, params)
    assert int8.token_ids == full.token_ids == plain.token_ids
    assert int8.stats.draft == "eagle" and int8.stats.accepted > 0.8 * full.stats.accepted


def test_widths_that_the_kernel_would_read_beyond_are_refused() -> None:
    with pytest.raises(UsageError, match="multiples of 16, but this head has a matrix with 24 columns"):
        quantize_head(make_head(intermediate_size=24))


def test_a_torch_without_the_kernel_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("Could not run '_weight_int8pack_mm'\nand much more")

    monkeypatch.setattr(torch.ops.aten, "_weight_int8pack_mm", refuse)
    with pytest.raises(UsageError, match=r"cannot run int8 drafts on cpu \(Could not run '_weight_int8pack_mm'\); use"):
        Int8Linear(torch.randn(4, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_dtype": "int2"}, "draft_dtype is 'int2'; it must be 'auto' or 'int8' or 'int4'"),
        ({"draft_dtype": "int8", "draft": "ngram"}, "int8 is for draft heads and smaller models, and the draft is ngr"),
        ({"draft_dtype": "int8", "draft": "none"}, "int8 is for draft heads and smaller models, and the draft is none"),
        ({"draft_dtype": "int4"}, "int4 is for smaller models as draft, and the draft is a head; name another draft"),
        ({"draft_dtype": "int4", "draft": "ngram"}, "int4 is for smaller models as draft, and the draft is ngram"),
    ],
)
def test_impossible_dtypes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LLM("demo", in_process=True, **options)


def test_an_int8_wire_needs_a_wire() -> None:
    with pytest.raises(UsageError, match="there is no wire in one process"):
        LLM("demo", in_process=True, link=LinkConfig(int8_wire=True))
