"""transformers' conversion of GGUF tokenizers, and what it leaves out: how text is cut before byte pairs are merged."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger("flowspec.model")

# The expressions of the models' own tokenizer.json: contractions, words, digits, signs, line ends, spaces.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_CAPITAL, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}*{_SMALL}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}+{_SMALL}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(digits: str) -> PreTokenizer:
    whole = Split(Regex(_WORDS % digits), behavior="isolated")
    return Sequence([whole, ByteLevel(add_prefix_space=False, use_regex=False)])


def _single_digits() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])


def _split_by_case() -> PreTokenizer:
    """As GPT-4o's: words end where small letters are followed by a capital."""
    return Sequence([Split(Regex(_CASES), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


_BY_NAME = {
    "default": lambda: ByteLevel(add_prefix_space=False, use_regex=True),
    "gpt-2": lambda: ByteLevel(add_prefix_space=False, use_regex=True),
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,  # of Granite 3
    "dbrx": lambda: _split(r"\p{N}{1,3}"),  # of Phi-4
    "smaug-bpe": lambda: _split(r"\p{N}{1,3}"),  # of SmolLM3
    "gpt-4o": _split_by_case,  # of Phi-4-mini
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "llama3": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}


_UNKNOWN_TO_AUTO = ("granite", "smollm3")  # AutoTokenizer asks for the config first, and refuses these architectures


def read_tokenizer(path: Path, architecture: str) -> PreTrainedTokenizerBase:
    """As transformers makes it of the file. Raises what transformers raises."""
    reader = PreTrainedTokenizerFast if architecture in _UNKNOWN_TO_AUTO else AutoTokenizer
    return reader.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)


def set_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, name: object) -> None:
    """``name``: the file's ``tokenizer.ggml.pre``; an unknown one is left as it is, with a warning.

    SentencePiece tokenizers do without.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if name is None or backend is None or not _is_byte_level(backend.pre_tokenizer):
        return
    if name not in _BY_NAME:
        logger.warning("text is cut as GPT-2's, since %r of this GGUF file is unknown; numbers may differ", name)
        return
    backend.pre_tokenizer = _BY_NAME[str(name)]()


def _is_byte_level(pre_tokenizer: PreTokenizer | None) -> bool:
    return isinstance(pre_tokenizer, (pre_tokenizers.ByteLevel, pre_tokenizers.Sequence))
