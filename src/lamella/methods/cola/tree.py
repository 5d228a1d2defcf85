"""Monte-Carlo tree search over edits, and a random search over the same edits as control.

Every node of the tree is a state, every edge an edit. One simulation:

    select       from the root down: mostly the child with the largest stored UCB, sometimes a random one
    expand       all edits of the selected node at once; go to a random one of them
    evaluate     once per state
    propagate    visits, rewards and UCB of every node up to the root

A search that tries every edit of the root first never leaves depth 1. Here children without an evaluation have a UCB of
-inf, so the greedy selection descends among evaluated nodes, and a budget of a hundred simulations reaches deep edits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

State = TypeVar("State", bound=Hashable)
Edits = Callable[[State, bool], Iterable[State]]  # the legal edits of a state, and whether it is the root


@dataclass(eq=False)
class SearchNode(Generic[State]):
    """A state in the tree, with its statistics.

    Attributes:
        state: the state.
        parent: the node from which an edit led here.
        depth: number of edits from the root.
        children: nodes of all new edits, once expanded.
        reward: reward of the state, once evaluated.
        visits: number of simulations through this node.
        total: sum of their rewards.
        ucb: the upper confidence bound.
        fully_explored: whether there is nothing left to explore below.
    """

    state: State
    parent: SearchNode[State] | None = None
    depth: int = 0
    children: list[SearchNode[State]] = field(default_factory=list)
    reward: float | None = None
    visits: int = 0
    total: float = 0.0
    ucb: float = -math.inf
    fully_explored: bool = False


class EvaluatedState(NamedTuple, Generic[State]):
    """An evaluated state.

    Attributes:
        state: the state.
        reward: its reward.
        depth: number of edits from the root.
    """

    state: State
    reward: float
    depth: int


@dataclass(frozen=True)
class TreeSearch(Generic[State]):
    """The result of a search.

    Attributes:
        evaluated: every evaluated state once, in order of evaluation, root first.
        simulations: number of simulations run; one may end at a known state.
        root: the tree, with its statistics.
    """

    evaluated: list[EvaluatedState[State]]
    simulations: int
    root: SearchNode[State]

    @property
    def depth(self) -> int:
        """The maximum number of edits between the root and an evaluated state."""
        return max(found.depth for found in self.evaluated)


def tree_search(
    root: State,
    edits: Edits[State],
    evaluate: Callable[[State], float],
    size: Callable[[State], float],
    *,
    simulations: int = 100,
    penalty: float = 5.0,
    explore: float = math.sqrt(2),
    p_random: float = 0.1,
    seed: int = 42,
) -> TreeSearch[State]:
    """Search for states with a high reward and a small size.

    The number of simulations is bounded, not that of evaluations; the search ends early when everything is explored.

    Args:
        root: the initial state; it is evaluated first.
        edits: returns the legal edits of a state; states already in the tree are skipped.
        evaluate: returns the reward of a state; called once per state.
        size: returns the size of a state, which is penalised.
        simulations: the budget.
        penalty: lambda of the UCB, total / visits - lambda * size + explore * sqrt(ln(root visits + 1) / visits).
        explore: weight of the last term.
        p_random: probability that the selection takes a random child.
        seed: random seed.
    """
    rng = random.Random(seed)
    top = SearchNode(root, reward=evaluate(root))
    seen = {root}
    evaluated = [EvaluatedState(root, top.reward or 0.0, 0)]
    done = 0
    while done < simulations and not top.fully_explored:
        done += 1
        node = _select(top, p_random, rng)
        if not node.children:
            new = [state for state in dict.fromkeys(edits(node.state, node is top)) if state not in seen]
            seen.update(new)
            node.children = [SearchNode(state, node, node.depth + 1) for state in new]
            if node.children:
                node = rng.choice(node.children)
            else:
                node.fully_explored = True
        if node.reward is None:
            node.reward = evaluate(node.state)
            evaluated.append(EvaluatedState(node.state, node.reward, node.depth))
        _propagate(node, node.reward, top, size, penalty, explore)
    return TreeSearch(evaluated, done, top)


def _select(node: SearchNode[State], p_random: float, rng: random.Random) -> SearchNode[State]:
    """Descend to a node without children."""
    while open_children := [child for child in node.children if not child.fully_explored]:
        at_random = rng.random() < p_random
        node = rng.choice(open_children) if at_random else max(open_children, key=lambda child: child.ucb)
    return node


def _propagate(
    leaf: SearchNode[State],
    reward: float,
    root: SearchNode[State],
    size: Callable[[State], float],
    penalty: float,
    explore: float,
) -> None:
    """Update the statistics of all nodes from a leaf to the root."""
    node: SearchNode[State] | None = leaf
    while node is not None:
        node.visits += 1
        node.total += reward
        bonus = explore * math.sqrt(math.log(root.visits + 1) / node.visits)
        node.ucb = node.total / node.visits - penalty * size(node.state) + bonus
        if node.children and all(child.fully_explored for child in node.children):
            node.fully_explored = True
        node = node.parent


def random_search(
    root: State, edits: Edits[State], evaluate: Callable[[State], float], *, evaluations: int, seed: int = 42
) -> TreeSearch[State]:
    """Control: evaluate a random new edit of a random known state, until the budget is used up.

    Args:
        root: the initial state; it is evaluated first.
        edits: returns the legal edits of a state.
        evaluate: returns the reward of a state.
        evaluations: the budget, including the root.
        seed: random seed.
    """
    rng = random.Random(seed)
    top = SearchNode(root, reward=evaluate(root))
    seen = {root}
    evaluated = [EvaluatedState(root, top.reward or 0.0, 0)]
    growing = [top]
    while growing and len(evaluated) < evaluations:
        parent = rng.choice(growing)
        new = [state for state in dict.fromkeys(edits(parent.state, parent is top)) if state not in seen]
        if not new:
            growing.remove(parent)
            continue
        state = rng.choice(new)
        seen.add(state)
        node = SearchNode(state, parent, parent.depth + 1, reward=evaluate(state))
        parent.children.append(node)
        growing.append(node)
        evaluated.append(EvaluatedState(state, node.reward or 0.0, node.depth))
    return TreeSearch(evaluated, len(evaluated) - 1, top)
