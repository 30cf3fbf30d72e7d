"""How a draft that is fed features grows its tree, against what its layers say by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowspec.draft.base import Accepted
from flowspec.sampling import Sampler, SamplingParams
from flowspec.tree import DraftTree


def check_that_a_tree_grows(
    source: Any,
    text: Tensor,
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
    wanted: Callable[[list[int], Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Prompt, a pass of the root, one below it, a commit, and a pass from the new root.

    ``read``: a text -> what the draft is told of each token, and the features that this means. ``wanted``: tokens, and
    features of those before them -> of the last row log-probabilities [V], and what is fed back [1, D].
    """
    told, features = read(text)
    prompt = text[:6].tolist()
    draft = source.open(prompt, Sampler(SamplingParams()), top_k=4)
    draft.read_prompt([0, 1, 2], told[:3])
    draft.read_prompt([3, 4], told[3:5])
    tree = DraftTree(5, prompt[-1], 40)
    root = np.zeros(1, dtype=np.int64)
    assert draft.expand(tree, root)
    logprobs, fed = wanted(prompt[1:], features[:5])
    best = logprobs.topk(4)
    assert tree.token_ids[1:].tolist() == best.indices.tolist()
    np.testing.assert_allclose(tree.logprobs[1:], best.values.numpy(), atol=1e-4)
    child = int(best.indices[0])
    assert draft.expand(tree, np.array([1]))
    below, _ = wanted([*prompt[1:], child], torch.cat([features[:5], fed]))
    grown = [row for row in range(len(tree)) if tree.parents[row] == 1]
    np.testing.assert_allclose(tree.logprobs[grown], below.topk(4).values.numpy(), atol=1e-4)

    # The root and its first child turn out to be right, and another token follows.
    accepted = [int(tree.node_ids[0]), int(tree.node_ids[1])]
    told, features = read(torch.tensor([*prompt, child, 11]))
    tree.restart(11)
    draft.commit(Accepted(accepted, [prompt[-1], child], told[5:7]), tree)
    assert draft.expand(tree, root)
    logprobs, _ = wanted([*prompt[1:], child, 11], features[:7])
    np.testing.assert_allclose(tree.logprobs[1:], logprobs.topk(4).values.numpy(), atol=1e-4)
