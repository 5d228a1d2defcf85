"""Cost of dropping each block: the output of the network without it, compared with the original's.

    v_i = E || eps({l_i}) - eps_ori ||^2        over (x_0, t, noise, c), the same for all blocks; a mean over elements

The sum of v_i over a set R predicts the cost of dropping R if the changes are nearly orthogonal; the triangle
inequality holds for norms, not for squares. Therefore additivity is measured on random sets (:func:`additivity`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch.func import functional_call

from lamella.errors import NumericsError
from lamella.files import Finished, Work
from lamella.methods.laptop_diff.denoiser import Denoiser
from lamella.methods.laptop_diff.tuples import Tuples, error, predicted, predictions, targets
from lamella.progress import tracker

SIZES = (2, 4, 6)  # of random sets


@dataclass(frozen=True)
class BlockScores:
    """Effect of dropping each block, by site.

    Attributes:
        output: v_i.
        by_time: v_i for each interval of timesteps, starting with little noise.
        task: rise of the denoising loss.
        whole: denoising loss of the original network.
    """

    output: Mapping[str, float]
    by_time: Mapping[str, list[float]]
    task: Mapping[str, float]
    whole: float


def measure_blocks(denoiser: Denoiser, tuples: Tuples, *, bins: int, batch: int, work: Work) -> BlockScores:
    """Measure the effect of dropping each block; an interrupted run resumes.

    Args:
        denoiser: the model.
        tuples: measurement samples.
        bins: number of timestep intervals.
        batch: batch size.
        work: folder for the journal.

    Raises:
        NumericsError: for a block without which the network's output is not finite.
    """
    original = predictions(denoiser, denoiser.network, tuples, batch)
    wanted = targets(denoiser, tuples)
    where = tuples.bins(denoiser, bins)
    whole = float(error(original, wanted).mean())
    depends = [denoiser.describe(), bins, batch, len(tuples), float(tuples.noise.double().sum())]
    known = Finished(work.journal("blocks"), depends)

    def dropped(site: str) -> dict[str, Any]:
        found = predictions(denoiser, denoiser.blocks.without([site]), tuples, batch)
        changed = error(found, original)
        by_time = [float(changed[where == number].mean()) for number in range(bins)]
        return {
            "output": float(changed.mean()),
            "by_time": by_time,
            "task": float(error(found, wanted).mean()) - whole,
        }

    found: dict[str, dict[str, Any]] = {}
    with tracker("measuring blocks", len(denoiser.blocks)) as count:
        for site in denoiser.blocks.sites:
            found[site] = known.once(site, partial(dropped, site))
            count()
    wrong = next((site for site, each in found.items() if not np.isfinite(each["output"])), None)
    if wrong is not None:
        raise NumericsError(f"without {wrong} the network's output is not finite: measure in float32")
    columns = {name: {site: each[name] for site, each in found.items()} for name in ("output", "by_time", "task")}
    return BlockScores(columns["output"], columns["by_time"], columns["task"], whole)


def joint(denoiser: Denoiser, tuples: Tuples, sites: Sequence[str], batch: int) -> tuple[float, float]:
    """Measure dropping a whole set: the change of the output, and the denoising loss.

    Args:
        denoiser: the model.
        tuples: measurement samples.
        sites: the set.
        batch: batch size.
    """
    original = predictions(denoiser, denoiser.network, tuples, batch)
    found = predictions(denoiser, denoiser.blocks.without(sites), tuples, batch)
    return float(error(found, original).mean()), float(error(found, targets(denoiser, tuples)).mean())


def random_sets(sites: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """Choose random sets of two, four and six blocks in turn.

    Args:
        sites: all sites.
        count: number of sets.
        seed: random seed.
    """
    generator = np.random.default_rng(seed)
    sizes = [min(SIZES[number % len(SIZES)], len(sites)) for number in range(count)]
    return [generator.choice(sites, size, replace=False).tolist() for size in sizes]


def additivity(
    denoiser: Denoiser, tuples: Tuples, scores: Mapping[str, float], sets: Sequence[Sequence[str]], batch: int
) -> dict[str, Any]:
    """Measure how well sums of scores predict the cost of dropping sets of blocks.

    Args:
        denoiser: the model.
        tuples: measurement samples.
        scores: v_i by site.
        sets: sets of sites.
        batch: batch size.

    Returns:
        Rank and linear correlation of sum and measurement, the median ratio of measurement to sum, the pair of blocks
        with the largest deviation, and all points.
    """
    original = predictions(denoiser, denoiser.network, tuples, batch)
    with tracker("measuring sets", len(sets)) as count:
        points = []
        for each in sets:
            found = predictions(denoiser, denoiser.blocks.without(each), tuples, batch)
            points.append((sum(scores[site] for site in each), float(error(found, original).mean())))
            count()
    sums, measured_ = (np.array(column) for column in zip(*points, strict=True))
    ratios = measured_ / sums
    pairs = [number for number, each in enumerate(sets) if len(each) == 2] or list(range(len(sets)))
    worst = max(pairs, key=lambda number: abs(np.log(max(ratios[number], 1e-12))))
    return {
        "spearman": float(spearmanr(sums, measured_).statistic),
        "pearson": float(pearsonr(sums, measured_).statistic),
        "ratio": float(np.median(ratios)),
        "worst": {"sites": list(sets[worst]), "sum": points[worst][0], "measured": points[worst][1]},
        "points": [list(each) for each in points],
    }


def magnitudes(denoiser: Denoiser) -> dict[str, float]:
    """Baseline: the mean absolute weight of each block, without its shortcut."""
    found = {}
    for site in denoiser.blocks.sites:
        kept = {id(each) for part in denoiser.blocks.kept(site) for each in part.parameters()}
        weights = [each.detach().flatten() for each in denoiser.blocks[site].parameters() if id(each) not in kept]
        found[site] = float(torch.cat(weights).abs().mean())
    return found


def taylor(denoiser: Denoiser, tuples: Tuples, batch: int) -> dict[str, float]:
    """Baseline: first-order change of the denoising loss, |sum g w| over each block without its shortcut.

    Args:
        denoiser: the model.
        tuples: measurement samples.
        batch: batch size.
    """
    parameters = {name: each.detach().requires_grad_() for name, each in denoiser.network.named_parameters()}
    total = dict.fromkeys(denoiser.blocks.sites, 0.0)

    def network(*args: Any, **given: Any) -> Any:
        return functional_call(denoiser.network, parameters, args, given)

    for rows in tuples.batches(batch):
        with torch.enable_grad():
            loss = (predicted(denoiser, network, rows) - targets(denoiser, rows)).square().mean()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        products = {
            name: float((g * w).sum().detach())
            for (name, w), g in zip(parameters.items(), gradients, strict=True)
            if g is not None
        }
        for site, path in denoiser.blocks.paths.items():
            stays = tuple(f"{path}.{name}." for name in denoiser.blocks.kind(site).keeps)
            inside = [n for n in products if n.startswith(f"{path}.") and not n.startswith(stays)]
            total[site] += abs(sum(products[name] for name in inside)) * len(rows) / len(tuples)
    return total
