"""What a worker may use of its device's memory: what it says is free, and what it refuses to load."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import msgspec
import psutil
import pytest
import torch

from command_line import Run
from flowspec import LLM, SamplingParams
from flowspec.config import LinkConfig
from flowspec.core import DType, LayerRange, Weights
from flowspec.draft import catalogue
from flowspec.engine import spec
from flowspec.errors import DoesNotFitError, UsageError
from flowspec.model.backends import load_head, load_stage, model_bytes, open_checkpoint
from flowspec.model.compiled_matrix import CompiledMatrix
from flowspec.model.loader import Checkpoint
from flowspec.model.stage_size import shapes_of, stage_bytes
from flowspec.wire.messages import PROTOCOL_VERSION, Configure
from flowspec.worker.kept import StageLoader
from flowspec.worker.memory import Allowance, free_bytes, total_bytes, used_bytes
from logged_process import LoggedProcess
from tiny_gguf import write_gguf
from tiny_models import make_checkpoint
from worker_process import WorkerProcess

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 7.7 MB."""
    return make_checkpoint(tmp_path_factory.mktemp("wide"), "llama", intermediate_size=20_000)


def test_free_memory_is_what_machine_and_container_leave(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    whole = free_bytes(cpu, tmp_path)
    assert 2**20 < whole < psutil.virtual_memory().total
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, expected in (("1048576\n", 1048576 - 1000), ("500\n", 1)):
        (tmp_path / "memory.max").write_text(limit)
        assert free_bytes(cpu, tmp_path) == expected
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(cpu, tmp_path) > 2**20
    (tmp_path / "memory.max").write_text("1048576\n")
    assert total_bytes(CPU, tmp_path) == 1048576 < total_bytes(CPU, tmp_path / "none")


@pytest.mark.parametrize("kind", ["safetensors", "Q8_0", "tied", "experts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_stage_takes_is_known_before_it_is_read(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, kind: str, dtype: DType
) -> None:
    path = checkpoint_dir({"tied": "qwen3", "experts": "qwen3_moe"}.get(kind, "llama"))
    if kind == "Q8_0":
        path = tmp_path / "tiny.gguf"
        write_gguf(path, "qwen3", gguf.GGMLQuantizationType.Q8_0, num_hidden_layers=6)
    checkpoint = open_checkpoint(str(path))
    for layers in (LayerRange(0, 2), LayerRange(2, 3), LayerRange(3, 6)):
        wanted = load_stage(checkpoint, layers, dtype, "float", "cpu").weights_bytes
        assert stage_bytes(shapes_of(checkpoint, layers), dtype, "float") == wanted


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_so_it_is_on_matrix_kernels(family: str, weights: Weights, tmp_path: Path) -> None:
    sizes: dict[str, Any] = (
        {"num_local_experts": 64, "hidden_size": 64, "num_hidden_layers": 1} if family == "mixtral" else {}
    )
    checkpoint, layers = open_checkpoint(make_checkpoint(tmp_path, family, **sizes)), LayerRange(0, 1)
    wanted = load_stage(checkpoint, layers, "float32", weights, "cpu").weights_bytes
    expected = stage_bytes(shapes_of(checkpoint, layers), "float32", weights)
    # With 4 bits it allows for offsets, which take more than zero points.
    assert expected == wanted if weights == "int8" else wanted < expected < 1.1 * wanted


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("weights", ["int8", "int4", "float"])
def test_so_are_the_layers_and_the_lm_head(
    checkpoint_dir: Callable[[str], Path], family: str, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has 8 bits where ``weights`` are integers; with one that is the embedding it is there twice."""
    checkpoint = open_checkpoint(checkpoint_dir(family))
    sizes = [load_stage(checkpoint, LayerRange(0, checkpoint.num_layers), "float32", weights, "cpu").weights_bytes]
    if weights == "float":
        sizes.append(checkpoint.load_lm_head("float32", "cpu").nbytes)
    else:
        made: list[CompiledMatrix] = []
        init = CompiledMatrix.__init__
        monkeypatch.setattr(CompiledMatrix, "__init__", lambda self, *given: made.append(self) or init(self, *given))
        load_head(checkpoint, "float32", weights, "cpu")
        sizes.append(sum(matrix.nbytes for matrix in made))
    found = model_bytes(checkpoint, "float32", weights, "cpu")
    assert found == sum(sizes) if weights != "int4" else sum(sizes) < found < 1.1 * sum(sizes)


def test_free_is_what_is_left_of_what_is_allowed() -> None:
    assert Allowance().free_bytes > 2**20 and not Allowance().has_limit
    gc.collect()  # what others have left is not to go meanwhile
    used = used_bytes(CPU)
    assert used == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    limited = Allowance("cpu", (used + 2**28) / 1e9)
    held = torch.ones(2**25)  # 128 MB
    left = limited.free_bytes
    assert 2**26 < left < 2**28 - 2**26
    del held
    more = torch.ones(2**27)  # all of it, and more: little is said to be left, and not that nobody can tell
    assert limited.free_bytes == 1
    del more


def test_a_stage_that_is_too_large_is_refused_before_it_is_read(wide: Path) -> None:
    memory = Allowance("cpu", (used_bytes(CPU) + 20e6) / 1e9)
    loader, told = StageLoader("cpu", memory), list[float]()
    configure = Configure(PROTOCOL_VERSION, 2, str(wide), 1, 3, "float32", None, 1.0)
    small = loader.load(configure, open_checkpoint(str(wide)), told.append)
    assert small.stage.weights_bytes < 20e6 and told
    told.clear()
    with pytest.raises(
        UsageError, match=r"worker 2 \(\S+, cpu\): layers 1:5 take 0\.03\d+ GB, and it may use .* larger --max-memory"
    ):
        loader.load(msgspec.structs.replace(configure, end_layer=5), open_checkpoint(str(wide)), told.append)
    assert not told
    fits = msgspec.structs.replace(configure, end_layer=5, dtype="bfloat16")
    assert loader.load(fits, open_checkpoint(str(wide)), told.append).stage.weights_bytes > 10e6


def test_a_draft_model_takes_its_lm_head_too(wide: Path) -> None:
    checkpoint, layers = open_checkpoint(str(wide)), LayerRange(0, 5)
    without = load_stage(checkpoint, layers, "float32", "float", "cpu").weights_bytes
    head = checkpoint.vocab_size * checkpoint.hidden_size * 4
    configure = Configure(PROTOCOL_VERSION, 1, str(wide), 0, 5, "float32", None, 1.0, num_best=9)
    loader = StageLoader("cpu", Allowance("cpu", (used_bytes(CPU) + 20e6) / 1e9))
    told: list[int] = []
    loader.memory.check_fits = lambda num_bytes, *_: told.append(num_bytes)  # type: ignore[method-assign]
    loaded = loader.load(configure, checkpoint, lambda done: None)
    assert told == [without + head] and loaded.guesser is not None
    loader.check_fits(configure, shapes_of(checkpoint, layers))
    assert told[1:] == [without + head], "a model whose embedding is its lm_head holds it twice"


def test_a_model_is_no_larger_than_what_is_free(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ``auto`` takes the widest weights that are not."""
    with pytest.raises(DoesNotFitError, match=r"^x take 1e\+06 GB, and \S+ GB of its memory are free; give it fewer"):
        Allowance().check_fits(10**15, "x")
    sizes = {"float": 47e6, "int8": 14e6, "int4": 8e6}
    for weights, size in sizes.items():
        monkeypatch.setattr(spec, "free_bytes", lambda device, free=int(1.2 * size): free)
        with LLM(wide, in_process=True) as llm:
            assert llm.engine.pipeline.spec.weights == weights
    monkeypatch.setattr(spec, "free_bytes", lambda device: 40_000_000)
    with pytest.raises(
        DoesNotFitError, match=r"takes 0\.04\d* GB in float, and 0\.038 GB are free here; use --weights"
    ):
        LLM(wide, in_process=True, weights="float")


def test_so_is_a_small_model_that_drafts_beside_it(
    wide: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``auto`` takes narrower weights for the draft, and for the model only where those do not help."""
    loaded: list[str] = []

    def load(draft: Checkpoint, layers: LayerRange, dtype: DType, weights: Weights, device: str) -> Any:
        loaded.append(weights)
        return load_stage(draft, layers, dtype, weights, device)

    monkeypatch.setattr(catalogue, "load_stage", load)
    settings: dict[str, Any] = {"draft": wide, "draft_check": "off", "in_process": True}
    sizes = {"float": 47, "int8": 14, "int4": 8}
    for weights, of_draft in (("float", "float"), ("float", "int8"), ("int8", "int4")):
        megabytes = sizes[weights] + sizes[of_draft]
        monkeypatch.setattr(spec, "free_bytes", lambda device, free=megabytes: int(1.1e6 * free))
        with LLM(wide, **settings) as llm:
            assert (llm.engine.pipeline.spec.weights, loaded.pop()) == (weights, of_draft)
    assert "as --draft-dtype is auto, its weights are to be int8" in caplog.text
    with pytest.raises(DoesNotFitError, match=r"in int8, and \S+ GB are free here; take a smaller draft, or"):
        LLM(wide, **settings, weights="int8", draft_dtype="int8")
    monkeypatch.setattr(spec, "free_bytes", lambda device: 1_000_000)
    with pytest.raises(UsageError, match=r"^draft: .* in int4, and 0\.00095 GB are free here; take a smaller"):
        LLM(wide, draft=wide, workers=["127.0.0.1:1"])


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "1e12", "0.001", "4096000", "much"])
def test_what_is_no_size_is_said_to_be_none(run: Run, given: str) -> None:
    refused = run("worker", "--listen", "127.0.0.1:0", "--max-memory", given)
    assert refused.code == 2 and "max-memory" in refused.err and "Traceback" not in refused.err


def test_a_worker_keeps_to_what_it_may_use(
    wide: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It refuses a stage before it fetches a byte of it, and serves the next driver; what it tells bounds caches."""
    small = LoggedProcess(["worker", "--threads", "1", "--listen", "127.0.0.1:0", "--max-memory", "0.01"], "GB; give")
    assert small.wait(60) == 2
    found = re.search(r"without any layers this process takes (\S+) GB; give more", small.log)
    assert found is not None, small.log
    worker = WorkerProcess("127.0.0.1", 0, "--max-memory", str(float(found[1]) + 0.04))
    link = LinkConfig(start_timeout_s=60, stall_timeout_s=60)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "full_name", property(lambda self: "/not/on/that/device"))
            with pytest.raises(DoesNotFitError, match=r"layers 0:6 take 0\.04\d* GB, and it may use .* fewer layers"):
                LLM(wide, workers=[worker.address], link=link, weights="float")
        with LLM(wide, workers=[worker.address], link=link) as llm:
            assert llm.engine.pipeline.spec.weights == "int8"
        assert "it may use" in caplog.text and "as --weights is auto, they are to be int8" in caplog.text
        with LLM(wide, workers=[worker.address], dtype="bfloat16", link=link) as llm:
            (ready,) = llm.engine.pipeline.ready
            assert 1 <= ready.free_bytes < 0.04e9
        draft = {"draft": wide, "draft_worker": worker.address, "draft_check": "off", "link": link}
        with LLM(wide, stages=1, **draft) as llm:
            flow, plain = (llm.generate([1, 4, 2], SamplingParams(max_tokens=8), schedule=s) for s in ("flow", "ar"))
            assert flow.token_ids == plain.token_ids, "whether or not something is left for keys and values"
        assert "the draft model's layers and lm_head take 0.04" in caplog.text
        assert "as --draft-dtype is auto, its weights are to be int8" in caplog.text
    finally:
        log = worker.end()
    assert "fetching" not in log
