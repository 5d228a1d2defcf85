"""The stages of a model: stretches of layers, in the order in which a microbatch visits them, or without some of them.

A stage that is left out is the identity on the residual stream; nothing is rescaled.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lamella.data.samples import NO_LOSS
from lamella.errors import MethodError
from lamella.measure import sequences
from lamella.progress import track
from lamella.stack import Context, Hidden, Stack, join
from lamella.train import cross_entropy
from lamella.train.losses import mean_over_positions

STAGES = 6  # the authors'
Order = tuple[int, ...]  # of stages
Span = tuple[int, int]  # layers [start, stop)
TOKENS = 2048  # that are measured in one forward pass


def spans(stack: Stack, stages: int | None = None) -> list[Span]:
    """The layers of each stage: as equal in number as can be, the first ones longer by one where they are not.

    Args:
        stages: how many; the authors' 6, or as many as there are layers, when left out.

    Raises:
        MethodError: for fewer than two, or more than there are layers.
    """
    count = min(STAGES, len(stack)) if stages is None else stages
    if not 2 <= count <= len(stack):
        raise MethodError(f"stages {count}: the {len(stack)} layers of {stack.name} can be 2 to {len(stack)} stages")
    each, longer = divmod(len(stack), count)
    ends = [0, *itertools.accumulate(each + (stage < longer) for stage in range(count))]
    return list(itertools.pairwise(ends))


def layers_of(spans: Sequence[Span], order: Sequence[int]) -> list[int]:
    """The layers that an order of stages runs, one after the other."""
    return [layer for stage in order for layer in range(*spans[stage])]


def run(stack: Stack, h: Hidden, span: Span, context: Context) -> Tensor:
    """The stream [batch, time, hidden] behind a stage, given the stream in front of it."""
    return join(stack.run(h, *span, context))


def loss_at_home(stack: Stack, h: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of a microbatch, from the stream behind its last stage."""
    carries = labels[:, 1:] != NO_LOSS
    states = stack.normed(h)[:, :-1][carries]

    def chunk(states: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(stack.logits(states), labels)

    return mean_over_positions(chunk, states, labels[:, 1:][carries])


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
    rows = sequences(text)  # type: ignore[arg-type]
    size = max(1, TOKENS // rows[0]["input_ids"].shape[1])
    totals, tokens = [0.0] * len(orders), 0
    for start in track(range(0, len(rows), size), "losses without stages"):
        batch = {name: torch.cat([row[name] for row in rows[start : start + size]]) for name in rows[0]}
        context, labels = stack.context(batch), batch["input_ids"].to(stack.device)
        count = labels[:, 1:].numel()
        tokens += count
        for number, order in enumerate(orders):
            h = join(stack.execute(context, layers_of(spans, order)))
            totals[number] += count * float(loss_at_home(stack, h, labels))
    return [total / tokens for total in totals]
