"""Loss without some layers, under the same noise for every choice of layers.

The hidden states before the first skipped layer are those of the whole model, so they are computed once for all
choices.
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
def losses_without(stack: Stack, noised: Sequence[Draw], choices: Sequence[Collection[int]]) -> Tensor:
    """Compute the loss of each sequence without some layers, in nats per token [choices, sequences] float64.

    Args:
        stack: the model; it is not changed.
        noised: the samples that :func:`lamella.measure.draws` returned for it.
        choices: sets of layers to skip; an empty set is the whole model.

    Raises:
        NumericsError: for logits that are not finite.
    """
    total = torch.zeros(len(choices), max(draw.sequence for draw in noised) + 1, dtype=torch.float64)
    rounds = torch.zeros(total.shape[1], dtype=torch.float64)
    for draw in track(noised, "losses without layers"):
        context = stack.context(draw.inputs)
        hidden: list[Hidden] = [context.h]
        for layer in range(len(stack)):
            hidden.append(stack.run(hidden[-1], layer, layer + 1, context))
        for choice, layers in enumerate(choices):
            first = min(layers, default=len(stack))
            gone = {Position(layer, name) for layer in layers for name in stack.architecture.names}
            h = stack.run(hidden[first], first, len(stack), context, skip=gone)
            states = predicting(stack, stack.normed(join(h)), draw.scored)
            logits = stack.logits(states).float()
            if not torch.isfinite(logits).all():
                raise NumericsError(
                    f"non-finite logits of {stack.name} without layers {listed(sorted(layers))}: try float32"
                )
            loss = cross_entropy(logits, draw.labels, reduction="sum").double().cpu()
            total[choice, draw.sequence] += loss * draw.weight / draw.eligible
        rounds[draw.sequence] += 1
    return total / rounds


def rises(stack: Stack, noised: Sequence[Draw], choices: Sequence[Collection[int]]) -> list[float]:
    """Return the increase of the mean loss without some layers, in nats per token, for each choice.

    Args:
        stack: the model; it is not changed.
        noised: the samples that :func:`lamella.measure.draws` returned for it.
        choices: sets of layers to skip.
    """
    whole, *others = losses_without(stack, noised, [(), *choices]).mean(dim=1).tolist()
    return [each - whole for each in others]
