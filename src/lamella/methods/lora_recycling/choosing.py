"""Scores for selecting adapters from a pool, computed from the factors A and B.

    <D_i, D_T> = s_i s_T trace((A_i A_T^T) (B_T^T B_i))

so neither products nor norms need a dense update. Variants that use single entries (``clamp``, ``abs``, ``quasi-fim``)
need dense updates, which are computed one module at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from lamella.train import Adapter

Closeness = Literal["closeness", "clamp-pm", "macro", "clamp", "abs", "quasi-fim", "l2"]


def inner(one: Adapter, other: Adapter, module: str) -> float:
    """<D_1, D_2> of a module; 0 if one of them lacks it.

    Args:
        one: an adapter.
        other: another adapter.
        module: name of the module.
    """
    if module not in one.pairs or module not in other.pairs:
        return 0.0
    (a, b), (a_other, b_other) = one.scaled(module), other.scaled(module)
    return float(((a @ a_other.T) * (b.T @ b_other)).sum())  # trace of X Y^T is the sum of X * Y


def norm(adapter: Adapter) -> float:
    """Total scaled norm of an adapter, sqrt(sum_m |D_m|_F^2)."""
    return math.sqrt(max(sum(inner(adapter, adapter, module) for module in adapter.modules), 0.0))


def cosine(one: Adapter, other: Adapter, module: str) -> float:
    """Cosine of two updates of a module; 0 if one of them is zero.

    Args:
        one: an adapter.
        other: another adapter.
        module: name of the module.
    """
    size = math.sqrt(inner(one, one, module) * inner(other, other, module))
    return inner(one, other, module) / size if size > 0 else 0.0


def closeness(one: Adapter, target: Adapter, how: Closeness = "closeness") -> float:
    """Similarity of an adapter to that of the target task.

    Args:
        one: a member of the pool.
        target: T.
        how: ``closeness`` is the mean cosine over the modules of both; ``clamp-pm`` counts negative cosines as 0;
            ``macro`` is one ratio over all modules; ``clamp`` drops negative products of entries, ``abs`` takes their
            magnitudes; ``quasi-fim`` is the square root of the cosine of squared entries; ``l2`` is
            -log(1 + sum_m |D_m - T_m|^2).
    """
    modules = list(dict.fromkeys([*one.modules, *target.modules]))
    if how == "l2":
        apart = sum(inner(one, one, m) + inner(target, target, m) - 2 * inner(one, target, m) for m in modules)
        return -math.log1p(max(apart, 0.0))
    if how == "macro":
        size = norm(one) * norm(target)
        return sum(inner(one, target, m) for m in modules) / size if size > 0 else 0.0
    of = OF_MODULE[how]
    return sum(of(one, target, m) for m in modules) / len(modules)


def _of_entries(form: str) -> Callable[[Adapter, Adapter, str], float]:
    def of(one: Adapter, target: Adapter, module: str) -> float:
        if module not in one.pairs or module not in target.pairs:
            return 0.0
        ours, theirs = one.delta(module), target.delta(module)
        if form == "quasi-fim":
            ours, theirs = ours.square(), theirs.square()
        size = float(torch.linalg.norm(ours) * torch.linalg.norm(theirs))
        products = ours * theirs
        total = float((products.clamp(min=0) if form == "clamp" else products.abs()).sum())
        share = total / size if size > 0 else 0.0
        return math.sqrt(share) if form == "quasi-fim" else share

    return of


OF_MODULE: dict[str, Callable[[Adapter, Adapter, str], float]] = {
    "closeness": cosine,
    "clamp-pm": lambda one, target, module: max(cosine(one, target, module), 0.0),
    "clamp": _of_entries("clamp"),
    "abs": _of_entries("abs"),
    "quasi-fim": _of_entries("quasi-fim"),
}
