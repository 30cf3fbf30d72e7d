"""Which kind of draft head a directory holds: its container says so, or its tensors do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal

from flowspec.errors import ModelError, shortened
from flowspec.model.draft_files import DraftFiles
from flowspec.model.head_tensors import CONTAINER, FC, FIRST, IDS, SUPPORTED

Kind = Literal["eagle", "eagle3", "peagle", "dflash", "dflash2", "dspark"]
NAMES: Final[Mapping[Kind, str]] = {
    "eagle": "an EAGLE-1 or EAGLE-2 head",
    "eagle3": "an EAGLE-3 head",
    "peagle": "a P-EAGLE head",
    "dflash": "a DFlash head",
    "dflash2": "a DFlash2 head",
    "dspark": "a DSpark head",
}


# Layers of a model that guess what comes behind its next token (multi-token prediction), by themselves.
_MTP = re.compile(r"mtp(_layers)?\.|layers\.\d+\.(eh_proj|enorm|hnorm|shared_head)\.|blk\.\d+\.nextn\.")


def kind_of(files: DraftFiles) -> Kind:
    """Raises ``ModelError`` for a draft of another kind."""
    container = files.config.get(CONTAINER)
    names = {plain_name(name) for name in files.shapes}
    if container not in (None, "eagle3", "peagle", "dflash", "dflash2", "dspark"):
        raise _is_other(files, str(container))
    if any(_MTP.match(name) for name in names):
        raise _is_other(files, "mtp")
    if container == "peagle" or "mask_hidden" in names:
        return "peagle"
    is_marked = "hidden_norm.weight" in names or "dflash_config" in files.config
    is_block = container in ("dflash", "dflash2", "dspark") or (is_marked and f"{FIRST}hidden_norm.weight" not in names)
    if container == "dflash2" or (is_block and any(re.search(r"_conv\.|selector\.", name) for name in names)):
        return "dflash2"
    if container == "dspark" or any(name.startswith(("markov_head.", "confidence_head.")) for name in names):
        return "dspark"
    if is_block:
        return "dspark" if _says_dspark(files) else "dflash"
    fc = files.shapes.get(FC, ())
    is_wide = len(fc) == 2 and fc[1] >= 3 * fc[0] > 0  # EAGLE-1's reads one feature and one embedding
    marks = {IDS, "t2d", f"{FIRST}hidden_norm.weight"}
    return "eagle3" if container == "eagle3" or is_wide or names & marks else "eagle"


def plain_name(name: str) -> str:
    """A tensor's name in any dialect -> the one used here."""
    name = name.removeprefix("model.").removeprefix("logit_head.")
    name = name.removesuffix(".weight") if "_codebook" in name else name
    return FIRST + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name


def _says_dspark(files: DraftFiles) -> bool:
    """DSpark's authors write DFlash heads so, too: without a tensor of its own, but with DSpark's meaning of rows."""
    inner, classes = files.config.get("dflash_config"), files.config.get("architectures")
    is_told = isinstance(inner, dict) and inner.get("projector_type") == "dspark"
    return is_told or (isinstance(classes, list) and any("DSpark" in str(name) for name in classes))


def _is_other(files: DraftFiles, kind: str) -> ModelError:
    return ModelError(
        f"{files.directory} holds a draft of the kind {shortened(kind, 40)!r}, which is not supported; {SUPPORTED}"
    )
