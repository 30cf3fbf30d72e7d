from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chains import add_path
from flowspec.tree import UNDRAFTED, DraftTree

ROOT, ONE = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)


def grown_tree(data: st.DataObject, size: int = 12) -> DraftTree:
    """A tree after some random expansions, chains and sends."""
    tree = DraftTree(5, 0, size)
    for _ in range(data.draw(st.integers(1, 6))):
        change(data, tree)
    return tree


def change(data: st.DataObject, tree: DraftTree) -> None:
    logprob = st.floats(-5.0, 0.0)
    row = data.draw(st.integers(0, len(tree) - 1))
    match data.draw(st.sampled_from(["expand", "hint", "add_path", "send"])):
        case "expand":
            tokens = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
            logprobs = data.draw(st.lists(logprob, min_size=len(tokens), max_size=len(tokens)))
            tree.expand(np.array([row]), np.array([tokens]), np.array([logprobs]), np.array([1]))
        case "hint":
            tokens = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True))
            shares = data.draw(st.lists(st.floats(0.01, 0.24), min_size=len(tokens), max_size=len(tokens)))
            tree.hint(np.array([row]), np.array([tokens]), np.log([shares]))
        case "add_path":
            tokens = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
            add_path(tree, row, tokens, [data.draw(logprob) for _ in tokens])
        case _:
            tree.mark_sent(tree.best_unsent(data.draw(st.integers(1, 5))))


def paths(tree: DraftTree) -> dict[tuple[int, ...], tuple[int, bool]]:
    """Token path from the root -> (node id, sent): the tree without its layout."""
    return {
        tuple(tree.token_ids[tree.path(row)].tolist()): (int(tree.node_ids[row]), bool(tree.sent[row]))
        for row in range(len(tree))
    }


def test_below_a_root_that_wants_a_pass_the_best_rows_with_old_guesses_grow() -> None:
    tree = DraftTree(5, 0, 12)
    tree.expand(ROOT, np.array([[1, 2, 3]]), np.log([[0.5, 0.3, 0.1]]), np.array([4]))
    tree.expand(np.array([1]), np.array([[4]]), np.log([[0.9]]), np.array([6]))
    assert tree.worth_expanding(9, 9, steady_steps=3).tolist() == [0]
    # The first child's guesses are two steps staler than the root's, the others and the leaf have none.
    assert tree.worth_growing(9, 9).tolist() == [1, 2, 3, 4]
    assert tree.worth_growing(1, 9).tolist() == [] and tree.worth_growing(2, 2).tolist() == [1, 2]


@given(st.data())
def test_every_change_keeps_the_invariants(data: st.DataObject) -> None:
    tree = DraftTree(5, 0, 12)
    for _ in range(data.draw(st.integers(1, 12))):
        change(data, tree)
        tree.check_integrity()


@given(st.data())
def test_every_prefix_of_the_score_order_is_a_connected_tree(data: st.DataObject) -> None:
    tree = grown_tree(data)
    best = tree.best().tolist()
    assert best[0] == 0
    for i, row in enumerate(best[1:], start=1):
        assert tree.parents[row] in best[:i]


@given(st.data())
def test_a_tree_that_is_drafted_again_is_what_it_would_be_without_the_old_nodes(data: st.DataObject) -> None:
    """And old nodes keep their ids, and their places in flight."""
    old, fresh = grown_tree(data, size=100), DraftTree(0, 0, size=100)
    before = paths(old)
    old.forget_scores()
    assert old.best().tolist() == [0] and not len(old.best_at(1, 10))
    all_shares = ([0.53, 0.29, 0.13], [0.47, 0.31, 0.17], [0.59, 0.23, 0.11])  # primes: no two paths score alike
    for level, level_shares in enumerate(all_shares):
        tokens = data.draw(st.lists(st.integers(0, 9), min_size=3, max_size=3, unique=True))
        shares = np.array(data.draw(st.permutations(level_shares)))
        for tree in (old, fresh):
            rows = tree.best_at(level, 2)
            tree.expand(rows, np.array([tokens] * len(rows)), np.log([shares] * len(rows)), np.ones_like(rows))
            tree.check_integrity()
    scores = [
        {tuple(tree.token_ids[tree.path(row)].tolist()): tree.scores[row] for row in tree.best().tolist()}
        for tree in (old, fresh)
    ]
    assert scores[0] == scores[1]
    assert {path: node for path, node in paths(old).items() if path in before} == before


