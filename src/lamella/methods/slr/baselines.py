"""What a restoration is compared with, under the same rule: soups of the two models, and other ranges of layers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.methods.slr.answers import Asked
from lamella.methods.slr.intervals import Interval
from lamella.methods.slr.pair import check_pair
from lamella.methods.slr.search import EMPTY, Blend, Blends, choose, measure, restored, said
from lamella.plan import apply_tensors, parameters_at
from lamella.progress import track
from lamella.stack import Stack

SOUP = 21  # values of alpha, the paper's
DRAWS = 10  # random intervals


def soups_of(post: Stack, pre: Stack, asked: Asked) -> dict[str, list[Blend]]:
    """The soup of all tensors, where they can be mixed, and that of the layers alone."""
    soups = {"soup": soup(post, pre, asked, n=SOUP)} if mixable(post, pre) else {}
    return soups | {"blocks": soup(post, pre, asked, n=SOUP, blocks_only=True)}


def compared(
    post: Stack, pre: Stack, found: Blends, soups: dict[str, list[Blend]], asked: Asked, seed: int
) -> list[dict[str, Any]]:
    """Every choice, and what it is compared with, on questions that nothing was chosen on."""
    layers, length = len(post), int(found.chosen.size)
    rows = {"post": measure(post, asked)}
    if mixable(post, pre):
        rows["pre"] = measure(pre, asked)
    others: dict[str, Any] = {"slr": found.chosen.what, "all": (0, layers)} | (placed(layers, length) if length else {})
    drawn = random_intervals(layers, length, draws=DRAWS, seed=seed) if length else []
    wanted = {*others.values(), *drawn} - {EMPTY}
    measured = {point.what: point for point in restored(post, pre, asked, wanted)} | {EMPTY: rows["post"]}
    rows |= {name: measured[what] for name, what in others.items()}
    if drawn:
        quality, spread = (
            sum(getattr(measured[each], name) for each in drawn) / len(drawn) for name in ("quality", "diversity")
        )
        rows["random"] = Blend((0, length), quality, spread)
    for name, points in soups.items():
        share = float(choose(points, points[0], found.min_quality).what)  # type: ignore[arg-type]
        rows[name] = measure(mixed(post, pre, share, blocks_only=name == "blocks"), asked, share)
    return [said(point) | {"name": name} for name, point in rows.items()]


def mixable(stack: Stack, base: Stack) -> bool:
    """Whether all tensors of two models have the same shapes, those outside the layers too."""
    ours, theirs = ({name: each.shape for name, each in s.model.named_parameters()} for s in (stack, base))
    return all(theirs.get(name) == shape for name, shape in ours.items())


@torch.no_grad()
def mixed(stack: Stack, base: Stack, share: float, *, blocks_only: bool = False) -> Stack:
    """theta(alpha) = (1 - alpha) theta^post + alpha theta^pre, exact at both ends; neither model is changed.

    Args:
        share: alpha.
        blocks_only: leave embedding, final norm and head as they are in post, as a restoration does.
    """

    def mix(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.lerp(ours.detach().float(), theirs.detach().to(ours.device).float(), share).to(ours.dtype)

    sites = [f"layers.{layer}" for layer in range(len(stack))] + ([] if blocks_only else ["embed", "norm", "head"])
    names = parameters_at(stack, sites)
    tensors = {name: mix(stack.model.get_parameter(name), base.model.get_parameter(name)) for name in names}
    return Stack(apply_tensors(stack.model, tensors), name=f"{stack.name}, {share:g} of {base.name}")


def soup(stack: Stack, base: Stack, asked: Asked, *, n: int = 21, blocks_only: bool = False) -> list[Blend]:
    """Q and D of n mixtures, from post to pre; :func:`choose` takes one of them.

    Raises:
        MethodError: for fewer than 2, or models that cannot be mixed.
    """
    if n < 2:
        raise MethodError(f"a soup of {n}: give at least 2")
    check_pair(stack, base)
    if not blocks_only and not mixable(stack, base):
        raise MethodError(f"{stack.name} and {base.name} differ outside the layers: mix the blocks only")
    shares = [k / (n - 1) for k in range(n)]
    return [
        measure(mixed(stack, base, share, blocks_only=blocks_only), asked, share) for share in track(shares, "soup")
    ]


def random_intervals(layers: int, length: int, *, draws: int = 10, seed: int = 0) -> list[Interval]:
    """Intervals of one length, drawn with replacement."""
    drawn = random.Random(seed)
    starts = [drawn.randrange(layers - length + 1) for _ in range(draws)]
    return [(start, start + length) for start in starts]


def placed(layers: int, length: int) -> dict[str, Interval]:
    """The first, the middle and the last interval of one length."""
    middle = (layers - length) // 2
    return {"early": (0, length), "middle": (middle, middle + length), "late": (layers - length, layers)}


def with_norms_of(stack: Stack, base: Stack) -> Stack:
    """An ablation: the base with the norms (and biases) of post, so that a restoration puts back matrices alone."""
    ours: Sequence[str] = [name for name in parameters_at(stack, [f"layers.{k}" for k in range(len(stack))])]
    vectors = {name: p for name in ours if (p := stack.model.get_parameter(name)).ndim == 1}
    return Stack(apply_tensors(base.model, vectors), name=f"{base.name} with norms of {stack.name}")
