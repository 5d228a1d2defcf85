"""SLEB: cut whole layers one by one, whichever hurts the perplexity least. A baseline.

Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
arXiv 2402.09025. It is the greedy search of FinerCut over whole layers with perplexity as the distance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lamella.plan import PlanSeries
from lamella.prune.finercut import finercut
from lamella.registry import method
from lamella.scoring import Tokens
from lamella.stack import Stack


@method(
    slug="sleb",
    title="SLEB: whole layers, greedily, by perplexity",
    arxiv="2402.09025",
    kind="plan",
    families="decoder",
    needs=("calibration",),
    baseline=True,
)
def sleb(
    stack: Stack,
    calibration: Tokens,
    *,
    remove: float = 0.25,
    distance: str = "perplexity",
    until: Callable[[frozenset[int]], bool] | None = None,
    journal: Path | None = None,
) -> PlanSeries:
    """Greedily remove whole layers; every step measures again, no layer but the first is protected.

    Args:
        stack: the opened model.
        calibration: token ids [sequences, time], or them with an attention mask.
        remove: the share of all layers at which to stop.
        distance: ``perplexity`` as in the paper, or another distance of finercut.
        until: stop as soon as this is true of the removed halves.
        journal: a file that lets an interrupted run go on.

    Returns:
        The series that removes one layer after the other.
    """
    series = finercut(
        stack,
        calibration,
        remove=remove,
        distance=distance,
        level="block",
        exclude_front=0.0,
        until=until,
        journal=journal,
    )
    series.provenance["method"] = "sleb"
    return series