@given(st.data())
def test_rerooting_keeps_exactly_the_descendants_and_their_order(data: st.DataObject) -> None:
    tree = grown_tree(data)
    row = data.draw(st.integers(0, len(tree) - 1))
    prefix = tuple(tree.token_ids[tree.path(row)].tolist())
    kept = {path[len(prefix) - 1 :]: node for path, node in paths(tree).items() if path[: len(prefix)] == prefix}
    scores = {int(tree.node_ids[r]): tree.scores[r] - tree.scores[row] for r in range(len(tree))}
    tree.reroot(row)
    tree.check_integrity()
    assert paths(tree) == kept
    np.testing.assert_allclose(tree.scores, [scores[i] for i in tree.node_ids.tolist()], atol=1e-9)


@given(st.data())
def test_node_ids_only_grow_and_are_never_reused(data: st.DataObject) -> None:
    tree = grown_tree(data)
    seen = set(tree.node_ids.tolist())
    tree.restart(3)
    assert tree.root_id > max(seen)
    assert (len(tree), tree.token_ids[0], tree.sent[0]) == (1, 3, False)


def test_merging_finds_existing_children_and_takes_the_new_probabilities() -> None:
    tree = DraftTree(0, 7, 80)
    tree.expand(np.array([0]), np.array([[1, 2, 3]]), np.log([[0.5, 0.3, 0.1]]), np.array([4]))
    ids = dict(zip(tree.token_ids.tolist(), tree.node_ids.tolist(), strict=True))
    tree.expand(np.array([0]), np.array([[2, 4]]), np.log([[0.6, 0.2]]), np.array([1]))
    tree.check_integrity()
    assert len(tree) == 5
    found = {token: tree.find(0, token) for token in (1, 2, 3, 4)}
    assert all(row is not None for row in found.values())
    assert [int(tree.node_ids[found[token]]) for token in (1, 2, 3)] == [ids[token] for token in (1, 2, 3)]  # type: ignore[index]
    # What the new draft does not name ranks no higher than the last that it names.
    np.testing.assert_allclose(np.exp(tree.logprobs[[found[t] for t in (1, 2, 3, 4)]]), [0.2, 0.6, 0.1, 0.2])  # type: ignore[index]
    assert tree.staleness[0] == 1 and (tree.staleness[1:] == UNDRAFTED).all()


def test_a_hint_and_the_draft_are_multiplied_whichever_comes_first() -> None:
    tree = DraftTree(0, 5, size=20)
    tree.expand(ROOT, np.array([[1, 2, 3]]), np.log([[0.6, 0.3, 0.05]]), ONE)
    tree.hint(ROOT, np.array([[2, 9]]), np.log([[0.8, 0.1]]))
    # What one of them does not name has its last one's share, and the hint leaves 0.1 to what neither names.
    products = {1: 0.6 * 0.1, 2: 0.3 * 0.8, 3: 0.05 * 0.1, 9: 0.05 * 0.1}
    total = sum(products.values()) + 0.05 * 0.1
    expected = {token: share / total for token, share in products.items()}
    assert probabilities(tree) == pytest.approx(expected)
    other = DraftTree(0, 5, size=20)
    other.hint(ROOT, np.array([[2, 9]]), np.log([[0.8, 0.1]]))
    other.expand(ROOT, np.array([[1, 2, 3]]), np.log([[0.6, 0.3, 0.05]]), ONE)
    assert probabilities(other) == pytest.approx(expected)
    tree.hint(ROOT, np.array([[1, 9]]), np.log([[0.9, 0.05]]))
    assert probabilities(tree)[1] > 0.9, "a later hint replaces the earlier one"
    tree.expand(ROOT, np.array([[1, 2, 3]]), np.log([[0.1, 0.8, 0.05]]), ONE)
    assert probabilities(tree)[1] < 0.9, "and the draft has its say again"
    tree.check_integrity()


