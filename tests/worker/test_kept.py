"""A worker keeps its stage for the next session that wants the same one of the same files, and only then."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from flowspec.model.backends import open_checkpoint
from flowspec.wire.messages import PROTOCOL_VERSION, Configure
from flowspec.worker.kept import StageLoader


def test_a_stage_is_kept_until_another_one_is_wanted_or_its_files_have_changed(
    tmp_path: Path, checkpoint_dir: Callable[[str], Path]
) -> None:
    directory = shutil.copytree(checkpoint_dir("llama"), tmp_path / "model")
    configure = Configure(PROTOCOL_VERSION, 1, str(directory), 0, 2, "float32", "127.0.0.1:1", 1.0)
    loader, told = StageLoader("cpu"), list[float]()

    def load(**changes: object) -> object:
        changed = msgspec.structs.replace(configure, **changes)
        return loader.load(changed, open_checkpoint(changed.model), told.append)

    first = load()
    num_told = len(told)
    assert num_told and load() is first and len(told) == num_told
    assert load(next_address=None, heartbeat_s=2.0, stage=2) is first, "that is no matter of the stage"
    for changes in ({"end_layer": 3}, {"dtype": "bfloat16"}, {"start_layer": 1}):
        other = load(**changes)
        assert other is not first and load(**changes) is other
    again = load()
    assert again is not first, "there is room for one"
    os.utime(next(directory.glob("*.safetensors")), ns=(1, 1))
    assert load() is not again, "the same names, and maybe other weights"
    loader.forget()
    last = load()
    assert load() is last
