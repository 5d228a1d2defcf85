"""SLEB: cut whole layers one by one, whichever hurts the perplexity least. A baseline.

Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
arXiv 2402.09025. The greedy search over whole layers, with perplexity as what a removal costs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lamella.errors import MethodError
from lamella.measure import OutputDistance, Tokens, describe
from lamella.plan import ModelReference, PlanSeries
from lamella.registry import method
from lamella.search import Removals, greedy, take
from lamella.stack import Position, Stack, groups_at


@method("sleb", paper="2402.09025", purpose="prune", baseline=True)
def sleb(
    stack: Stack,
    calibration: Tokens,
    *,
    remove: float = 0.25,
    distance: str = "perplexity",
    until: Callable[[frozenset[Position]], bool] | None = None,
    journal: Path | None = None,
) -> PlanSeries:
    """Greedily remove whole layers; every step measures again, and no layer is protected.

    Args:
        stack: the opened model.
        calibration: token ids [sequences, time], or them with an attention mask.
        remove: the share of all layers at which to stop.
        distance: ``perplexity`` as in the paper, or another distance of finercut.
        until: stop as soon as this is true of the removed sublayers.
        journal: a file that lets an interrupted run go on.

    Returns:
        The series that removes one layer after the other.
    """
    if not 0 <= remove <= 1:
        raise MethodError("remove is a share of the layers: give a number from 0 to 1")
    layers = groups_at("block", stack.positions)
    most = min(int(remove * len(layers) + 1e-9), len(layers) - 1)  # one layer must stay
    measure = OutputDistance(stack, calibration, distance)
    model = ModelReference.of(stack)
    provenance = {"method": "sleb", "options": {"distance": distance}, "calibration": describe(calibration)}
    log = Removals(journal, {"model": model.model_dump(), **provenance})
    steps = greedy(
        layers, measure.cost, done=log.done[:most], guess={layer: -place for place, layer in enumerate(layers)}
    )
    order = take(steps, log, most, until, "sleb: removing layers")
    start = measure.of(()) if distance == "perplexity" else 0.0
    scores = [{distance: start}, *({distance: step.cost} for step in order)]
    return PlanSeries.of_removals(model, [step.candidate for step in order], scores, **provenance)