def test_a_hint_does_not_outlive_the_choice_it_is_about() -> None:
    tree = DraftTree(0, 5, size=20)
    tree.expand(ROOT, np.array([[1, 2]]), np.log([[0.7, 0.2]]), ONE)
    tree.hint(ROOT, np.array([[2]]), np.log([[0.8]]))
    tree.reroot(tree.find(0, 1) or 0)
    tree.expand(ROOT, np.array([[6, 7]]), np.log([[0.7, 0.2]]), ONE)
    assert tree.scores[0] == 0.0 and probabilities(tree) == pytest.approx({6: 0.7, 7: 0.2})
    tree.check_integrity()


def test_a_hint_adds_nothing_that_would_not_be_sent() -> None:
    tree = DraftTree(0, 5, size=20, min_score=np.log(0.1))
    tree.hint(ROOT, np.array([[1, 2]]), np.log([[0.9, 0.05]]))
    assert list(probabilities(tree)) == [1]


def probabilities(tree: DraftTree) -> dict[int, float]:
    """Of the root's children, by token."""
    rows = np.flatnonzero(tree.parents == 0)
    return dict(zip(tree.token_ids[rows].tolist(), np.exp(tree.logprobs[rows]).tolist(), strict=True))


def test_only_the_best_nodes_are_sent_and_only_once() -> None:
    tree = DraftTree(0, 7, size=3)
    tree.expand(np.array([0]), np.array([[1, 2, 3, 4]]), np.log([[0.4, 0.3, 0.2, 0.05]]), np.array([1]))
    assert tree.best_unsent(2).tolist() == [0, 1]
    tree.mark_sent(tree.best_unsent(2))
    assert tree.best_unsent(10).tolist() == [2]
    tree.mark_sent(tree.best_unsent(10))
    assert not len(tree.best_unsent(10))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_a_large_tree_forgets_only_unsent_nodes_outside_the_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree = DraftTree(0, 0, size=20)
    for _ in range(20):
        rows = tree.best()[:5]
        tokens = np.stack([rng.permutation(50)[:10] for _ in rows])
        tree.expand(rows, tokens, np.log(rng.dirichlet(np.ones(10), len(rows)) + 1e-9), np.ones(len(rows), dtype=int))
        tree.mark_sent(tree.best_unsent(3))
        sent = set(tree.node_ids[tree.sent].tolist())
        best = set(tree.node_ids[tree.best()].tolist())
        tree.check_integrity()
        assert sent | best <= set(tree.node_ids.tolist())
    assert len(tree) <= 2 * 20 + int(tree.sent.sum())


def test_nodes_that_are_not_good_enough_are_neither_sent_nor_expanded() -> None:
    tree = DraftTree(0, 7, size=80, min_score=float(np.log(0.1)))
    tree.expand(np.array([0]), np.array([[1, 2, 3]]), np.log([[0.6, 0.3, 0.05]]), np.array([1]))
    tree.expand(np.array([1, 2]), np.array([[4, 5], [6, 7]]), np.log([[0.4, 0.1], [0.9, 0.05]]), np.array([2, 2]))
    assert tree.token_ids[tree.best()].tolist() == [7, 1, 2, 6, 4]
    assert tree.token_ids[tree.best_unsent(80)].tolist() == [7, 1, 2, 4, 6]
    tree.reroot(2)  # where the others are gone, what was below them counts for more
    assert tree.token_ids[tree.best()].tolist() == [2, 6]
