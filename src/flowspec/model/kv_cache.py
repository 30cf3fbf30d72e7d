"""The KV cache of one request on one stage: which node has which slot, and the keys and values in the slots.

A node keeps its slot for life. Committing makes slots visible to all later rows, pruning returns slots to a free list,
and nothing is ever copied or compacted: keys carry their rotary position, so attention does not care about row order.
This module knows nodes, slots and masks; it knows nothing of layers' arithmetic, sliding windows or messages.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from flowspec.errors import ProtocolError

Ints = Sequence[int] | NDArray[np.integer[Any]]

# The argument by which transformers' layers and models take a cache: from 5.24 on under the new name.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"

NO_NODE = -2  # a root that never comes
INITIAL_CAPACITY = 256  # slots of a new cache; doubled whenever they run out


class SlotTable:
    """Which slot holds which node of one request.

    The prefix is visible to all rows at later positions; its nodes need no ids, since nothing names them again. The
    nodes that are not committed form one tree below the root, and a node outside of it is dead. A method that raises
    ``ProtocolError`` has changed nothing.
    """

    def __init__(self, root_id: int | None = None, capacity: int = INITIAL_CAPACITY) -> None:
        assert capacity > 0, "a table without slots"
        self.root_id = root_id  # may be set until the first node is placed; from then on commits move it
        self.limit = 0  # slots that are expected at most: the table does not double beyond them; 0: unknown
        self.positions: NDArray[np.int64] = np.zeros(capacity, dtype=np.int64)  # by slot
        self.high_water = 0  # one more than the highest slot ever used
        self._in_prefix: NDArray[np.bool_] = np.zeros(capacity, dtype=np.bool_)  # by slot
        self._free: list[int] = []  # a heap, so that the lowest slot comes first
        self._tree: dict[int, _Node] = {}  # by node id, parents before their children
        self._paths: dict[int, tuple[int, ...]] = {}  # slot of a tree node -> slots from the root down to it

    @property
    def capacity(self) -> int:
        return len(self.positions)

    def slot_of(self, node_id: int) -> int | None:
        """The slot of a living node that is not committed, else None."""
        node = self._tree.get(node_id)
        return None if node is None else node.slot

    def append_prefix(self, positions: Ints) -> NDArray[np.int64]:
        """Place a chain of nodes that are committed on arrival (prefill); return their slots [n]."""
        slots = self._take_slots(len(positions))
        self.positions[slots] = positions
        self._in_prefix[slots] = True
        return slots

    def place(self, node_ids: Ints, parent_ids: Ints, positions: Ints) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give slots to the nodes that are alive; return their row indices and their slots, both [num_alive].

        A node is alive exactly when it is the root or its parent is a living tree node, placed earlier or in this call.
        Raises ``ProtocolError`` for a node that has a slot already.
        """
        ids, parents = _as_list(node_ids), _as_list(parent_ids)
        if len(set(ids)) < len(ids) or not self._tree.keys().isdisjoint(ids):
            raise ProtocolError(f"one of the nodes {ids} was sent twice; the request has to start again")
        alive = self._alive_rows(ids, parents)
        slots = self._take_slots(len(alive))
        for row, slot in zip(alive, slots.tolist(), strict=True):
            node_id, parent_id = ids[row], parents[row]
            above = () if node_id == self.root_id else self._paths[self._tree[parent_id].slot]
            self._tree[node_id] = _Node(slot, parent_id)
            self._paths[slot] = (*above, slot)
        rows = np.array(alive, dtype=np.int64)
        self.positions[slots] = np.asarray(positions, dtype=np.int64)[rows]
        return rows, slots

    def commit(self, prefix_ids: Ints, root_id: int) -> NDArray[np.int64]:
        """Move the path ``prefix_ids`` (old root first) into the prefix and re-root; return the slots that were freed.

        All tree nodes but the new root and its descendants die. The new root may be on its way still.
        Raises ``ProtocolError`` if the ids are no path from the old root, or the new root does not follow them.
        """
        path = _as_list(prefix_ids)
        self._check_path(path, root_id)
        for node_id in path:
            slot = self._tree.pop(node_id).slot
            self._in_prefix[slot] = True
            del self._paths[slot]
        self.root_id = root_id
        freed = self._drop_dead()
        # Each survivor's path began with the nodes that are committed now.
        self._paths = {slot: above[len(path) :] for slot, above in self._paths.items()}
        return np.array(freed, dtype=np.int64)

    def settle(self, node_ids: Ints) -> None:
        """The request has ended and these nodes were accepted: commit those that are not yet, drop all others."""
        self.commit([i for i in _as_list(node_ids) if i in self._tree], NO_NODE)

    def inherit(self, num_kept: int, root_id: int) -> None:
        """After ``settle``, for another request: keep the prefix tokens at positions below ``num_kept``."""
        assert not self._tree, "the table's request has not ended"
        dropped = np.flatnonzero(self._in_prefix & (self.positions >= num_kept)).tolist()
        self._in_prefix[dropped] = False
        for slot in dropped:
            heapq.heappush(self._free, slot)
        self.root_id = root_id

    def rows_mask(self, slots: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Ancestor mask [n, high_water] of the nodes in these slots: the prefix up to them, ancestors, themselves."""
        in_prefix = self._in_prefix[: self.high_water]
        mask = np.repeat(in_prefix[None], len(slots), axis=0)
        if not len(slots):
            return mask
        # Only a row of the prefix itself has prefix rows behind it.
        positions, row_positions = self.positions[: self.high_water], self.positions[slots]
        later = np.flatnonzero(in_prefix & (positions > row_positions.min()))
        if len(later):
            columns = slice(later[0], later[-1] + 1)
            mask[:, columns] &= positions[columns] <= row_positions[:, None]
        paths = [self._paths.get(slot, ()) for slot in slots.tolist()]
        rows = np.repeat(np.arange(len(slots)), [len(path) for path in paths])
        mask[rows, [slot for path in paths for slot in path]] = True
        assert mask[np.arange(len(slots)), slots].all(), "a row without a node in its slot"
        return mask

    def check_integrity(self) -> None:
        """Assert that no slot is shared or leaked, and that the paths are the ancestor relation."""
        tree = [node.slot for node in self._tree.values()]
        prefix = np.flatnonzero(self._in_prefix).tolist()
        assert sorted([*prefix, *tree, *self._free]) == list(range(self.high_water)), "a slot is shared or leaked"
        assert self._paths.keys() == set(tree), "a path without a node, or a node without a path"
        for node_id, node in self._tree.items():
            assert node_id == self.root_id or node.parent_id in self._tree, f"node {node_id} should be dead"
            above = () if node_id == self.root_id else self._paths[self._tree[node.parent_id].slot]
            assert self._paths[node.slot] == (*above, node.slot), f"node {node_id} has not its parent's path"

    def _alive_rows(self, ids: list[int], parents: list[int]) -> list[int]:
        rows: list[int] = []
        arriving: set[int] = set()
        for row, (node_id, parent_id) in enumerate(zip(ids, parents, strict=True)):
            if node_id == self.root_id or parent_id in self._tree or parent_id in arriving:
                rows.append(row)
                arriving.add(node_id)
        return rows

    def _check_path(self, path: list[int], root_id: int) -> None:
        above = None
        for node_id in path:
            node = self._tree.get(node_id)
            follows = node_id == self.root_id if above is None else node is not None and node.parent_id == above
            if node is None or not follows:
                raise ProtocolError(f"commit of {path}: node {node_id} is unknown, or no next step from the root")
            above = node_id
        root = self._tree.get(root_id)
        if root is not None and (above is None or root.parent_id != above):
            raise ProtocolError(f"commit of {path}: the new root {root_id} is no child of its last node")

    def _drop_dead(self) -> list[int]:
        """Forget the tree nodes that do not descend from the root; return their slots."""
        alive: dict[int, _Node] = {}
        freed: list[int] = []
        for node_id, node in self._tree.items():
            if node_id == self.root_id or node.parent_id in alive:
                alive[node_id] = node
            else:
                del self._paths[node.slot]
                heapq.heappush(self._free, node.slot)
                freed.append(node.slot)
        self._tree = alive
        return freed

    def _take_slots(self, count: int) -> NDArray[np.int64]:
        reused = [heapq.heappop(self._free) for _ in range(min(count, len(self._free)))]
        end = self.high_water + count - len(reused)
        capacity = self.capacity
        while capacity < end:
            capacity = min(2 * capacity, self.limit) if capacity < self.limit else 2 * capacity
        if capacity > self.capacity:
            self.positions = np.pad(self.positions, (0, capacity - len(self.positions)))
            self._in_prefix = np.pad(self._in_prefix, (0, capacity - len(self._in_prefix)))
        slots = np.array([*reused, *range(self.high_water, end)], dtype=np.int64)
        self.high_water = end
        return slots


class KVCache(Cache):
    """Keys and values of one request in the layers of one stage, in the form that transformers' layers write to.

    The table decides which slot a row has. ``write_at`` names the slots of the next forward; each layer then calls
    ``update``. Tensors are ``[1, num_kv_heads, capacity, head_dim]``, made at a layer's first row and grown by
    doubling; dead slots are reused and never given back.
    """

    def __init__(self, first_layer: int, num_layers: int, root_id: int | None = None) -> None:
        """``first_layer`` is the model's index of the first of the ``num_layers`` layers."""
        super().__init__(layers=[])
        self.slots = SlotTable(root_id)
        self._first_layer = first_layer
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._rows = torch.empty(0, dtype=torch.long)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values) if tensor is not None)

    def write_at(self, slots: torch.Tensor) -> None:
        """Let the next forward write to ``slots``, LongTensor [n] on the device; a slot may be written again."""
        self._rows = slots

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by a layer: write its rows [1, num_kv_heads, n, head_dim]; return all slots below high water."""
        layer, capacity, end = layer_idx - self._first_layer, self.slots.capacity, self.slots.high_water
        keys = self._keys[layer] = _with_capacity(self._keys[layer], capacity, key_states)
        values = self._values[layer] = _with_capacity(self._values[layer], capacity, value_states)
        keys.index_copy_(2, self._rows, key_states)
        values.index_copy_(2, self._rows, value_states)
        return keys[:, :, :end], values[:, :, :end]


class JointCache(Cache):
    """Several requests' caches in one forward: the layers' linear parts run on all rows, attention on each one's own.

    ``update`` returns one tensor for each cache, which ``attention.slot_attention`` takes in the place of one.
    """

    def __init__(self, caches: Sequence[KVCache], num_rows: Sequence[int]) -> None:
        """``num_rows``: how many of the forward's rows belong to each cache, in their order; it knows their slots."""
        super().__init__(layers=[])
        self._caches = caches
        self._num_rows = list(num_rows)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        rows = zip(key_states.split(self._num_rows, dim=2), value_states.split(self._num_rows, dim=2), strict=True)
        pairs = [cache.update(*own, layer_idx) for cache, own in zip(self._caches, rows, strict=True)]
        return tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs)


class Part(NamedTuple):
    """One request's rows in a forward that may be shared with others'."""

    inputs: torch.Tensor  # token ids [n] on the first stage, hidden states [n, H] on the others
    slots: NDArray[np.int64]  # [n]
    cache: Any  # of the stage's own kind


@dataclass(frozen=True)
class _Node:
    slot: int
    parent_id: int


def _as_list(ids: Ints) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)


def _with_capacity(tensor: torch.Tensor | None, capacity: int, like: torch.Tensor) -> torch.Tensor:
    if tensor is not None and tensor.shape[2] == capacity:
        return tensor
    # Zeros: attention multiplies the values it must not see by 0, and 0 * NaN would be NaN.
    grown = like.new_zeros(*like.shape[:2], capacity, like.shape[3])
    if tensor is not None:
        grown[:, :, : tensor.shape[2]] = tensor
    return grown
