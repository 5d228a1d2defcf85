"""The neighbourhood of a plan: two microbatches exchange a node or their paths, or one takes another path (ours).

An exchange keeps the load of stages and nodes, so a plan that satisfies the constraints still does afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from lamella.methods.skippipe.paths import Assignment, Path

Paths = tuple[Path, ...]


def exchange_variants(assignment: Assignment, paths: Paths) -> Iterator[Paths]:
    """Yield the plans that differ by one exchange between two paths.

    Args:
        assignment: the nodes of each stage.
        paths: the paths of a wave.
    """
    stage_of = assignment.stage_of
    for index, other in itertools.combinations(range(len(paths)), 2):
        one, two = paths[index], paths[other]
        if one[1:] != two[1:]:
            yield _replace_paths(paths, {index: (one[0], *two[1:]), other: (two[0], *one[1:])})
        for here, there in itertools.product(one[1:], two[1:]):
            if here != there and stage_of[here] == stage_of[there]:
                mapping = {here: there, there: here}
                changed = {each: tuple(mapping.get(node, node) for node in paths[each]) for each in (index, other)}
                yield _replace_paths(paths, changed)


def reroute_variants(assignment: Assignment, orders: Sequence[Sequence[int]], paths: Paths) -> Iterator[Paths]:
    """Yield the plans in which one path is replaced by another, which may violate constraints.

    Args:
        assignment: the nodes of each stage.
        orders: the orders in which a path may visit stages.
        paths: the paths of a wave.
    """
    for index, path in enumerate(paths):
        for changed in _alternatives(assignment, orders, path):
            yield _replace_paths(paths, {index: changed})


def _alternatives(assignment: Assignment, orders: Sequence[Sequence[int]], path: Path) -> Iterator[Path]:
    """Yield paths with the stages in another order, or with another node in one of them."""
    node_of = {assignment.stage_of[node]: node for node in path}
    for order in orders:
        if set(order) == set(node_of) and (other := tuple(node_of[stage] for stage in order)) != path:
            yield other
    for number, node in enumerate(path[1:], start=1):
        for other_node in assignment.stages[assignment.stage_of[node]]:
            if other_node != node:
                yield (*path[:number], other_node, *path[number + 1 :])


def _replace_paths(paths: Paths, changed: Mapping[int, Path]) -> Paths:
    """Return the paths with some of them replaced."""
    return tuple(changed.get(index, path) for index, path in enumerate(paths))
