"""MoDES: skip the experts that matter least to a token of its modality in each layer.

Huang et al., "MoDES: Accelerating Mixture-of-Experts Multimodal Large Language Models via Dynamic Expert Skipping",
arXiv 2511.15690.

    1  importance   alpha[l, c]: how much the answers change without the experts of layer l for modality c
    2  score        s_i = alpha * w_i, of each expert that the router chose
    3  threshold    skip where s_i < tau_c; separate tau for text and images
    4  search       of the pairs (tau_text, tau_image) that skip enough, the one whose answers change least

Nothing is trained, and all experts stay in memory. Layers without experts, and shared experts, run unchanged.
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
from lamella.methods.modes.frontier import FrontierResult, frontier, parity_grid, quantile_grid
from lamella.methods.modes.importance import AnswerDistance, layer_importance
from lamella.methods.modes.policy import MODALITIES, Bypass
from lamella.plan import ModelReference, PlanSeries, Point, PolicyReference
from lamella.progress import track
from lamella.registry import method
from lamella.stack import Stack

BATCH = 8
SHARES = tuple(round(0.1 * tenth, 1) for tenth in range(1, 10))
PAPER = {"text": 0.71, "image": 0.6}  # upper ends of the paper's grids


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
    """Skip experts by their router weight times the importance of their layer, with thresholds for a fraction to skip.

    Args:
        stack: a model with experts.
        calibration: prompts with their answers; the change of the answers decides. The paper takes 1024.
        skip: fraction of the pairs of a token and an expert to skip; if omitted, the series holds every tenth that the
            thresholds of the grid can skip.
        points: number of thresholds in the grid of each modality; 100 in the paper.
        grid: ``quantile`` places the thresholds at quantiles of the calibration scores; ``paper`` takes the paper's
            values, which fit 26 to 48 layers.
        modality: ``apart`` measures one alpha for text and one for images, as in the authors' code; ``joint`` one alpha
            for both, as in the paper's formula.
        bypass: output of the experts for tokens that skip all experts of a layer while importance is measured:
            ``zero``, as in later skipping, or ``identity``, the input of the experts, as in the authors' code.

    Returns:
        The series of plans, starting with the whole model, each with the fraction it skips and the change of the
        answers in nats.

    Raises:
        MethodError: for a model without experts, or a fraction that cannot be skipped.
    """
    answers = AnswerDistance(stack, list(labelled_batches(calibration, BATCH, stack.device)))
    alpha = layer_importance(answers, bypass, modality)
    grids = thresholds(answers, alpha, points, grid)
    shares = SHARES if skip is None else [skip]
    found = [_point(stack, alpha, each) for each in search(answers, alpha, grids, shares)]
    return PlanSeries(model=ModelReference.of(stack), points=[Point(), *found], provenance={"method": "modes"})


@dataclass(frozen=True)
class ChosenThresholds:
    """The thresholds of least cost among those that skip a fraction.

    Attributes:
        tau: threshold of each modality.
        found: result of the frontier search.
        counts: chosen and executed experts; see :meth:`AnswerDistance.distance`.
    """

    tau: dict[str, float]
    found: FrontierResult
    counts: Tensor


def search(
    answers: AnswerDistance, alpha: dict[str, list[float]], grids: dict[str, list[float]], shares: Sequence[float]
) -> list[ChosenThresholds]:
    """Return the thresholds for each fraction to skip, with every pair of them evaluated only once.

    Fractions that lead to the same thresholds as a lower one are omitted, and so are fractions that the highest
    thresholds do not reach, unless that is all of them.

    Args:
        answers: the measurement on the calibration samples.
        alpha: importance of each layer, by modality.
        grids: thresholds from low to high, by modality.
        shares: the fractions to skip.

    Raises:
        MethodError: when the highest thresholds reach none of the fractions.
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
    within = [share for share in shares if share <= most] or list(shares[:1])  # the error then names the maximum
    chosen: dict[tuple[int, int], ChosenThresholds] = {}
    for share in track(within, "modes: thresholds"):
        best = frontier(len(grids["text"]), len(grids["image"]), evaluate, share)
        pair = best.text, best.image
        chosen.setdefault(pair, ChosenThresholds(tau(*pair), best, known[pair][1]))
    return list(chosen.values())


def thresholds(
    answers: AnswerDistance, alpha: dict[str, list[float]], points: int, grid: Literal["quantile", "paper"]
) -> dict[str, list[float]]:
    """Return the thresholds of each modality among which the search chooses, from low to high; one if it has no tokens.

    Args:
        answers: the measurement on the calibration samples.
        alpha: importance of each layer, by modality.
        points: number of thresholds per modality.
        grid: ``quantile`` or ``paper``, see :func:`modes`.
    """
    scores = answers.scores(alpha)
    if grid == "paper":
        return {name: parity_grid(points, PAPER[name]) if len(scores[name]) else [0.0] for name in MODALITIES}
    return {name: quantile_grid(points, scores[name]) for name in MODALITIES}


def skipping(answers: AnswerDistance, alpha: dict[str, list[float]], tau: dict[str, float]) -> tuple[float, Tensor]:
    """Return the cost of the answers under these thresholds, and the counts; see :meth:`AnswerDistance.distance`.

    Args:
        answers: the measurement on the calibration samples.
        alpha: importance of each layer, by modality.
        tau: threshold of each modality.
    """
    answers.policy.alpha = torch.tensor([alpha[name] for name in MODALITIES])
    answers.policy.tau = torch.tensor([tau[name] for name in MODALITIES])
    return answers.distance()


def skipped(counts: Tensor) -> float:
    """Return g, the fraction of pairs that did not run, over all layers and modalities."""
    chosen, ran = counts.sum((0, 1)).tolist()
    return 1 - ran / chosen


def _point(stack: Stack, alpha: dict[str, list[float]], one: ChosenThresholds) -> Point:
    counts = one.counts
    chosen, ran = counts.sum(1).unbind(-1)
    left = torch.where(chosen > 0, ran / chosen.clamp(min=1), 1.0).tolist()
    by_modality = {
        f"skipped pairs of {name}": 1 - int(counts[:, index, 1].sum()) / int(counts[:, index, 0].sum())
        for index, name in enumerate(MODALITIES)
        if counts[:, index, 0].any()
    }
    params = {"alpha": alpha, "tau": one.tau}
    policy = PolicyReference(name="modes", params=params, work=[(1.0, share) for share in left])
    result = one.found
    scores = {
        "skipped pairs": result.skipped,
        "answers KL (nats)": result.cost,
        "monotonicity violations": result.violations,
        **by_modality,
    }
    return Point(policies={stack.stack: policy}, scores=scores)
