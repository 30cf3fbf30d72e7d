"""One stage of a model whose files are elsewhere: what a device is told of it, and the checkpoint made of what came.

Tensors travel as the model's files store them, and lie on the device by their SHA-256: what two partitions, two models
or two versions of one have in common is there once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gguf
import msgspec
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from flowspec.core import DType, LayerRange, StageManifest, TensorEntry
from flowspec.errors import ModelError, first_line, require
from flowspec.model.gguf_checkpoint import GGUFCheckpoint
from flowspec.model.gguf_header import TensorPlace
from flowspec.model.loader import Checkpoint, read_config
from flowspec.model.tensor_files import StoredTensor
from flowspec.model.user_cache import keep

PathOf = Callable[[str], Path]  # of what has this SHA-256

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAX_TENSORS, _MAX_NAME_LEN, _MAX_CONFIG_BYTES = 2**17, 512, 2**22
_MAX_DIMENSIONS, _MAX_SIZE = 4, 2**40
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


# --- where the files are ---


def make_manifest(
    checkpoint: Checkpoint, layers: LayerRange, digest_of: Callable[[StoredTensor], str]
) -> StageManifest:
    """Of a stage. Raises ``ModelError`` where its tensors cannot be read here."""
    own = set(checkpoint.names_of_stage(layers))
    is_gguf = isinstance(checkpoint, GGUFCheckpoint)
    entries: list[TensorEntry] = []
    for name in sorted(checkpoint.tensor_names() | own):
        # What other stages hold need not be on this device either; a GGUF file's header says it all, and is read.
        stored = checkpoint.stored(name) if name in own or is_gguf else None
        if stored is None and name in own:
            raise ModelError(f"{checkpoint.name}: {checkpoint.shard_of(name)} is missing; download the model again")
        if stored is not None and not is_gguf and stored.kind not in _FLOATS:
            raise ModelError(f"{stored.path}: {name} has type {stored.kind}; only float checkpoints are supported")
        if stored is None:
            entries.append(TensorEntry(name, "", (), 0, ""))
        else:
            digest = digest_of(stored) if name in own else ""
            entries.append(TensorEntry(name, stored.kind, stored.shape, stored.num_bytes, digest))
    if isinstance(checkpoint, GGUFCheckpoint):
        return StageManifest("gguf", msgspec.msgpack.encode(checkpoint.values), "", entries)
    config = checkpoint.path("config.json").read_bytes()
    return StageManifest("safetensors", config, checkpoint.revision, entries)


# --- where they are not ---


def check_manifest(manifest: StageManifest) -> None:
    """Before anything of it is used. Raises ``ProtocolError``."""
    require(len(manifest.config) <= _MAX_CONFIG_BYTES, f"a config of {len(manifest.config)} bytes")
    require(0 < len(manifest.tensors) <= _MAX_TENSORS, f"a model of {len(manifest.tensors)} tensors")
    require(len(manifest.revision) <= _MAX_NAME_LEN, "a revision is no name")
    sizes: dict[str, int] = {}
    for entry in manifest.tensors:
        require(0 < len(entry.name) <= _MAX_NAME_LEN and entry.name.isprintable(), "a tensor has no name")
        is_shape = len(entry.shape) <= _MAX_DIMENSIONS and all(0 <= size <= _MAX_SIZE for size in entry.shape)
        require(is_shape, f"{entry.name} has the shape {entry.shape}")
        if entry.sha256:
            require(_SHA256.fullmatch(entry.sha256) is not None, f"the SHA-256 of {entry.name} is none")
            require(entry.num_bytes == _num_bytes(manifest.format, entry), f"{entry.name} has {entry.num_bytes} bytes")
            require(sizes.setdefault(entry.sha256, entry.num_bytes) == entry.num_bytes, "two sizes of one content")
    require(bool(sizes), "a stage without tensors")


def _num_bytes(format_name: str, entry: TensorEntry) -> int | None:
    """That a tensor of this kind and shape has; ``None`` for what is no kind."""
    num_values = math.prod(entry.shape)
    if format_name == "safetensors":
        return num_values * _FLOATS[entry.kind].itemsize if entry.kind in _FLOATS else None
    if entry.kind not in GGMLQuantizationType.__members__ or not entry.shape:
        return None
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[entry.kind]]
    return num_values // block * size if entry.shape[-1] % block == 0 else None


def open_received(name: str, manifest: StageManifest, path_of: PathOf, folder: Path) -> Checkpoint:
    """What has come, as a checkpoint; ``manifest`` has been checked. Raises ``ModelError``.

    ``name``: what its driver calls it. ``folder``: of this manifest alone, where a config.json may be put.
    """
    if manifest.format == "gguf":
        return _ReceivedGGUF(name, manifest, path_of)
    try:
        keep(folder / "config.json", manifest.config)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written ({first_line(error)}); give it permissions, or room") from error
    return _ReceivedSafetensors(name, manifest, path_of, folder)


class _ReceivedSafetensors(Checkpoint):
    def __init__(self, name: str, manifest: StageManifest, path_of: PathOf, folder: Path) -> None:
        super().__init__(name, folder, read_config(folder / "config.json"))
        self._entries = {entry.name: entry for entry in manifest.tensors}
        self._revision = manifest.revision
        self._path_of = path_of

    @property
    def revision(self) -> str:
        return self._revision

    def files(self) -> list[Path]:
        return sorted({self._path_of(entry.sha256) for entry in self._entries.values() if entry.sha256})

    def tensor_names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def shard_of(self, tensor_name: str) -> str:
        if not (entry := self._entry(tensor_name)).sha256:
            raise ModelError(f"{self.name}: {tensor_name} is of another stage, and was not fetched from the driver")
        return f"what came from the driver ({entry.sha256[:12]})"

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise ModelError(
                f"{self.name}: its config.json asks for {name}, but none of the driver's files holds it; files and "
                "config do not belong together, download or save the model again"
            )
        return self._entries[name]

    def stored(self, name: str) -> StoredTensor:
        self.shard_of(name)
        entry = self._entry(name)
        return StoredTensor(self._path_of(entry.sha256), 0, entry.num_bytes, entry.kind, entry.shape)

    def tensors(self, names: Iterable[str], dtype: DType, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            stored = self.stored(name)
            try:
                values = torch.from_numpy(np.fromfile(stored.path, np.uint8)).view(_FLOATS[stored.kind])
                yield name, values.reshape(stored.shape).to(device=device, dtype=getattr(torch, dtype))
            except (OSError, RuntimeError) as error:
                raise ModelError(f"{stored.path} cannot be read ({first_line(error)}); delete it") from error


class _ReceivedGGUF(GGUFCheckpoint):
    """Tensors of other stages have a shape, and no bytes."""

    def __init__(self, name: str, manifest: StageManifest, path_of: PathOf) -> None:
        self._own_files = {path_of(entry.sha256) for entry in manifest.wanted()}
        try:
            values = msgspec.msgpack.decode(manifest.config, type=dict[str, str | int | float | bool | None])
            places = {
                entry.name: TensorPlace(
                    path_of(entry.sha256 or "missing"), 0, GGMLQuantizationType[entry.kind], entry.shape
                )
                for entry in manifest.tensors
            }
        except (msgspec.DecodeError, KeyError) as error:
            raise ModelError(f"{name}: what the driver says of it is damaged ({first_line(error)})") from error
        super().__init__(Path(name), values, places)

    def files(self) -> list[Path]:
        return sorted(self._own_files)
