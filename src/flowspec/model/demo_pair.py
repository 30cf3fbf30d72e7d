"""Where the demo pair lies: in the installed package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

DEMO = "demo"  # its name, for users and between processes


def demo_directory() -> Path:
    """The demo's target model in the installed package."""
    return Path(str(files("flowspec"))) / "demo" / "target"


def demo_draft_directory() -> Path:
    """The demo's draft head in the installed package."""
    return Path(str(files("flowspec"))) / "demo" / "draft"


def draft_for_workers(directory: Path) -> str:
    """The directory as workers find it: they run in folders of their own, and have a demo pair of their own."""
    return DEMO if directory == demo_draft_directory() else str(directory.resolve())
