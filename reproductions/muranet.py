"""MuraNet at small scale: walls, doors and windows of synthetic plans, by one network or by two.

With clear plans a network recognises every wall, even after training on 100 of them. Here nano networks are trained for
300 steps on 100 plans that are faint and noisy, as in a photograph in poor light, with walls of three quarters of the
usual thickness, and evaluated on 96 others; a pilot on validation plans first shows that they learn the task and leave
something to gain.

The claims: one network for both tasks, with the default attention, is as good as two networks of the same encoder, one
for each task: walls within 2.5 points of IoU, openings within 1 point of AP50, and an AP75 that is not lower. Twelve
seeds; of a seed, arms share weights as far as their shapes agree, and the plans with their order. Every arm has its own
learning rate, chosen on validation plans with two other seeds.

Further checks: the paper's comparison with a U-Net for walls and a YOLO for openings, whose widths give them as many
parameters as the network for that task has; the same network without relation attention, at equal parameters, and the
steps until either recognises walls and openings, all with six of the seeds; and attention that is inserted into a
frozen encoder, which was trained on rendered shapes. Tables without a check have fewer seeds: other interpretations of
the attention, loss weights, the stage at which the tasks should split, and a style of walls that is not in the training
data.

    python reproductions/muranet.py            # about three hours on one core; an interrupted run resumes
    python reproductions/muranet.py --quick    # small plans, few steps, one seed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from torch import nn

from lamella.files import Work
from lamella.methods.muranet import (
    FloorPlan,
    LossBalance,
    PlanNetwork,
    PlanTraining,
    RecogniserShape,
    branch_point,
    evaluate_plans,
    floor_plans,
    grey_floor,
)
from lamella.methods.muranet.baselines import unet, yolo
from lamella.methods.muranet.branch import gradients_of, size_of
from lamella.methods.muranet.drawing import KINDS
from lamella.methods.muranet.encoder import EncoderWidths
from lamella.methods.muranet.judge import median_box
from lamella.methods.muranet.method import PERSISTENT
from lamella.methods.muranet.raster import Style
from lamella.methods.muranet.recipe import NO_CLIP, train_network
from lamella.report.figures import Bars
from lamella.train import Hook, TrainConfig, TrainingRun, class_cross_entropy, fit, supervised
from lamella.zoo.worlds import render, scenes

THIN = 0.75  # thickness of walls, relative to the generator's
CONTRAST, NOISE = 0.4, 0.2  # of images, relative to black on white
WALLS, OPENINGS = 0.8, 0.4  # target wall IoU and AP50 of convergence
RATES = (3e-3, 1e-2, 3e-2)
PILOTS = (100, 101)  # seeds of the pilot and of the choice of rates
BOTH, ONLY_WALLS, ONLY_OPENINGS, WITHOUT = "both tasks", "walls only", "openings only", "both, without attention"
UNET, YOLO = "U-Net, walls only", "YOLO, openings only"
CLAIMED = (BOTH, ONLY_WALLS, ONLY_OPENINGS)
VARIANTS = ("msca", "local_softmax")  # the other interpretations of the attention
SEEN: tuple[Style, ...] = ("solid", "grey")
UNSEEN: tuple[Style, ...] = ("double",)
BRANCHED = 64  # plans whose gradients are compared


@dataclass(frozen=True)
class Size:
    """Scale of the experiment."""

    side: int
    plans: int
    chosen: int  # validation plans
    tests: int
    looked: int  # test plans on which convergence is measured
    steps: int
    every: int  # steps between evaluations
    seeds: Sequence[int]
    compared: int  # number of the seeds, the first, of other networks
    few: int  # of what no claim is about


FULL = Size(128, 100, 32, 96, 8, 300, 20, range(6, 18), 6, 3)  # with seeds 0 to 5 the attention was found to overflow
QUICK = Size(64, 16, 2, 2, 1, 4, 4, (0,), 1, 1)


def shape(size: Size, **parts: Any) -> RecogniserShape:
    return RecogniserShape(**{"encoder": "nano", "size": size.side, **parts})


Build = Callable[[Size], PlanNetwork]
ARMS: dict[str, Build] = {
    BOTH: lambda size: shape(size).build(len(KINDS)),
    ONLY_WALLS: lambda size: shape(size, tasks="walls").build(len(KINDS)),
    ONLY_OPENINGS: lambda size: shape(size, tasks="openings").build(len(KINDS)),
    WITHOUT: lambda size: shape(size, attention="depthwise").build(len(KINDS)),
    UNET: lambda size: unet(EncoderWidths(15, 1, (20, 30, 60, 80))),
    YOLO: lambda size: yolo(EncoderWidths(12, 1, (24, 40, 72, 88), (2, 2, 2, 2), neck=32), len(KINDS), 2),
}
OTHERS: dict[str, Build] = {
    kind: partial(lambda size, kind: shape(size, attention=kind).build(len(KINDS)), kind=kind) for kind in VARIANTS
}


def config(size: Size, rate: float, seed: int, every: int | None = None, clip: float = NO_CLIP) -> TrainConfig:
    return TrainConfig(
        steps=size.steps, lr=rate, schedule="cosine", warmup=0.1, batch=8, weight_decay=0.01, clip=clip, seed=seed,
        save_every=size.steps, eval_every=every or size.steps,
    )  # fmt: skip


PRACTICE, BALANCE = PlanTraining(jitter=False), LossBalance(look_every=100)  # ten times the wall loss, without clipping
EQUAL, ONE_CLIP = LossBalance(wall_weight=1.0, look_every=100), 5.0  # equal weights; clipping of the summed gradient
BALANCES = {
    f"10 to 1, both clipped to {ONE_CLIP:g}": (BALANCE, ONE_CLIP),
    f"1 to 1, both clipped to {ONE_CLIP:g}": (EQUAL, ONE_CLIP),
}


@cache
def plans(part: str, side: int, count: int, *styles: Style) -> list[FloorPlan]:
    """Return plans of a part: ``train``, ``choose`` for validation, or ``test``."""
    how = {"styles": styles} if styles else {}
    split, seed = ("train", 1) if part == "choose" else (part, 0)
    clear = islice(floor_plans(split, seed, side, thin=THIN, **how), count)  # type: ignore[arg-type]
    first = 10_000 * ("train", "choose", "test").index(part)  # the noise of no two plans is the same
    return [faint(plan, torch.Generator().manual_seed(first + n)) for n, plan in enumerate(clear)]


def faint(plan: FloorPlan, generator: torch.Generator) -> FloorPlan:
    """Return a plan whose image has less contrast, around medium grey, and noise."""
    grey = torch.from_numpy(plan.image).float() / 255 - 0.5
    image = 0.5 + CONTRAST * grey + NOISE * torch.randn(grey.shape, generator=generator)
    return replace(plan, image=(255 * image.clamp(0, 1)).round().byte().numpy())


class Looks(Hook):
    """Hook that records wall IoU and AP50 during training on a few test plans."""

    def __init__(self, network: PlanNetwork, size: Size) -> None:
        self.network, self.size = network, size
        self.curve: list[tuple[int, float, float]] = []

    def evaluated(self, run: TrainingRun) -> None:
        found = judge(self.network.eval(), self.size, "test", self.size.looked)
        self.curve.append((run.step, found["wall iou"], precision(found, "ap50")))


def judge(network: PlanNetwork, size: Size, part: str, count: int, *styles: Style) -> dict[str, Any]:
    return evaluate_plans(network, plans(part, size.side, count, *styles), (size.side, False), KINDS)


def precision(found: Mapping[str, Any], at: str) -> float:
    """Return the mean of a metric over both classes of openings."""
    return fmean(found["openings"][kind][at] for kind in KINDS)


def trained(
    build: Build,
    size: Size,
    rate: float,
    seed: int,
    given: Sequence[FloorPlan],
    looks: bool = False,
    balance: LossBalance = BALANCE,
    clip: float = NO_CLIP,
) -> tuple[PlanNetwork, Looks]:
    """Return a trained network, by default with losses weighted ten to one and without gradient clipping."""
    torch.manual_seed(seed)
    network = build(size)
    look = Looks(network, size)
    chosen = config(size, rate, seed, size.every if looks else None, clip)
    train_network(
        network.train(), given, chosen, PRACTICE, balance, frame=(size.side, False), out=Work().directory(),
        hooks=[look] if looks else [],
    )  # fmt: skip
    return network.eval(), look


def read(build: Build, size: Size, rate: float, seed: int, part: str = "test", **how: Any) -> dict[str, Any]:
    """Train and evaluate a network on all test plans, or on validation plans."""
    network, look = trained(build, size, rate, seed, plans("train", size.side, size.plans), **how)
    found = judge(network, size, part, size.tests if part == "test" else size.chosen)
    parameters = sum(each.numel() for each in network.parameters())
    return found | {"parameters": parameters, "curve": look.curve}


def validated(build: Build, size: Size, rate: float) -> float:
    """Return what is missing from a perfect IoU of walls and AP of openings on validation plans; mean of two seeds."""
    missing = 0.0
    for found in (read(build, size, rate, seed, "choose") for seed in PILOTS):
        missing += 1 - found["wall iou"] if "wall iou" in found else 0
        missing += 1 - precision(found, "ap") if "openings" in found else 0
    return missing / len(PILOTS)


# Attention in a frozen encoder


@cache
def pretrained(size: Size) -> tuple[PlanNetwork, float]:
    """Return a network with a pretrained convolutional encoder, and its accuracy on held-out images.

    The encoder has learnt to count rendered shapes.
    """
    torch.manual_seed(0)
    network = shape(size, attention="depthwise").build(len(KINDS))
    counter = Counter(network)
    fit(
        counter,
        counted("calibration", 8 * size.steps),
        supervised(class_cross_entropy),
        config(size, RATES[1], 0),
        out=Work().directory(),
    )
    tests = counted("test", 256)
    x, y = (torch.stack([each[name] for each in tests]) for name in ("x", "y"))
    with torch.no_grad():
        right = counter.eval()(x).argmax(dim=1) == y
    return network, float(right.double().mean())


def counted(part: Any, count: int) -> list[dict[str, torch.Tensor]]:
    """Return rendered shapes, and their counts minus one."""
    return [
        {"x": torch.from_numpy(render(scene, 32, seed=n)).permute(2, 0, 1), "y": torch.tensor(len(scene.objects) - 1)}
        for n, scene in enumerate(islice(scenes(part), count))
    ]


class Counter(nn.Module):
    """Encoder with a linear layer on the mean of its last feature map."""

    def __init__(self, network: PlanNetwork) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.out = nn.Linear(network.encoder.channels[-1], 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.encoder(x)[0][-1].mean((2, 3)))
        return found


def inserted(size: Size, seed: int, rate: float) -> dict[str, float]:
    """Return the loss on test plans after training the other parts with a frozen encoder, and its accuracy."""
    network, counts = pretrained(size)
    encoder, found = network.encoder.state_dict(), {"counts": counts}
    for arm, after in (("frozen", ()), ("inserted", (1, 2, 3, 4))):
        torch.manual_seed(seed)
        network = shape(size, attention="depthwise").build(len(KINDS))
        network.encoder.load_state_dict(encoder)
        frozen = list(network.encoder.stages)
        torch.manual_seed(seed)
        network.encoder.insert(after, shape(size).blocks)
        network.freeze(*frozen)
        log = train_network(
            network.train(), plans("train", size.side, size.plans), config(size, rate, seed), PRACTICE, BALANCE,
            frame=(size.side, False), out=Work().directory(), held_out=plans("test", size.side, size.tests),
        )  # fmt: skip
        found[arm] = log.held_out[-1].loss
    return found


# Stages and styles


def branched(size: Size, seed: int, rate: float) -> dict[str, Any]:
    """Return the cosines of the tasks' gradients on each stage, and a network whose tasks split where they disagree."""
    given = plans("train", size.side, size.plans)
    network, _ = trained(ARMS[BOTH], size, rate, seed, given)
    seen = gradients_of(network, given[:BRANCHED], (size.side, False), 8)
    split = branch_point(seen[..., 2], PERSISTENT)
    whole = split == seen.shape[1]
    found = judge(network, size, "test", size.tests) if whole else read(
        lambda size: shape(size, split=split).build(len(KINDS)), size, rate, seed
    )  # fmt: skip
    return found | {
        "cosines": seen[..., 2].mean(0).tolist(), "split": split, "parameters": size_of(network, split)
    }  # fmt: skip


