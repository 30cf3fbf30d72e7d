"""Drafts with an EAGLE-1/2 or EAGLE-3 head (arXiv 2401.15077, 2406.16858, 2503.01840), pass by pass, into one tree.

The head predicts the next feature from a token and the feature before it. The row of node n takes n's token and its
parent's feature, gives n's own feature, and the target's lm_head turns that into n's children. A verified parent has a
true feature; else it is the head's prediction, and n's staleness counts the predictions since the last true one.

An EAGLE-3 head is no prediction of features: it is fed with its own output all the same, and its true features are sums
that the target's stages have made. A model's own MTP layer predicts hidden states, and reads the target's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowspec.core import FINAL, SamplingParams
from flowspec.draft.base import Accepted, ReusableDraft, steady_steps
from flowspec.model.attention import ATTENTION
from flowspec.model.draft_head import DraftHead
from flowspec.model.kv_cache import KVCache
from flowspec.model.target_head import LogitsHead
from flowspec.sampling import Sampler
from flowspec.tree import DraftTree, Ints
from flowspec.wire.messages import NO_PARENT

GREEDY = Sampler(SamplingParams())  # knows of no noise


class EagleSource:
    """A loaded head, shared by all requests."""

    def __init__(
        self,
        head: DraftHead,
        lm_head: LogitsHead,
        is_coupled: bool = True,
        name: str = "eagle",
        feature_layers: tuple[int, ...] = (FINAL,),
    ) -> None:
        """``lm_head``: of the head's outputs; the target's, or a cheaper copy.

        ``is_coupled``: guess with the noise of the draws to come; off for comparison with systems that do not.
        """
        head.config._attn_implementation = ATTENTION
        self.head = head
        self.lm_head = lm_head
        self.is_coupled = is_coupled
        self.name = name
        self.feature_layers = feature_layers
        self.hit_rates: Sequence[float] = getattr(head.config, "hit_rates", ())
        self.steady_steps = steady_steps(self.hit_rates)
        self.block_len = 1

    def open(self, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> EagleDraft:
        return EagleDraft(self, prompt_ids, sampler if self.is_coupled else GREEDY, top_k)


@dataclass
class _TrueRow:
    """A row to run with its parent's true feature [H]; ``slot``: of a stale row of the same node, to write over."""

    node_id: int
    token_id: int
    position: int  # of the feature, which is the rotary position of the row
    feature: Tensor
    slot: int | None = None


