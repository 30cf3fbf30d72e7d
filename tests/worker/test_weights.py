"""Devices without the model: they get what their stage is made of from the driver, once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from flowspec import LLM, SamplingParams
from flowspec.cluster import weight_server
from flowspec.cluster.weight_server import WeightServer
from flowspec.config import LinkConfig
from flowspec.core import LayerRange, Partition, StageManifest, TensorEntry
from flowspec.errors import FlowspecError, ModelError, ProtocolError, UsageError
from flowspec.model.backends import find_checkpoint, load_stage, open_checkpoint
from flowspec.model.fingerprint import fingerprint
from flowspec.model.hint_head import HintHead, save_hints
from flowspec.model.loader import Checkpoint
from flowspec.model.received import check_manifest
from flowspec.request.generation import Generation
from flowspec.wire.messages import (
    PROTOCOL_VERSION,
    Chunk,
    Configure,
    Hint,
    Manifest,
    Message,
    WantChunk,
    WantManifest,
)
from flowspec.worker import fetch as fetch_module
from flowspec.worker.blob_cache import BlobCache
from flowspec.worker.fetch import StageFetch
from flowspec.worker.kept import StageLoader
from flowspec.worker.sources import Sources
from pump import Pump
from tiny_gguf import write_gguf
from tiny_quantised import write_quantised
from worker_process import WorkerProcess

PROMPT_IDS = [1, 4, 2, 1, 4, 2, 3]
PARTITION = Partition.parse("0:2,2:3,3:6")


class Wire:
    """A driver's files and a device's disk, with what goes between them."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        partition: Partition = PARTITION,
        most_bytes: int = 10**9,
        draft: Path | None = None,
    ) -> None:
        self.partition = partition
        self.checkpoint = open_checkpoint(str(model))
        self.server = WeightServer(self.checkpoint, partition, None if draft is None else str(draft))
        self.cache = BlobCache(folder, most_bytes)
        self.num_bytes = 0  # that went to the device

    def manifest(self, stage: int) -> Manifest:
        self.server.want_manifest(stage)
        until_s = time.monotonic() + 20
        while not (made := self.server.made()):
            assert time.monotonic() < until_s, "no manifest is made"
            time.sleep(0.002)
        return made[stage]

    def fetch(self, stage: int, num_chunks: int = 10**9, spoil: Callable[[Chunk], Chunk] = lambda c: c) -> StageFetch:
        """Until all has come, or so many chunks."""
        fetch = StageFetch(self.cache, "elsewhere")
        wants: list[Message] = [fetch.begin()]
        while wants:
            want = wants.pop(0)
            if isinstance(want, WantManifest):
                wants += fetch.take(self.manifest(stage))
                continue
            assert isinstance(want, WantChunk)
            if not num_chunks:
                fetch.close()
                return fetch
            num_chunks -= 1
            chunk = self.server.chunk(stage, want)
            self.num_bytes += len(chunk.data)
            wants += fetch.take(spoil(chunk))
        assert fetch.is_complete
        return fetch


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch_module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(weight_server, "CHUNK_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=["safetensors", "experts", "awq", "Q8_0", "Q5_0", "phi3", "qwen3moe"])
def model(request: pytest.FixtureRequest, checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    if request.param in ("safetensors", "experts"):
        return checkpoint_dir("llama" if request.param == "safetensors" else "mixtral")
    if request.param == "awq":
        write_quantised(tmp_path / "awq", "awq", "llama", num_hidden_layers=6)
        return tmp_path / "awq"
    path = tmp_path / "tiny.gguf"
    if request.param in ("phi3", "qwen3moe"):  # whose rotary factors, or experts, come too
        write_gguf(path, request.param, num_hidden_layers=6)
    else:
        write_gguf(path, "llama", gguf.GGMLQuantizationType[request.param], num_hidden_layers=6)
    return path


def same_stage(ours: Checkpoint, theirs: Checkpoint, layers: LayerRange) -> None:
    assert ours.names_of_stage(layers) == theirs.names_of_stage(layers)
    stored = set(ours.names_of_stage(layers))
    names = sorted(name for name in ours.tensor_names() if stored.issuperset(ours.parts_of(name)))
    own, other = (dict(source.tensors(names, "float32", "cpu")) for source in (ours, theirs))
    assert own.keys() == other.keys() == set(names)
    assert all(torch.equal(own[name], other[name]) for name in names)
    for name in (name for name in names if "proj.weight" in name and ".experts." not in name):
        one, two = ours.packed(name, 8), theirs.packed(name, 8)
        assert np.array_equal(one.codes, two.codes) and np.array_equal(one.scales, two.scales)


def test_what_has_come_is_the_stage_and_nothing_else(model: Path, tmp_path: Path) -> None:
    wire = Wire(model, tmp_path / "received")
    for stage, layers in enumerate(PARTITION.stages, start=1):
        before = wire.num_bytes
        fetch = wire.fetch(stage)
        own = fetch.checkpoint()
        assert wire.num_bytes - before == fetch.num_bytes == fetch.num_wanted > 0
        same_stage(own, wire.checkpoint, layers)
        assert fingerprint(own, layers) == fingerprint(wire.checkpoint, layers)
        stage_made = load_stage(own, layers, "float32", "float", "cpu")
        assert stage_made.weights_bytes == load_stage(wire.checkpoint, layers, "float32", "float", "cpu").weights_bytes
        other = f"model.layers.{5 if stage == 1 else 0}.self_attn.o_proj.weight"
        with pytest.raises(ModelError, match=r"of another stage|cannot be read"):
            list(own.tensors([other], "float32", "cpu"))
    sent = wire.num_bytes
    assert [wire.fetch(stage).num_bytes for stage in (1, 2, 3)] == [0, 0, 0], "all of it is there"
    moved = Wire(model, tmp_path / "received", Partition.parse("0:1,1:6"))
    assert moved.fetch(1).num_bytes == moved.fetch(2).num_bytes == 0, "another partition, the same tensors"
    assert wire.num_bytes == sent
    files = list((tmp_path / "received" / "tensors").iterdir())
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.name for path in files)


@pytest.mark.parametrize("family", ["llama", "qwen3", "Q8_0"])
def test_a_fetched_stage_gives_the_hints_of_a_local_one(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """With an lm_head of its own, or the embedding in its place; what it takes is fetched once, and only for hints."""
    path = tmp_path / "tiny.gguf" if family == "Q8_0" else checkpoint_dir(family)
    if family == "Q8_0":
        write_gguf(path, "llama", gguf.GGMLQuantizationType.Q8_0, num_hidden_layers=6)
    partition, stages = Partition.parse("0:1,1:4,4:6"), (1, 2, 3)
    plain = [Wire(path, tmp_path / f"plain{n}", partition).fetch(n).num_bytes for n in stages]
    wires = [Wire(path, tmp_path / f"device{n}", partition, draft=tmp_path) for n in stages]
    checkpoint = wires[1].checkpoint
    lm_head, stored = checkpoint.load_lm_head("float32", "cpu"), checkpoint.stored(checkpoint.lm_head_name)
    save_hints(tmp_path, [HintHead(n, lm_head, 3, 1e-6) for n in range(1, 6)])
    fetches = [wire.fetch(n) for n, wire in zip(stages, wires, strict=True)]
    assert stored is not None
    width = lm_head.shape[1]
    extra = stored.num_bytes + 2 * (width + 2 * 3 * width)  # the head's norm, and its two matrices, in float16
    assert [fetch.num_bytes for fetch in fetches] == [plain[0], plain[1] + extra, plain[2]], "of use there alone"
    assert [fetch.has_hints for fetch in fetches] == [False, True, False]
    assert [wire.fetch(n).num_bytes for n, wire in zip(stages, wires, strict=True)] == [0, 0, 0]
    (tmp_path / "empty").mkdir()
    assert Wire(path, tmp_path / "plain2", partition, draft=tmp_path / "empty").fetch(2).num_bytes == 0
    configure = Configure(PROTOCOL_VERSION, 2, "elsewhere", 1, 4, "float32", None, 1.0, hints=str(tmp_path))
    local = StageLoader("cpu").load(configure, checkpoint, lambda done: None)
    there = replace(configure, hints="/not/on/that/device")
    loader, received = StageLoader("cpu"), fetches[1].checkpoint()
    fetched = loader.load(there, received, lambda done: None)
    assert loader.load(there, wires[1].fetch(2).checkpoint(), lambda done: None) is fetched, "it is kept"
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(3))
    assert local.hinter is not None and fetched.hinter is not None
    for ours, theirs in zip(local.hinter.guess(rows, 5), fetched.hinter.guess(rows, 5), strict=True):
        assert torch.equal(ours, theirs)
    assert StageLoader("cpu").load(replace(there, hints=None), received, lambda done: None).hinter is None


def test_a_fetch_that_was_cut_off_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    whole = Wire(model, tmp_path / "whole").fetch(1).num_bytes
    wire, rng = Wire(model, tmp_path / "received"), np.random.default_rng(3)
    rounds = 0
    while not (fetch := wire.fetch(1, int(rng.integers(1, 30)))).is_complete:
        rounds += 1
    assert rounds > 2 and wire.num_bytes == whole, "nothing has come twice"
    same_stage(fetch.checkpoint(), wire.checkpoint, PARTITION.stages[0])
    assert not list((tmp_path / "received" / "tensors").glob("*.partial"))


def test_what_comes_damaged_comes_again(model: Path, tmp_path: Path) -> None:
    def flipped(chunk: Chunk) -> Chunk:
        return Chunk(chunk.tensor, chunk.offset, bytes([chunk.data[0] ^ 1]) + chunk.data[1:])

    times = iter([True, False, True])

    def once(chunk: Chunk) -> Chunk:
        return flipped(chunk) if next(times, False) else chunk

    wire = Wire(model, tmp_path / "received")
    same_stage(wire.fetch(2, spoil=once).checkpoint(), wire.checkpoint, PARTITION.stages[1])
    with pytest.raises(ModelError, match="is not what it has announced"):
        wire.fetch(3, spoil=flipped)
    cut = Wire(model, tmp_path / "cut")
    cut.fetch(1, num_chunks=25)
    partial = max((tmp_path / "cut" / "tensors").glob("*.partial"), key=lambda path: path.stat().st_size)
    partial.write_bytes(bytes(partial.stat().st_size))  # as a disk may leave it whose power was cut
    same_stage(cut.fetch(1).checkpoint(), cut.checkpoint, PARTITION.stages[0])


def test_a_cache_holds_no_more_than_it_may(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    model = checkpoint_dir("llama")
    sizes = [Wire(model, tmp_path / "all").fetch(stage).num_bytes for stage in (1, 2, 3)]
    tensors = tmp_path / "received" / "tensors"
    for stage in (1, 2, 3, 1):
        wire = Wire(model, tmp_path / "received", most_bytes=max(sizes) + 100)
        same_stage(wire.fetch(stage).checkpoint(), wire.checkpoint, PARTITION.stages[stage - 1])
        assert sum(path.stat().st_size for path in tensors.iterdir()) <= max(sizes) + 100
    with pytest.raises(UsageError, match="larger --cache-gb, or fewer layers"):
        Wire(model, tmp_path / "small", most_bytes=sizes[2] - 1).fetch(3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"weights cannot be kept in .*XDG_CACHE_HOME"):
        Wire(model, tmp_path / "file").fetch(3)
    with pytest.raises(UsageError, match="a cache of 0 GB is none"):
        Sources(cache_gb=0)


def test_two_workers_may_write_one_tensor(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    one, two = (Wire(checkpoint_dir("llama"), tmp_path / "received") for _ in range(2))
    begun = StageFetch(one.cache, "elsewhere")
    begun.take(one.manifest(2))  # has its files open
    same_stage(two.fetch(2).checkpoint(), two.checkpoint, PARTITION.stages[1])
    begun.close()


def entry(**changes: Any) -> TensorEntry:
    good = TensorEntry("model.norm.weight", "F32", (8,), 32, "0" * 64)
    return good._replace(**changes)


BAD = {
    "no tensor": StageManifest("safetensors", b"{}", "", [], []),
    "none of the stage": StageManifest("safetensors", b"{}", "", [entry(sha256="")], []),
    "a path for a digest": StageManifest("safetensors", b"{}", "", [entry(sha256="../" * 21 + "x")], []),
    "a size that is not the shape's": StageManifest("safetensors", b"{}", "", [entry(num_bytes=2**50)], []),
    "a shape that nothing has": StageManifest("safetensors", b"{}", "", [entry(shape=(2**50,), num_bytes=2**52)], []),
    "a negative shape": StageManifest("safetensors", b"{}", "", [entry(shape=(-8, -1))], []),
    "numbers that are no floats": StageManifest("safetensors", b"{}", "", [entry(kind="BOOL", num_bytes=8)], []),
    "no kind of GGUF": StageManifest("gguf", b"\x80", "", [entry(kind="Q9_9")], []),
    "half a block": StageManifest("gguf", b"\x80", "", [entry(kind="Q8_0", num_bytes=8)], []),
    "two sizes of one content": StageManifest(
        "safetensors", b"{}", "", [entry(), entry(name="b", shape=(4,), num_bytes=16)], []
    ),
    "a name of control characters": StageManifest("safetensors", b"{}", "", [entry(name="a\nb")], []),
    "hints alone": StageManifest("safetensors", b"{}", "", [entry(sha256="")], [entry()]),
    "hints without end": StageManifest("safetensors", b"{}", "", [entry()], [entry()] * 9),
    "hints that are not to be had": StageManifest("safetensors", b"{}", "", [entry()], [entry(sha256="")]),
    "hints of GGUF's kind": StageManifest("gguf", b"\x80", "", [entry()], [entry(kind="Q8_0", num_bytes=34)]),
    "a config without end": StageManifest("safetensors", bytes(2**23), "", [entry()], []),
}


@pytest.mark.parametrize("manifest", BAD.values(), ids=BAD)
def test_a_manifest_that_cannot_be_is_refused(manifest: StageManifest, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError):
        check_manifest(manifest)
    with pytest.raises(ProtocolError):
        StageFetch(BlobCache(tmp_path, 10**9), "m").take(Manifest(manifest))
    assert not list(tmp_path.rglob("*"))


def test_neither_side_takes_what_was_not_agreed(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    wire = Wire(checkpoint_dir("llama"), tmp_path / "received")
    with pytest.raises(ProtocolError, match="it wants tensor 0 of 0"):
        wire.server.chunk(2, WantChunk(0, 0))
    fetch = StageFetch(wire.cache, "elsewhere")
    manifest = wire.manifest(2)
    first, second = fetch.take(manifest)[:2]
    assert isinstance(first, WantChunk) and isinstance(second, WantChunk)
    for tensor, offset in ((-1, 0), (999, 0), (0, -1), (0, 2**40)):
        with pytest.raises(ProtocolError, match="it wants"):
            wire.server.chunk(2, WantChunk(tensor, offset))
    chunk = wire.server.chunk(2, first)
    with pytest.raises(ProtocolError, match="the same weights again"):
        wire.server.chunk(2, first)
    with pytest.raises(ProtocolError, match="chunks are on their way"):
        fetch.take(manifest)
    with pytest.raises(ProtocolError, match="were not asked for"):
        fetch.take(Chunk(chunk.tensor, chunk.offset, chunk.data + b"x"))
    fetch.close()
    with pytest.raises(ProtocolError, match="nobody has asked"):
        StageFetch(wire.cache, "elsewhere").take(chunk)


def test_files_that_are_no_more_are_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, num_hidden_layers=6)
    wire = Wire(path, tmp_path / "received")
    manifest = wire.manifest(1)
    path.write_bytes(path.read_bytes()[:9000])
    last = WantChunk(len(manifest.stage.wanted()) - 1, 0)
    with pytest.raises(ModelError, match="has become shorter"):
        wire.server.chunk(1, last)
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        wire.server.chunk(1, WantChunk(last.tensor, 1))
    wire.server.close()


def test_only_what_is_here_is_opened(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    assert find_checkpoint(str(checkpoint_dir("llama")), may_ask_hub=False) is not None
    assert find_checkpoint("demo", may_ask_hub=False) is not None
    for name in ("/not/here", "not/here", "smollm2", "/not/here.gguf"):
        assert find_checkpoint(name, may_ask_hub=False) is None
    with pytest.raises(FlowspecError):
        find_checkpoint(str(tmp_path), may_ask_hub=False)  # it is here, and no model


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_devices_without_the_model_give_the_text_of_plain_decoding(
    checkpoint_dir: Callable[[str], Path], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a draft head, and one of them killed while it generates: it has its weights on its disk by then."""
    directory = checkpoint_dir(family)
    pump = Pump(directory, 1, "none", "ar")
    generation = pump.submit(PROMPT_IDS, SamplingParams(max_tokens=40))
    pump.run()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Checkpoint, "full_name", property(lambda self: "/not/on/that/device"))
    workers = [WorkerProcess() for _ in range(3)]
    addresses = [worker.address for worker in workers]
    link = LinkConfig(start_timeout_s=60, stall_timeout_s=60, heartbeat_timeout_s=1.5)
    fetched = []
    try:
        for _ in range(2):
            with LLM(directory, workers=addresses, partition=str(PARTITION), link=link) as llm:
                fetched.append([stage.fetched_bytes for stage in llm.engine.status().stages])
                assert llm.generate(PROMPT_IDS, SamplingParams(max_tokens=40)).token_ids == generation.output_ids
        port = int(addresses[1].rpartition(":")[2])
        with LLM(directory, workers=addresses, partition=str(PARTITION), link=link) as llm:
            workers[1].kill()
            workers[1] = WorkerProcess(port=port)
            assert llm.generate(PROMPT_IDS, SamplingParams(max_tokens=40)).token_ids == generation.output_ids
    finally:
        logs = [worker.end() for worker in workers]
    assert all(fetched[0]) and not any(fetched[1])
    assert "fetching" in logs[0] and "fetching" not in logs[1]


def test_hints_come_from_a_device_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Checkpoint, "full_name", property(lambda self: "/not/on/that/device"))
    hints: list[Hint] = []
    take_hint = Generation.take_hint

    def note(self: Generation, hint: Hint) -> None:
        hints.append(hint)
        take_hint(self, hint)

    monkeypatch.setattr(Generation, "take_hint", note)
    workers = [WorkerProcess() for _ in range(2)]
    fetched = []
    try:
        for wants_hints in (False, True, True):
            where: dict[str, Any] = {"workers": [worker.address for worker in workers], "partition": "0:5,5:8"}
            with LLM(
                "demo", hints=wants_hints, link=LinkConfig(start_timeout_s=60, stall_timeout_s=60), **where
            ) as llm:
                llm.generate("def main(", SamplingParams(max_tokens=16), schedule="flow")
                fetched.append([stage.fetched_bytes for stage in llm.engine.status().stages])
            assert bool(hints) == wants_hints
    finally:
        logs = [worker.end() for worker in workers]
    assert all(fetched[0]) and fetched[1][0] and fetched[1][1] == 0 and fetched[2] == [0, 0]
    assert "layers 0:5 of /not/on/that/device are still here" in logs[0], "what has come is kept, too"
