"""Baselines for a restoration under the same rule: soups of the two models, and other ranges of layers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lamella.errors import MethodError
from lamella.methods.slr.answers import EncodedQuestions
from lamella.methods.slr.intervals import Interval
from lamella.methods.slr.pair import check_pair
from lamella.methods.slr.search import EMPTY, MixedModel, SearchResult, as_row, choose, measure, measure_restored
from lamella.plan import apply_tensors, parameters_at
from lamella.progress import track
from lamella.stack import Stack

SOUP = 21  # values of alpha, as in the paper
DRAWS = 10  # random intervals


def measure_soups(post: Stack, pre: Stack, encoded: EncodedQuestions) -> dict[str, list[MixedModel]]:
    """Measure the soup of all tensors, if they can be mixed, and that of the layers only.

    Args:
        post: the post-trained model.
        pre: the pre-trained model.
        encoded: the questions.
    """
    soups = {"soup": soup(post, pre, encoded, n=SOUP)} if mixable(post, pre) else {}
    return soups | {"blocks": soup(post, pre, encoded, n=SOUP, blocks_only=True)}


def compare_models(
    post: Stack,
    pre: Stack,
    found: SearchResult,
    soups: dict[str, list[MixedModel]],
    encoded: EncodedQuestions,
    seed: int,
) -> list[dict[str, Any]]:
    """Measure the chosen interval and all baselines on held-out questions.

    Args:
        post: the post-trained model.
        pre: the pre-trained model.
        found: the result of the search.
        soups: the measured soups.
        encoded: the held-out questions.
        seed: random seed of the random intervals.
    """
    layers, length = len(post), int(found.chosen.size)
    rows = {"post": measure(post, encoded)}
    if mixable(post, pre):
        rows["pre"] = measure(pre, encoded)
    others: dict[str, Any] = {"slr": found.chosen.what, "all": (0, layers)} | (
        fixed_intervals(layers, length) if length else {}
    )
    random_ = random_intervals(layers, length, draws=DRAWS, seed=seed) if length else []
    requested = {*others.values(), *random_} - {EMPTY}
    measured = {point.what: point for point in measure_restored(post, pre, encoded, requested)} | {EMPTY: rows["post"]}
    rows |= {name: measured[what] for name, what in others.items()}
    if random_:
        quality, spread = (
            sum(getattr(measured[each], name) for each in random_) / len(random_) for name in ("quality", "diversity")
        )
        rows["random"] = MixedModel((0, length), quality, spread)
    for name, points in soups.items():
        share = float(choose(points, points[0], found.min_quality).what)  # type: ignore[arg-type]
        rows[name] = measure(mix_models(post, pre, share, blocks_only=name == "blocks"), encoded, share)
    return [as_row(point) | {"name": name} for name, point in rows.items()]


def mixable(stack: Stack, base: Stack) -> bool:
    """Return whether all tensors of two models have the same shapes, including those outside the layers.

    Args:
        stack: one model.
        base: the other model.
    """
    ours, theirs = ({name: each.shape for name, each in s.model.named_parameters()} for s in (stack, base))
    return all(theirs.get(name) == shape for name, shape in ours.items())


@torch.no_grad()
def mix_models(stack: Stack, base: Stack, share: float, *, blocks_only: bool = False) -> Stack:
    """Mix theta(alpha) = (1 - alpha) theta^post + alpha theta^pre, exact at both ends; neither model is changed.

    Args:
        stack: the post-trained model.
        base: the pre-trained model.
        share: alpha.
        blocks_only: keep embedding, final norm and head of the post-trained model, as a restoration does.
    """

    def mix(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.lerp(ours.detach().float(), theirs.detach().to(ours.device).float(), share).to(ours.dtype)

    sites = [f"layers.{layer}" for layer in range(len(stack))] + ([] if blocks_only else ["embed", "norm", "head"])
    names = parameters_at(stack, sites)
    tensors = {name: mix(stack.model.get_parameter(name), base.model.get_parameter(name)) for name in names}
    return Stack(apply_tensors(stack.model, tensors), name=f"{stack.name}, {share:g} of {base.name}")


def soup(
    stack: Stack, base: Stack, encoded: EncodedQuestions, *, n: int = 21, blocks_only: bool = False
) -> list[MixedModel]:
    """Measure Q and D of n mixtures from post to pre; :func:`choose` selects one of them.

    Args:
        stack: the post-trained model.
        base: the pre-trained model.
        encoded: the questions.
        n: the number of mixtures.
        blocks_only: mix the layers only.

    Raises:
        MethodError: for fewer than 2, or models that cannot be mixed.
    """
    if n < 2:
        raise MethodError(f"a soup of {n}: give at least 2")
    check_pair(stack, base)
    if not blocks_only and not mixable(stack, base):
        raise MethodError(f"{stack.name} and {base.name} differ outside the layers: use blocks_only")
    shares = [k / (n - 1) for k in range(n)]
    return [
        measure(mix_models(stack, base, share, blocks_only=blocks_only), encoded, share)
        for share in track(shares, "soup")
    ]


def random_intervals(layers: int, length: int, *, draws: int = 10, seed: int = 0) -> list[Interval]:
    """Draw intervals of one length at random with replacement.

    Args:
        layers: the number of layers.
        length: the length of the intervals.
        draws: the number of intervals.
        seed: random seed.
    """
    random_ = random.Random(seed)
    starts = [random_.randrange(layers - length + 1) for _ in range(draws)]
    return [(start, start + length) for start in starts]


def fixed_intervals(layers: int, length: int) -> dict[str, Interval]:
    """Return the first, the middle and the last interval of one length.

    Args:
        layers: the number of layers.
        length: the length of the intervals.
    """
    middle = (layers - length) // 2
    return {"early": (0, length), "middle": (middle, middle + length), "late": (layers - length, layers)}


def with_norms_of(stack: Stack, base: Stack) -> Stack:
    """Return the base with the norms (and biases) of post, so that a restoration restores matrices only (an ablation).

    Args:
        stack: the post-trained model.
        base: the pre-trained model.
    """
    ours: Sequence[str] = [name for name in parameters_at(stack, [f"layers.{k}" for k in range(len(stack))])]
    vectors = {name: p for name in ours if (p := stack.model.get_parameter(name)).ndim == 1}
    return Stack(apply_tensors(base.model, vectors), name=f"{base.name} with norms of {stack.name}")