class EagleDraft:
    """One request's drafting: the head's own cache, and the newest feature of every node in it, by slot."""

    def __init__(self, source: EagleSource, prompt_ids: Sequence[int], sampler: Sampler, top_k: int) -> None:
        self._head = source.head
        self._lm_head = source.lm_head
        self._top_k = top_k
        self._sampler = sampler
        self._prompt_ids = prompt_ids
        self._cache = KVCache(0, source.head.config.num_hidden_layers, root_id=len(prompt_ids) - 1)
        self._features = source.head.embedding.new_zeros(0, source.head.embedding.shape[1])
        self._true_rows: list[_TrueRow] = []  # a chain that ends in the root
        self._root_position = len(prompt_ids) - 2  # the rotary position of the root's row

    @property
    def num_certain(self) -> int:
        """The row at a rotary position holds the feature of the token there."""
        return self._true_rows[0].position if self._true_rows else self._root_position + 1

    def reuse(self, other: ReusableDraft, num_cached: int) -> None:
        assert isinstance(other, EagleDraft) and num_cached <= other.num_certain, "guesses are not to be reused"
        self._cache, self._features = other._cache, other._features
        self._cache.slots.finish([])
        self._cache.slots.reuse(num_cached, len(self._prompt_ids) - 1)

    def end(self) -> EagleDraft:
        return self

    def read_prompt(self, node_ids: Sequence[int], features: Tensor) -> None:
        """Run the rows of the tokens behind these; the root's own waits for the first pass."""
        self._true_rows += [
            _TrueRow(node_id + 1, self._prompt_ids[node_id + 1], node_id, feature)
            for node_id, feature in zip(node_ids, self._head.features_of(features), strict=True)
        ]
        root_row = self._true_rows.pop() if node_ids[-1] == self._root_position else None
        if self._true_rows:
            self._run_true_rows()
        if root_row is not None:
            self._true_rows.append(root_row)

    def commit(self, accepted: Accepted, tree: DraftTree) -> None:
        """Note the rows whose parents' features are true now; dead nodes' slots are free at once."""
        table = self._cache.slots
        node_ids = [*accepted.node_ids, tree.root_id]
        token_ids = [*accepted.token_ids, int(tree.token_ids[0])]
        slots = [table.slot_of(node_id) for node_id in node_ids]
        # Nodes are drafted from the root down, so the ones that the head knows are the path's beginning.
        table.commit([i for i, slot in zip(accepted.node_ids, slots, strict=False) if slot is not None], tree.root_id)
        for i, feature in enumerate(self._head.features_of(accepted.features), start=1):
            self._root_position += 1
            self._true_rows.append(_TrueRow(node_ids[i], token_ids[i], self._root_position, feature, slots[i]))

    def expand(self, tree: DraftTree, rows: Ints) -> bool:
        """The root's pass runs the accepted chain with its true features first; it cannot run before the prompt's."""
        if rows[0] != 0:
            self._grow(tree, rows, self._run_tree_rows(tree, rows), tree.staleness[tree.parents[rows]] + 1)
            return True
        if not self._true_rows:
            return False
        self._grow(tree, rows, self._run_true_rows()[-1:], np.ones(1, dtype=np.int64))
        return True

    def _run_true_rows(self) -> Tensor:
        """Run the chain of rows with true features, and forget it. Returns their predicted features [rows, H]."""
        table = self._cache.slots
        rows, self._true_rows = self._true_rows, []
        for row in rows:
            if row.slot is None:
                is_root = row.node_id == table.root_id
                placed = table.place([row.node_id], [NO_PARENT], [row.position])[1] if is_root else None
                row.slot = int((table.append_prefix([row.position]) if placed is None else placed)[0])
        slots = np.array([row.slot for row in rows], dtype=np.int64)
        return self._forward([row.token_id for row in rows], torch.stack([row.feature for row in rows]), slots)

    def _run_tree_rows(self, tree: DraftTree, rows: Ints) -> Tensor:
        """Run nodes of the tree with the newest features of their parents; returns predicted features [rows, H]."""
        table = self._cache.slots
        node_ids, parent_ids = tree.node_ids[rows], tree.node_ids[tree.parents[rows]]
        positions = tree.depths[rows] + self._root_position
        is_new = np.array([table.slot_of(node_id) is None for node_id in node_ids.tolist()])
        table.place(node_ids[is_new], parent_ids[is_new], positions[is_new])
        parent_slots = torch.from_numpy(self._slots_of(parent_ids.tolist()))
        features = self._features[parent_slots.to(self._features.device)]
        return self._forward(tree.token_ids[rows].tolist(), features, self._slots_of(node_ids.tolist()))

    def _slots_of(self, node_ids: list[int]) -> Ints:
        return np.array([self._cache.slots.slot_of(node_id) for node_id in node_ids], dtype=np.int64)

    @torch.inference_mode()
    def _forward(self, token_ids: list[int], features: Tensor, slots: Ints) -> Tensor:
        table, embedding = self._cache.slots, self._head.embedding
        device = embedding.device
        rows = torch.from_numpy(slots).to(device)
        self._cache.write_at(rows)
        predicted = self._head(
            torch.tensor([token_ids], device=device),
            features[None].to(device, embedding.dtype),
            torch.from_numpy(table.positions[slots])[None].to(device),
            torch.from_numpy(table.rows_mask(slots))[None, None].to(device),
            self._cache,
        )[0]
        if len(self._features) < table.capacity:
            grown = predicted.new_zeros(table.capacity, predicted.shape[1])
            grown[: len(self._features)] = self._features
            self._features = grown
        self._features[rows] = self._head.fed_back(predicted)
        return predicted

    def _grow(self, tree: DraftTree, rows: Ints, features: Tensor, staleness: Ints) -> None:
        """Give the nodes the ``top_k`` most probable tokens after them."""
        positions = tree.depths[rows] + self._root_position + 2  # a node's token is one behind its row's feature
        children = self._sampler.draft_children(self._lm_head.logits(features), positions, self._top_k)
        tree.expand(rows, *children, staleness)
