"""The frontier: what each family reaches with how many parameters (arXiv 2510.01796).

    hourglass       d_h < d_z > d_x, W_in trained                frozen   the same, W_in as it was drawn
    conventional    d_h > d_z = d_x, with W_in and W_out         lean     without these two square matrices
    bottleneck      d_h < d_z <= d_x: as deep and as narrow, but its skip is no wider than the input

The lean family is the fair baseline wherever d_x = d_y; elsewhere it has no shapes. A bottleneck tells what the wide
skip is worth. Rates and the frontier are chosen on held-out rows, by means over seeds, for every shape apart; test rows
judge.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, MinLen
from torch import nn

from lamella.errors import BudgetError, MethodError, listed
from lamella.files import Finished, Work
from lamella.measure import Recording
from lamella.methods.hourglass_mlp.network import HourglassMLP, Lift, Size, size_of
from lamella.methods.hourglass_mlp.vectors import Vectors
from lamella.registry import command
from lamella.results import Study
from lamella.search import pareto
from lamella.train import EarlyStopping, TrainConfig, fit, supervised

Family = Literal["hourglass", "frozen", "conventional", "lean", "bottleneck"]
FAMILIES: dict[Family, tuple[Lift, bool]] = {  # W_in, and whether there is a W_out
    "hourglass": ("trained", True),
    "frozen": ("frozen", True),
    "conventional": ("trained", True),
    "lean": ("none", False),
    "bottleneck": ("trained", True),
}
WIDE = ("conventional", "lean")
RATES = (1e-4, 5e-4, 1e-3, 5e-3)  # the paper's for MNIST
UNCLIPPED = 1e9
TRAINING = TrainConfig(
    batch=64, schedule="linear", warmup=0.0, weight_decay=0.01, clip=UNCLIPPED, eval_every=100, save_every=10**6
)


@dataclass(frozen=True)
class Grid:
    """The shapes of a search; what is left out follows d_x as the paper's grid does.

    Attributes:
        d_z: widths of the skip of Hourglasses, and of bottlenecks where they are no wider than the input; d_x + 1, one
            and a half and two times d_x when left out.
        d_h: their hidden widths; a sixth and a quarter of d_x when left out.
        depth: their numbers of blocks.
        wide: hidden widths of conventional networks; one and a half and three times d_x when left out.
        wide_depth: their numbers of blocks.
    """

    d_z: tuple[Annotated[int, Ge(1)], ...] = ()
    d_h: tuple[Annotated[int, Ge(1)], ...] = ()
    depth: tuple[Annotated[int, Ge(0)], ...] = (4, 8)
    wide: tuple[Annotated[int, Ge(1)], ...] = ()
    wide_depth: tuple[Annotated[int, Ge(0)], ...] = (1, 2, 4)

    def shapes(self, families: Sequence[Family], d_x: int, d_y: int) -> list[Shape]:
        """All shapes of these families.

        Raises:
            MethodError: for one that its family does not have, or when there is none.
        """
        narrow = self.d_z or (d_x + 1, 3 * d_x // 2, 2 * d_x), self.d_h or (max(1, d_x // 6), max(1, d_x // 4))
        wide = (d_x,), self.wide or (3 * d_x // 2, 3 * d_x)
        found = []
        for family in families:
            sizes = (*wide, self.wide_depth) if family in WIDE else (*narrow, self.depth)
            found += [Shape(family, *each) for each in product(*sizes) if _has(family, each[0], d_x, d_y)]
        for shape in found:
            shape.check()
        if not found:
            raise MethodError(
                f"{', '.join(families)}: no such network takes {d_x} numbers and gives {d_y} with these shapes: "
                "hourglass and frozen have d_z above the first, bottleneck has not, and lean needs as many of both"
            )
        return found


def _has(family: Family, d_z: int, d_x: int, d_y: int) -> bool:
    """Whether a family has networks of that latent width."""
    if family in WIDE:
        return family == "conventional" or d_x == d_y
    return (d_z > d_x) == (family != "bottleneck")


@dataclass(frozen=True)
class Shape:
    """One network of a family: d_z, d_h and the number of blocks L."""

    family: Family
    d_z: int
    d_h: int
    blocks: int

    @property
    def name(self) -> str:
        return f"{self.family} {self.d_z} x {self.d_h} x {self.blocks}"

    def check(self) -> None:
        """Raise a :class:`MethodError` for a shape that is not of its family."""
        if self.family in WIDE and not self.d_h > self.d_z:
            raise MethodError(f"{self.name}: a {self.family} network has d_h above d_z")
        if self.family not in WIDE and not self.d_h < self.d_z:
            raise MethodError(f"{self.name}: a {self.family} network has d_h below d_z")

    def size(self, d_x: int, d_y: int) -> Size:
        """Its parameters, all and those that train."""
        lift, readout = FAMILIES[self.family]
        return size_of(d_x, d_y, self.d_z, (self.d_h,) * self.blocks, lift, readout)

    def network(self, d_x: int, d_y: int, seed: int) -> HourglassMLP:
        """It, drawn from a seed."""
        lift, readout = FAMILIES[self.family]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return HourglassMLP(d_x, d_y, self.d_z, (self.d_h,) * self.blocks, lift=lift, readout=readout, seed=seed)


@command(
    "hourglass-mlp", "frontier", on="any",
    brief={"d_z": (20,), "d_h": (4,), "depth": (1, 2), "wide": (24,), "wide_depth": (1,), "lrs": (1e-3,), "seeds": 1,
           "epochs": 1, "batch": 16},
)  # fmt: skip
def frontier(
    task: Vectors,
    *,
    families: Annotated[tuple[Family, ...], MinLen(1)] = tuple(FAMILIES),
    grid: Grid = Grid(),
    most: Annotated[int, Ge(1)] | None = None,
    count: Literal["total", "trainable"] = "total",
    lrs: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1)] = RATES,
    seeds: Annotated[int, Ge(1)] = 3,
    epochs: Annotated[int, Ge(1)] = 40,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Study:
    """Train Hourglass and conventional networks of many shapes, and find those that more parameters alone would beat.

    Args:
        task: vectors to vectors, in three parts.
        families: of ``hourglass``, ``frozen``, ``conventional``, ``lean`` and ``bottleneck``.
        grid: their shapes.
        most: leave out shapes with more parameters.
        count: which parameters; a frozen lift is in the ``total``, and costs its multiplications either way.
        lrs: rates to try for every shape; the paper's four for MNIST.
        seeds: of each shape at each rate.
        epochs: passes over the training rows, where ``steps`` is left out; the paper's 30 to 50.
        config: of each training; its rate comes from ``lrs``, its seed is the first one.
        work: where an interrupted run goes on from.

    Returns:
        For every shape its parameters and PSNR in dB on held-out and test rows at its best rate, and the frontiers.

    Raises:
        BudgetError: when ``most`` is below the smallest shape.
        MethodError: for shapes that are not of their family, a rate in ``config``, or a batch of one row.
    """
    if config.lr is not None:
        raise MethodError(f"lr {config.lr:g}: every shape is trained at all of lrs {listed(lrs)}: give these")
    if config.batch < 2:
        raise MethodError(f"batch {config.batch}: give at least 2, since a batch norm learns nothing from a single row")
    shapes = within(grid.shapes(families, task.d_in, task.d_out), task, most, count)
    config = config.with_steps(epochs * len(task.train))
    depends = [task.describe(), asdict(replace(config, lr=None))]
    folder, points = work.directory(), []
    finished = Finished(folder / "frontier.jsonl", depends)
    for shape in shapes:
        runs: dict[float, list[list[float]]] = {lr: [] for lr in lrs}
        for lr, seed in product(lrs, range(config.seed, config.seed + seeds)):
            rated = replace(config, lr=lr, seed=seed)
            find = partial(trained, task, shape, rated, folder)
            runs[lr].append(finished.once(f"{shape.name}, {lr:g}, {seed}", find))
        points.append(point(task, shape, runs))
    return Study(
        findings={
            "task": task.name,
            "sizes": [task.d_in, task.d_out],
            "counted": count,
            "seeds": seeds,
            "points": points,
            "front": front(points, count),
            "fronts": {each: front(points, count, each) for each in families},
        }
    )


def within(shapes: Sequence[Shape], task: Vectors, most: int | None, count: str) -> list[Shape]:
    """The shapes with at most so many parameters, the smallest first.

    Raises:
        BudgetError: when there is none.
    """
    sizes = {shape: getattr(shape.size(task.d_in, task.d_out), count) for shape in shapes}
    ordered = sorted(sizes, key=lambda shape: sizes[shape])
    fitting = [shape for shape in ordered if most is None or sizes[shape] <= most]
    if not fitting:
        least = ordered[0]
        raise BudgetError(
            f"most {most:,} parameters are below the smallest shape, {least.name} with {sizes[least]:,}: give more, or "
            "smaller d_z, d_h and depth"
        )
    return fitting


def trained(task: Vectors, shape: Shape, config: TrainConfig, folder: Path) -> list[float]:
    """What a network of that shape reaches; see :func:`reached`. Its checkpoints go when that is known."""
    network = shape.network(task.d_in, task.d_out, config.seed)
    out = folder / f"{shape.name.replace(' ', '-')}-{config.lr:g}-{config.seed}"
    found = reached(task, network, config, out)
    shutil.rmtree(out)
    return found


def reached(task: Vectors, network: nn.Module, config: TrainConfig, out: Path) -> list[float]:
    """Train a network on a task, and say what it reaches at its lowest held-out loss.

    Args:
        network: from d_x to d_y; it is trained in place.
        config: of the training, with its steps and its rate.
        out: the folder of the run.

    Returns:
        PSNR on held-out and on test rows, in dB.
    """
    patient = EarlyStopping(patience=config.steps or 1)  # it never stops before the end
    fit(network, task.train, supervised(task.loss), config, out=out, held_out=task.held_out, hooks=[patient])
    return [psnr(network, task.held_out), psnr(network, task.test)]


@torch.no_grad()
def psnr(network: nn.Module, rows: Recording) -> float:
    """-10 log10 of the mean squared error over all rows, in dB; images are in [0, 1]."""
    network.eval()
    return -10 * math.log10(float((network(rows.x) - rows.y).double().square().mean()))


def point(task: Vectors, shape: Shape, runs: dict[float, list[list[float]]]) -> dict[str, Any]:
    """What is known of a shape: at the rate whose mean over seeds is best on held-out rows."""
    best = max(runs, key=lambda lr: fmean(held for held, _ in runs[lr]))
    tests = [test for _, test in runs[best]]
    return {
        **asdict(shape),
        **shape.size(task.d_in, task.d_out)._asdict(),
        "lr": best,
        "held out": fmean(held for held, _ in runs[best]),
        "test": fmean(tests),
        "spread": stdev(tests) if len(tests) > 1 else None,
        "rates": {f"{lr:g}": fmean(held for held, _ in each) for lr, each in runs.items()},
    }


def front(points: Sequence[dict[str, Any]], count: str, family: str | None = None) -> list[int]:
    """The places of the points that none with as few parameters beats on held-out rows, the smallest first.

    Args:
        family: look at its points alone.
    """
    chosen = {place: one for place, one in enumerate(points) if family in (None, one["family"])}
    found = pareto({place: (one[count], -one["held out"]) for place, one in chosen.items()})
    return sorted(found, key=lambda place: points[place][count])
