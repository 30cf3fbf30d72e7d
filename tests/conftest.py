"""Shared settings and fixtures: one torch thread, and one tiny checkpoint of each family for the whole run.

Imports nothing heavy: the process that only hands tests out would wait for it, and the others for that one.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import fork_server

if TYPE_CHECKING:
    from command_line import Done, Run

os.environ.pop("COLUMNS", None)  # set in processes of xdist; rich's consoles go for ever by what they are born with
if "PYTEST_XDIST_WORKER" not in os.environ:  # these have it from the process that started them
    # Nothing hangs on what the user has fetched, or fetches anything. Matplotlib keeps its list of fonts.
    user_cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    os.environ.setdefault("MPLCONFIGDIR", str(Path(user_cache, "matplotlib")))
    os.environ |= {"XDG_CACHE_HOME": tempfile.mkdtemp(prefix="flowspec-tests-"), "PIP_NO_INDEX": "1"}
    os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"]  # and nobody has joined a cluster
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
if fork_server.is_possible:
    fork_server.install(fork_server.server)
settings.register_profile("flowspec", deadline=None)  # machines are shared: no test measures time
settings.load_profile("flowspec")

# What takes longest, to begin with: else one process is left alone with it in the end.
LONGEST = (
    "server/test_server_soak.py", "worker/test_real_network.py", "test_requests_wait_for_devices_that_are_away",
    "test_other_processors_make_the_same_bits", "bench/test_benchmarks_fuzz.py", "server/test_dashboard.py",
    "server/test_server_fuzz.py", "test_the_synthetic_language_is_calibrated", "test_rivals_are_tuned",
    "bench/test_benchmarks_gguf.py", "test_workers_that_have_joined_give", "test_samples_follow_the_exact_distribution",
    "test_the_draft_dtype_benchmark", "test_chats_keys_and_a_stage_that_dies",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):  # this process runs tests
        import torch

        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((place for place, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))

    items.sort(key=place)


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny checkpoint, made on first use.

    A random EAGLE head lies in ``draft``, an EAGLE-3 head in ``eagle3``, and one of each other kind in
    a folder of its name.
    """
    from tiny_dflash import DFlashForm, write_dflash
    from tiny_dflash2 import DFlash2Form, write_dflash2
    from tiny_dspark import DSparkForm, write_dspark
    from tiny_eagle3 import Eagle3Form, write_eagle3
    from tiny_models import make_checkpoint, make_draft_head
    from tiny_peagle import PEagleForm, write_peagle

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(tmp_path_factory.mktemp(family), family)
            make_draft_head(made[family] / "draft")
            write_eagle3(made[family] / "eagle3", Eagle3Form("specforge"))
            write_peagle(made[family] / "peagle", PEagleForm(num_levels=4))
            write_dflash(made[family] / "dflash", DFlashForm(block_size=5))
            write_dflash2(made[family] / "dflash2", DFlash2Form(block_size=5))
            write_dspark(made[family] / "dspark", DSparkForm(block_size=5))
        return made[family]

    return get


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """``flowspec`` in this process."""
    from command_line import run_here

    def run(*arguments: str, stdin: str = "") -> Done:
        return run_here(monkeypatch, capfd, arguments, stdin)

    return run
