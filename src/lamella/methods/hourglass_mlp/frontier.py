"""The frontier: the quality that each family of networks reaches at each parameter count (arXiv 2510.01796).

    hourglass       d_h < d_z > d_x, W_in trained                frozen   the same, with a random fixed W_in
    conventional    d_h > d_z = d_x, with W_in and W_out         lean     without these two square matrices
    bottleneck      d_h < d_z <= d_x: as deep and as narrow, but its skip is no wider than the input

The lean family is the fair baseline wherever d_x = d_y; otherwise it has no shapes. A bottleneck shows what the wide
skip is worth. Learning rates and the frontier are selected on held-out rows, by means over seeds, for every shape
separately; results are reported on test rows.
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
class ShapeGrid:
    """The shapes of a search; empty fields follow d_x like the paper's grid.

    Attributes:
        d_z: widths of the skip, for hourglasses where they are wider than the input and for bottlenecks otherwise;
            defaults to d_x + 1, 1.5 d_x and 2 d_x.
        d_h: hidden widths of hourglasses and bottlenecks; defaults to a sixth and a quarter of d_x.
        depth: numbers of blocks of hourglasses and bottlenecks.
        wide: hidden widths of conventional networks; defaults to 1.5 d_x and 3 d_x.
        wide_depth: numbers of blocks of conventional networks.
    """

    d_z: tuple[Annotated[int, Ge(1)], ...] = ()
    d_h: tuple[Annotated[int, Ge(1)], ...] = ()
    depth: tuple[Annotated[int, Ge(0)], ...] = (4, 8)
    wide: tuple[Annotated[int, Ge(1)], ...] = ()
    wide_depth: tuple[Annotated[int, Ge(0)], ...] = (1, 2, 4)

    def shapes(self, families: Sequence[Family], d_x: int, d_y: int) -> list[MLPShape]:
        """List all shapes of some families.

        Args:
            families: the families.
            d_x: input size.
            d_y: output size.

        Returns:
            The shapes.

        Raises:
            MethodError: for a shape that does not belong to its family, or if there is none.
        """
        narrow = self.d_z or (d_x + 1, 3 * d_x // 2, 2 * d_x), self.d_h or (max(1, d_x // 6), max(1, d_x // 4))
        wide = (d_x,), self.wide or (3 * d_x // 2, 3 * d_x)
        found = []
        for family in families:
            sizes = (*wide, self.wide_depth) if family in WIDE else (*narrow, self.depth)
            found += [MLPShape(family, *each) for each in product(*sizes) if _has(family, each[0], d_x, d_y)]
        for shape in found:
            shape.check()
        if not found:
            raise MethodError(
                f"{', '.join(families)}: no network of these shapes takes {d_x} inputs and gives {d_y} outputs: "
                "hourglass and frozen need d_z above the inputs, bottleneck at most that, lean equal inputs and outputs"
            )
        return found


def _has(family: Family, d_z: int, d_x: int, d_y: int) -> bool:
    """Return whether a family has networks of that latent width."""
    if family in WIDE:
        return family == "conventional" or d_x == d_y
    return (d_z > d_x) == (family != "bottleneck")


@dataclass(frozen=True)
class MLPShape:
    """The shape of one network.

    Attributes:
        family: its family.
        d_z: latent width, at which the skip is.
        d_h: hidden width of its blocks.
        blocks: L, the number of blocks.
    """

    family: Family
    d_z: int
    d_h: int
    blocks: int

    @property
    def name(self) -> str:
        """Family and sizes in one string."""
        return f"{self.family} {self.d_z} x {self.d_h} x {self.blocks}"

    def check(self) -> None:
        """Raise a :class:`MethodError` for a shape that does not belong to its family."""
        if self.family in WIDE and not self.d_h > self.d_z:
            raise MethodError(f"{self.name}: a {self.family} network needs d_h above d_z")
        if self.family not in WIDE and not self.d_h < self.d_z:
            raise MethodError(f"{self.name}: a {self.family} network needs d_h below d_z")

    def size(self, d_x: int, d_y: int) -> Size:
        """Count its parameters, total and trainable.

        Args:
            d_x: input size.
            d_y: output size.
        """
        lift, readout = FAMILIES[self.family]
        return size_of(d_x, d_y, self.d_z, (self.d_h,) * self.blocks, lift, readout)

    def network(self, d_x: int, d_y: int, seed: int) -> HourglassMLP:
        """Create the network.

        Args:
            d_x: input size.
            d_y: output size.
            seed: random seed of its weights.
        """
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
    grid: ShapeGrid = ShapeGrid(),
    most: Annotated[int, Ge(1)] | None = None,
    count: Literal["total", "trainable"] = "total",
    lrs: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1)] = RATES,
    seeds: Annotated[int, Ge(1)] = 3,
    epochs: Annotated[int, Ge(1)] = 40,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Study:
    """Train Hourglass and conventional networks of many shapes, and find the Pareto frontier of parameters and quality.

    Args:
        task: pairs of vectors, in three splits.
        families: some of ``hourglass``, ``frozen``, ``conventional``, ``lean`` and ``bottleneck``.
        grid: the shapes.
        most: skip shapes with more parameters.
        count: parameters to count; a frozen lift is part of ``total``, and costs its multiplications either way.
        lrs: learning rates to try for every shape; the paper's four for MNIST.
        seeds: number of seeds per shape and learning rate.
        epochs: passes over the training rows if ``steps`` is None; the paper uses 30 to 50.
        config: settings of each training; the learning rate comes from ``lrs``, and ``seed`` is the first seed.
        work: folder from which an interrupted run resumes.

    Returns:
        For every shape its parameters and PSNR in dB on held-out and test rows at its best learning rate, and the
        frontiers.

    Raises:
        BudgetError: when ``most`` is below the smallest shape.
        MethodError: for shapes that do not belong to their family, a learning rate in ``config``, or a batch of one
            row.
    """
    if config.lr is not None:
        raise MethodError(f"lr {config.lr:g}: every shape is trained with all of lrs {listed(lrs)}: set lrs instead")
    if config.batch < 2:
        raise MethodError(f"batch {config.batch}: give at least 2, since batch norm needs more than one row")
    shapes = within(grid.shapes(families, task.d_in, task.d_out), task, most, count)
    config = config.with_steps(epochs * len(task.train))
    depends = [task.describe(), asdict(replace(config, lr=None))]
    folder, points = work.directory(), []
    finished = Finished(folder / "frontier.jsonl", depends)
    for shape in shapes:
        runs: dict[float, list[list[float]]] = {lr: [] for lr in lrs}
        for lr, seed in product(lrs, range(config.seed, config.seed + seeds)):
            rated = replace(config, lr=lr, seed=seed)
            find = partial(train_shape, task, shape, rated, folder)
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


def within(shapes: Sequence[MLPShape], task: Vectors, most: int | None, count: str) -> list[MLPShape]:
    """Select the shapes with at most ``most`` parameters, the smallest first.

    Args:
        shapes: the shapes.
        task: the task, which sets input and output size.
        most: maximum number of parameters; None for all.
        count: parameters to count, ``total`` or ``trainable``.

    Returns:
        The shapes, sorted.

    Raises:
        BudgetError: if there is none.
    """
    sizes = {shape: getattr(shape.size(task.d_in, task.d_out), count) for shape in shapes}
    ordered = sorted(sizes, key=lambda shape: sizes[shape])
    fitting = [shape for shape in ordered if most is None or sizes[shape] <= most]
    if not fitting:
        least = ordered[0]
        raise BudgetError(
            f"most: {most:,} parameters are fewer than in the smallest shape, {least.name} with {sizes[least]:,}: "
            "allow more, or use smaller d_z, d_h and depth"
        )
    return fitting


def train_shape(task: Vectors, shape: MLPShape, config: TrainConfig, folder: Path) -> list[float]:
    """Train a network of one shape, and delete its checkpoints afterwards.

    Args:
        task: the task.
        shape: the shape.
        config: training settings.
        folder: folder for checkpoints.

    Returns:
        PSNR on held-out and on test rows, in dB; see :func:`train_and_measure`.
    """
    network = shape.network(task.d_in, task.d_out, config.seed)
    out = folder / f"{shape.name.replace(' ', '-')}-{config.lr:g}-{config.seed}"
    found = train_and_measure(task, network, config, out)
    shutil.rmtree(out)
    return found


def train_and_measure(task: Vectors, network: nn.Module, config: TrainConfig, out: Path) -> list[float]:
    """Train a network on a task, and measure it at its lowest held-out loss.

    Args:
        task: the task.
        network: network from d_x to d_y; it is trained in place.
        config: training settings, with steps and learning rate.
        out: folder of the run.

    Returns:
        PSNR on held-out and on test rows, in dB.
    """
    patient = EarlyStopping(patience=config.steps or 1)  # keeps the best weights, never stops early
    fit(network, task.train, supervised(task.loss), config, out=out, held_out=task.held_out, hooks=[patient])
    return [psnr(network, task.held_out), psnr(network, task.test)]


@torch.no_grad()
def psnr(network: nn.Module, rows: Recording) -> float:
    """Compute -10 log10 of the mean squared error over all rows, in dB; images are in [0, 1].

    Args:
        network: the network; set to evaluation mode.
        rows: inputs and targets.
    """
    network.eval()
    return -10 * math.log10(float((network(rows.x) - rows.y).double().square().mean()))


def point(task: Vectors, shape: MLPShape, runs: dict[float, list[list[float]]]) -> dict[str, Any]:
    """Summarise a shape at the learning rate whose mean over seeds is best on held-out rows.

    Args:
        task: the task.
        shape: the shape.
        runs: for every learning rate, held-out and test PSNR of each seed.
    """
    best = max(runs, key=lambda lr: fmean(held for held, _ in runs[lr]))
    tests = [test for _, test in runs[best]]
    return {
        **asdict(shape),
        **shape.size(task.d_in, task.d_out)._asdict(),
        "lr": best,
        "held_out": fmean(held for held, _ in runs[best]),
        "test": fmean(tests),
        "spread": stdev(tests) if len(tests) > 1 else None,
        "rates": {f"{lr:g}": fmean(held for held, _ in each) for lr, each in runs.items()},
    }


def front(points: Sequence[dict[str, Any]], count: str, family: str | None = None) -> list[int]:
    """Indices of the points on the frontier of held-out PSNR and parameters, the smallest first.

    Args:
        points: the points.
        count: parameters to count, ``total`` or ``trainable``.
        family: restrict to one family; None for all.
    """
    chosen = {index: one for index, one in enumerate(points) if family in (None, one["family"])}
    found = pareto({index: (one[count], -one["held_out"]) for index, one in chosen.items()})
    return sorted(found, key=lambda index: points[index][count])
