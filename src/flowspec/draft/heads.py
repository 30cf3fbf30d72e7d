"""From a head's checkpoint to a draft source, whatever its kind."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from flowspec.core import DraftDType, DType, Weights
from flowspec.draft.base import DraftSource
from flowspec.draft.dflash import DFlashSource
from flowspec.draft.dspark import DSparkSource
from flowspec.draft.eagle import EagleSource
from flowspec.model.backends import load_head
from flowspec.model.dflash2_format import DFlash2Format
from flowspec.model.dflash2_head import DFlash2Head, ScaledHead
from flowspec.model.dflash_format import DFlashFormat
from flowspec.model.dflash_head import DFlashHead
from flowspec.model.dspark_format import DSparkFormat
from flowspec.model.dspark_head import DSparkHead
from flowspec.model.eagle3_format import Eagle3Format
from flowspec.model.eagle3_head import Eagle3Head, NormedHead
from flowspec.model.eagle_head import EagleHead
from flowspec.model.head_tensors import HEAD, HeadTensors
from flowspec.model.int8 import Int8TargetHead, can_quantize, quantize_head
from flowspec.model.loader import Checkpoint
from flowspec.model.peagle_format import PEagleFormat
from flowspec.model.peagle_head import PEagleHead
from flowspec.model.target_head import FewTokensHead, LogitsHead, TargetHead


def load_eagle_draft(
    directory: Path,
    checkpoint: Checkpoint,
    head: LogitsHead,
    dtype: DType,
    device: str,
    is_coupled: bool,
    draft_dtype: DraftDType,
    weights: Weights,
) -> DraftSource:
    """EAGLE-1 or EAGLE-2. Arguments as of ``catalogue.load_draft``. Raises ``ModelError``, ``UsageError``."""
    draft_head = EagleHead.load(directory, checkpoint.load_embedding(dtype, device), dtype, device)
    token_ids = draft_head.token_ids
    if token_ids is not None:
        head = load_head(checkpoint, dtype, weights, device, token_ids)
    head = _quantised(draft_head, head, draft_dtype, weights)
    return EagleSource(draft_head, _spread(head, token_ids, checkpoint), is_coupled)


def load_tapped_draft(
    taps: HeadTensors,
    checkpoint: Checkpoint,
    head: LogitsHead,
    dtype: DType,
    device: str,
    is_coupled: bool,
    draft_dtype: DraftDType,
    weights: Weights,
) -> DraftSource:
    """A head that reads several layers. Arguments and errors as of ``load_eagle_draft``."""
    embedding, layers = checkpoint.load_embedding(dtype, device), taps.taps.layers
    token_ids = taps.token_ids(checkpoint.vocab_size)
    own = TargetHead(taps.tensor(HEAD).to(device, getattr(torch, dtype))) if HEAD in taps.names else head

    def finished(draft_head: nn.Module) -> LogitsHead:
        return _spread(_quantised(draft_head, own, draft_dtype, weights), token_ids, checkpoint)

    match taps:
        case DSparkFormat():
            dspark = DSparkHead.load(taps, embedding, dtype, device)
            assert isinstance(dspark, DSparkHead)
            source = DSparkSource(dspark, finished(dspark), token_ids, layers, is_coupled)
            source.hit_rates = tuple(taps.files.config.get("hit_rates") or ())
            return source
        case DFlash2Format():
            dflash2 = DFlash2Head.load(taps, embedding, dtype, device)
            assert isinstance(dflash2, DFlash2Head)
            scaled = ScaledHead(finished(dflash2), taps.output_multiplier, taps.softcap)
            return DSparkSource(dflash2, scaled, None, layers, is_coupled, "dflash2", taps.num_candidates)
        case DFlashFormat():
            dflash = DFlashHead.load(taps, embedding, dtype, device)
            return DFlashSource(dflash, finished(dflash), layers, is_coupled)
        case PEagleFormat():
            peagle = PEagleHead.load(taps, embedding, dtype, device)
            return DFlashSource(peagle, finished(peagle), layers, is_coupled, "peagle")
        case Eagle3Format():
            eagle3 = Eagle3Head.load(taps, embedding, dtype, device)
            return EagleSource(eagle3, NormedHead(eagle3, finished(eagle3)), is_coupled, "eagle3", layers)
        case _:
            raise AssertionError(f"{taps.kind} heads are none that read several layers")


def _quantised(draft_head: nn.Module, lm_head: LogitsHead, draft_dtype: DraftDType, weights: Weights) -> LogitsHead:
    """The lm_head, in integers where the draft head is made so."""
    if draft_dtype != "int8" and (weights == "float" or not can_quantize(draft_head)):
        return lm_head
    quantize_head(draft_head)
    # Others are in integers themselves.
    return Int8TargetHead(lm_head.weight) if isinstance(lm_head, TargetHead) else lm_head


def _spread(head: LogitsHead, token_ids: Tensor | None, checkpoint: Checkpoint) -> LogitsHead:
    """Over all of the target's tokens, where a head knows some alone."""
    return head if token_ids is None else FewTokensHead(head, token_ids, checkpoint.vocab_size)
