"""What it costs to skip layers, under the same noise for every choice of them.

The stream in front of the first skipped layer is the whole model's, so it is computed once for all choices.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lamella.errors import NumericsError, listed
from lamella.measure import Draw, predicting
from lamella.progress import track
from lamella.stack import Hidden, Position, Stack, join


@torch.no_grad()
def losses_without(stack: Stack, asked: Sequence[Draw], choices: Sequence[Collection[int]]) -> Tensor:
    """What each sequence costs without some layers, in nats per token [choices, sequences] float64.

    Args:
        stack: the model; it is not changed.
        asked: what :func:`lamella.measure.draws` returned for it.
        choices: layers to skip; none of them for the whole model.

    Raises:
        NumericsError: for logits that are not finite.
    """
    total = torch.zeros(len(choices), max(draw.sequence for draw in asked) + 1, dtype=torch.float64)
    rounds = torch.zeros(total.shape[1], dtype=torch.float64)
    for draw in track(asked, "losses without layers"):
        context = stack.context(draw.inputs)
        streams: list[Hidden] = [context.h]
        for layer in range(len(stack)):
            streams.append(stack.run(streams[-1], layer, layer + 1, context))
        for number, layers in enumerate(choices):
            first = min(layers, default=len(stack))
            gone = {Position(layer, name) for layer in layers for name in stack.architecture.names}
            h = stack.run(streams[first], first, len(stack), context, skip=gone)
            states = predicting(stack, stack.normed(join(h)), draw.scored)
            logits = stack.logits(states).float()
            if not torch.isfinite(logits).all():
                raise NumericsError(
                    f"non-finite logits of {stack.name} without layers {listed(sorted(layers))}: try float32"
                )
            loss = cross_entropy(logits, draw.labels, reduction="sum").double().cpu()
            total[number, draw.sequence] += loss * draw.weight / draw.eligible
        rounds[draw.sequence] += 1
    return total / rounds


def rises(stack: Stack, asked: Sequence[Draw], choices: Sequence[Collection[int]]) -> list[float]:
    """By how much the mean loss rises without some layers, in nats per token, for each choice."""
    whole, *others = losses_without(stack, asked, [(), *choices]).mean(dim=1).tolist()
    return [each - whole for each in others]
