"""The stages of a model: consecutive layers, in the order in which a microbatch visits them, possibly without some.

A skipped stage is the identity on the residual stream; nothing is rescaled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lamella.data.samples import NO_LOSS
from lamella.errors import MethodError
from lamella.measure import sequences
from lamella.plan.filling import load_some
from lamella.progress import track
from lamella.stack import Context, Hidden, Stack, join, share
from lamella.train import cross_entropy
from lamella.train.losses import mean_over_positions

STAGES = 6  # the authors' number
Order = tuple[int, ...]  # of stages
Span = tuple[int, int]  # layers [start, stop)
TOKENS = 2048  # per forward pass


def spans(stack: Stack, stages: int | None = None) -> list[Span]:
    """Divide the layers into stages of equal size; the first ones have one layer more if there is a remainder.

    Args:
        stack: the model.
        stages: the number of stages; the authors' 6, or the number of layers if that is smaller, if None.

    Raises:
        MethodError: for fewer than two stages, or more than there are layers.
    """
    count = min(STAGES, len(stack)) if stages is None else stages
    if not 2 <= count <= len(stack):
        raise MethodError(f"stages {count}: the {len(stack)} layers of {stack.name} can form 2 to {len(stack)} stages")
    each, remainder = divmod(len(stack), count)
    ends = [0, *itertools.accumulate(each + (stage < remainder) for stage in range(count))]
    return list(itertools.pairwise(ends))


def layers_of(spans: Sequence[Span], order: Sequence[int]) -> list[int]:
    """Return the layers that an order of stages runs, one after the other.

    Args:
        spans: the layers of each stage.
        order: the stages.
    """
    return [layer for stage in order for layer in range(*spans[stage])]


def stage_of_parameter(stack: Stack, spans: Sequence[Span]) -> Callable[[str], int]:
    """Return a function from a parameter name to its stage; embedding, final norm and head belong to stage 0.

    Args:
        stack: the model.
        spans: the layers of each stage.
    """
    prefix = stack.architecture.prefix

    def stage(name: str) -> int:
        if not name.startswith(prefix):
            return 0
        layer = int(name.removeprefix(prefix).split(".", 1)[0])
        return next(number for number, (start, stop) in enumerate(spans) if start <= layer < stop)

    return stage


def with_stage(stack: Stack, spans: Sequence[Span], stage: int, device: torch.device | str) -> Stack:
    """Return a model that was opened without weights with those that one stage needs; others are None.

    These are its layers and, for stage 0, embedding and head. Other parameters outside the layers, such as those of
    positions and norms, are small and belong to every stage, since they take part in the other inputs of layers.

    Args:
        stack: the model; with its weights it is returned as it is.
        spans: the layers of each stage.
        stage: the stage.
        device: the device of the weights.
    """
    if stack.device.type != "meta":
        return stack
    model, stage_of = share(stack.model), stage_of_parameter(stack, spans)
    inside = stack.architecture.prefix
    vocabulary = {each for module in stack.vocabulary for each in module.parameters()}
    words = {name for name, each in model.named_parameters(remove_duplicate=False) if each in vocabulary}

    def is_needed(name: str) -> bool:
        return stage_of(name) == stage if name.startswith(inside) or name in words else True

    assert stack.path is not None
    load_some(model, stack.path, is_needed, device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                module.register_parameter(name, None)
    return Stack(model, stack.path, stack.name, stack.stack)


def is_loaded(module: nn.Module) -> bool:
    """Return whether a module has its weights; see :func:`with_stage`."""
    return any(True for _ in module.parameters())


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[object]:
    """Return the context of a computation in bfloat16, or in the precision of the weights.

    Args:
        device: the device.
        bf16: whether to compute in bfloat16.
    """
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def run(stack: Stack, h: Hidden, span: Span, context: Context) -> Tensor:
    """Run a stage, and return the hidden states after it `[batch, time, hidden]`.

    Args:
        stack: the model.
        h: the hidden states before the stage.
        span: the layers of the stage.
        context: the other inputs of the layers.
    """
    return join(stack.run(h, *span, context))


def origin_loss(stack: Stack, h: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of a microbatch from the hidden states after its last stage.

    Args:
        stack: the model.
        h: the hidden states `[batch, time, hidden]`.
        labels: the labels `[batch, time]`.
    """
    has_loss = labels[:, 1:] != NO_LOSS
    states = stack.normed(h)[:, :-1][has_loss]

    def chunk(states: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(stack.logits(states), labels)

    return mean_over_positions(chunk, states, labels[:, 1:][has_loss])


def omissions(stages: int, count: int) -> list[Order]:
    """Return all orders that skip `count` stages, never the first one.

    Args:
        stages: number of stages.
        count: number of stages to skip.

    >>> omissions(3, 1)
    [(0, 1), (0, 2)]
    """
    return [(0, *remaining) for remaining in itertools.combinations(range(1, stages), stages - 1 - count)]


def left_out(stages: int, order: Sequence[int]) -> Order:
    """Return the stages that an order skips.

    Args:
        stages: number of stages.
        order: the stages in the order of execution.

    >>> left_out(4, (0, 3, 2))
    (1,)
    """
    return tuple(stage for stage in range(stages) if stage not in order)


@torch.no_grad()
def losses(stack: Stack, text: object, spans: Sequence[Span], orders: Sequence[Sequence[int]]) -> list[float]:
    """Measure the loss of each order of stages in nats per token.

    Args:
        stack: the model; it is not changed.
        text: token ids `[sequences, time]`, or a text input.
        spans: the layers of each stage.
        orders: the orders of stages.

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
            totals[number] += count * float(origin_loss(stack, h, labels))
    return [total / tokens for total in totals]
