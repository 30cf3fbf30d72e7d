"""The weights of a small model that drafts on the driver: as wide as there is memory for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise

from flowspec.core import DraftDType, DType, Weights
from flowspec.errors import DoesNotFitError
from flowspec.model.backends import check_fits, weights_to_try
from flowspec.model.loader import Checkpoint

logger = logging.getLogger("flowspec.engine")

_ADVICE = "take a smaller draft, or let another device run it (--draft-worker)"


def draft_dtype_that_fits(
    draft: Checkpoint, draft_dtype: DraftDType, dtype: DType, device: str, num_bytes: int
) -> DraftDType:
    """What is asked for, or, of ``auto``, the widest that fits into ``num_bytes``.

    Raises ``DoesNotFitError`` where none does.
    """
    weights = _widest(draft, weights_to_try(draft, draft_dtype, device), dtype, device, num_bytes)
    return "auto" if weights == "float" else weights


def _widest(draft: Checkpoint, in_turn: Sequence[Weights], dtype: DType, device: str, num_bytes: int) -> Weights:
    for weights, smaller in pairwise(in_turn):
        try:
            check_fits(draft, dtype, weights, device, num_bytes, _ADVICE)
        except DoesNotFitError as error:
            logger.warning("draft: %s; as --draft-dtype is auto, its weights are to be %s", error, smaller)
        else:
            return weights
    check_fits(draft, dtype, in_turn[-1], device, num_bytes, _ADVICE)
    return in_turn[-1]
