"""Draft heads on compiled kernels: the guesses of torch's layers, for any number of rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from flowspec import LLM, SamplingParams
from flowspec.draft.catalogue import load_draft
from flowspec.draft.eagle import EagleSource
from flowspec.model.backends import load_head, open_checkpoint
from flowspec.model.eagle_head import EagleHead
from flowspec.model.mtp_head import MtpHead, MtpLayers
from tiny_models import VOCAB_SIZE, make_checkpoint, make_draft_head

pytest.importorskip("numba")

from flowspec.model.compiled_head import KernelLinear, compile_head
from flowspec.model.compiled_stage import CompiledHead

HIDDEN = 96
SIZES: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is wide enough for floats on kernels, with a head."""
    directory = make_checkpoint(tmp_path_factory.mktemp("wide"), "llama", **SIZES)
    make_draft_head(directory / "draft", hidden_size=512)
    return directory


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-5), (8, 0.04)])
def test_a_pass_gives_what_it_gave(precision: Any, most: float) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 40}
    config = LlamaConfig(vocab_size=50, hidden_size=HIDDEN, **sizes)
    head = EagleHead(config, torch.randn(50, HIDDEN), {"fc", "layers.0.self_attn.q_proj"}).eval()
    compiled = copy.deepcopy(head)
    compile_head(compiled, precision)
    kinds = {name: type(module) for name, module in head.named_modules() if isinstance(module, nn.Linear)}
    assert len(kinds) == 8 and all(isinstance(compiled.get_submodule(name), KernelLinear) for name in kinds)
    given = torch.randint(50, (1, 6)), torch.randn(1, 6, HIDDEN), torch.arange(6)[None]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    with torch.inference_mode():
        found, wanted = compiled(*given, mask), head(*given, mask)
        assert 0 < (found - wanted).norm() < most * wanted.norm()
        few = compiled(*(each[:, :2] for each in given), mask[..., :2, :2])
    torch.testing.assert_close(few, found[:, :2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("draft_dtype", "precision"), [("auto", "float32"), ("int8", 8)])
def test_a_wide_models_head_is_on_them(wide: Path, draft_dtype: Any, precision: Any) -> None:
    checkpoint = open_checkpoint(wide)
    head = load_head(checkpoint, "float32", "float", "cpu")
    source = load_draft(wide / "draft", checkpoint, head, "float32", "cpu", draft_dtype=draft_dtype)
    assert isinstance(source, EagleSource) and isinstance(source.head, EagleHead)
    assert isinstance(source.head.fc, KernelLinear) and isinstance(source.lm_head, CompiledHead)
    assert (source.lm_head is head) == (precision == "float32")  # nothing is held twice
    rows = torch.randn(5, 512)
    error = (source.lm_head.logits(rows) - head.logits(rows)).norm() / head.logits(rows).norm()
    assert error < 0.03 and head.logits(rows).shape == (5, VOCAB_SIZE)


@pytest.mark.parametrize(("draft_dtype", "most"), [("auto", 1e-5), ("int8", 0.06)])
def test_a_wide_models_mtp_layer_is_on_them(tmp_path: Path, draft_dtype: Any, most: float) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, "mimo", **SIZES))
    head, layers = load_head(checkpoint, "float32", "float", "cpu"), MtpLayers.read(checkpoint)
    source = load_draft(layers, checkpoint, head, "float32", "cpu", draft_dtype=draft_dtype)
    assert isinstance(source, EagleSource) and isinstance(source.head, MtpHead)
    assert isinstance(source.head.input_proj, KernelLinear) and isinstance(source.lm_head, CompiledHead)
    assert not any(isinstance(module, nn.Linear) for module in source.head.modules())
    plain = MtpHead.load(layers, checkpoint, source.head.embedding, "float32", "cpu")
    torch.manual_seed(0)
    given = torch.arange(6)[None], plain.features_of(torch.randn(6, 512))[None], torch.arange(6)[None]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    with torch.inference_mode():
        found, wanted = source.head(*given, mask), plain(*given, mask)
    assert 0 < (found - wanted).norm() < most * wanted.norm()


@pytest.mark.parametrize("draft_dtype", ["auto", "int8"])
def test_the_text_is_that_of_plain_decoding(wide: Path, draft_dtype: Any) -> None:
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=4)
    with LLM(wide, stages=2, in_process=True, draft_dtype=draft_dtype) as llm:
        texts = [llm.generate([5, 6, 7], params, schedule=name).token_ids for name in ("ar", "flow", "serial")]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 24
