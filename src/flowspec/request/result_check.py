"""Whether a result can be an answer to what was sent; a broken worker must not go unnoticed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowspec.core import FINAL
from flowspec.errors import ProtocolError
from flowspec.tree import Ints
from flowspec.wire.messages import Result


def check_result(result: Result, sent: Ints, num_prefix: int, alive: Ints, feature_layers: Sequence[int]) -> None:
    """``sent``: its segment's node ids, the first ``num_prefix`` of them of the prompt; ``alive``: those of the tree.

    Raises ``ProtocolError``.
    """
    problem = ""
    if result.num_prefix != num_prefix:
        problem = f"a result has {result.num_prefix} prefix rows where {num_prefix} were sent"
    node_ids = np.array(result.node_ids, dtype=np.int64)
    if feature_layers and num_prefix and not np.array_equal(node_ids[:num_prefix], sent[:num_prefix]):
        problem = "a result lacks rows of the prompt"
    if (result.features is not None) != bool(feature_layers and tuple(feature_layers) != (FINAL,)):
        problem = "a result has features that nobody wants, or lacks them"
    foreign = np.setdiff1d(node_ids, sent)  # none, but for a worker that is broken
    if len(foreign) and np.isin(foreign, alive).any():
        problem = "a result has rows that its segment did not have"
    if problem:
        raise ProtocolError(f"worker {result.timings[-1].stage} breaks the protocol: {problem}")
