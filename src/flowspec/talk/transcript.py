"""A conversation in a file, which only its user may read."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import msgspec

from flowspec.errors import UsageError
from flowspec.talk.talker import Message


class Transcript(msgspec.Struct):
    """What was said, and to whom."""

    model: str
    system: str
    messages: list[Message]

    def save(self, path: Path) -> None:
        """Raises ``UsageError``."""
        partial = path.with_name(f".{path.name}.partial")
        content = msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)
            os.replace(partial, path)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}; give a file elsewhere") from None

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Raises ``UsageError``."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
        except msgspec.DecodeError as error:
            raise UsageError(f"{path} is no conversation of flowspec chat: {error}") from None


def new_file() -> Path:
    """For a conversation that begins now, in the user's directory for such things. Raises ``UsageError``."""
    directory = _directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the directory {directory}: {error.strerror or error}") from None
    return directory / f"{datetime.now():%Y-%m-%dT%H-%M-%S}-{os.getpid()}.json"


def newest_file() -> Path:
    """Raises ``UsageError`` where no conversation is kept."""
    files = sorted(_directory().glob("*.json"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UsageError("no conversation is kept; give the file of one")
    return files[-1]


def _directory() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "flowspec" / "chats"
