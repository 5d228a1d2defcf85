"""Sensitivity of layers: the norm of a loss's gradient with respect to each layer's own parameters.

IRepair (arXiv 2502.07072) computes it on unwanted text and takes the most sensitive layer as the responsible one:

    s_l = sqrt( sum over the tensors w of layer l of |dL/dw|^2 )

Embeddings, the final norm and the head belong to no layer; their gradients would often dominate all others. The norm is
not divided by a layer's size, which is fair among equal layers; ``per_parameter`` divides it by its square root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lamella.errors import CalibrationError, NumericsError
from lamella.measure.scores import Scores
from lamella.progress import track
from lamella.stack import Stack, share, weights

Parameters = Mapping[str, nn.Parameter]
Gradients = list[list[Tensor | None]]


def next_token_loss(model: Any, tokens: Tensor) -> Tensor:
    """Compute the mean cross-entropy of every next token, in nats.

    Args:
        model: the model.
        tokens: token ids [rows, time].
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def layer_parameters(stack: Stack) -> list[dict[str, nn.Parameter]]:
    """The parameters of each layer, by their full names."""
    prefix = stack.architecture.prefix
    return [
        {f"{prefix}{number}.{name}": parameter for name, parameter in layer.named_parameters()}
        for number, layer in enumerate(stack.layers)
    ]


def sensitivity(
    stack: Stack,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] = next_token_loss,
    *,
    average: Literal["norms", "gradients"] = "norms",
    per_parameter: bool = False,
) -> Scores:
    """Measure the sensitivity of each layer of a model to a loss on some batches.

    Args:
        stack: the model; it is not changed, and its gradients are unchanged.
        batches: inputs of ``loss``, such as ``tokens.split(4)``.
        loss: function of the model and a batch that returns a mean loss.
        average: mean of the ``norms`` of batches, or the norm of their mean ``gradients``, in which differences between
            batches cancel. IRepair's one-shot selection, a baseline, uses the latter.
        per_parameter: see :func:`norms_of`.

    Returns:
        ``("layer",)`` scores [layers].

    Raises:
        CalibrationError: without batches.
        NumericsError: for a gradient that is not finite, with its site.
    """
    if average not in ("norms", "gradients"):
        raise CalibrationError(f"average '{average}': choose norms or gradients")
    model = _differentiable(stack)
    groups = layer_parameters(Stack(model))
    norms, total, count = torch.zeros(len(groups), dtype=torch.float64), None, 0
    with torch.enable_grad():
        for batch in track(batches, "sensitivity of layers"):
            gradients = gradients_of(loss(model, batch), groups)
            count += 1
            if average == "norms":
                norms += norms_of(gradients, groups, per_parameter)
            else:
                total = gradients if total is None else _sum(total, gradients)
    if count == 0:
        raise CalibrationError("sensitivity needs at least one batch of text: give more text")
    values = norms / count if total is None else norms_of(total, groups, per_parameter) / count
    for layer, value in enumerate(values.tolist()):
        if not np.isfinite(value):
            raise NumericsError(f"non-finite gradient at layers.{layer} of {stack.name}: try float32, or other text")
    options = {"average": average, "per_parameter": per_parameter, "batches": count}
    return Scores("sensitivity (gradient norm, nats)", ("layer",), values.numpy(), options)


def _differentiable(stack: Stack) -> Any:
    """Copy a model with shared tensors, in which only the layers' parameters require a gradient."""
    copy = share(stack.model)
    inside = {name for group in layer_parameters(stack) for name in group}
    for name, weight in weights(copy).items():
        weight.put(copy, nn.Parameter(weight.of(copy).detach(), requires_grad=name in inside))
    return copy


def gradients_of(loss: Tensor, groups: Sequence[Parameters]) -> Gradients:
    """Compute the gradients of a loss for every parameter of every group; None where it does not depend on it.

    Args:
        loss: the loss; its graph is freed.
        groups: groups of parameters.
    """
    flat = iter(torch.autograd.grad(loss, [each for group in groups for each in group.values()], allow_unused=True))
    return [[next(flat) for _ in group] for group in groups]


def norms_of(gradients: Gradients, groups: Sequence[Parameters], per_parameter: bool = False) -> Tensor:
    """Compute the norm of the gradient of each group of parameters, float64 [groups].

    Args:
        gradients: result of :func:`gradients_of`.
        groups: such as :func:`layer_parameters`.
        per_parameter: divide by the square root of the group's number of parameters.
    """
    norms = torch.zeros(len(groups), dtype=torch.float64)
    for number, (own, group) in enumerate(zip(gradients, groups, strict=True)):
        squares = [each.float().square().sum().double() for each in own if each is not None]
        norms[number] = torch.stack(squares).sum().sqrt() if squares else 0.0
        if per_parameter:
            norms[number] /= sum(each.numel() for each in group.values()) ** 0.5
    return norms


def _sum(ours: Gradients, theirs: Gradients) -> Gradients:
    return [
        [b if a is None else a if b is None else a + b for a, b in zip(*pair, strict=True)]
        for pair in zip(ours, theirs, strict=True)
    ]
