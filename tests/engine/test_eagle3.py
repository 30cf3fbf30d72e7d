"""An EAGLE-3 head beside a real engine: found, loaded, served by processes, and of no influence on the text."""

from __future__ import annotations

import importlib.util
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import Fault, engine_of, run
from flowspec import LLM, SamplingParams
from flowspec.config import LinkConfig
from flowspec.errors import ModelError, UsageError
from tiny_eagle3 import Eagle3Form, write_eagle3

LINK = LinkConfig(start_timeout_s=60, stall_timeout_s=60, heartbeat_timeout_s=1.5, rejoin_timeout_s=60)
PROMPT = (1, 4, 2, 1, 4, 2, 3, 9, 9)
PARAMS = SamplingParams(24, 0.8, seed=5)
LAYERS = (2, 4, 5)


@pytest.fixture(scope="module")
def expected(checkpoint_dir: Callable[[str], Path]) -> list[int]:
    with LLM(checkpoint_dir("qwen3"), stages=1, draft="none", schedule="ar", in_process=True) as llm:
        return llm.generate(PROMPT, PARAMS).token_ids


@pytest.fixture
def model(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy whose own draft is an EAGLE-3 head that does not say which layers it reads."""
    target = tmp_path / "model"
    shutil.copytree(checkpoint_dir("qwen3"), target, ignore=shutil.ignore_patterns("draft", "eagle3"))
    write_eagle3(target / "draft", Eagle3Form(tapped=LAYERS, binary=True))
    return target


@pytest.mark.parametrize("in_process", [True, False])
def test_a_head_in_the_models_directory_is_found_and_drafts(model: Path, expected: list[int], in_process: bool) -> None:
    with pytest.raises(ModelError, match=r"does not say which of the target's layers .*--draft-layers"):
        LLM(model, in_process=in_process)
    with LLM(model, draft_layers=LAYERS, stages=3, schedule="flow", in_process=in_process) as llm:
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.token_ids == expected
    assert completion.stats.draft == "eagle3" and completion.stats.drafted > 0


def test_layers_are_for_such_heads_alone(checkpoint_dir: Callable[[str], Path]) -> None:
    for draft in ("ngram", str(checkpoint_dir("qwen3") / "draft")):
        with pytest.raises(UsageError, match="draft_layers are for EAGLE-3, P-EAGLE, DFlash and DSpark heads"):
            LLM(checkpoint_dir("qwen3"), draft=draft, draft_layers=LAYERS, in_process=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_dtype_and_width_goes_over_the_wire(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, expected: list[int], dtype: str
) -> None:
    """A head of its own width, with the norm of all streams, whose scalar travels too; an int8 wire."""
    write_eagle3(tmp_path, Eagle3Form("speculators", size=24, norm_before_fc=True))
    link = LinkConfig(int8_wire=dtype == "bfloat16")
    settings = {"stages": 2, "schedule": "flow", "dtype": dtype, "link": link, "draft_dtype": "auto"}
    with LLM(checkpoint_dir("qwen3"), draft=tmp_path, **settings) as llm:  # type: ignore[arg-type]
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.stats.drafted > 0
    assert dtype != "float32" or completion.token_ids == expected


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_compiled_stages_serve_it_and_stay_exact(checkpoint_dir: Callable[[str], Path]) -> None:
    directory, texts = checkpoint_dir("qwen3"), []
    for draft, stages, schedule in (("none", 1, "ar"), (directory / "eagle3", 3, "flow")):
        with LLM(directory, draft=draft, stages=stages, schedule=schedule, weights="int8", in_process=True) as llm:
            texts.append(llm.generate(PROMPT, PARAMS).token_ids)
    assert texts[0] == texts[1]


def test_requests_go_on_when_a_worker_has_died(checkpoint_dir: Callable[[str], Path], expected: list[int]) -> None:
    directory = checkpoint_dir("qwen3")
    with engine_of(directory, draft=directory / "eagle3", stages=3, link=LINK, schedule="flow") as engine:
        job = engine.submit(PROMPT, PARAMS)
        run(engine, [job], [Fault(8, 2, signal.SIGKILL)])
        assert job.output_ids == expected
        again = engine.submit(PROMPT, PARAMS)
        run(engine, [again])
        assert again.output_ids == expected


def test_remote_workers_serve_drivers_with_different_drafts_in_turn(
    checkpoint_dir: Callable[[str], Path], expected: list[int], remote_workers: list[str]
) -> None:
    """The stage that a worker has kept knows nothing of the last driver's draft."""
    directory = checkpoint_dir("qwen3")
    for draft in ("eagle3", "draft", "eagle3"):
        with LLM(directory, draft=directory / draft, workers=remote_workers, schedule="flow") as llm:
            completion = llm.generate(PROMPT, PARAMS)
        assert completion.token_ids == expected and completion.stats.drafted > 0


def test_a_head_of_another_target_is_an_error_before_workers_start(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    write_eagle3(tmp_path, Eagle3Form("specforge", config={"vocab_size": 128}))
    with pytest.raises(ModelError, match="vocabulary of 128, the target of 96"):
        LLM(checkpoint_dir("qwen3"), draft=tmp_path, workers=["127.0.0.1:1"])
