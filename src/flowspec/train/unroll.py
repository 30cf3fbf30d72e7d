"""EAGLE heads of all versions, run over a text as they run when they draft several levels deep."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from flowspec.model.draft_head import DraftHead


def unroll(head: DraftHead, token_ids: Tensor, features: Tensor, num_levels: int) -> list[Tensor]:
    """Estimates of draft levels 1..num_levels, each [B, T, H]; row i estimates the feature of token i + 1.

    Level 1 is fed with the given features [B, T, H] of all but the last of the tokens [B, T + 1], level k + 1 with what
    level k estimated for the token before. A row of level k sees what it would see when drafting: itself, one row each
    of the levels below, and level-1 rows before those.
    """
    tokens, num_rows = token_ids[:, 1:], features.shape[1]
    positions = torch.arange(num_rows, device=token_ids.device)[None]
    distance = positions[0][:, None] - positions[0][None]  # from row i back to row j
    if num_levels == 1:
        return [head(tokens, features, positions, (distance >= 0)[None, None])]
    cache = DynamicCache()
    outputs: list[Tensor] = []
    fed = features
    for level in range(num_levels):
        # A row of this level sees that row of the level `below` that is as far back as the levels are apart.
        blocks = [distance >= level, *(distance == level - below for below in range(1, level + 1))]
        outputs.append(head(tokens, fed, positions, torch.cat(blocks, dim=1)[None, None], cache))
        # The first row has no estimate before it: it keeps a true feature, and its later levels are not used.
        fed = torch.cat((features[:, :1], outputs[-1][:, :-1].to(features.dtype)), dim=1)
    return outputs
