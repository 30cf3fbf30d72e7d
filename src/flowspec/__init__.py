"""flowspec: one language model over several small devices, fast for a single user, with exactly its own output.

Importing the package loads nothing heavy; the names below are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowspec.core import SamplingParams
    from flowspec.llm import LLM, Completion, TextChunk

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "SamplingParams", "TextChunk", "__version__"]

_HOMES = {
    "LLM": "flowspec.llm",
    "Completion": "flowspec.llm",
    "TextChunk": "flowspec.llm",
    "SamplingParams": "flowspec.core",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flowspec' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
