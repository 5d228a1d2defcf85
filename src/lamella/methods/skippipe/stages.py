"""The stages of a model: stretches of layers, in the order in which a microbatch visits them, or without some of them.

A stage that is left out is the identity on the residual stream; nothing is rescaled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.measure import sequences
from lamella.progress import track
from lamella.stack import Context, Stack, Stream, join

STAGES = 6  # the authors'
Order = tuple[int, ...]  # of stages
Span = tuple[int, int]  # layers [start, stop)


def spans(stack: Stack, stages: int | None = None) -> list[Span]:
    """The layers of each stage: as equal in number as can be, the first ones longer by one where they are not.

    Args:
        stages: how many; the authors' 6, or as many as there are layers, when left out.

    Raises:
        MethodError: for fewer than two, or more than there are layers.
    """
    count = min(STAGES, len(stack)) if stages is None else stages
    if not 2 <= count <= len(stack):
        raise MethodError(f"stages={count}: the {len(stack)} layers of {stack.name} can be 2 to {len(stack)} stages")
    each, longer = divmod(len(stack), count)
    ends = [0, *itertools.accumulate(each + (stage < longer) for stage in range(count))]
    return list(itertools.pairwise(ends))


def layers_of(spans: Sequence[Span], order: Sequence[int]) -> list[int]:
    """The layers that an order of stages runs, one after the other."""
    return [layer for stage in order for layer in range(*spans[stage])]


def run(stack: Stack, h: Stream, span: Span, context: Context) -> Tensor:
    """The stream [batch, time, hidden] behind a stage, given the stream in front of it."""
    return join(stack.run(h, *span, context))


def omissions(stages: int, count: int) -> list[Order]:
    """All orders in which so many stages are left out, never the first one.

    >>> omissions(3, 1)
    [(0, 1), (0, 2)]
    """
    return [(0, *kept) for kept in itertools.combinations(range(1, stages), stages - 1 - count)]


def left_out(stages: int, order: Sequence[int]) -> Order:
    """The stages that an order leaves out.

    >>> left_out(4, (0, 3, 2))
    (1,)
    """
    return tuple(stage for stage in range(stages) if stage not in order)


@torch.no_grad()
def losses(stack: Stack, text: object, spans: Sequence[Span], orders: Sequence[Sequence[int]]) -> list[float]:
    """What each order of stages costs, in nats per token.

    Args:
        stack: the model; it is not changed.
        text: token ids [sequences, time], or what stands for them.
        orders: of stages.

    Raises:
        CalibrationError: for too little text.
    """
    totals, tokens = [0.0] * len(orders), 0
    for row in track(sequences(text), "losses without stages"):  # type: ignore[arg-type]
        context = stack.context(row)
        labels = row["input_ids"][:, 1:].flatten()
        tokens += len(labels)
        for number, order in enumerate(orders):
            states = stack.normed(stack.execute(context, layers_of(spans, order)))[:, :-1].flatten(0, 1)
            logits = stack.logits(states).float()
            totals[number] += float(
                torch.nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            )
    return [total / tokens for total in totals]
