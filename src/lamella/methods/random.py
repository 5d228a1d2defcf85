"""Random removal: the floor that every method must beat. A baseline."""

from __future__ import annotations

import torch

from lamella.plan import ModelReference, PlanSeries
from lamella.registry import method
from lamella.stack import Level, Stack, groups_at


@method("random", purpose="prune", baseline=True)
def random_cut(stack: Stack, *, level: Level = "sublayer", exclude_front: float = 0.4, seed: int = 0) -> PlanSeries:
    """Remove sublayers in a random order.

    Args:
        stack: the opened model.
        level: unit of removal: any ``sublayer``, only ``attn``, only ``mlp``, or whole layers (``block``).
        exclude_front: protect the first int(exclude_front * layers) + 1 layers, as finercut does.
        seed: random seed of the order.

    Returns:
        The series that removes one unit after the other.
    """
    groups = groups_at(level, stack.positions)
    protected = int(len(stack) * exclude_front) + 1
    candidates = [group for group in groups if group[0].layer >= protected]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed)).tolist()
    return PlanSeries.of_removals(
        ModelReference.of(stack),
        [candidates[index] for index in order],
        [{} for _ in range(len(order) + 1)],
    )
