"""Which node of one request has which slot on a stage, and which slots its row sees.

A node keeps its slot for life. Committing makes slots visible to all later rows, pruning returns slots to a free list,
and nothing is ever copied or compacted: keys carry their rotary position, so attention does not care about row order.
This module knows nodes, slots and masks; it knows nothing of layers' arithmetic, sliding windows or messages.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowspec.errors import ProtocolError

Ints = Sequence[int] | NDArray[np.integer[Any]]

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

    @property
    def num_nodes(self) -> int:
        """That live and are not committed."""
        return len(self._tree)

    @property
    def num_used(self) -> int:
        """Slots that hold a row."""
        return self.high_water - len(self._free)

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
            raise ProtocolError(f"one of the nodes {ids[:20]} was sent twice; the request has to start again")
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

    def finish(self, node_ids: Ints) -> None:
        """The request has ended and these nodes were accepted: commit those that are not yet, drop all others."""
        self.commit([i for i in _as_list(node_ids) if i in self._tree], NO_NODE)

    def reuse(self, num_cached: int, root_id: int) -> None:
        """After ``finish``, for another request: keep the prefix tokens at positions below ``num_cached``."""
        assert not self._tree, "the table's request has not ended"
        dropped = np.flatnonzero(self._in_prefix & (self.positions >= num_cached)).tolist()
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
                raise ProtocolError(f"commit of {path[:20]}: node {node_id} is unknown, or no next step from the root")
            above = node_id
        root = self._tree.get(root_id)
        if root is not None and (above is None or root.parent_id != above):
            raise ProtocolError(f"commit of {path[:20]}: the new root {root_id} is no child of its last node")

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


@dataclass(frozen=True)
class _Node:
    slot: int
    parent_id: int


def _as_list(ids: Ints) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
