"""The tree search goes deep, never looks at a state twice, and depends on nothing but its seed."""

from __future__ import annotations

import math
import random
from collections import Counter
from statistics import fmean

import pytest

from lamella.methods.cola import SearchNode, TreeSearch, random_search, tree_search

LAYERS = 28
ROOT = tuple(range(LAYERS))


def edits(path: tuple[int, ...], at_root: bool) -> list[tuple[int, ...]]:
    """Skip or repeat blocks in a chain of 28, as in the paper: 212 edits at the root."""
    found = []
    for k in (1, 2, 3, 4) if at_root else (1,):
        for p in range(len(path) - k + 1):
            found += [path[:p] + path[p + k :], path[: p + k] + path[p:]]
    return [new for new in found if 16 <= len(new) <= 32]


def reward(path: tuple[int, ...]) -> float:
    """Right for one path in three, by nothing that the search could learn."""
    return float(random.Random(repr(path)).random() < 1 / 3)


def length(path: tuple[int, ...]) -> float:
    return len(path) / LAYERS


def searched(simulations: int = 60, **options: float) -> TreeSearch[tuple[int, ...]]:
    return tree_search(ROOT, edits, reward, length, simulations=simulations, **options)


def nodes(node: SearchNode) -> list[SearchNode]:
    return [node, *(below for child in node.children for below in nodes(child))]


def test_ucb_on_a_tree_of_three_nodes_is_what_the_formula_gives_by_hand() -> None:
    rewards = {"root": 0.0, "a": 1.0, "b": 0.0}
    sizes = {"root": 1.0, "a": 0.75, "b": 1.25}

    def run(simulations: int) -> dict[str, SearchNode]:
        search = tree_search(
            "root",
            lambda state, at_root: ["a", "b"] if at_root else [],
            rewards.__getitem__,
            sizes.__getitem__,
            simulations=simulations,
            penalty=5.0,
            p_random=0.0,
            seed=0,
        )
        return {node.state: node for node in nodes(search.root)}

    # 1: expands the root and draws a child x; x has 1 visit while the root still has 0, then the root has 1.
    after = run(1)
    x = "a" if after["a"].visits else "b"
    y = "b" if x == "a" else "a"
    assert after[x].ucb == pytest.approx(rewards[x] - 5 * sizes[x] + 0)
    assert after["root"].ucb == pytest.approx(rewards[x] - 5 + math.sqrt(2 * math.log(2)))
    assert after[y].ucb == -math.inf and after[y].reward is None

    # 2: selects x, the only one with a value, and finds no edits: x has 2 visits while the root has 1.
    after = run(2)
    assert after[x].ucb == pytest.approx(rewards[x] - 5 * sizes[x] + math.sqrt(2 * math.log(2) / 2))
    assert after["root"].ucb == pytest.approx(rewards[x] - 5 + math.sqrt(2 * math.log(3) / 2))
    assert after[x].fully_explored and not after["root"].fully_explored

    # 3: x is done, so y: it has 1 visit while the root has 2; then the root has 3, and all is explored.
    after = run(3)
    assert after[y].ucb == pytest.approx(rewards[y] - 5 * sizes[y] + math.sqrt(2 * math.log(3) / 1))
    total = 2 * rewards[x] + rewards[y]
    assert after["root"].ucb == pytest.approx(total / 3 - 5 + math.sqrt(2 * math.log(4) / 3))
    assert after["root"].fully_explored


def test_60_simulations_go_deeper_than_3_though_the_root_alone_has_212_edits() -> None:
    assert len(set(edits(ROOT, True))) == 212
    for seed in range(5):
        assert searched(60, seed=seed).depth > 3


def test_every_state_is_in_the_tree_once_and_is_evaluated_at_most_once() -> None:
    unshared: Counter = Counter()

    def counted(path: tuple[int, ...]) -> float:
        unshared[path] += 1
        return reward(path)

    search = tree_search(ROOT, edits, counted, length, simulations=100)
    states = [node.state for node in nodes(search.root)]
    assert len(states) == len(set(states))
    assert set(unshared.values()) == {1}
    assert [found.state for found in search.evaluated] == list(unshared)
    assert search.evaluated[0].state == ROOT and search.simulations == 100


def test_every_edge_of_the_tree_is_a_legal_edit_and_counts_as_one_step_of_depth() -> None:
    search = searched(40)
    for node in nodes(search.root):
        for child in node.children:
            assert child.state in edits(node.state, node is search.root)
            assert child.depth == node.depth + 1 and child.parent is node
    depths = {node.state: node.depth for node in nodes(search.root)}
    assert all(depths[found.state] == found.depth for found in search.evaluated)


def test_visits_and_rewards_add_up_and_a_revisit_counts_the_node_s_own_reward() -> None:
    search = searched(100)
    assert search.root.visits == 100
    for node in nodes(search.root):
        below = sum(child.visits for child in node.children)
        assert node.visits - below >= 0
        if not node.children and node.visits:
            assert node.total == node.visits * reward(node.state)
        if node.children:
            own = node.visits - below
            rewards_below = sum(child.total for child in node.children)
            assert node.total == rewards_below + own * (reward(node.state) if own else 0)


def test_the_same_seed_gives_the_same_search_whatever_else_draws() -> None:
    random.seed(1)
    first = searched(60)
    random.seed(2)
    again = searched(60)
    assert first.evaluated == again.evaluated
    assert searched(60, seed=1).evaluated != first.evaluated
    one = random_search(ROOT, edits, reward, evaluations=40)
    random.seed(3)
    assert one.evaluated == random_search(ROOT, edits, reward, evaluations=40).evaluated
    assert one.evaluated != random_search(ROOT, edits, reward, evaluations=40, seed=1).evaluated


def test_the_penalty_draws_the_search_to_small_states() -> None:
    def mean(penalty: float) -> float:
        searches = [searched(80, penalty=penalty, seed=seed) for seed in range(5)]
        return fmean(len(found.state) for search in searches for found in search.evaluated)

    assert mean(5.0) < mean(0.0) < mean(-5.0)


def test_without_random_choices_selection_follows_the_evaluated_child() -> None:
    search = searched(6, p_random=0.0)
    # Every simulation goes one level deeper along the one child that was evaluated.
    assert [found.depth for found in search.evaluated] == [0, 1, 2, 3, 4, 5, 6]


def test_a_state_without_edits_ends_the_search_early() -> None:
    search = tree_search("only", lambda state, at_root: [], lambda state: 1.0, len, simulations=50)
    assert [found.state for found in search.evaluated] == ["only"]
    assert search.simulations == 1 and search.root.fully_explored
    alone = random_search("only", lambda state, at_root: [], lambda state: 1.0, evaluations=50)
    assert [found.state for found in alone.evaluated] == ["only"]


def test_random_search_evaluates_that_many_states_once_each_by_legal_edits() -> None:
    search = random_search(ROOT, edits, reward, evaluations=70)
    states = [found.state for found in search.evaluated]
    assert len(states) == len(set(states)) == 70 and states[0] == ROOT
    for node in nodes(search.root):
        assert all(child.state in edits(node.state, node is search.root) for child in node.children)
    assert {found.state: found.reward for found in search.evaluated} == {state: reward(state) for state in states}


def test_random_search_ends_where_everything_is_known() -> None:
    search = random_search(0, lambda n, at_root: [m for m in (n + 1, n + 2) if m < 6], float, evaluations=100)
    assert sorted(found.state for found in search.evaluated) == list(range(6))
