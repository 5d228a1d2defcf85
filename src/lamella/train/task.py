"""What a training step does: how samples become a batch, the loss on it, and what the batch weighs."""

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


def at_once(forward: Callable[[Batch], LossAndParts], batch: Batch, backward: Backward) -> LossAndParts:
    """One forward pass, and one backward pass through its loss."""
    loss, parts = forward(batch)
    backward(loss)
    return loss, parts


def batching(samples: Sequence[Any]) -> Callable[[Sequence[Any]], Batch]:
    """What makes batches of samples: of rows of images with text the model's own processor, else :func:`collate`."""
    return samples.batch if isinstance(samples, ImageText) else collate


@dataclass(frozen=True)
class Task:
    """What :func:`lamella.train.fit` trains a model for.

    Language models need the loss alone: their batches are made by :func:`lamella.train.collate`, and weigh as many
    labels as they have.

    Attributes:
        loss: from the model and a batch to the mean loss, alone or with named parts to log. It may call any part of the
            model.
        collate: from some samples to a batch: tensors by name, or by role and name.
        weight: from a batch to how many things its loss is a mean over. The batches of a step, those of all processes
            and the held-out ones weigh by it, so that neither accumulation nor the number of processes changes what a
            mean is.
        passes: the forward and the backward pass of one batch, for a task that needs more than one of each, or does
            something to gradients in between. It gets ``forward``, from a batch to the loss and its parts; the batch;
            and ``backward``, which takes what a loss has and weighs it. With several processes, every forward pass has
            one backward pass. It returns what the log shall say.
        dropout: whether the model drops what it drops in training.
        frozen: frozen models that the loss calls; a sharded run shards them too, in place.
    """

    loss: Loss
    collate: Callable[[Sequence[Any]], Batch] = collate
    weight: Callable[[Any], int] = count_labels
    passes: Callable[[Callable[[Batch], LossAndParts], Any, Backward], LossAndParts] = at_once
    dropout: bool = True
    frozen: Sequence[nn.Module] = ()

    @property
    def name(self) -> str:
        """Of the loss, for the record."""
        return getattr(self.loss, "__qualname__", type(self.loss).__qualname__)
