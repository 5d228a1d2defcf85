"""Monte-Carlo tree search over edits, and the random search over the same edits that it has to beat.

Every node of the tree is a state, every edge an edit. One simulation:

    select       from the root down: mostly the child with the largest stored UCB, now and then a random one
    expand       all edits of the selected node at once; go to a random one of them
    evaluate     once per state
    propagate    visits, rewards and UCB of every node up to the root

A search that tries every edit of the root first never leaves depth 1. Here children without an evaluation have a UCB of
-inf, so the greedy choice goes down from what is known, and a budget of a hundred simulations reaches deep edits.
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
class Node(Generic[State]):
    """A state in the tree, with its statistics."""

    state: State
    parent: Node[State] | None = None
    depth: int = 0
    children: list[Node[State]] = field(default_factory=list)
    reward: float | None = None
    visits: int = 0
    total: float = 0.0
    ucb: float = -math.inf
    fully_explored: bool = False


class Evaluated(NamedTuple, Generic[State]):
    """A state that was evaluated, and how many edits away from the root it was found."""

    state: State
    reward: float
    depth: int


@dataclass(frozen=True)
class TreeSearch(Generic[State]):
    """What a search did.

    Attributes:
        evaluated: every state once, in the order of evaluation, the root first.
        simulations: how many were run; one may end at a state that is known.
        root: the tree, with its statistics.
    """

    evaluated: list[Evaluated[State]]
    simulations: int
    root: Node[State]

    @property
    def depth(self) -> int:
        """The most edits between the root and an evaluated state."""
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

    The number of simulations is bounded, not that of evaluations; the search ends early when all is explored.

    Args:
        root: where the search starts; it is evaluated first.
        edits: the legal edits of a state. States that are in the tree already are left out.
        evaluate: the reward of a state, called once for each.
        size: what the penalty is multiplied with.
        simulations: the budget.
        penalty: lambda of the UCB, total / visits - lambda * size + explore * sqrt(ln(root visits + 1) / visits).
        explore: the weight of the last term.
        p_random: how often selection takes a random child.
        seed: of all choices.
    """
    rng = random.Random(seed)
    top = Node(root, reward=evaluate(root))
    seen = {root}
    evaluated = [Evaluated(root, top.reward or 0.0, 0)]
    done = 0
    while done < simulations and not top.fully_explored:
        done += 1
        node = _select(top, p_random, rng)
        if not node.children:
            new = [state for state in dict.fromkeys(edits(node.state, node is top)) if state not in seen]
            seen.update(new)
            node.children = [Node(state, node, node.depth + 1) for state in new]
            if node.children:
                node = rng.choice(node.children)
            else:
                node.fully_explored = True
        if node.reward is None:
            node.reward = evaluate(node.state)
            evaluated.append(Evaluated(node.state, node.reward, node.depth))
        _propagate(node, node.reward, top, size, penalty, explore)
    return TreeSearch(evaluated, done, top)


def _select(node: Node[State], p_random: float, rng: random.Random) -> Node[State]:
    """Go down to a node that has no children yet."""
    while open_children := [child for child in node.children if not child.fully_explored]:
        at_random = rng.random() < p_random
        node = rng.choice(open_children) if at_random else max(open_children, key=lambda child: child.ucb)
    return node


def _propagate(
    leaf: Node[State],
    reward: float,
    root: Node[State],
    size: Callable[[State], float],
    penalty: float,
    explore: float,
) -> None:
    node: Node[State] | None = leaf
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
    """The control: a random new edit of a random known state, until that many states are evaluated.

    Args:
        root, edits, evaluate: as for :func:`tree_search`.
        evaluations: the budget, the root's own included.
        seed: of all choices.
    """
    rng = random.Random(seed)
    top = Node(root, reward=evaluate(root))
    seen = {root}
    evaluated = [Evaluated(root, top.reward or 0.0, 0)]
    growing = [top]
    while growing and len(evaluated) < evaluations:
        parent = rng.choice(growing)
        new = [state for state in dict.fromkeys(edits(parent.state, parent is top)) if state not in seen]
        if not new:
            growing.remove(parent)
            continue
        state = rng.choice(new)
        seen.add(state)
        node = Node(state, parent, parent.depth + 1, reward=evaluate(state))
        parent.children.append(node)
        growing.append(node)
        evaluated.append(Evaluated(state, node.reward or 0.0, node.depth))
    return TreeSearch(evaluated, len(evaluated) - 1, top)
