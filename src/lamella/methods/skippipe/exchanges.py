"""The plans next to a plan: two microbatches take each other's node or way, or one goes another way (ours).

An exchange keeps the loads of stages and what nodes must hold, so what it makes of paths that fit fits, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from lamella.methods.skippipe.paths import Assignment, Path

Paths = tuple[Path, ...]


def exchanged(assignment: Assignment, paths: Paths) -> Iterator[Paths]:
    """The same paths but for one exchange between two of them."""
    stage_of = assignment.stage_of
    for place, other in itertools.combinations(range(len(paths)), 2):
        one, two = paths[place], paths[other]
        if one[1:] != two[1:]:
            yield _put(paths, {place: (one[0], *two[1:]), other: (two[0], *one[1:])})
        for here, there in itertools.product(one[1:], two[1:]):
            if here != there and stage_of[here] == stage_of[there]:
                ways = {here: there, there: here}
                changed = {each: tuple(ways.get(node, node) for node in paths[each]) for each in (place, other)}
                yield _put(paths, changed)


def turned(assignment: Assignment, orders: Sequence[Sequence[int]], paths: Paths) -> Iterator[Paths]:
    """The same paths but for one that goes another way, which may not fit.

    Args:
        orders: in which a path may visit stages.
    """
    for place, path in enumerate(paths):
        for changed in _other_ways(assignment, orders, path):
            yield _put(paths, {place: changed})


def _other_ways(assignment: Assignment, orders: Sequence[Sequence[int]], path: Path) -> Iterator[Path]:
    """A path with its stages in another order, or with another node in one of them."""
    at = {assignment.stage_of[node]: node for node in path}
    for order in orders:
        if set(order) == set(at) and (other := tuple(at[stage] for stage in order)) != path:
            yield other
    for number, node in enumerate(path[1:], start=1):
        for other_node in assignment.stages[assignment.stage_of[node]]:
            if other_node != node:
                yield (*path[:number], other_node, *path[number + 1 :])


def _put(paths: Paths, changed: Mapping[int, Path]) -> Paths:
    """The same paths but for some."""
    return tuple(changed.get(place, path) for place, path in enumerate(paths))
