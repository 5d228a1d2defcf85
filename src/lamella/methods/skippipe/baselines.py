"""The paper's baselines: the full pipeline, and paths that skip random stages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lamella.methods.skippipe.allocation import bottleneck_matching, hops
from lamella.methods.skippipe.network import PipelineNetwork
from lamella.methods.skippipe.paths import Assignment, Path

JITTER = 0.01  # relative random differences between equal costs, so that ties are broken at random


def full_pipeline(network: PipelineNetwork, assignment: Assignment, microbatches: int) -> list[Path]:
    """Build the full pipeline: chains through all stages, as many as the smallest stage has nodes.

    Consecutive stages are connected by the matchings that their allocation is based on, around the tour that starts at
    the smallest stage. The last of its stages is matched by the sum of both of its hops, which closes the tour.

    Args:
        network: the costs of nodes and links.
        assignment: the nodes of each stage.
        microbatches: microbatches in flight per chain.

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
        for chain, node in bottleneck_matching(costs):
            chains[chain].append(stages[stage][node])
    capacity = min(microbatches, *(int(network.memory[node]) for stage in stages for node in stage))
    origin = len(stages) - start  # the position of stage 0 in the tour
    return [(*chain[origin:], *chain[:origin]) for _ in range(capacity) for chain in chains]


def random_costs(network: PipelineNetwork, seed: int) -> PipelineNetwork:
    """Return the network with nearly equal costs everywhere, for which a planner skips random stages.

    Args:
        network: the network.
        seed: random seed.
    """
    rng = np.random.default_rng(seed)
    edge = (network.edge > 0) * (1 + JITTER * rng.random(network.edge.shape))
    return replace(network, edge=edge, work=1 + JITTER * rng.random(len(network)))
