"""From what a user says of the draft to a draft source."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from flowspec.core import DraftDType, DType, LayerRange, Weights
from flowspec.draft.base import DraftSource
from flowspec.draft.heads import HeadLoader
from flowspec.draft.language_model import ModelSource
from flowspec.draft.memory import Memory
from flowspec.draft.model_passes import LocalPasses
from flowspec.draft.ngram import NgramSource
from flowspec.draft.remote_passes import Port, RemoteModelSource
from flowspec.draft.token_map import TokenMap
from flowspec.errors import UsageError
from flowspec.model.backends import choose_weights, load_head, load_stage, open_checkpoint
from flowspec.model.demo_pair import DEMO
from flowspec.model.dflash2_format import DFlash2Format
from flowspec.model.dflash_format import DFlashFormat
from flowspec.model.draft_files import DraftFiles, holds_model
from flowspec.model.dspark_format import DSparkFormat
from flowspec.model.eagle3_format import Eagle3Format
from flowspec.model.fetched import FETCHED, is_for_own_devices
from flowspec.model.gguf_checkpoint import GGUF_SUFFIX
from flowspec.model.head_kind import Kind, kind_of
from flowspec.model.head_tensors import HeadTensors, TargetSizes
from flowspec.model.loader import Checkpoint
from flowspec.model.mtp_head import LostMtpError, MtpLayers, has_mtp
from flowspec.model.peagle_format import PEagleFormat
from flowspec.model.target_head import LogitsHead

logger = logging.getLogger("flowspec.draft")

# A head's directory, MTP layers, a language model, or the caller's own source.
ChosenDraft: TypeAlias = Literal["none", "ngram"] | Path | MtpLayers | Checkpoint | DraftSource

_FORMS: Final[Mapping[Kind, type[Eagle3Format | DFlashFormat]]] = {
    "eagle3": Eagle3Format,
    "peagle": PEagleFormat,
    "dflash": DFlashFormat,
    "dflash2": DFlash2Format,
    "dspark": DSparkFormat,
}
_NARROW: Final = {"int8": "draft heads and smaller models", "int4": "smaller models as draft"}  # what can be so
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def choose_draft(
    checkpoint: Checkpoint, draft: str | Path | DraftSource, draft_dtype: DraftDType = "auto", is_local: bool = False
) -> ChosenDraft:
    """Find what is meant, without loading it.

    ``auto`` is the head that belongs to the model, else the MTP layers that are part of it, else n-grams. ``is_local``:
    all workers are on the driver's machine, where not every head pays.
    Raises ``UsageError``, also for a ``draft_dtype`` that such a draft cannot have.
    """
    if draft_dtype not in get_args(DraftDType):
        raise UsageError(f"draft_dtype is {draft_dtype!r}; it must be {' or '.join(map(repr, get_args(DraftDType)))}")
    chosen = _find_draft(checkpoint, draft, is_local)
    is_model, is_head = isinstance(chosen, Checkpoint), isinstance(chosen, (Path, MtpLayers))
    if draft_dtype != "auto" and not (is_model or (is_head and draft_dtype == "int8")):
        name = "a head" if is_head else getattr(chosen, "name", chosen)
        raise UsageError(
            f"{draft_dtype} is for {_NARROW[draft_dtype]}, and the draft is {name}; name another draft, or leave "
            f"{draft_dtype} out"
        )
    return chosen


def _find_draft(checkpoint: Checkpoint, draft: str | Path | DraftSource, is_local: bool) -> ChosenDraft:
    if not isinstance(draft, (str, Path)):
        return draft
    match str(draft):
        case "none":
            return "none"
        case "ngram":
            return "ngram"
        case "auto":
            own = checkpoint.draft_directory
            is_of_use = (own / "config.json").is_file() and not (is_local and is_for_own_devices(own))
            return own if is_of_use else _own_layers(checkpoint)
        case name:
            directory = Path(name).expanduser()
            is_known = name in (DEMO, *FETCHED) or name.endswith(GGUF_SUFFIX) or _HUB_NAME.fullmatch(name)
            if is_known and not directory.is_dir():
                return _part_or_whole(open_checkpoint(name), checkpoint)
            if not directory.is_dir():
                raise UsageError(
                    f"no draft in {name!r}; give the directory of a head or a small model, a .gguf file, a hub name "
                    "(owner/model), or one of auto, none, ngram"
                )
            is_model = holds_model(DraftFiles(directory))
            return _part_or_whole(open_checkpoint(name), checkpoint) if is_model else directory


def _own_layers(checkpoint: Checkpoint) -> MtpLayers | Literal["ngram"]:
    """What a model brings along. Raises ``ModelError`` for half of it."""
    if not has_mtp(checkpoint):
        return "ngram"
    try:
        return MtpLayers.read(checkpoint)
    except LostMtpError as error:
        logger.warning("%s. N-grams draft instead", error)
        return "ngram"


def _part_or_whole(model: Checkpoint, target: Checkpoint) -> MtpLayers | Checkpoint:
    """The MTP layers of a model that is the target, or another copy of it; else it drafts as it is."""
    is_copy = all(getattr(model, size) == getattr(target, size) for size in TargetSizes._fields)
    return MtpLayers.read(model) if is_copy and has_mtp(model) else model


def read_taps(
    chosen: ChosenDraft, checkpoint: Checkpoint, draft_layers: Sequence[int] | None = None
) -> HeadTensors | None:
    """The checkpoint of a head whose features the target's stages add up; ``None`` for another draft.

    ``draft_layers``: of the target, that it reads, where its config is wrong or silent. Raises ``UsageError``.
    """
    files = DraftFiles(chosen) if isinstance(chosen, Path) else None
    form = None if files is None else _FORMS.get(kind_of(files))
    if files is not None and form is not None:
        return form.read(files, checkpoint.num_layers, checkpoint.hidden_size, checkpoint.vocab_size, draft_layers)
    if draft_layers is not None:
        raise UsageError(
            "draft_layers are for EAGLE-3, P-EAGLE, DFlash and DSpark heads, and the draft is none; leave them out"
        )
    return None


def load_draft(
    chosen: ChosenDraft,
    checkpoint: Checkpoint,
    head: LogitsHead,
    dtype: DType,
    device: str,
    is_coupled: bool = True,
    draft_dtype: DraftDType = "auto",
    weights: Weights = "float",
    taps: HeadTensors | None = None,
    memory: Memory | None = None,
    port: Port | None = None,
) -> DraftSource | None:
    """``None`` when nothing is to be drafted. ``is_coupled``: see ``EagleSource``.

    ``weights``: of the target, and so of ``head``. ``draft_dtype``: int8 quantises the draft head and a copy of the
    lm_head, ``head`` itself stays as it is; auto does so where the target is in integers too, and the kernels can. For
    a small model it is as ``--weights`` for any other one.
    ``taps``: what ``read_taps`` has found. ``memory``: for n-grams. ``port``: to the worker that a small model is on.
    Raises ``UsageError``.
    """
    match chosen:
        case "none":
            return None
        case "ngram":
            return NgramSource(memory=memory)
        case Checkpoint():
            tokens = TokenMap(chosen.load_tokenizer(), checkpoint.load_tokenizer(), chosen, checkpoint)
            if port is not None:
                return RemoteModelSource(port, tokens, chosen.max_positions, memory)
            weights = choose_weights(chosen, draft_dtype, device)
            stage = load_stage(chosen, LayerRange(0, chosen.num_layers), dtype, weights, device)
            own_head = load_head(chosen, dtype, weights, device)
            return ModelSource(
                lambda root_id: LocalPasses(stage, own_head, root_id), tokens, chosen.max_positions, is_coupled
            )
        case MtpLayers():
            return HeadLoader(checkpoint, head, dtype, device, is_coupled, draft_dtype, weights).load_mtp(chosen)
        case Path():
            loader = HeadLoader(checkpoint, head, dtype, device, is_coupled, draft_dtype, weights)
            return loader.load_eagle(chosen) if taps is None else loader.load_tapped(taps)
        case _:
            return chosen
