"""Attackers that predict the class of an image from transmitted features, of three capacities.

    linear    v = W_1 F, logits = W_2 v: the published linear probe of rank 768
    gap       global average pooling, then a linear layer
    conv      convolutions over feature maps, or an MLP over tokens or vectors: strong at every depth

Deeper features contain less information, not more. The accuracy of a weak attacker that grows with depth shows what
*it* can extract, so at least two capacities are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lamella.data import batches

AttackerKind = Literal["linear", "gap", "conv"]
COMPARED = 2**26  # number of values, in at most 1,024 rows of features, that are compared at once
RANK = 768
HIDDEN = 64


class Standardise(nn.Module):
    """Standardise features to mean 0 and variance 1 with running statistics; it adds no capacity."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(shape.numel(), affine=False)

    def forward(self, features: Tensor) -> Tensor:
        """Standardise features [batch, ...]."""
        found: Tensor = self.norm(features.flatten(1))
        return found.view_as(features)


class LinearProbe(nn.Module):
    """The published label attacker, without its text: two linear layers without activation.

    Args:
        shape: shape of the features of one image.
        classes: number of classes.
        rank: width of the hidden layer.
    """

    def __init__(self, shape: torch.Size, classes: int, rank: int = RANK) -> None:
        super().__init__()
        self.standardise = Standardise(shape)
        self.first, self.second = nn.Linear(shape.numel(), rank), nn.Linear(rank, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits [batch, classes]."""
        logits: Tensor = self.second(self.first(self.standardise(features).flatten(1)))
        return logits


class PooledProbe(nn.Module):
    """A linear layer on features averaged over positions.

    The means are standardised, not the features: means of standardised features vary so little that a linear layer on
    them needs thousands of steps.
    """

    def __init__(self, shape: torch.Size, classes: int) -> None:
        super().__init__()
        width = shape[0] if len(shape) == 3 else shape[-1]
        self.standardise, self.head = Standardise(torch.Size((width,))), nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits [batch, classes]."""
        logits: Tensor = self.head(self.standardise(pooled(features)))
        return logits


class DeepProbe(nn.Module):
    """Convolutions over feature maps [channels, height, width], or an MLP over tokens [tokens, width] or vectors."""

    def __init__(self, shape: torch.Size, classes: int) -> None:
        super().__init__()
        self.standardise = Standardise(shape)
        body: list[nn.Module]
        if len(shape) == 3:
            body = [*_convolution(shape[0]), *_convolution(HIDDEN), nn.Flatten()]
            width = HIDDEN * math.prod(shape[1:])
        else:
            body = [nn.Linear(shape[-1], 2 * HIDDEN), nn.ReLU(), nn.Linear(2 * HIDDEN, HIDDEN), nn.ReLU(), nn.Flatten()]
            width = HIDDEN * math.prod(shape[:-1])
        self.body = nn.Sequential(*body, nn.Linear(width, 2 * HIDDEN), nn.ReLU(), nn.Linear(2 * HIDDEN, classes))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits [batch, classes]."""
        logits: Tensor = self.body(self.standardise(features))
        return logits


def _convolution(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, HIDDEN, 3, padding=1), nn.BatchNorm2d(HIDDEN), nn.ReLU()]


ATTACKERS: dict[AttackerKind, Callable[..., nn.Module]] = {"linear": LinearProbe, "gap": PooledProbe, "conv": DeepProbe}


def pooled(features: Tensor) -> Tensor:
    """Average features over positions; vectors are unchanged.

    Args:
        features: maps [batch, channels, height, width], tokens [batch, tokens, width] or vectors [batch, width].
    """
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features


def nearest(train: Sequence[Tensor], test: Sequence[Tensor]) -> Tensor:
    """Return for each test row the index of the most similar training row, by cosine [rows].

    Args:
        train: features of the attacker's images.
        test: features of the test images.
    """
    found, size = [], min(1024, max(1, COMPARED // train[0].numel()))
    for ours in batches(test, size, _directions):
        best, where, first = ours.new_full((len(ours),), -torch.inf), torch.zeros(len(ours), dtype=torch.long), 0
        for theirs in batches(train, size, _directions):
            most, row = (ours @ theirs.T).max(1)
            where = torch.where(most > best, row + first, where)
            best = torch.maximum(best, most)
            first += len(theirs)
        found.append(where)
    return torch.cat(found)


def _directions(rows: list[Tensor]) -> Tensor:
    return nn.functional.normalize(torch.stack(rows).flatten(1).float(), dim=1)
