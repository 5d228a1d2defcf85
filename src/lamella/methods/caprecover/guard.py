"""Defences: what is sent in place of features, and what the server makes of it.

    noise       F + e is sent, and e subtracted behind the link: the task loses nothing but rounding
    quantised   so many bits for each number            what arrives is what was sent, and the task pays
    top         the largest numbers of each row alone    likewise
    pooled      means over places                        likewise

Noise hides features from who listens on the link and does not know it, and from nobody who computes the next stage. It
is drawn anew for each request, from a key that both ends have and a number that is never used twice: a mask that stays
the same is a constant, which an attacker's first bias learns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lamella.data import batches
from lamella.errors import MethodError

Kind = Literal["none", "uniform", "gaussian", "fixed", "bits", "top", "pooled"]
TOLD = "none, uniform, gaussian:10, fixed:10, bits:8, top:0.1, pooled"
BATCH = 64
NEEDS = ("gaussian", "fixed", "bits", "top")


@dataclass(frozen=True)
class Guard:
    """One defence.

    Attributes:
        kind: ``uniform``, the published noise from [0, 1) whatever the features' scale; ``gaussian``, in units of the
            cut's standard deviation; ``fixed``, the same once for all requests; or what is sent in fewer numbers.
        amount: of ``gaussian`` and ``fixed``, the units; bits; the share of numbers that is kept.
        key: what both ends know.

    Raises:
        MethodError: for a kind that there is not, or an amount out of range.
    """

    kind: Kind = "none"
    amount: float = 0.0
    key: str = "key"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise MethodError(f"no defence '{self.kind}': give {TOLD}")
        low, high = {"bits": (1, 16), "top": (1e-6, 1)}.get(self.kind, (0.0, 1e6))
        if self.kind in NEEDS and not low <= self.amount <= high:
            raise MethodError(f"{self.kind}:{self.amount:g}: give {low:g} to {high:g}")

    @classmethod
    def parse(cls, said: str) -> Guard:
        """
        >>> Guard.parse("gaussian:10")
        Guard(kind='gaussian', amount=10.0, key='key')
        """
        kind, _, amount = said.partition(":")
        try:
            return cls(kind, float(amount or 0))  # type: ignore[arg-type]
        except ValueError:
            raise MethodError(f"no defence '{said}': give {TOLD}") from None

    def __str__(self) -> str:
        return f"{self.kind}:{self.amount:g}" if self.kind in NEEDS else self.kind

    @property
    def masks(self) -> bool:
        """Whether what arrives is what was meant, but for rounding."""
        return self.kind in ("none", "uniform", "gaussian", "fixed")

    def noise(self, cut: str, shape: torch.Size, scale: float, request: int) -> Tensor:
        """e, the same at both ends for the same key, cut and request [batch, ...].

        Args:
            scale: the standard deviation of what is sent at the cut.
            request: a number that is used once. ``fixed`` does not look at it.
        """
        number = 0 if self.kind == "fixed" else request
        seed = hashlib.sha256(f"{self.key}\0{cut}\0{number}".encode()).digest()[:8]
        drawn = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
        if self.kind == "uniform":
            return torch.rand(shape, generator=drawn)
        if self.kind == "fixed":
            one = torch.randn(shape[1:], generator=drawn)
            return (self.amount * scale * one).expand(shape)
        return self.amount * scale * torch.randn(shape, generator=drawn)

    def send(self, cut: str, features: Tensor, scale: float, request: int) -> Tensor:
        """What an eavesdropper sees in place of features [batch, ...]."""
        if self.kind == "none":
            return features
        if self.masks:
            return features + self.noise(cut, features.shape, scale, request).to(features)
        if self.kind == "bits":
            return quantised(features, int(self.amount))
        if self.kind == "top":
            return largest(features, self.amount)
        return averaged(features)

    def receive(self, cut: str, sent: Tensor, scale: float, request: int) -> Tensor:
        """What the server computes with."""
        if self.kind == "none" or not self.masks:
            return sent
        return sent - self.noise(cut, sent.shape, scale, request).to(sent)

    def ratio(self, scale: float) -> float | None:
        """var F over var e: how loud features are beside the noise; None where there is none."""
        spread = {"uniform": 12**-0.5, "gaussian": self.amount * scale, "fixed": self.amount * scale}.get(
            self.kind, 0.0
        )
        return scale**2 / spread**2 if spread else None

    def sent(self, shape: torch.Size) -> float:
        """How many bytes one row takes on the link, in float32 unless quantised; with its places where few are sent."""
        count = math.prod(shape[1:])
        if self.kind == "bits":
            return count * self.amount / 8 + 8
        if self.kind == "top":
            return self.amount * count * 8
        return 4 * (count / math.prod(shape[2:]) if self.kind == "pooled" and len(shape) == 4 else count)


def scales(features: Mapping[str, Sequence[Tensor] | Tensor]) -> dict[str, float]:
    """The standard deviation of what is sent at each cut, which both ends know."""
    return {name: _deviation(each) or 1.0 for name, each in features.items()}


def _deviation(rows: Sequence[Tensor] | Tensor) -> float:
    """Of all elements, in one pass: means and squared deviations of batches are combined (Chan et al., 1979)."""
    count, mean, squares = 0, 0.0, 0.0
    for part in batches(rows, BATCH, torch.stack):
        values = part.double()
        more, shift = values.numel(), float(values.mean()) - mean
        squares += float(values.var(correction=0)) * more + shift**2 * count * more / (count + more)
        mean += shift * more / (count + more)
        count += more
    return math.sqrt(squares / (count - 1))


def quantised(features: Tensor, bits: int) -> Tensor:
    """Each row in so many bits for each number, from its least to its largest."""
    rows = features.flatten(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = (high - low).clamp_min(1e-12) / (2**bits - 1)
    return (((rows - low) / step).round() * step + low).view_as(features)


def largest(features: Tensor, share: float) -> Tensor:
    """The largest numbers of each row, by magnitude; the others are zero."""
    rows = features.flatten(1)
    count = max(1, round(share * rows.shape[1]))
    kept = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, rows.abs().topk(count, dim=1).indices, True)
    return rows.where(kept, rows.new_zeros(())).view_as(features)


def averaged(features: Tensor) -> Tensor:
    """Each channel's mean in all of its places; what has no places stays."""
    if features.ndim == 4:  # [batch, channels, height, width]
        return features.mean((2, 3), keepdim=True).expand_as(features)
    return features.mean(1, keepdim=True).expand_as(features) if features.ndim == 3 else features
