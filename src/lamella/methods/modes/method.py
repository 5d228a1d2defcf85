"""MoDES: skip the experts that a token of its modality, in this layer, needs least.

Huang et al., "MoDES: Accelerating Mixture-of-Experts Multimodal Large Language Models via Dynamic Expert Skipping",
arXiv 2511.15690.

    1  importance   alpha[l, c]: how far the answers move without the experts of layer l for modality c
    2  score        s_i = alpha * w_i, of each expert that the router chose
    3  threshold    skip where s_i < tau_c; tau of text and of images apart
    4  search       of the pairs (tau_text, tau_image) that skip enough, the one whose answers move least

Nothing is trained, and all experts stay in memory. Layers without experts, and experts that all tokens share, run as
they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from lamella.data import ImageText, Samples
from lamella.evaluate.scored import labelled_batches
from lamella.methods.modes.frontier import Found, frontier, parity_grid, quantile_grid
from lamella.methods.modes.importance import Answers, layer_importance
from lamella.methods.modes.policy import MODALITIES, Bypass
from lamella.plan import ModelReference, PlanSeries, Point, PolicyReference
from lamella.progress import track
from lamella.registry import method
from lamella.stack import Stack

BATCH = 8
SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))
PAPER = {"text": 0.71, "image": 0.6}  # of its grid, the ends


@method("modes", paper="2511.15690", purpose="skip", on="experts", brief={"points": 4, "skip": 0.3})
@torch.no_grad()
def modes(
    stack: Stack,
    calibration: Samples | ImageText,
    *,
    skip: Annotated[float, Gt(0), Lt(1)] | None = None,
    points: Annotated[int, Ge(2)] = 100,
    grid: Literal["quantile", "paper"] = "quantile",
    modality: Literal["apart", "joint"] = "apart",
    bypass: Bypass = "zero",
) -> PlanSeries:
    """Skip experts by what they weigh and by what their layer is worth, at thresholds found for a share to skip.

    Args:
        stack: a model with experts.
        calibration: prompts with their answers; how far the answers move decides. The paper takes 1024.
        skip: the share of the pairs of a token and an expert to skip; when left out, the series holds every tenth that
            the thresholds of the grid can skip.
        points: thresholds in the grid of each modality.
        grid: ``quantile`` spaces them by the scores of calibration tokens; ``paper`` takes its numbers, which fit 26 to
            48 layers.
        modality: ``apart`` as released, or one alpha for text and images, ``joint``, as the paper's formula reads.
        bypass: what tokens take, while importance is measured, that skip all experts of a layer: ``zero``, as when they
            are skipped later, or ``identity``, what the experts read, as released.

    Returns:
        The series of plans, from the whole model on, each with what it skips and how far the answers move, in nats.

    Raises:
        MethodError: for a model without experts, or a share that cannot be skipped.
    """
    answers = Answers(stack, list(labelled_batches(calibration, BATCH, stack.device)))
    alpha = layer_importance(answers, bypass, modality)
    grids = thresholds(answers, alpha, points, grid)
    shares = SHARES if skip is None else [skip]
    found = [_point(stack, alpha, each) for each in search(answers, alpha, grids, shares)]
    return PlanSeries(model=ModelReference.of(stack), points=[Point(), *found], provenance={"method": "modes"})


@dataclass(frozen=True)
class Searched:
    """The thresholds that cost least of those that skip a share.

    Attributes:
        tau: of each modality.
        found: where the search ended.
        counts: what ran; see :meth:`Answers.distance`.
    """

    tau: dict[str, float]
    found: Found
    counts: Tensor


def search(
    answers: Answers, alpha: dict[str, list[float]], grids: dict[str, list[float]], shares: Sequence[float]
) -> list[Searched]:
    """The thresholds for each share, every pair of them evaluated once; a share that needs no others is left out.

    So are shares that the highest thresholds do not skip, unless that is all of them.

    Raises:
        MethodError: where they skip none of the shares.
    """
    known: dict[tuple[int, int], tuple[float, Tensor]] = {}

    def tau(text: int, image: int) -> dict[str, float]:
        return {"text": grids["text"][text], "image": grids["image"][image]}

    def evaluate(text: int, image: int) -> tuple[float, float]:
        if (text, image) not in known:
            known[text, image] = skipping(answers, alpha, tau(text, image))
        cost, counts = known[text, image]
        return skipped(counts), cost

    most, _ = evaluate(len(grids["text"]) - 1, len(grids["image"]) - 1)
    within = [share for share in shares if share <= most] or list(shares[:1])  # which then says how much is
    chosen: dict[tuple[int, int], Searched] = {}
    for share in track(within, "modes: thresholds"):
        best = frontier(len(grids["text"]), len(grids["image"]), evaluate, share)
        place = best.text, best.image
        chosen.setdefault(place, Searched(tau(*place), best, known[place][1]))
    return list(chosen.values())


def thresholds(
    answers: Answers, alpha: dict[str, list[float]], points: int, grid: Literal["quantile", "paper"]
) -> dict[str, list[float]]:
    """The thresholds of each modality that the search may choose, from low to high; one where there are no tokens."""
    scores = answers.scores(alpha)
    if grid == "paper":
        return {name: parity_grid(points, PAPER[name]) if len(scores[name]) else [0.0] for name in MODALITIES}
    return {name: quantile_grid(points, scores[name]) for name in MODALITIES}


def skipping(answers: Answers, alpha: dict[str, list[float]], tau: dict[str, float]) -> tuple[float, Tensor]:
    """What answers cost under these thresholds, and what ran; see :meth:`Answers.distance`."""
    answers.policy.alpha = torch.tensor([alpha[name] for name in MODALITIES])
    answers.policy.tau = torch.tensor([tau[name] for name in MODALITIES])
    return answers.distance()


def skipped(counts: Tensor) -> float:
    """g: the share of pairs that did not run, of all layers and modalities together."""
    chosen, ran = counts.sum((0, 1)).tolist()
    return 1 - ran / chosen


def _point(stack: Stack, alpha: dict[str, list[float]], one: Searched) -> Point:
    counts = one.counts
    chosen, ran = counts.sum(1).unbind(-1)
    left = torch.where(chosen > 0, ran / chosen.clamp(min=1), 1.0).tolist()
    by_modality = {
        f"skipped of {name}": 1 - int(counts[:, place, 1].sum()) / int(counts[:, place, 0].sum())
        for place, name in enumerate(MODALITIES)
        if counts[:, place, 0].any()
    }
    params = {"alpha": alpha, "tau": one.tau}
    policy = PolicyReference(name="modes", params=params, work=[(1.0, share) for share in left])
    found = one.found
    scores = {"skipped pairs": found.skipped, "answers KL (nats)": found.cost, "falls": found.falls, **by_modality}
    return Point(policies={stack.stack: policy}, scores=scores)
