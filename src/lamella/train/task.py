"""The parts of a training step: how samples become a batch, its loss and its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lamella.data import ImageText
from lamella.data.samples import collate, count_labels

Batch = Mapping[str, Any]  # tensors by name, or by role and name
LossAndParts = tuple[Tensor, Mapping[str, Tensor]]  # a loss and its named parts
Loss = Callable[[Any, Any], Tensor | LossAndParts]
Backward = Callable[..., None]


def single_pass(forward: Callable[[Batch], LossAndParts], batch: Batch, backward: Backward) -> LossAndParts:
    """Run one forward pass, and one backward pass through its loss.

    Args:
        forward: returns the loss of a batch and its named parts.
        batch: the batch.
        backward: computes gradients from a loss.
    """
    loss, parts = forward(batch)
    backward(loss)
    return loss, parts


def batching(samples: Sequence[Any]) -> Callable[[Sequence[Any]], Batch]:
    """Return the function that collates samples: the model's processor for images with text, else :func:`collate`."""
    return samples.batch if isinstance(samples, ImageText) else collate


@dataclass(frozen=True)
class Task:
    """The objective that :func:`lamella.train.fit` trains for.

    Language models need only the loss: their batches are made by :func:`lamella.train.collate`, and weighted by the
    number of their labels.

    Attributes:
        loss: from the model and a batch to the mean loss, alone or with named parts to log. It may call any part of the
            model.
        collate: from some samples to a batch: tensors by name, or by role and name.
        weight: from a batch to the number of items over which its loss is the mean. The batches of a step, of all
            processes, and the held-out ones are weighted by it, so that means depend neither on gradient accumulation
            nor on the number of processes.
        passes: the forward and the backward pass of one batch, for a task that needs more than one of each, or modifies
            gradients in between. Its arguments are ``forward``, from a batch to the loss and its parts; the batch; and
            ``backward``, which takes a loss with a gradient and weights it. With several processes, every forward pass
            has one backward pass. It returns the values to log.
        dropout: whether the model uses dropout in training.
        frozen: frozen models that the loss calls; a sharded run shards them too, in place.
    """

    loss: Loss
    collate: Callable[[Sequence[Any]], Batch] = collate
    weight: Callable[[Any], int] = count_labels
    passes: Callable[[Callable[[Batch], LossAndParts], Any, Backward], LossAndParts] = single_pass
    dropout: bool = True
    frozen: Sequence[nn.Module] = ()

    @property
    def name(self) -> str:
        """The name of the loss, for records."""
        return getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
