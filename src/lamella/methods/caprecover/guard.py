"""Defences: how features are changed before they are sent, and how the server restores them.

    noise       F + e is sent, and e is subtracted by the server: exact for the task up to rounding
    quantised   a given number of bits per value           lossy: the server uses what was sent
    top         only the largest values of each row        lossy
    pooled      means over positions                       lossy

Noise hides features from an eavesdropper on the link who does not know it, not from the server, which computes the next
stage. It is new for each request, derived from a key that both ends know and a request number that is never reused: a
constant mask would be learnt by the first bias of any attacker.
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
EXPECTED = "none, uniform, gaussian:10, fixed:10, bits:8, top:0.1, pooled"
BATCH = 64
NEEDS = ("gaussian", "fixed", "bits", "top")


@dataclass(frozen=True)
class LinkDefence:
    """One defence.

    Attributes:
        kind: ``uniform``, the published noise from [0, 1) regardless of the features' scale; ``gaussian``, in units of
            the cut's standard deviation; ``fixed``, the same noise for all requests; or a lossy kind that sends fewer
            values or bits.
        amount: standard deviation of ``gaussian`` and ``fixed`` noise in units of the cut's; number of ``bits``; or the
            fraction of values kept by ``top``.
        key: the secret that both ends know.

    Raises:
        MethodError: for an unknown kind, or an amount out of range.
    """

    kind: Kind = "none"
    amount: float = 0.0
    key: str = "key"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise MethodError(f"unknown defence '{self.kind}': give {EXPECTED}")
        low, high = {"bits": (1, 16), "top": (1e-6, 1)}.get(self.kind, (0.0, 1e6))
        if self.kind in NEEDS and not low <= self.amount <= high:
            raise MethodError(f"{self.kind}:{self.amount:g}: give {low:g} to {high:g}")

    @classmethod
    def parse(cls, text: str) -> LinkDefence:
        """Parse a defence from its name and amount.

        >>> LinkDefence.parse("gaussian:10")
        LinkDefence(kind='gaussian', amount=10.0, key='key')
        """
        kind, _, amount = text.partition(":")
        try:
            return cls(kind, float(amount or 0))  # type: ignore[arg-type]
        except ValueError:
            raise MethodError(f"unknown defence '{text}': give {EXPECTED}") from None

    def __str__(self) -> str:
        return f"{self.kind}:{self.amount:g}" if self.kind in NEEDS else self.kind

    @property
    def masks(self) -> bool:
        """Whether the server restores the features exactly, up to rounding."""
        return self.kind in ("none", "uniform", "gaussian", "fixed")

    def noise(self, cut: str, shape: torch.Size, scale: float, request: int) -> Tensor:
        """Generate the noise e [batch, ...], the same at both ends for the same key, cut and request.

        Args:
            cut: name of the cut.
            shape: shape of the features.
            scale: standard deviation of the features at the cut.
            request: a request number, used once; ``fixed`` ignores it.
        """
        number = 0 if self.kind == "fixed" else request
        seed = hashlib.sha256(f"{self.key}\0{cut}\0{number}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
        if self.kind == "uniform":
            return torch.rand(shape, generator=generator)
        if self.kind == "fixed":
            one = torch.randn(shape[1:], generator=generator)
            return (self.amount * scale * one).expand(shape)
        return self.amount * scale * torch.randn(shape, generator=generator)

    def send(self, cut: str, features: Tensor, scale: float, request: int) -> Tensor:
        """Return the features as an eavesdropper sees them [batch, ...].

        Args:
            cut: name of the cut.
            features: features of the device [batch, ...].
            scale: standard deviation of the features at the cut.
            request: the request number.
        """
        if self.kind == "none":
            return features
        if self.masks:
            return features + self.noise(cut, features.shape, scale, request).to(features)
        if self.kind == "bits":
            return quantise(features, int(self.amount))
        if self.kind == "top":
            return keep_largest(features, self.amount)
        return average_positions(features)

    def receive(self, cut: str, sent: Tensor, scale: float, request: int) -> Tensor:
        """Return the features with which the server computes [batch, ...].

        Args:
            cut: name of the cut.
            sent: transmitted features [batch, ...].
            scale: standard deviation of the features at the cut.
            request: the request number.
        """
        if self.kind == "none" or not self.masks:
            return sent
        return sent - self.noise(cut, sent.shape, scale, request).to(sent)

    def ratio(self, scale: float) -> float | None:
        """Return the variance of the features over that of the noise, or None without noise.

        Args:
            scale: standard deviation of the features.
        """
        spread = {"uniform": 12**-0.5, "gaussian": self.amount * scale, "fixed": self.amount * scale}.get(
            self.kind, 0.0
        )
        return scale**2 / spread**2 if spread else None

    def sent(self, shape: torch.Size) -> float:
        """Return the bytes per row on the link, in float32 unless quantised, including indices for ``top``.

        Args:
            shape: shape of the features [batch, ...].
        """
        count = math.prod(shape[1:])
        if self.kind == "bits":
            return count * self.amount / 8 + 8
        if self.kind == "top":
            return self.amount * count * 8
        return 4 * (count / math.prod(shape[2:]) if self.kind == "pooled" and len(shape) == 4 else count)


def scales(features: Mapping[str, Sequence[Tensor] | Tensor]) -> dict[str, float]:
    """Return the standard deviation of the features at each cut, which both ends know.

    Args:
        features: features by cut.
    """
    return {name: _deviation(each) or 1.0 for name, each in features.items()}


def _deviation(rows: Sequence[Tensor] | Tensor) -> float:
    """Compute the standard deviation of all elements in one pass, combining batches (Chan et al., 1979)."""
    count, mean, squares = 0, 0.0, 0.0
    for part in batches(rows, BATCH, torch.stack):
        values = part.double()
        more, shift = values.numel(), float(values.mean()) - mean
        squares += float(values.var(correction=0)) * more + shift**2 * count * more / (count + more)
        mean += shift * more / (count + more)
        count += more
    return math.sqrt(squares / (count - 1))


def quantise(features: Tensor, bits: int) -> Tensor:
    """Quantise each row to a number of bits per value, between its minimum and maximum.

    Args:
        features: features [batch, ...].
        bits: number of bits per value.
    """
    rows = features.flatten(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = (high - low).clamp_min(1e-12) / (2**bits - 1)
    return (((rows - low) / step).round() * step + low).view_as(features)


def keep_largest(features: Tensor, share: float) -> Tensor:
    """Keep only the largest values of each row, by magnitude; the others become zero.

    Args:
        features: features [batch, ...].
        share: fraction of the values to keep.
    """
    rows = features.flatten(1)
    count = max(1, round(share * rows.shape[1]))
    kept = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, rows.abs().topk(count, dim=1).indices, True)
    return rows.where(kept, rows.new_zeros(())).view_as(features)


def average_positions(features: Tensor) -> Tensor:
    """Replace each channel by its mean over positions; vectors are unchanged.

    Args:
        features: features [batch, channels, height, width], [batch, tokens, width] or [batch, width].
    """
    if features.ndim == 4:  # [batch, channels, height, width]
        return features.mean((2, 3), keepdim=True).expand_as(features)
    return features.mean(1, keepdim=True).expand_as(features) if features.ndim == 3 else features
