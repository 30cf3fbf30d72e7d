"""One stage of a model whose files are elsewhere: what a device is told of it, and the checkpoint made of what came.

Tensors travel as the model's files store them, and lie on the device by their SHA-256: what two partitions, two models
or two versions of one have in common is there once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import msgspec
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from flowspec.core import DType, LayerRange, StageManifest, TensorEntry
from flowspec.errors import ModelError, first_line, require, shortened
from flowspec.model.gguf_blocks import is_held, own_bits
from flowspec.model.gguf_checkpoint import GGUFCheckpoint
from flowspec.model.gguf_header import TensorPlace
from flowspec.model.hint_head import stored_hints
from flowspec.model.loader import Checkpoint, read_config
from flowspec.model.quantised import layout_of
from flowspec.model.stage_size import StageShapes
from flowspec.model.tensor_files import KINDS, NARROW, StoredTensor, check_float, read_stored
from flowspec.model.user_cache import keep

PathOf = Callable[[str], Path]  # of what has this SHA-256

_MAX_TENSORS, _MAX_NAME_LEN, _MAX_CONFIG_BYTES = 2**17, 512, 2**22
_MAX_DIMENSIONS, _MAX_SIZE = 4, 2**40
_MAX_HINT_TENSORS = 8
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


# --- where the files are ---


def make_manifest(
    checkpoint: Checkpoint,
    layers: LayerRange,
    digest_of: Callable[[StoredTensor], str],
    draft: str | None = None,
    with_head: bool = False,
) -> tuple[StageManifest, dict[str, StoredTensor]]:
    """Of a stage, and where what it wants lies, by SHA-256. Raises ``ModelError`` where that cannot be read here.

    ``draft``: its directory, or its place, if the stage is to give hints; they need the lm_head too.
    ``with_head``: it is to have that in any case.
    """
    own = set(checkpoint.names_of_stage(layers))
    hints = {} if draft is None else stored_hints(draft, checkpoint.num_layers, layers.end)
    if hints or with_head:
        own.update(checkpoint.parts_of(checkpoint.lm_head_name))
    places: dict[str, StoredTensor] = {}

    def entry(name: str, stored: StoredTensor, is_own: bool) -> TensorEntry:
        digest = digest_of(stored) if is_own else ""
        if is_own:
            places[digest] = stored
        return TensorEntry(name, stored.kind, stored.shape, stored.num_bytes, digest)

    is_gguf = isinstance(checkpoint, GGUFCheckpoint)
    entries: list[TensorEntry] = []
    for name in sorted(checkpoint.stored_names() | own):
        # What other stages hold need not be on this device either; a GGUF file's header says it all, and is read.
        stored = checkpoint.stored(name) if name in own or is_gguf else None
        if stored is None and name in own:
            raise ModelError(f"{checkpoint.name}: {checkpoint.shard_of(name)} is missing; download the model again")
        if stored is not None and not is_gguf:
            _check_kind(name, stored, is_quantised=checkpoint.layout is not None)
        entries.append(TensorEntry(name, "", (), 0, "") if stored is None else entry(name, stored, is_own=name in own))
    for name, stored in hints.items():
        _check_kind(name, stored, is_quantised=False)
    of_hints = [entry(name, stored, is_own=True) for name, stored in hints.items()]
    if isinstance(checkpoint, GGUFCheckpoint):
        return StageManifest("gguf", msgspec.msgpack.encode(checkpoint.values), "", entries, of_hints), places
    config = checkpoint.path("config.json").read_bytes()
    return StageManifest("safetensors", config, checkpoint.revision, entries, of_hints), places


def _check_kind(name: str, stored: StoredTensor, is_quantised: bool) -> None:
    if stored.kind not in KINDS:
        raise ModelError(f"{stored.path}: {name} has type {stored.kind}, which cannot be read; use another version")
    if not is_quantised:
        check_float(stored.path, name, KINDS[stored.kind])


# --- where they are not ---


def stage_shapes(manifest: StageManifest) -> StageShapes:
    """Of the stage's tensors, the lm_head's among them where there is a hint head.

    ``manifest`` has been checked. Raises ``ModelError`` for a config that is none.
    """
    own = [entry for entry in manifest.tensors if entry.sha256]
    stored = {entry.name: entry.shape for entry in own}
    narrow = frozenset(entry.name for entry in own if entry.kind in NARROW)
    if manifest.format == "gguf":
        of_file = {e.name: (GGMLQuantizationType[e.kind], math.prod(e.shape)) for e in manifest.tensors}
        names = stored if own_bits(of_file) == 4 else ()
        return StageShapes(stored, frozenset(name for name in names if not is_held(of_file[name][0], 4)), narrow)
    try:
        quantised = json.loads(manifest.config).get("quantization_config")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"what the driver says of its model is damaged ({first_line(error)})") from error
    if quantised is None:
        return StageShapes(stored, narrow=narrow)
    layout = layout_of(quantised, "the driver's config.json")
    return StageShapes(layout.weight_shapes(stored), layout.wide_among(stored), narrow)


def check_manifest(manifest: StageManifest) -> None:
    """Before anything of it is used. Raises ``ProtocolError``."""
    require(len(manifest.config) <= _MAX_CONFIG_BYTES, f"a config of {len(manifest.config)} bytes")
    require(0 < len(manifest.tensors) <= _MAX_TENSORS, f"a model of {len(manifest.tensors)} tensors")
    require(len(manifest.revision) <= _MAX_NAME_LEN, "a revision is no name")
    require(len(manifest.hints) <= _MAX_HINT_TENSORS, f"a hint head of {len(manifest.hints)} tensors")
    require(all(entry.sha256 for entry in manifest.hints), "a hint head that is not to be had")
    require(any(entry.sha256 for entry in manifest.tensors), "a stage without tensors")
    formats = [*((manifest.format, entry) for entry in manifest.tensors)]
    formats += [("safetensors", entry) for entry in manifest.hints]
    sizes: dict[str, int] = {}
    for form, entry in formats:
        require(0 < len(entry.name) <= _MAX_NAME_LEN and entry.name.isprintable(), "a tensor has no name")
        is_shape = len(entry.shape) <= _MAX_DIMENSIONS and all(0 <= size <= _MAX_SIZE for size in entry.shape)
        require(is_shape, f"{entry.name} has the shape {entry.shape}")
        is_kind = form != "gguf" or entry.kind in GGMLQuantizationType.__members__
        require(is_kind, f"{entry.name} has the type {shortened(entry.kind, 40)!r}")
        if entry.sha256:
            require(_SHA256.fullmatch(entry.sha256) is not None, f"the SHA-256 of {entry.name} is none")
            require(entry.num_bytes == _num_bytes(form, entry), f"{entry.name} has {entry.num_bytes} bytes")
            require(sizes.setdefault(entry.sha256, entry.num_bytes) == entry.num_bytes, "two sizes of one content")


def _num_bytes(format_name: str, entry: TensorEntry) -> int | None:
    """That a tensor of this kind and shape has; ``None`` for what is no kind."""
    num_values = math.prod(entry.shape)
    if format_name == "safetensors":
        return num_values * KINDS[entry.kind].itemsize if entry.kind in KINDS else None
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


def _stored(entry: TensorEntry, path_of: PathOf) -> StoredTensor:
    """As it has come: alone in a file."""
    return StoredTensor(path_of(entry.sha256), 0, entry.num_bytes, entry.kind, entry.shape)


class _Received(Checkpoint):
    """What the formats share."""

    _manifest: StageManifest
    _path_of: PathOf

    def files(self) -> list[Path]:
        return sorted(self._path_of(entry.sha256) for entry in self._manifest.wanted())

    @property
    def has_hints(self) -> bool:
        return bool(self._manifest.hints)

    def hint_weights(self, dtype: DType, device: torch.device | str) -> dict[str, Tensor]:
        hints = self._manifest.hints
        return {entry.name: read_stored(_stored(entry, self._path_of), dtype, device) for entry in hints}


class _ReceivedSafetensors(_Received):
    def __init__(self, name: str, manifest: StageManifest, path_of: PathOf, folder: Path) -> None:
        super().__init__(name, folder, read_config(folder / "config.json"))
        self._manifest = manifest
        self._entries = {entry.name: entry for entry in manifest.tensors}
        self._path_of = path_of

    @property
    def revision(self) -> str:
        return self._manifest.revision

    def stored_names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def shard_of(self, tensor_name: str) -> str:
        if not (entry := self._entry(self.parts_of(tensor_name)[0])).sha256:
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
        return _stored(self._entry(name), self._path_of)

    def _read(self, stored_name: str, dtype: DType | None, device: torch.device | str) -> Tensor:
        return read_stored(self.stored(stored_name), dtype, device)


class _ReceivedGGUF(_Received, GGUFCheckpoint):
    """Tensors of other stages have a shape, and no bytes."""

    def __init__(self, name: str, manifest: StageManifest, path_of: PathOf) -> None:
        self._manifest, self._path_of = manifest, path_of
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
        GGUFCheckpoint.__init__(self, Path(name), values, places)
