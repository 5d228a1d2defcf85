"""What the paper compares its paths with: the full pipeline, and paths that leave out stages by chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lamella.methods.skippipe.allocation import hops, matched
from lamella.methods.skippipe.network import Network
from lamella.methods.skippipe.paths import Assignment, Path

NEARLY = 0.01  # by which costs differ where they are alike, so that none is always the first


def full(network: Network, assignment: Assignment, microbatches: int) -> list[Path]:
    """The full pipeline: chains through all stages, as many as the smallest stage has nodes, each with its share.

    Neighbouring stages are chained by the matchings that their allocation counts on, all around the tour from the
    smallest stage. The tour closes where the last of its stages is matched by both of its hops together.

    Args:
        microbatches: in flight on each chain.

    Returns:
        The paths of a wave.
    """
    stages = assignment.stages
    start = min(range(len(stages)), key=lambda stage: len(stages[stage]))
    tour = [*range(start, len(stages)), *range(start)]
    chains = [[node] for node in stages[start]]
    for stage in tour[1:]:
        costs = hops(network, [chain[-1] for chain in chains], stages[stage])
        if stage == tour[-1]:
            costs = costs + hops(network, stages[stage], stages[start]).T
        for chain, node in matched(costs):
            chains[chain].append(stages[stage][node])
    room = min(microbatches, *(int(network.memory[node]) for stage in stages for node in stage))
    home = len(stages) - start  # where stage 0 is in the tour
    return [(*chain[home:], *chain[:home]) for _ in range(room) for chain in chains]


def unweighted(network: Network, seed: int) -> Network:
    """The same network in which everything costs nearly alike: paths through it skip by chance."""
    drawn = np.random.default_rng(seed)
    edge = (network.edge > 0) * (1 + NEARLY * drawn.random(network.edge.shape))
    return replace(network, edge=edge, work=1 + NEARLY * drawn.random(len(network)))
