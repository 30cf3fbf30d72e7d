"""Heads that guess blocks beside a real engine: found, loaded, served by processes, and of no influence on the text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowspec import LLM, SamplingParams
from flowspec.errors import ModelError
from tiny_dflash import DFlashForm, write_dflash
from tiny_dflash2 import DFlash2Form, write_dflash2
from tiny_dspark import DSparkForm, write_dspark
from tiny_peagle import PEagleForm, write_peagle

PROMPT = (1, 4, 2, 1, 4, 2, 3, 9, 9)
PARAMS = SamplingParams(24, 0.8, seed=5)


@pytest.fixture(scope="module")
def expected(checkpoint_dir: Callable[[str], Path]) -> list[int]:
    with LLM(checkpoint_dir("qwen3"), stages=1, draft="none", schedule="ar", in_process=True) as llm:
        return llm.generate(PROMPT, PARAMS).token_ids


@pytest.mark.parametrize(
    "settings",
    [
        {"stages": 2, "schedule": "flow"},
        {"stages": 2, "schedule": "auto", "in_process": True, "draft_dtype": "int8"},
        {"stages": 3, "schedule": "flow", "in_process": True, "draft_layers": (1, 2, 6)},
    ],
)
def test_a_head_drafts_and_changes_nothing(
    checkpoint_dir: Callable[[str], Path], expected: list[int], settings: dict[str, Any]
) -> None:
    directory = checkpoint_dir("qwen3")
    with LLM(directory, draft=directory / "dflash", draft_check="off", **settings) as llm:
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.token_ids == expected
    assert completion.stats.draft == "dflash" and completion.stats.drafted > 0


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        (DSparkForm(), {"stages": 2}),
        (DSparkForm("deepspec"), {"stages": 3, "in_process": True, "draft_dtype": "int8"}),
        (DSparkForm("specforge", variant="rnn"), {"stages": 2, "in_process": True, "schedule": "lockstep"}),
        (DSparkForm(num_draft=60, variant="gated"), {"stages": 1, "in_process": True, "schedule": "serial"}),
    ],
)
def test_a_dspark_head_drafts_and_changes_nothing(
    checkpoint_dir: Callable[[str], Path],
    tmp_path: Path,
    expected: list[int],
    form: DSparkForm,
    settings: dict[str, Any],
) -> None:
    write_dspark(tmp_path, form)
    with LLM(checkpoint_dir("qwen3"), draft=tmp_path, draft_check="off", **{"schedule": "flow", **settings}) as llm:
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.token_ids == expected
    assert completion.stats.draft == "dspark" and completion.stats.drafted > 0


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        (PEagleForm(), {"stages": 2}),
        (PEagleForm("amazon", num_draft=60), {"stages": 3, "in_process": True, "draft_dtype": "int8"}),
        (PEagleForm("specforge", norm_before_fc=True), {"stages": 2, "in_process": True, "schedule": "serial"}),
    ],
)
def test_a_peagle_head_drafts_and_changes_nothing(
    checkpoint_dir: Callable[[str], Path],
    tmp_path: Path,
    expected: list[int],
    form: PEagleForm,
    settings: dict[str, Any],
) -> None:
    write_peagle(tmp_path, form)
    with LLM(checkpoint_dir("qwen3"), draft=tmp_path, draft_check="off", **{"schedule": "flow", **settings}) as llm:
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.token_ids == expected
    assert completion.stats.draft == "peagle" and completion.stats.drafted > 0


def test_a_dflash2_head_drafts_and_changes_nothing(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, expected: list[int]
) -> None:
    write_dflash2(tmp_path, DFlash2Form(window=4, group=16))
    how: dict[str, Any] = {"stages": 2, "schedule": "flow", "draft_check": "off", "draft_dtype": "int8"}
    with LLM(checkpoint_dir("qwen3"), draft=tmp_path, in_process=True, **how) as llm:
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.token_ids == expected
    assert completion.stats.draft == "dflash2" and completion.stats.drafted > 0


def test_a_head_of_speculators_with_few_tokens_drafts(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, expected: list[int]
) -> None:
    write_dflash(tmp_path, DFlashForm("speculators", num_draft=60, samples_anchor=True))
    how: dict[str, Any] = {"stages": 2, "schedule": "flow", "in_process": True, "draft_check": "off"}
    with LLM(checkpoint_dir("qwen3"), draft=tmp_path, **how) as llm:
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.token_ids == expected and completion.stats.drafted > 0


def test_what_cannot_be_is_said_before_workers_start(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    directory = checkpoint_dir("qwen3")
    write_dflash(tmp_path, DFlashForm(config={"num_target_layers": 7}))
    with pytest.raises(ModelError, match="a target with 7 layers, this one has 6"):
        LLM(directory, draft=tmp_path, workers=["127.0.0.1:1"])
