"""What the paper compares its paths with: the full pipeline, and paths that leave out stages by chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lamella.methods.skippipe.network import Network
from lamella.methods.skippipe.paths import Assignment, Path

NEARLY = 0.01  # by which costs differ where they are alike, so that none is always the first


def full(network: Network, assignment: Assignment, microbatches: int) -> list[Path]:
    """The full pipeline: chains through all stages, as many as the smallest stage has nodes, each with its share.

    Args:
        microbatches: in flight on each chain.

    Returns:
        The paths of a wave.
    """
    chains = range(min(map(len, assignment.stages)))
    room = min(microbatches, *(int(network.memory[node]) for stage in assignment.stages for node in stage))
    return [tuple(stage[chain] for stage in assignment.stages) for _ in range(room) for chain in chains]


def unweighted(network: Network, seed: int) -> Network:
    """The same network in which everything costs nearly alike: paths through it skip by chance."""
    drawn = np.random.default_rng(seed)
    edge = (network.edge > 0) * (1 + NEARLY * drawn.random(network.edge.shape))
    return replace(network, edge=edge, work=1 + NEARLY * drawn.random(len(network)))
