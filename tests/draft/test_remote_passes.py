"""A draft model on a worker of its own, in this process: whatever comes when, the text is that of plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flowspec.config import PipelineConfig, TreeConfig
from flowspec.core import SamplingParams
from flowspec.draft import remote_passes
from flowspec.draft.model_passes import NamedTokens, Rows
from flowspec.draft.remote_passes import RemoteModelSource, RemotePasses
from flowspec.wire.messages import NO_PARENT, Guesses
from inproc_port import InprocPort, remote_source
from pump import Pump, prompt_of
from tiny_models import make_checkpoint

SMALL = PipelineConfig(segment_len=5, prefill_chunk=7)
TREE = TreeConfig(top_k=4, width=4, depth=4, max_depth=6, size=24, min_probability=0.0)


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small"), "mistral", seed=3, hidden_size=16, num_hidden_layers=2)


def outputs(pump: Pump, prompt: list[int], params: SamplingParams, choose: Callable[[int], int]) -> list[list[int]]:
    generations = [pump.submit(prompt, params), pump.submit(prompt[::-1], params)]
    pump.run(choose)
    return [generation.output_ids for generation in generations]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is, a pass is waited for."""
    monkeypatch.setattr(remote_passes, "PATIENCE_S", 1000.0)


@pytest.mark.parametrize("patience_s", [1000.0, 0.0], ids=["waits", "goes on"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("schedule", ["flow", "serial", "lockstep"])
def test_any_order_of_events_gives_the_text_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path],
    small_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
    temperature: float,
    patience_s: float,
) -> None:
    """Two requests; the answer to a pass comes at once, late, or when the request has long gone on."""
    monkeypatch.setattr(remote_passes, "PATIENCE_S", patience_s)
    target, params = checkpoint_dir("qwen3"), SamplingParams(max_tokens=16, temperature=temperature, seed=5)
    plain = outputs(Pump(target, 1, "none", "ar"), prompt_of(20), params, lambda num: 0)
    port = InprocPort(small_dir)
    source = remote_source(target, small_dir, port)
    drafted, rng = 0, np.random.default_rng(1)
    for _ in range(2):
        pump = Pump(target, 3, source, schedule, TREE, SMALL, apart=port)
        assert outputs(pump, prompt_of(20), params, lambda num: int(rng.integers(num))) == plain
        drafted += sum(generation.stats.drafted for generation in pump.generations)
        while port.has_work:
            port.work()
        assert port.worker.num_open == 0, "a cache has leaked"
        port.worker.check_integrity()
    assert drafted > 0 or patience_s == 0


def test_a_worker_that_never_answers_costs_no_text(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request goes on, and ends; what it was to be told comes to nothing."""
    monkeypatch.setattr(remote_passes, "PATIENCE_S", 0.0)
    target, params = checkpoint_dir("qwen3"), SamplingParams(max_tokens=16)
    plain = outputs(Pump(target, 1, "none", "ar"), prompt_of(20), params, lambda num: 0)
    for schedule in ("flow", "serial", "pipedec"):
        port = InprocPort(small_dir)
        pump = Pump(target, 2, remote_source(target, small_dir, port), schedule, TREE, SMALL)
        assert outputs(pump, prompt_of(20), params, lambda num: 0) == plain
        assert sum(generation.stats.draft_passes for generation in pump.generations) >= 2
        assert not port.num_rows, "it has done nothing"


def test_the_target_itself_as_draft_is_always_right(checkpoint_dir: Callable[[str], Path]) -> None:
    target = checkpoint_dir("llama")
    port = InprocPort(target)
    tree = TreeConfig(top_k=1, depth=6, max_depth=12, root_passes=7, min_probability=0.0)
    for temperature in (0.0, 0.8):
        pump = Pump(target, 2, remote_source(target, target, port), "serial", tree=tree, apart=port)
        generation = pump.submit([1, 4, 2, 5, 3], SamplingParams(max_tokens=50, temperature=temperature, seed=2))
        pump.run()
        assert (generation.stats.verdicts, generation.stats.accepted) == (8, 42), "all guesses, and a bonus token"
        assert generation.stats.accepted == generation.stats.drafted


def test_the_next_turn_reads_only_what_is_new(checkpoint_dir: Callable[[str], Path], small_dir: Path) -> None:
    target, port = checkpoint_dir("llama"), InprocPort(small_dir)
    source = remote_source(target, small_dir, port)
    pump = Pump(target, 2, source, "flow", TREE, keeps_caches=True, apart=port)
    plain = Pump(target, 1, "none", "ar")
    prompt = prompt_of(50)
    for turn in range(4):
        port.num_rows.clear()
        generations = [each.submit(prompt, SamplingParams(max_tokens=12)) for each in (pump, plain)]
        for each in (pump, plain):
            each.run()
        assert generations[0].output_ids == generations[1].output_ids
        assert (max(port.num_rows) < 20) == bool(turn), "the first turn has nothing to begin with"
        prompt = [*prompt, *generations[0].output_ids, 3, 5, 2]
    while port.has_work:
        port.work()
    assert 0 < port.worker.num_cached <= 3, "of ended requests a few are kept"


def test_a_long_text_is_read_in_parts_and_answered_once(small_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of any length, and its root behind the last part."""
    monkeypatch.setattr(remote_passes, "CHUNK", 8)
    text = prompt_of(40)
    rows = Rows([39], [NO_PARENT], [text[-1]], [39])
    found: list[NamedTokens] = []
    for length in (39, 32, 8, 7, 1, 0):
        port = InprocPort(small_dir, num_best=5)
        passes = RemotePasses(port, 0)
        port.source = _Taker(passes)  # type: ignore[assignment]
        passes.read(text[: 39 - length], 0)
        answer = passes.run(text[39 - length : 39], 39 - length, rows)
        assert answer is not None and answer.token_ids.shape == answer.logprobs.shape == (1, 5)
        assert max(port.num_rows) <= 9
        found.append(answer)
    model: Any = AutoModelForCausalLM.from_pretrained(small_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        best = model(torch.tensor([text])).logits[0, -1].log_softmax(-1).topk(5)
    for token_ids, logprobs in found:
        assert token_ids[0].tolist() == best.indices.tolist()
        assert np.allclose(logprobs[0], best.values.numpy(), atol=1e-5)


class _Taker:
    def __init__(self, passes: RemotePasses) -> None:
        self._passes = passes

    def take(self, message: object) -> None:
        if isinstance(message, Guesses):
            self._passes.note(message)


def test_a_request_that_the_worker_cannot_go_on_with_drafts_from_ngrams(
    checkpoint_dir: Callable[[str], Path], small_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And a worker that is lost: what is under way ends, and nobody waits."""
    target, params = checkpoint_dir("llama"), SamplingParams(max_tokens=24)
    plain = outputs(Pump(target, 1, "none", "ar"), prompt_of(30), params, lambda num: 0)
    for fault in ("request", "worker"):
        port = InprocPort(small_dir)
        source = remote_source(target, small_dir, port)
        pump = Pump(target, 2, source, "flow", TREE, SMALL, apart=port)
        num_events = 0

        def choose(num: int, port: InprocPort = port, fault: str = fault, source: RemoteModelSource = source) -> int:
            nonlocal num_events
            num_events += 1
            if num_events == 150:
                if fault == "worker":
                    port.is_lost = True
                else:
                    next(iter(source._passes.values())).fail("no memory")
            return num_events % num

        assert outputs(pump, prompt_of(30), params, choose) == plain
        assert all(generation.stats.drafted > 0 for generation in pump.generations)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the draft worker cannot go on with a request, for which n-grams draft instead: no memory"
    ]
