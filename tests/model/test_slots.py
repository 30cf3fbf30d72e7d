"""The slot table against a model that is rebuilt from scratch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flowspec.errors import ProtocolError
from flowspec.model.slots import SlotTable

ROOT, NO_NODE = 100, 99


class Naive:
    """What design.md says about nodes, computed from the definitions each time it is asked."""

    def __init__(self, root_id: int) -> None:
        self.root_id = root_id
        self.prefix_slots: list[int] = []  # in path order
        self.slots: dict[int, int] = {}
        self.parents: dict[int, int] = {}

    def path(self, node_id: int) -> list[int] | None:
        """From the root down to the node; None if it is dead."""
        path = [node_id]
        while path[-1] != self.root_id:
            if path[-1] not in self.parents:
                return None
            path.append(self.parents[path[-1]])
        return path[::-1] if self.root_id in self.slots else None

    def alive(self) -> list[int]:
        return [node_id for node_id in self.slots if self.path(node_id) is not None]

    def forget_dead(self) -> set[int]:
        alive = set(self.alive())
        freed = {slot for node_id, slot in self.slots.items() if node_id not in alive}
        self.slots = {node_id: slot for node_id, slot in self.slots.items() if node_id in alive}
        self.parents = {node_id: parent for node_id, parent in self.parents.items() if node_id in alive}
        return freed

    def visible(self, node_id: int) -> set[int]:
        path = self.path(node_id)
        assert path is not None
        return {*self.prefix_slots, *(self.slots[ancestor] for ancestor in path)}


class SlotTableMachine(RuleBasedStateMachine):
    """Segments, commits and stale rows in any order, as a worker may meet them."""

    @initialize(num_prefix=st.integers(0, 6), capacity=st.sampled_from([1, 4, 256]))
    def open(self, num_prefix: int, capacity: int) -> None:
        self.table = SlotTable(ROOT, capacity)
        self.naive = Naive(ROOT)
        self.next_id = ROOT + 1
        self.sent: dict[int, int] = {}  # every id that was ever given out, and its position
        self.sent[ROOT] = num_prefix
        self.pending_root: int | None = ROOT
        self.naive.prefix_slots = self.table.append_prefix(range(num_prefix)).tolist()

    @rule(picks=st.lists(st.integers(0, 10**6), max_size=6), sends_root=st.booleans())
    def place(self, picks: list[int], sends_root: bool) -> None:
        rows: list[tuple[int, int]] = []
        if sends_root and self.pending_root is not None:
            rows.append((self.pending_root, NO_NODE))
            self.pending_root = None
        for pick in picks:
            known = list(self.sent)
            parent_id = known[pick % len(known)]  # alive, dead, committed or not here yet
            rows.append((self.next_id, parent_id))
            self.sent[self.next_id] = self.sent[parent_id] + 1
            self.next_id += 1
        ids, parents = [row[0] for row in rows], [row[1] for row in rows]
        kept, slots = self.table.place(ids, parents, [self.sent[node_id] for node_id in ids])
        expected = []
        for row, (node_id, parent_id) in enumerate(rows):
            if node_id == self.naive.root_id or parent_id in self.naive.alive():
                self.naive.slots[node_id] = slots[len(expected)]
                self.naive.parents[node_id] = parent_id
                expected.append(row)
        assert kept.tolist() == expected
        assert [self.table.slot_of(ids[row]) for row in kept] == slots.tolist()

    @precondition(lambda self: self.naive.root_id in self.naive.slots)
    @rule(pick=st.integers(0, 10**6), root_pick=st.integers(0, 10**6))
    def commit(self, pick: int, root_pick: int) -> None:
        alive = self.naive.alive()
        path = self.naive.path(alive[pick % len(alive)])
        assert path is not None
        children = [node_id for node_id in alive if self.naive.parents[node_id] == path[-1] and node_id not in path]
        choice = root_pick % (len(children) + 1)
        if choice < len(children):
            root_id = children[choice]
            self.pending_root = None
        else:  # the bonus token: a node that arrives after this commit
            root_id, self.next_id = self.next_id, self.next_id + 1
            self.sent[root_id] = self.sent[path[-1]] + 1
            self.pending_root = root_id
        freed = self.table.commit(path, root_id)
        for node_id in path:
            self.naive.prefix_slots.append(self.naive.slots.pop(node_id))
            del self.naive.parents[node_id]
        self.naive.root_id = root_id
        assert set(freed.tolist()) == self.naive.forget_dead()
        assert len(set(freed.tolist())) == len(freed)

    @rule(pick=st.integers(0, 10**6))
    def refused_commits_change_nothing(self, pick: int) -> None:
        strangers = [node_id for node_id in [*self.sent, NO_NODE] if node_id != self.naive.root_id]
        with pytest.raises(ProtocolError):
            self.table.commit([strangers[pick % len(strangers)] if strangers else NO_NODE], self.next_id)
        if self.naive.slots:
            with pytest.raises(ProtocolError):
                self.table.place([self.next_id, next(iter(self.naive.slots))], [self.naive.root_id] * 2, [0, 0])

    @invariant()
    def slots_are_neither_shared_nor_leaked(self) -> None:
        self.table.check_integrity()
        used = [*self.naive.prefix_slots, *self.naive.slots.values()]
        assert len(set(used)) == len(used)
        assert all(slot < self.table.high_water <= self.table.capacity for slot in used)
        assert len(self.table.positions) == self.table.capacity

    @invariant()
    def masks_are_the_ancestor_relation(self) -> None:
        alive = self.naive.alive()
        mask = self.table.rows_mask(np.array([self.naive.slots[node_id] for node_id in alive], dtype=np.int64))
        assert mask.shape == (len(alive), self.table.high_water)
        for row, node_id in zip(mask, alive, strict=True):
            assert set(np.flatnonzero(row).tolist()) == self.naive.visible(node_id)
            assert self.table.positions[self.naive.slots[node_id]] == self.sent[node_id]

    @invariant()
    def prefix_rows_see_the_prefix_up_to_themselves(self) -> None:
        slots = self.naive.prefix_slots
        for i, row in enumerate(self.table.rows_mask(np.array(slots, dtype=np.int64))):
            assert set(np.flatnonzero(row).tolist()) == set(slots[: i + 1])


TestSlotTable = SlotTableMachine.TestCase
TestSlotTable.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)


def table_with_tree() -> SlotTable:
    """Prefix 0, 1; root 100 with children 101 and 102; 101 has the child 103."""
    table = SlotTable(root_id=ROOT)
    table.append_prefix([0, 1])
    table.place([100, 101, 102, 103], [NO_NODE, 100, 100, 101], [2, 3, 3, 4])
    return table


def test_a_row_alone_does_not_see_its_siblings() -> None:
    table = table_with_tree()
    kept, slots = table.place([104], [101], [4])
    assert kept.tolist() == [0]
    assert table.rows_mask(slots).astype(int).tolist() == [[1, 1, 1, 1, 0, 0, 1]]


def test_freed_slots_are_used_again_lowest_first() -> None:
    table = table_with_tree()
    assert table.commit([100], root_id=102).tolist() == [3, 5]
    _, slots = table.place([110, 111, 112], [102, 110, 110], [4, 5, 5])
    assert slots.tolist() == [3, 5, 6]
    assert table.rows_mask(slots)[1].astype(int).tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_rows_below_committed_nodes_are_dead_unless_they_are_the_root() -> None:
    table = table_with_tree()
    table.commit([100, 101], root_id=200)
    kept, _ = table.place([105, 106, 200, 201], [101, 103, 101, 200], [4, 5, 4, 5])
    assert kept.tolist() == [2, 3]
    assert table.slot_of(103) is None
    assert table.slot_of(200) is not None


def test_the_root_may_arrive_before_the_commit_that_names_it() -> None:
    table = table_with_tree()
    table.place([200, 201], [101, 200], [4, 5])
    table.commit([100, 101], root_id=200)
    kept, slots = table.place([202], [201], [6])
    assert kept.tolist() == [0]
    assert table.rows_mask(slots).sum() == 2 + 2 + 3


def test_an_accepted_row_may_be_run_again_and_sees_only_what_is_before_it() -> None:
    table = table_with_tree()
    slots = np.array([table.slot_of(node_id) for node_id in (100, 101, 103)])
    before = table.rows_mask(slots)
    table.commit([100, 101, 103], root_id=200)
    assert np.array_equal(table.rows_mask(slots), before)


@pytest.mark.parametrize(
    ("prefix_ids", "root_id"),
    [
        ([101], 200),  # not from the root
        ([100, 103], 200),  # a gap
        ([100, 104], 200),  # unknown
        ([100, 100], 200),
        ([100], 103),  # the new root is known, and no child of 100
        ([], 101),
    ],
)
def test_a_commit_that_is_no_path_is_refused_and_changes_nothing(prefix_ids: list[int], root_id: int) -> None:
    table = table_with_tree()
    with pytest.raises(ProtocolError, match="commit of"):
        table.commit(prefix_ids, root_id)
    table.check_integrity()
    assert table.root_id == ROOT
    assert table.slot_of(103) == 5


@pytest.mark.parametrize(("ids", "parents"), [([103], [100]), ([104, 104], [100, 100])])
def test_a_node_that_was_sent_twice_is_refused(ids: list[int], parents: list[int]) -> None:
    table = table_with_tree()
    with pytest.raises(ProtocolError, match="sent twice"):
        table.place(ids, parents, [3] * len(ids))
    table.check_integrity()


def test_paths_stay_as_short_as_the_tree_is_deep() -> None:
    """A request of any length: a chain of bonus tokens and accepted children."""
    table = SlotTable(root_id=0)
    for root_id in range(0, 400, 2):
        table.place([root_id, root_id + 1], [NO_NODE, root_id], [root_id, root_id + 1])
        table.commit([root_id, root_id + 1], root_id + 2)
        table.check_integrity()
    assert table.slot_of(399) is None
    _, slots = table.place([400, 401], [NO_NODE, 400], [400, 401])
    assert table.rows_mask(slots).sum(axis=1).tolist() == [401, 402]
    assert table.high_water == 402


@pytest.mark.parametrize("broken", ["shared", "leaked", "path"])
def test_check_integrity_notices_damage(broken: str) -> None:
    table = table_with_tree()
    if broken == "shared":
        table._free.append(3)
    elif broken == "leaked":
        table.high_water += 1
    else:
        table._paths[5] = (2, 4, 5)
    with pytest.raises(AssertionError):
        table.check_integrity()


def test_masks_of_dead_slots_are_refused() -> None:
    table = table_with_tree()
    table.commit([100], root_id=102)
    with pytest.raises(AssertionError, match="without a node"):
        table.rows_mask(np.array([3]))
