"""ShortGPT: remove the layers that change the direction of the residual stream least. A baseline.

Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853.
"""

from __future__ import annotations

import numpy as np

from lamella.data import ImageText, Text
from lamella.measure import block_influence
from lamella.plan import ModelReference, PlanSeries
from lamella.registry import method
from lamella.stack import Stack, groups_at


@method("shortgpt", paper="2403.03853", purpose="prune", baseline=True)
def shortgpt(stack: Stack, calibration: Text | ImageText) -> PlanSeries:
    """Remove layers in the order of their block influence, 1 - mean cosine of input and output, measured once.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time], alone or with an attention mask; or images with text.

    Returns:
        The series that removes one layer after the other; each plan records the summed influence of the removed layers.
    """
    influence, layers = block_influence(stack, calibration).values, groups_at("block", stack.positions)
    order = np.argsort(influence, kind="stable")[: len(stack) - 1]
    removed_influence = np.concatenate([[0.0], np.cumsum(influence[order])])
    return PlanSeries.of_removals(
        ModelReference.of(stack),
        [layers[layer] for layer in order],
        [{"block influence": float(value)} for value in removed_influence],
    )
