"""Merging methods without training: from N adapters to one update of each weight.

    linear      D = sum_i lambda_i D_i                     lambda_i = 1/N averages, lambda is task arithmetic
    TIES        trim each D_i, elect a sign, average the entries that have it     (arXiv 2306.01708)
    DARE        drop entries at random, divide the rest by p                      (arXiv 2311.03099)
    magnitude   keep the largest entries of each D_i, add up
    TSV         the leading singular triplets of all D_i, orthogonalised          (arXiv 2412.00081)
    core space  add up in the common bases of all B_i and all A_i

with D_i = s_i B_i A_i, zero if adapter i lacks the module. The linear sum, TSV and the core space stay factorised, so
the result is an adapter. TIES, DARE and magnitude work on entries of D_i, not of A_i and B_i separately, as published.
All are computed on access, one module at a time: what is in memory is the factors of that module, of all adapters for
the factorised merges and of one for the others, and a few dense matrices of its size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.train import Adapter, concatenate
from lamella.train.adapters import LazyPairs, Pair

Entries = Literal["ties", "dare", "dare-ties", "magnitude"]
Sign = Literal["mass", "frequency"]
SMALL = 1e-6  # singular values below this fraction of the largest are treated as zero


def average(adapters: Sequence[Adapter]) -> Adapter:
    """D = (1/N) sum_i D_i; N counts all adapters, even if some lack a module."""
    return concatenate(adapters, [1 / len(adapters)] * len(adapters))


@dataclass(frozen=True)
class EntryMerge:
    """A merge that works on single entries of each D_i; updates are computed on access.

    Attributes:
        adapters: adapters of the same model.
        weights: lambda_i, by which each D_i is multiplied once.
        how: ``ties``, ``dare`` (then a linear sum), ``dare-ties`` (then the sign step) or ``magnitude``.
        density: fraction of entries to keep: the largest of each D_i, or with DARE random ones.
        sign: sign election by the ``mass`` of the trimmed entries or by their ``frequency``.
        seed: random seed of DARE's masks.
    """

    adapters: Sequence[Adapter]
    weights: Sequence[float]
    how: Entries = "ties"
    density: float = 0.2
    sign: Sign = "mass"
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.adapters) != len(self.weights) or not self.adapters:
            raise MethodError(f"{len(self.adapters)} adapters and {len(self.weights)} weights: give one weight each")

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules that at least one adapter changes."""
        return tuple(dict.fromkeys(name for each in self.adapters for name in each.modules))

    def delta(self, module: str) -> Tensor:
        """The update of a module's weight, in its shape."""
        total, positive, agreeing = None, None, None
        for kept in self._kept(module):  # the first pass elects signs
            mass = kept if self.sign == "mass" or not self._by_sign else kept.sign()
            total = mass if total is None else total + mass
        assert total is not None
        if not self._by_sign:
            return total
        positive = total >= 0  # ties count as +
        total, agreeing = torch.zeros_like(total), torch.zeros_like(total)
        for kept in self._kept(module):
            agrees = torch.where(positive, kept > 0, kept < 0)
            total += torch.where(agrees, kept, 0)
            agreeing += agrees
        return total / agreeing.clamp(min=1)

    def updates(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the updates of all modules, for :func:`lamella.train.adapters.with_updates`."""
        return ((name, self.delta(name)) for name in self.modules)

    @property
    def _by_sign(self) -> bool:
        return self.how in ("ties", "dare-ties")

    def _kept(self, module: str) -> Iterator[Tensor]:
        """lambda_i times the kept entries of each D_i, for adapters with the module."""
        for index, (adapter, weight) in enumerate(zip(self.adapters, self.weights, strict=True)):
            if module in adapter.pairs:
                full = adapter.delta(module)
                if self.how.startswith("dare"):
                    kept = drop_entries(full, self.density, module_seed(self.seed, module, index))
                else:
                    kept = trim(full, self.density)
                yield weight * kept


def trim(full: Tensor, density: float) -> Tensor:
    """Keep the largest entries of a matrix by magnitude; the others are 0.

    Args:
        full: the matrix.
        density: fraction to keep.
    """
    count = max(1, round(density * full.numel()))
    largest = full.abs().flatten().topk(count).indices
    kept = torch.zeros(full.numel(), dtype=full.dtype, device=full.device)
    kept[largest] = full.flatten()[largest]
    return kept.view_as(full)


def drop_entries(full: Tensor, p: float, seed: int) -> Tensor:
    """Keep each entry of a matrix with probability p, divided by p, so that its expectation is unchanged.

    Args:
        full: the matrix.
        p: the probability.
        seed: random seed.
    """
    draws = torch.rand(full.shape, generator=torch.Generator().manual_seed(seed)).to(full.device)
    return torch.where(draws < p, full / p, 0)


def module_seed(seed: int, module: str, index: int = 0) -> int:
    """Return the random seed for a module of one adapter, which can so be drawn without the others.

    Args:
        seed: the random seed of all.
        module: name of the module.
        index: index of the adapter.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {module} {index}".encode()).digest()[:7], "big")


# Factorised


def tsv(adapters: Sequence[Adapter], weights: Sequence[float], k: int = 16) -> Adapter:
    """Task singular vectors: the k leading triplets of each D_i, orthogonalised against those of the others.

        D = U_perp diag(S) V_perp^T      U_perp, V_perp: the polar factors of all U_i, V_i side by side

    Args:
        adapters: adapters of the same model.
        weights: factors of the singular values.
        k: triplets per adapter; limited by its rank.
    """

    def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        found = [triplets(a, b, k) for a, b in parts]
        u, v = (polar(torch.cat([each[index] for each in found], dim=1)) for index in (0, 2))
        return v.T, u * torch.cat([each[1] for each in found])

    return _by_module(adapters, weights, joined)


def core(adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None = None) -> Adapter:
    """Linear sum in core space: M = sum_i w_i s_i U^T B_i A_i V, and D = U M V^T.

    Args:
        adapters: adapters of the same model.
        weights: w_i.
        rank: rank of the result, by truncating its SVD; None for full rank, which is exact.
    """

    def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        u, v = (basis(torch.cat(halves, dim=1)) for halves in
                ([b for _, b in parts], [a.T for a, _ in parts]))  # fmt: skip
        small = sum((u.T @ b) @ (a @ v) for a, b in parts)
        left, sizes, right = torch.linalg.svd(torch.as_tensor(small), full_matrices=False)
        kept = len(sizes) if rank is None else min(rank, len(sizes))
        return right[:kept] @ v.T, (u @ left[:, :kept]) * sizes[:kept]

    return _by_module(adapters, weights, joined)


def _by_module(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    joined: Callable[[Sequence[tuple[Tensor, Tensor]]], tuple[Tensor, Tensor]],
) -> Adapter:
    """Build one adapter by applying ``joined`` to a module's pairs of A_i and lambda_i s_i B_i, on access."""
    scaled = [concatenate([each], [weight]) for each, weight in zip(adapters, weights, strict=True)]
    whole = concatenate(scaled)

    def of(name: str) -> Pair:
        a, b = joined([each.scaled(name) for each in scaled if name in each.pairs])
        return a.contiguous(), b.contiguous()

    return replace(whole, pairs=LazyPairs({name: name for name in whole.modules}, of))


def triplets(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k leading singular triplets of B A: U [out, k], S [k], V [in, k], computed from its factors.

    Args:
        a: A [r, in].
        b: B [out, r].
        k: number of triplets.
    """
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(upper @ lower.T)
    kept = min(k, len(s))
    return left @ u[:, :kept], s[:kept], right @ v[:kept].T


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows, if there are fewer): U V^T of its SVD."""
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    return u @ v


def basis(matrix: Tensor) -> Tensor:
    """Orthonormal basis of the column space of a matrix."""
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, s > SMALL * s[0]] if s[0] > 0 else u[:, :1]
