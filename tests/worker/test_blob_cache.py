"""What several workers of a device do in one folder at the same time."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowspec.worker.blob_cache import BlobCache

DATA = b"of a tensor" * 100
DIGEST = hashlib.sha256(DATA).hexdigest()


def fetch(cache: BlobCache, data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest()
    cache.make_room(len(data), [digest])
    blob = cache.open_partial(digest, len(data))
    while not blob.is_whole:
        blob.append(data[blob.size : blob.size + 500])
    assert blob.finish()


def test_room_is_made_while_another_worker_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BlobCache(tmp_path, 10**9)
    fetch(cache, DATA)
    cache.open_partial("0" * 64, 10).close()
    scandir = os.scandir

    def scan_then_rename(folder: Path) -> Iterator[os.DirEntry[str]]:
        entries = list(scandir(folder))
        (folder / f"{'0' * 64}.partial").rename(folder / ("0" * 64))
        return iter(entries)

    monkeypatch.setattr(os, "scandir", scan_then_rename)
    cache.make_room(10, [DIGEST])
    assert cache.has(DIGEST, len(DATA))


def test_a_partial_tensor_that_was_finished_before_it_is_locked_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = BlobCache(tmp_path, 10**9)
    cache.make_room(len(DATA), [])
    other = cache.open_partial(DIGEST, len(DATA))
    other.append(DATA)
    flock = fcntl.flock

    def finish_then_lock(file: int, flags: int) -> None:
        if not cache.has(DIGEST, len(DATA)):
            assert other.finish()
        flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", finish_then_lock)
    blob = cache.open_partial(DIGEST, len(DATA))
    assert blob.size == 0
    blob.append(DATA)
    assert blob.finish() and cache.path(DIGEST).read_bytes() == DATA


def test_room_is_not_made_of_what_another_worker_is_writing(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path, 2 * len(DATA) - 10)
    cache.make_room(len(DATA), [DIGEST])
    coming = cache.open_partial(DIGEST, len(DATA))
    coming.append(DATA[:500])
    fetch(cache, DATA[1:])
    fetch(cache, DATA[2:])
    coming.append(DATA[500:])
    assert coming.finish() and cache.has(DIGEST, len(DATA))
    assert not cache.has(hashlib.sha256(DATA[1:]).hexdigest(), len(DATA) - 1)


def fetch_all(folder: Path) -> None:
    for number in range(100):
        fetch(BlobCache(folder, 10**9), DATA + str(number).encode())


def test_four_workers_fetch_the_same_tensors(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=fetch_all, args=(tmp_path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list((tmp_path / "tensors").iterdir())) == 100
