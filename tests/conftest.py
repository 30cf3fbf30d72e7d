"""Shared settings and fixtures: one torch thread, and one tiny checkpoint of each family for the whole run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

import fork_server
from tiny_models import make_checkpoint, make_draft_head

if TYPE_CHECKING:
    from command_line import Done, Run

os.environ.pop("COLUMNS", None)  # set in processes of xdist; rich's consoles go for ever by what they are born with
torch.set_num_threads(1)
if fork_server.is_possible:
    fork_server.install(fork_server.server)
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
    from command_line import run_here

    def run(*arguments: str, stdin: str = "") -> Done:
        return run_here(monkeypatch, capfd, arguments, stdin)

    return run
