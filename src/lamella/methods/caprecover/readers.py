"""Attackers that name the class of a picture from what is sent: of three capacities, from weak to strong.

    linear    v = W_1 F, logits = W_2 v: a linear probe of rank 768, the published one
    gap       the mean over places, then a linear map
    conv      convolutions over maps, or an MLP over tokens or vectors: reads at every depth what is there to read

Deeper features hold less, not more. What grows with depth for a weak reader is what *it* can read, so two of them are
the least that says anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lamella.data import batches

Reader = Literal["linear", "gap", "conv"]
COMPARED = 1024  # rows of features that are in memory at once
RANK = 768
HIDDEN = 64


class Standardised(nn.Module):
    """Numbers of mean 0 and variance 1, as it has seen them in training: no capacity, and the scale of any layer."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(shape.numel(), affine=False)

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.norm(features.flatten(1))
        return found.view_as(features)


class Linear(nn.Module):
    """The published label attacker, without its text: two linear maps and nothing between them.

    Args:
        shape: of the features of one picture.
        classes: how many.
        rank: of the probe.
    """

    def __init__(self, shape: torch.Size, classes: int, rank: int = RANK) -> None:
        super().__init__()
        self.standardised = Standardised(shape)
        self.first, self.second = nn.Linear(shape.numel(), rank), nn.Linear(rank, classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(self.standardised(features).flatten(1)))
        return logits


class Pooled(nn.Module):
    """A linear map of means over places."""

    def __init__(self, shape: torch.Size, classes: int) -> None:
        super().__init__()
        width = shape[0] if len(shape) == 3 else shape[-1]
        self.standardised, self.head = Standardised(shape), nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(pooled(self.standardised(features)))
        return logits


class Deep(nn.Module):
    """Convolutions over maps [channels, height, width]; over tokens [tokens, width] or vectors, an MLP."""

    def __init__(self, shape: torch.Size, classes: int) -> None:
        super().__init__()
        self.standardised = Standardised(shape)
        body: list[nn.Module]
        if len(shape) == 3:
            body = [*_convolution(shape[0]), *_convolution(HIDDEN), nn.Flatten()]
            width = HIDDEN * math.prod(shape[1:])
        else:
            body = [nn.Linear(shape[-1], 2 * HIDDEN), nn.ReLU(), nn.Linear(2 * HIDDEN, HIDDEN), nn.ReLU(), nn.Flatten()]
            width = HIDDEN * math.prod(shape[:-1])
        self.body = nn.Sequential(*body, nn.Linear(width, 2 * HIDDEN), nn.ReLU(), nn.Linear(2 * HIDDEN, classes))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.body(self.standardised(features))
        return logits


def _convolution(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, HIDDEN, 3, padding=1), nn.BatchNorm2d(HIDDEN), nn.ReLU()]


READERS: dict[Reader, Callable[..., nn.Module]] = {"linear": Linear, "gap": Pooled, "conv": Deep}


def pooled(features: Tensor) -> Tensor:
    """Means over places, of maps [batch, channels, height, width] or tokens [batch, tokens, width]; vectors stay."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features


def nearest(train: Sequence[Tensor], test: Sequence[Tensor]) -> Tensor:
    """The baseline: for each row the most similar row of those that an attacker has, by cosine [rows]."""
    found = []
    for ours in batches(test, COMPARED, _directions):
        best, where, first = ours.new_full((len(ours),), -torch.inf), torch.zeros(len(ours), dtype=torch.long), 0
        for theirs in batches(train, COMPARED, _directions):
            most, row = (ours @ theirs.T).max(1)
            where = torch.where(most > best, row + first, where)
            best = torch.maximum(best, most)
            first += len(theirs)
        found.append(where)
    return torch.cat(found)


def _directions(rows: list[Tensor]) -> Tensor:
    return nn.functional.normalize(torch.stack(rows).flatten(1).float(), dim=1)
