"""A model with an MTP layer in a real engine: the layer is found, drafts, and has no influence on the text."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engines
from command_line import Run
from flowspec import LLM, SamplingParams
from flowspec.config import LinkConfig
from flowspec.errors import ModelError, UsageError
from tiny_mtp import write_mtp

LINK = LinkConfig(start_timeout_s=60, stall_timeout_s=60, heartbeat_timeout_s=1.5, rejoin_timeout_s=60)
PROMPT = (1, 4, 2, 1, 4, 2, 3, 9, 9)
PARAMS = SamplingParams(24, 0.8, seed=5)
UNCHECKED: dict[str, Any] = {"draft_check": "off"}  # its weights are random, and it guesses as badly
CLUSTER = Path(__file__).parents[2] / "clusters" / "7b-nano-150m.toml"


@pytest.fixture(scope="module")
def model(checkpoint_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With no other draft in its folder."""
    target = tmp_path_factory.mktemp("mtp") / "model"
    shutil.copytree(checkpoint_dir("mimo"), target, ignore=shutil.ignore_patterns("draft"))
    return target


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    with LLM(model, stages=1, draft="none", schedule="ar", in_process=True) as llm:
        return llm.generate(PROMPT, PARAMS).token_ids


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_drafts_by_itself(model: Path, expected: list[int], dtype: str) -> None:
    """Workers are processes; where numbers are rounded, those of the wire are too."""
    link = LinkConfig(int8_wire=dtype == "bfloat16")
    with LLM(model, stages=3, schedule="flow", dtype=dtype, link=link, **UNCHECKED) as llm:  # type: ignore[arg-type]
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.stats.draft == "mtp" and completion.stats.drafted > 0
    assert dtype != "float32" or completion.token_ids == expected


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_compiled_stages_and_layers_stay_exact(model: Path) -> None:
    texts = []
    for draft, stages, schedule in (("none", 1, "ar"), ("auto", 3, "flow")):
        how: dict[str, Any] = {"stages": stages, "schedule": schedule, "weights": "int8", "in_process": True}
        with LLM(model, draft=draft, **how, **UNCHECKED) as llm:
            completion = llm.generate(PROMPT, PARAMS)
            texts.append(completion.token_ids)
    assert texts[0] == texts[1] and completion.stats.draft == "mtp"


def test_requests_go_on_when_a_worker_has_died(model: Path, expected: list[int]) -> None:
    with engines.engine_of(model, stages=3, link=LINK, schedule="flow") as engine:
        assert engine.model.source is not None and engine.model.source.name == "mtp"
        job = engine.submit(PROMPT, PARAMS)
        engines.run(engine, [job], [engines.Fault(8, 2, signal.SIGKILL)])
        assert job.output_ids == expected


def test_remote_workers_without_the_model_serve_it(
    model: Path, expected: list[int], remote_workers: list[str], tmp_path: Path
) -> None:
    """They get the tensors of their stages, and know nothing of the layer."""
    with LLM(model, workers=remote_workers, schedule="flow", **UNCHECKED) as llm:
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.token_ids == expected and completion.stats.draft == "mtp" and completion.stats.drafted > 0


def test_a_copy_that_has_lost_its_layer_runs_with_n_grams(
    model: Path, expected: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(model, tmp_path / "copy")
    write_mtp(tmp_path / "copy", num_layers=0)
    with LLM(tmp_path / "copy", stages=2, in_process=True) as llm:
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.token_ids == expected and completion.stats.draft == "ngram"
    (told,) = [record.getMessage() for record in caplog.records if record.name == "flowspec.draft"]
    assert "its files hold none" in told and "N-grams draft instead" in told
    with LLM(tmp_path / "copy", draft=model, stages=2, in_process=True, **UNCHECKED) as llm:
        completion = llm.generate(PROMPT, PARAMS)
    assert completion.token_ids == expected and completion.stats.draft == "mtp"


def test_half_a_layer_is_an_error_before_workers_start(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    write_mtp(tmp_path / "copy", changes={"0.input_proj.weight": None})
    with pytest.raises(ModelError, match=r"MTP layer lack .*input_proj"):
        LLM(tmp_path / "copy", workers=["127.0.0.1:1"])


def test_a_draft_worker_runs_no_layer_of_the_model(model: Path) -> None:
    with pytest.raises(UsageError, match="a draft worker runs a small model, and the draft is a draft head or source"):
        LLM(model, draft_worker="127.0.0.1:1")


@pytest.mark.parametrize("command", ["simulate", "emulate"])
def test_described_clusters_run_it(model: Path, run: Run, command: str) -> None:
    sizes = ("--max-new-tokens", "4", "--num-prompts", "1")
    more = ("--time-scale", "4") if command == "emulate" else ()
    what = ("--model", str(model), "--draft", str(model), "--schedule", "ar,flow", "--json")
    done = run(command, str(CLUSTER), *what, *sizes, *more)
    assert done.code == 0, done.err
    assert json.loads(done.out)
