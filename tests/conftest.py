"""Shared settings and fixtures: one torch thread, and one tiny checkpoint of each family for the whole run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from command_line import Done, Run, run_here
from tiny_models import make_checkpoint, make_draft_head

torch.set_num_threads(1)
settings.register_profile("flowspec", deadline=None)  # machines are shared: no test measures time
settings.load_profile("flowspec")


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint, made on first use; a random EAGLE head lies in ``draft``."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(tmp_path_factory.mktemp(family), family)
            make_draft_head(made[family] / "draft")
        return made[family]

    return get


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """``flowspec`` in this process."""

    def run(*arguments: str, stdin: str = "") -> Done:
        return run_here(monkeypatch, capfd, arguments, stdin)

    return run