def stressed(size: Size, seed: int, rate: float) -> dict[str, list[float]]:
    """Return wall IoU, AP50 and AP on styles that occur in training, and on the held-out one."""
    network, _ = trained(ARMS[BOTH], size, rate, seed, plans("train", size.side, size.plans, *SEEN))
    found = {}
    for name, styles in (("seen", SEEN), ("unseen", UNSEEN)):
        each = judge(network, size, "test", size.tests, *styles)
        found[name] = [each["wall iou"], precision(each, "ap50"), precision(each, "ap")]
    return found


# Claims


def reached(curve: Sequence[Sequence[float]], place: int, level: float) -> float:
    """Return the step at which a curve first reaches a level; infinite if it never does."""
    return next((point[0] for point in curve if point[place] >= level), math.inf)


def row(name: str, found: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the table row of a network, with means over seeds."""
    cells: list[Any] = [name, fmean(each["parameters"] for each in found)]
    cells.append(100 * fmean(each["wall iou"] for each in found) if "wall iou" in found[0] else None)
    for at in ("ap50", "ap75", "ap"):
        for kind in KINDS:
            known = "openings" in found[0]
            cells.append(100 * fmean(each["openings"][kind][at] for each in found) if known else None)
    return [*cells, len(found)]


COLUMNS = ["", "parameters", "wall IoU", *(f"{at} {kind}" for at in ("AP50", "AP75", "AP") for kind in KINDS), "seeds"]


def experiment(run: Run) -> None:
    size = QUICK if run.quick else FULL
    tests = plans("test", size.side, size.tests)
    floor, box = grey_floor(tests), median_box(tests)
    assert box is not None
    fraction = fmean(float(each.walls.mean()) for each in tests if each.walls is not None)
    openings = fmean(len(each.boxes) for each in tests if each.boxes is not None)
    run.data = (
        f"{size.plans} plans of {size.side} pixels for training, {size.chosen} for validation and {size.tests} for "
        f"testing, synthetic; walls, {fraction:.3f} of a plan, include their {openings:.3g} openings, whose median is "
        f"{box[0]:.3g} x {box[1]:.3g} pixels"
    )
    rates = dict.fromkeys(ARMS, RATES[1])
    if not run.quick:
        premises(run, size, floor)
        chosen = tuned(run, {name: partial(validated, build, size) for name, build in ARMS.items()}, RATES)
        rates = {name: each.value for name, each in chosen.items()}
    run.freeze(
        "mean over seeds of the metric of one network less that of two, on all test plans",
        size.seeds, compared=size.compared, few=size.few, steps=size.steps, plans=size.plans, thin=THIN,
        contrast=CONTRAST, noise=NOISE, rates=rates,
    )  # fmt: skip
    found = {
        name: [
            run.arm(f"{name}, {seed}", read, build, size, rates[name], seed, looks=name in (BOTH, WITHOUT))
            for seed in size.seeds[: len(size.seeds) if name in CLAIMED else size.compared]
        ]
        for name, build in ARMS.items()
    }
    run.table("Networks after training; percent", COLUMNS, [row(name, each) for name, each in found.items()])

    def bars(task: str, value: Callable[[Mapping[str, Any]], float]) -> list[float | None]:
        return [100 * fmean(map(value, each)) if task in each[0] else None for each in found.values()]

    figures = {"wall IoU": bars("wall iou", wall_iou)}
    figures |= {f"{at.upper()} of openings": bars("openings", partial(precision, at=at)) for at in ("ap50", "ap75")}
    run.figure("muranet-networks", Bars("network", "%", figures, tuple(found), horizontal=True))
    rate, few = rates[BOTH], size.seeds[: size.few]
    brief = {name: [run.arm(f"{name}, {few[0]}", read, build, size, rate, few[0])] for name, build in OTHERS.items()}
    brief |= {name: [run.arm(f"{name}, {few[0]}", read, ARMS[BOTH], size, rate, few[0], balance=balance, clip=clip)]
              for name, (balance, clip) in BALANCES.items()}  # fmt: skip
    rows = [row("gate, 10 to 1, no clip", found[BOTH][:1]), *(row(name, each) for name, each in brief.items())]
    run.table("Other interpretations of the attention, and other loss weights of walls and openings", COLUMNS, rows)
    frozen = [run.arm(f"inserted, {seed}", inserted, size, seed, rate) for seed in few]
    parts = [run.arm(f"split, {seed}", branched, size, seed, rate) for seed in few]
    styles = [run.arm(f"styles, {seed}", stressed, size, seed, rate) for seed in few]
    if run.quick:  # a few steps are not conclusive
        return
    together_or_alone(run, found)
    baselines(run, found)
    converges(run, size, found)
    inserts(run, size, frozen)
    splits(run, size, found, parts)
    rows = [[name, *(100 * fmean(each[name][place] for each in styles) for place in range(3))] for name in styles[0]]
    title = f"Trained on {' and '.join(SEEN)} walls; {' and '.join(UNSEEN)} ones are unseen; percent"
    run.table(title, ["", "wall IoU", "AP50", "AP"], rows)


def premises(run: Run, size: Size, floor: Mapping[str, float]) -> None:
    """Check that the task is learnt, and that there is something to gain."""
    rows = [[f"grey below {threshold}", 100 * iou] for threshold, iou in floor.items()]
    run.table("Wall IoU without training", ["", "wall IoU"], rows)
    pilot = run.arm("pilot", read, ARMS[BOTH], size, RATES[1], PILOTS[0], "choose")
    run.table("The pilot on validation plans; percent", COLUMNS, [row(BOTH, [pilot])])
    walls, above = 100 * pilot["wall iou"], 100 * (pilot["wall iou"] - max(floor.values()))
    run.premise("wall IoU above the best threshold of grey", "at least 25 points", above, above >= 25)
    run.premise("wall IoU", "at most 99 %, so that there is something to gain", walls, walls <= 99)
    found, some = (100 * precision(pilot, at) for at in ("ap50", "ap75"))
    run.premise("AP50 of openings", "at least 50 %", found, found >= 50)
    run.premise("AP75 of openings", "10 to 90 %, so that there is something to gain", some, 10 <= some <= 90)


Found = Mapping[str, Sequence[Mapping[str, Any]]]


def apart(found: Found, ours: str, theirs: str, of: Callable[[Mapping[str, Any]], float]) -> Measured:
    """Return the difference of two arms in points, over the seeds of both."""
    return Measured.over_seeds([100 * (of(a) - of(b)) for a, b in zip(found[ours], found[theirs], strict=False)])


def wall_iou(found: Mapping[str, Any]) -> float:
    value: float = found["wall iou"]
    return value


def together_or_alone(run: Run, found: Found) -> None:
    """Check the main claim: one network for both tasks, against one network per task."""
    less = apart(found, BOTH, ONLY_WALLS, wall_iou)
    run.main("wall IoU, one network - two", "at least -2.5 points", less, less.at_least(-2.5))
    for at, least in (("ap50", -1), ("ap75", 0)):
        gain = apart(found, BOTH, ONLY_OPENINGS, partial(precision, at=at))
        run.main(f"{at.upper()}, one network - two", f"at least {least} points", gain, gain.at_least(least))


def baselines(run: Run, found: Found) -> None:
    """Check the paper's comparison with a U-Net and a YOLO, and with the same network without attention."""
    for ours, theirs, name in ((BOTH, UNET, "U-Net"), (BOTH, WITHOUT, "no attention")):
        gain = apart(found, ours, theirs, wall_iou)
        run.further(f"wall IoU, MuraNet - {name}", "at least 0 points", gain, gain.at_least(0))
    for theirs, name in ((YOLO, "YOLO"), (WITHOUT, "no attention")):
        for at in ("ap50", "ap"):
            gain = apart(found, BOTH, theirs, partial(precision, at=at))
            run.further(f"{at.upper()}, MuraNet - {name}", "at least 0 points", gain, gain.at_least(0))


def ratios(ours: Sequence[float], theirs: Sequence[float], late: float) -> list[float]:
    """Return the ratio of steps by seed.

    A network that never reaches the level counts as late; seeds in which neither does are skipped.
    """
    arrived = [pair for pair in zip(ours, theirs, strict=True) if min(pair) < math.inf]
    return [max(1, min(a, late)) / max(1, min(b, late)) for a, b in arrived]


def converges(run: Run, size: Size, found: Found) -> None:
    """Check the steps until walls and openings are detected, with relation attention and without."""
    for place, name, level in ((1, "wall IoU 80", WALLS), (2, "AP50 40", OPENINGS)):
        arms = [found[arm][: size.compared] for arm in (BOTH, WITHOUT)]
        steps = [[reached(each["curve"], place, level) for each in arm] for arm in arms]
        run.table(f"Steps to {name}, seed by seed; inf is never", ["", *map(str, size.seeds[: size.compared])],
                  [["with", *map(str, steps[0])], ["without", *map(str, steps[1])]])  # fmt: skip
        known = ratios(*steps, size.steps + size.every)
        ratio = Measured.over_seeds(known) if known else None
        said = "reached by neither" if ratio is None else ratio
        run.further(f"steps to {name}, with attention / without", "at most 1", said,
                    None if ratio is None else ratio.at_most(1))  # fmt: skip


def inserts(run: Run, size: Size, found: Sequence[Mapping[str, float]]) -> None:
    """Check attention that is inserted into a frozen encoder."""
    rows = [[arm, fmean(each[arm] for each in found)] for arm in ("frozen", "inserted")]
    title = (
        f"Loss on test plans over a frozen encoder, which counts {100 * found[0]['counts']:.1f} % of rendered shapes"
    )
    run.table(title, ["", f"after {size.steps} steps"], rows)
    lower = Measured.over_seeds([each["frozen"] - each["inserted"] for each in found])
    run.further("loss over a frozen encoder - with attention inserted", "above 0", lower, lower.at_least(0))


def splits(run: Run, size: Size, found: Found, parts: Sequence[Mapping[str, Any]]) -> None:
    """Report the stage at which the tasks should split."""
    seeds = [str(seed) for seed in size.seeds[: size.few]]
    rows = [[f"stage {n}", *(each["cosines"][n] for each in parts)] for n in range(len(parts[0]["cosines"]))]
    run.table("Cosine of the tasks' gradients by stage, seed by seed", ["", *seeds], rows)
    run.table("Stages to share, by seed", ["", *seeds], [["shared", *(each["split"] for each in parts)]])
    separate = [  # a split before the first stage shares nothing
        {**walls, "openings": openings["openings"], "parameters": walls["parameters"] + openings["parameters"]}
        for walls, openings in zip(found[ONLY_WALLS][: size.few], found[ONLY_OPENINGS][: size.few], strict=True)
    ]
    rows = [row("all shared", found[BOTH][: size.few]), row("as chosen", parts), row("separate", separate)]
    run.table("Shared, split as chosen, and separate; percent", COLUMNS, rows)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="small plans, a few steps, one seed"))
