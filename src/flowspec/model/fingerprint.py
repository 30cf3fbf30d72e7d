"""Whether two devices hold the same model: a digest of its config and of samples of a stage's tensors.

Each tensor gives its name, type, shape, and bytes spread over all of it. A fine-tune changes nearly all tensors, so the
samples tell it from its base, and nothing large is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flowspec.core import LayerRange
from flowspec.errors import ModelError, first_line
from flowspec.model.loader import Checkpoint

_NUM_SAMPLES = 8  # of a tensor, from its first bytes to its last ones
_NUM_FILE_SAMPLES = 256
_SAMPLE_BYTES = 8192
_NO_WEIGHTS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # say nothing of the model


def fingerprint(checkpoint: Checkpoint, layers: LayerRange) -> str:
    """Of a stage; empty where some of its tensors are not on this device. Raises ``ModelError``."""
    digest = hashlib.sha256(_config_bytes(checkpoint.config.to_dict()))
    digest.update(checkpoint.revision.encode())
    if not checkpoint.revision:
        for name in checkpoint.names_of_stage(layers):
            stored = checkpoint.stored(name)
            if stored is None:
                return ""
            digest.update(f"{name} {stored.kind} {stored.shape}".encode())
            for sample in _samples(stored.path, stored.offset, stored.num_bytes, _NUM_SAMPLES):
                digest.update(sample)
    return digest.hexdigest()[:32]


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Of files, as those of a draft. Raises ``ModelError``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        num_bytes = path.stat().st_size
        digest.update(f"{path.name} {num_bytes}".encode())
        for sample in _samples(path, 0, num_bytes, _NUM_FILE_SAMPLES):
            digest.update(sample)
    return digest.hexdigest()[:32]


def _config_bytes(config: dict[str, Any]) -> bytes:
    told = {name: value for name, value in config.items() if name not in _NO_WEIGHTS}
    return json.dumps(told, sort_keys=True, default=str).encode()


def _samples(path: Path, offset: int, num_bytes: int, num_samples: int) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            if num_bytes <= num_samples * _SAMPLE_BYTES:
                file.seek(offset)
                yield file.read(num_bytes)
                return
            for number in range(num_samples):
                file.seek(offset + number * (num_bytes - _SAMPLE_BYTES) // (num_samples - 1))
                yield file.read(_SAMPLE_BYTES)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); check its permissions") from error
