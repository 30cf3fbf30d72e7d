"""DFlash's published checkpoints (arXiv 2602.06036): its authors' (z-lab), and those of speculators.

Tensors beside those of ``model.head_tensors``: ``hidden_norm.weight`` [D], which norms what ``fc`` makes of the
target's streams; ordinary ``layers.i.*`` with norms of queries and keys; ``norm.weight`` [D].

| what | the authors' | speculators |
|---|---|---|
| sizes of the layers | top of the config | ``transformer_layer_config`` |
| rows of a block, ``block_size`` | top, or in ``dflash_config`` | top |
| ``mask_token_id`` | ``dflash_config`` | top |
| layers of the target | ``target_layer_ids`` in ``dflash_config``: outputs | ``aux_hidden_state_layer_ids``: streams |
| layers whose attention slides see | the window before each row | the window before the anchor |
| ``sample_from_anchor``: row 0 guesses, too | not said: no | top |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowspec.errors import ModelError, shortened
from flowspec.model.block_sight import Sight, read_sights
from flowspec.model.draft_files import DraftFiles
from flowspec.model.eagle3_layers import find_layer_ids
from flowspec.model.head_kind import plain_name
from flowspec.model.head_tensors import CONTAINER, SUPPORTED, HeadTensors, TargetSizes, read_layers

MAX_BLOCK = 256  # rows; none published has more than 16


@dataclass(frozen=True)
class DFlashFormat(HeadTensors):
    """A DFlash checkpoint that has been looked through."""

    kind = "DFlash"

    block_size: int  # rows of a block, the anchor's included
    mask_token_id: int
    embedding_scale: float
    sights: tuple[Sight, ...]  # by layer
    samples_anchor: bool  # the anchor's row guesses the token behind it; else the first mask's does

    @classmethod
    def _fields(cls, files: DraftFiles, target: TargetSizes, draft_layers: Sequence[int] | None) -> dict[str, Any]:
        names, config = read_layers(files, plain_name, target.hidden_size, target.vocab_size, may_slide=True)
        said = files.config.get("num_target_layers")
        if said is not None and said != target.num_layers:
            raise ModelError(
                f"the head in {files.directory} is for a target with {shortened(repr(said), 20)} layers, this one has "
                f"{target.num_layers}; give a head that was trained for this target"
            )
        causal = block_value(files, "is_causal")
        causal = block_value(files, "causal") if causal is None else causal
        own_choice = _own_choice(target.num_layers, config.num_hidden_layers)
        return {
            "files": files,
            "config": config,
            "names": names,
            "layer_ids": find_layer_ids(files, target.num_layers, draft_layers, own_choice),
            "target_size": target.hidden_size,
            "block_size": whole_number(files, "block_size", 2, MAX_BLOCK),
            "mask_token_id": whole_number(files, "mask_token_id", 0, target.vocab_size - 1),
            "embedding_scale": positive_number(files, "input_embedding_scale") or 1.0,
            "sights": read_sights(files, config, causal, bool(files.config.get(CONTAINER))),
            "samples_anchor": block_value(files, "sample_from_anchor") is True,
        }

    @property
    def num_levels(self) -> int:
        """Tokens behind the anchor that one block guesses."""
        return self.block_size - (not self.samples_anchor)

    def check(self, vocab_size: int) -> None:
        if self.num_levels < 2:
            raise ModelError(
                f"{self.files.config_path}: block_size is {self.block_size}, so a block guesses one token, which is "
                f"not supported; {SUPPORTED}"
            )
        super().check(vocab_size)

    def check_said(self, name: str, found: Any) -> None:
        """Raises ``ModelError`` where the config says something else than what the tensors show."""
        said = block_value(self.files, name)
        if said is not None and said != found:
            raise ModelError(
                f"{self.files.config_path}: {name} is {shortened(repr(said), 40)}, but by the tensors in "
                f"{self.files.path.name} it is {found!r}; fetch both again from one place"
            )


def block_value(files: DraftFiles, name: str) -> Any:
    """At the top of the config, or in ``dflash_config``; ``None``: in neither."""
    nested = files.config.get("dflash_config")
    own = files.config.get(name)
    return nested.get(name) if own is None and isinstance(nested, dict) else own


def _own_choice(num_layers: int, num_draft_layers: int) -> tuple[int, ...]:
    """The authors' for heads that say nothing: outputs spread evenly; each enters the layer behind."""
    if num_draft_layers == 1:
        return (num_layers // 2 + 1,)
    step = (num_layers - 4) / (num_draft_layers - 1)
    return tuple(round(1 + place * step) + 1 for place in range(num_draft_layers))


def whole_number(files: DraftFiles, name: str, least: int, most: int) -> int:
    value = block_value(files, name)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        told = "is missing" if value is None else f"is {shortened(repr(value), 40)}"
        raise ModelError(
            f"{files.config_path}: {name} {told}; it must be a whole number in {least}..{most}: fetch the head again, "
            "or give one for this target"
        )
    return value


def positive_number(files: DraftFiles, name: str) -> float | None:
    """``None`` where the config does not say it. Raises ``ModelError``."""
    value = block_value(files, name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ModelError(f"{files.config_path}: {name} is {shortened(repr(value), 40)}; it must be a positive number")
    return float(value)
