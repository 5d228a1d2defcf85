"""SLEB: remove whole layers one by one, whichever raises the perplexity least. A baseline.

Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
arXiv 2402.09025. The greedy search over whole layers, with perplexity as the cost of a removal.
"""

from __future__ import annotations

from lamella.data import ImageText, Text
from lamella.evaluate import Budget
from lamella.files import Work
from lamella.measure import DistanceName, OutputDistance, describe
from lamella.plan import ModelReference, PlanSeries
from lamella.registry import method
from lamella.search import Removals, greedy, take
from lamella.stack import Stack, groups_at

REMOVE = 0.25  # fraction of all layers, if no budget is given


@method("sleb", paper="2402.09025", purpose="prune", baseline=True)
def sleb(
    stack: Stack,
    calibration: Text | ImageText,
    *,
    distance: DistanceName = "perplexity",
    budget: Budget = Budget(),
    work: Work = Work(),
) -> PlanSeries:
    """Remove whole layers greedily; every step measures all remaining layers again, and no layer is protected.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time], alone or with an attention mask; or images with text.
        distance: ``perplexity`` as in the paper, or another distance of finercut.
        budget: how many layers to remove; defaults to a quarter of all layers.
        work: folder from which an interrupted run resumes.

    Returns:
        The series that removes one layer after the other.
    """
    layers = groups_at("block", stack.positions)
    most = min(int(budget.most(REMOVE) * len(layers) + 1e-9), len(layers) - 1)  # one layer must stay
    measure = OutputDistance(stack, calibration, distance)
    model = ModelReference.of(stack)
    header = {"model": model.model_dump(), "calibration": describe(calibration), "distance": distance}
    log = Removals(work.journal("sleb"), header)
    late = {layer: -index for index, layer in enumerate(layers)}
    steps = greedy(layers, measure.cost, done=log.done[:most], guess=late, out_of_time=budget.clock())
    order = take(steps, log, most, budget.enough(stack), "sleb: removing layers")
    start = measure.of(()) if distance == "perplexity" else 0.0
    scores = [{str(distance): start}, *({str(distance): step.cost} for step in order)]
    return PlanSeries.of_removals(model, [step.candidate for step in order], scores)
