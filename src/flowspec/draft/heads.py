"""From a head's checkpoint to a draft source, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowspec.core import DraftDType, DType, Weights
from flowspec.draft.base import DraftSource
from flowspec.draft.dflash import DFlashSource
from flowspec.draft.dspark import DSparkSource
from flowspec.draft.eagle import EagleSource
from flowspec.model.backends import has_kernels, is_compiled, load_head
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
from flowspec.model.mtp_head import MtpHead, MtpLayers
from flowspec.model.packed import Precision
from flowspec.model.peagle_format import PEagleFormat
from flowspec.model.peagle_head import PEagleHead
from flowspec.model.target_head import FewTokensHead, LogitsHead, TargetHead


@dataclass(frozen=True)
class HeadLoader:
    """For one target. Fields as of ``catalogue.load_draft``; methods raise ``ModelError`` and ``UsageError``."""

    checkpoint: Checkpoint
    head: LogitsHead
    dtype: DType
    device: str
    is_coupled: bool
    draft_dtype: DraftDType
    weights: Weights

    def load_eagle(self, directory: Path) -> DraftSource:
        """EAGLE-1 or EAGLE-2."""
        embedding = self.checkpoint.load_embedding(self.dtype, self.device)
        draft_head = EagleHead.load(directory, embedding, self.dtype, self.device)
        head, token_ids = self.head, draft_head.token_ids
        if token_ids is not None:
            head = load_head(self.checkpoint, self.dtype, self.weights, self.device, token_ids)
        return EagleSource(draft_head, self._finished(draft_head, head, token_ids), self.is_coupled)

    def load_mtp(self, layers: MtpLayers) -> DraftSource:
        """The model's own layer, or another copy's."""
        embedding = self.checkpoint.load_embedding(self.dtype, self.device)
        draft_head = MtpHead.load(layers, self.checkpoint, embedding, self.dtype, self.device)
        return EagleSource(draft_head, self._finished(draft_head, self.head, None), self.is_coupled, "mtp")

    def load_tapped(self, taps: HeadTensors) -> DraftSource:
        """A head that reads several layers."""
        embedding, layers = self.checkpoint.load_embedding(self.dtype, self.device), taps.taps.layers
        token_ids = taps.token_ids(self.checkpoint.vocab_size)
        own = self.head
        if HEAD in taps.names:
            own = TargetHead(taps.tensor(HEAD).to(self.device, getattr(torch, self.dtype)))
        where = embedding, self.dtype, self.device
        match taps:
            case DSparkFormat():
                dspark = DSparkHead.load(taps, *where)
                assert isinstance(dspark, DSparkHead)
                lm_head = self._finished(dspark, own, token_ids)
                source = DSparkSource(dspark, lm_head, token_ids, layers, self.is_coupled)
                source.hit_rates = tuple(taps.files.config.get("hit_rates") or ())
                return source
            case DFlash2Format():
                dflash2 = DFlash2Head.load(taps, *where)
                assert isinstance(dflash2, DFlash2Head)
                lm_head = self._finished(dflash2, own, token_ids)
                scaled = ScaledHead(lm_head, taps.output_multiplier, taps.softcap)
                return DSparkSource(dflash2, scaled, None, layers, self.is_coupled, "dflash2", taps.num_candidates)
            case DFlashFormat():
                dflash = DFlashHead.load(taps, *where)
                return DFlashSource(dflash, self._finished(dflash, own, token_ids), layers, self.is_coupled)
            case PEagleFormat():
                peagle = PEagleHead.load(taps, *where)
                lm_head = self._finished(peagle, own, token_ids)
                return DFlashSource(peagle, lm_head, layers, self.is_coupled, "peagle")
            case Eagle3Format():
                eagle3 = Eagle3Head.load(taps, *where)
                lm_head = NormedHead(eagle3, self._finished(eagle3, own, token_ids))
                return EagleSource(eagle3, lm_head, self.is_coupled, "eagle3", layers)
            case _:
                raise AssertionError(f"{taps.kind} heads are none that read several layers")

    def _finished(self, draft_head: nn.Module, lm_head: LogitsHead, token_ids: Tensor | None) -> LogitsHead:
        """The lm_head: in integers where the draft head is made so, and over all of the target's tokens."""
        is_int8 = self.draft_dtype == "int8" or self.weights != "float"
        if has_kernels(self.device) and (is_int8 or is_compiled(self.checkpoint.hidden_size, self.device)):
            lm_head = self._on_kernels(draft_head, lm_head, 8 if is_int8 else self.dtype, token_ids)
        elif self.draft_dtype == "int8" or (is_int8 and can_quantize(draft_head)):
            quantize_head(draft_head)
            if isinstance(lm_head, TargetHead):  # others are in integers themselves
                lm_head = Int8TargetHead(lm_head.weight)
        return lm_head if token_ids is None else FewTokensHead(lm_head, token_ids, self.checkpoint.vocab_size)

    def _on_kernels(
        self, draft_head: nn.Module, lm_head: LogitsHead, precision: Precision, token_ids: Tensor | None
    ) -> LogitsHead:
        from flowspec.model.compiled_head import compile_head, weight_of  # here: they are optional
        from flowspec.model.compiled_stage import CompiledHead

        compile_head(draft_head, precision)
        if isinstance(lm_head, TargetHead):
            return CompiledHead(weight_of(lm_head.weight, precision))
        if precision == 8 and self.weights == "float":  # else it is as narrow itself
            return CompiledHead.load(self.checkpoint, precision, token_ids)
        return lm_head
