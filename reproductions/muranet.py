"""MuraNet at small scale: walls, doors and windows of synthetic plans, by one network or by two.

A nano encoder is trained on 800 plans for 1,000 steps and evaluated on 96 others. One network for both tasks is
compared with two networks for one task each, trained with the same clipping; with the same network without relation
attention, at equal parameters; with networks of equal loss weights or joint clipping of the gradients; with a coupled
head; and with networks whose tasks split at a stage. A split before the first stage shares nothing: these are the two
networks for one task each, which are not trained again. The absolute criteria of one network apply after all steps; its
results after 600 are reported as well. Attention is inserted without effect into a frozen encoder that was trained on
rendered shapes. Last, a style of walls that is not in the training data. Arms that no claim needs have one seed.

    python reproductions/muranet.py            # about two hours on one idle core; an interrupted run resumes
    python reproductions/muranet.py --quick    # small plans, few steps, one seed
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from harness import Run, main
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
from lamella.methods.muranet.balance import gradients, shared_stages
from lamella.methods.muranet.branch import gradients_of, size_of
from lamella.methods.muranet.drawing import KINDS
from lamella.methods.muranet.frame import PlanRows, collate
from lamella.methods.muranet.judge import median_box
from lamella.methods.muranet.method import PERSISTENT
from lamella.methods.muranet.raster import Style
from lamella.methods.muranet.recipe import NO_CLIP, task_losses, train_network
from lamella.train import Hook, TrainConfig, TrainingRun, class_cross_entropy, fit, supervised
from lamella.zoo.worlds import render, scenes

EARLY = 600  # step at which all tests are evaluated once
WALLS, OPENINGS = 0.8, 0.4  # target wall IoU and AP50
VARIANTS = ("gate", "msca", "local_softmax")
FEW = 100  # training plans for the interpretations of the attention: with many plans, all learn the same
SEEN: tuple[Style, ...] = ("solid", "grey")
UNSEEN: tuple[Style, ...] = ("double",)
BRANCHED = 64  # plans whose gradients are compared


@dataclass(frozen=True)
class Size:
    """Scale of the experiment."""

    side: int
    plans: int
    tests: int
    looked: int  # test plans on which convergence is measured
    steps: int
    every: int  # steps between evaluations
    inserted: int  # steps of attention in a frozen encoder
    stress: int
    brief: int  # steps of each interpretation of the attention, with one seed
    seeds: Sequence[int]


FULL = Size(128, 800, 96, 8, 1000, 30, 300, 300, 150, (0, 1, 2))
QUICK = Size(64, 24, 4, 2, 12, 12, 6, 6, 3, (0,))


def shape(size: Size, **parts: Any) -> RecogniserShape:
    return RecogniserShape(**{"encoder": "nano", "size": size.side, "attention": "msca", **parts})


def config(steps: int, seed: int, every: int | None = None, clip: float = NO_CLIP) -> TrainConfig:
    return TrainConfig(
        steps=steps, lr=3e-3, schedule="cosine", warmup=0.1, batch=8, weight_decay=0.01, clip=clip, seed=seed,
        save_every=steps, eval_every=every or steps,
    )  # fmt: skip


PRACTICE, BALANCE = PlanTraining(jitter=False), LossBalance(look_every=100)  # ten times the wall loss, without clipping
EQUAL, ONE_CLIP = LossBalance(wall_weight=1.0, look_every=100), 5.0  # equal weights; clipping of the summed gradient
BALANCES = {
    f"10 to 1, both clipped to {ONE_CLIP:g}": (BALANCE, ONE_CLIP),
    f"1 to 1, both clipped to {ONE_CLIP:g}": (EQUAL, ONE_CLIP),
}


@cache
def plans(part: str, side: int, count: int, *styles: Style) -> list[FloorPlan]:
    how = {"styles": styles} if styles else {}
    return list(islice(floor_plans(part, 0, side, **how), count))  # type: ignore[arg-type]


class Looks(Hook):
    """Hook that records wall IoU and AP50 during training on a few test plans, and once everything on all of them."""

    def __init__(self, network: PlanNetwork, size: Size) -> None:
        self.network, self.size = network, size
        self.curve: list[tuple[int, float, float]] = []
        self.early: dict[str, Any] = {}

    def evaluated(self, run: TrainingRun) -> None:
        said = self.judge(self.size.looked)
        self.curve.append((run.step, said["wall iou"], precision(said, "ap50")))
        if run.step == EARLY:
            self.early = self.judge(self.size.tests)

    def judge(self, count: int) -> dict[str, Any]:
        return evaluate_plans(self.network.eval(), plans("test", self.size.side, count), (self.size.side, False), KINDS)


def precision(said: Mapping[str, Any], at: str) -> float:
    """Return the mean of a metric over both classes of openings."""
    return fmean(said["openings"][kind][at] for kind in KINDS)


def built(form: RecogniserShape, seed: int) -> PlanNetwork:
    torch.manual_seed(seed)
    return form.build(len(KINDS))


def trained(
    network: PlanNetwork,
    size: Size,
    given: Sequence[FloorPlan],
    steps: int,
    seed: int,
    hooks: Sequence[Hook] = (),
    balance: LossBalance = BALANCE,
    clip: float = NO_CLIP,
) -> PlanNetwork:
    chosen = config(steps, seed, size.every if hooks else None, clip)
    train_network(
        network.train(),
        given,
        chosen,
        PRACTICE,
        balance,
        frame=(size.side, False),
        out=Work().directory(),
        hooks=hooks,
    )
    return network.eval()


def read(
    size: Size, form: RecogniserShape, seed: int, looks: bool = False, branch: bool = False, **balanced: Any
) -> dict[str, Any]:
    """Train and evaluate a network; by default the losses are weighted ten to one, without gradient clipping."""
    network = built(form, seed)
    look = Looks(network, size)
    given = plans("train", size.side, size.plans)
    trained(network, size, given, size.steps, seed, [look] if looks else [], **balanced)
    found = evaluate_plans(network, plans("test", size.side, size.tests), form.frame, KINDS)
    found |= {
        "parameters": sum(each.numel() for each in network.parameters()),
        "curve": look.curve,
        "early": look.early,
    }
    if branch:
        seen = gradients_of(network, given[:BRANCHED], form.frame, 8)
        found |= {"separate": size_of(network, 0)}
        found |= {"cosines": seen[..., 2].mean(0).tolist(), "split": branch_point(seen[..., 2], PERSISTENT)}
    return found


# Exactness


def exactness(run: Run, size: Size) -> None:
    network = built(shape(size), 0).double().eval()
    batch = collate(list(PlanRows(plans("test", size.side, 2), size.side, False)))
    stages = shared_stages(network)
    losses = task_losses(network, batch)
    both = gradients(losses["walls"] + losses["openings"], stages)
    each = [gradients(losses[task], stages) for task in ("walls", "openings")]
    apart = max(float((both[n] - each[0][n] - each[1][n]).norm() / both[n].norm()) for n in stages)
    run.exact(
        "the gradient on shared stages is the sum of both tasks'", "difference at most 1e-6", apart, apart <= 1e-6
    )
    plain = built(shape(size, attention="gate"), 0).eval()
    with torch.no_grad():
        before = plain.encoder(batch["x"])[0]
        plain.encoder.insert(range(len(plain.encoder.stages)), shape(size).blocks)
        same = all(torch.equal(a, b) for a, b in zip(plain.eval().encoder(batch["x"])[0], before, strict=True))
    run.exact("attention that is inserted changes nothing", "bitwise equal", "same" if same else "other", same)
    counts = {}
    for kind in ("msca", "depthwise"):
        other = built(shape(size, attention=kind), 0)
        counts[kind] = sum(each.numel() for each in other.parameters())
    ratio = counts["depthwise"] / counts["msca"]
    run.exact("parameters without relation attention, of those with it", "0.95 to 1.05", ratio, 0.95 <= ratio <= 1.05)
    given = plans("train", size.side, 16)
    parted, walls, openings = (
        trained(built(shape(size, **form), 0), size, given, 2, 0)
        for form in ({"split": 0}, {"tasks": "walls"}, {"tasks": "openings"})
    )
    with torch.no_grad():
        ours, theirs = parted(batch["x"]), (walls(batch["x"]), openings(batch["x"]))
    same = torch.equal(ours.walls[-1], theirs[0].walls[-1]) and torch.equal(ours.cells, theirs[1].cells)
    run.exact("tasks that part at once, against two networks, after two steps", "bitwise equal",
              "same" if same else "other", same)  # fmt: skip


# Attention in a frozen encoder


@cache
def pretrained(size: Size, steps: int) -> tuple[PlanNetwork, float]:
    """Return a network with a pretrained convolutional encoder, and its accuracy on held-out images.

    The encoder has learnt to count rendered shapes.
    """
    form = shape(size, attention="depthwise")
    network = built(form, 0)
    counter = Counter(network)
    fit(
        counter,
        counted("calibration", 8 * steps),
        supervised(class_cross_entropy),
        config(steps, 0),
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


def inserted(size: Size, seed: int) -> dict[str, list[float]]:
    """Return the loss on test plans, before and after training the other parts with a frozen encoder."""
    network, counts = pretrained(size, size.inserted)
    encoder = network.encoder.state_dict()
    found = {"counts": [counts]}
    for arm, after in (("frozen", ()), ("inserted", (1, 2, 3, 4))):
        network = built(shape(size, attention="depthwise"), seed)
        network.encoder.load_state_dict(encoder)
        frozen = list(network.encoder.stages)
        torch.manual_seed(seed)
        network.encoder.insert(after, shape(size).blocks)
        network.freeze(*frozen)
        tests = plans("test", size.side, size.tests)
        log = train_network(
            network.train(), plans("train", size.side, size.plans), config(size.inserted, seed), PRACTICE, BALANCE,
            frame=(size.side, False), out=Work().directory(), held_out=tests,
        )  # fmt: skip
        found[arm] = [point.loss for point in log.held_out]
    return found


# Styles and interpretations


def stressed(size: Size, seed: int) -> dict[str, list[float]]:
    """Return wall IoU, AP50 and AP on styles that occur in training, and on the held-out one."""
    network = trained(built(shape(size), seed), size, plans("train", size.side, size.plans, *SEEN), size.stress, seed)
    found = {}
    for name, styles in (("seen", SEEN), ("unseen", UNSEEN)):
        said = evaluate_plans(network, plans("test", size.side, size.tests, *styles), (size.side, False), KINDS)
        found[name] = [said["wall iou"], precision(said, "ap50"), precision(said, "ap")]
    return found


def variant(size: Size, kind: str, seed: int) -> list[float]:
    """Return wall IoU, AP50 and AP of one interpretation of the attention after a short training."""
    form = shape(size, attention=kind)
    network = trained(built(form, seed), size, plans("train", size.side, min(FEW, size.plans)), size.brief, seed)
    said = evaluate_plans(network, plans("test", size.side, size.tests), form.frame, KINDS)
    return [said["wall iou"], precision(said, "ap50"), precision(said, "ap")]


# Claims


def reached(curve: Sequence[Sequence[float]], place: int, level: float) -> float:
    """Return the step at which a curve first reaches a level; infinite if it never does."""
    return next((point[0] for point in curve if point[place] >= level), math.inf)


def row(name: str, found: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the table row of a network, with means over seeds."""
    cells: list[Any] = [name, found[0]["parameters"]]
    cells.append(100 * fmean(each["wall iou"] for each in found) if "wall iou" in found[0] else None)
    for at in ("ap50", "ap75", "ap"):
        for kind in KINDS:
            known = "openings" in found[0]
            cells.append(100 * fmean(each["openings"][kind][at] for each in found) if known else None)
    return cells


COLUMNS = ["", "parameters", "wall IoU", *(f"{at} {kind}" for at in ("AP50", "AP75", "AP") for kind in KINDS)]


def experiment(run: Run) -> None:
    size = QUICK if run.quick else FULL
    tests = plans("test", size.side, size.tests)
    floor, box = grey_floor(tests), median_box(tests)
    assert box is not None
    fraction = fmean(float(each.walls.mean()) for each in tests if each.walls is not None)
    openings = fmean(len(each.boxes) for each in tests if each.boxes is not None)
    run.data = (
        f"{size.plans} plans of {size.side} pixels for training and {size.tests} for testing, synthetic; walls, "
        f"{fraction:.3f} of a plan, include their {openings:.3g} openings, whose median is {box[0]:.3g} x "
        f"{box[1]:.3g} pixels"
    )
    run.part("exactness", exactness, size)
    both = [run.arm(f"both, {seed}", read, size, shape(size), seed, looks=True, branch=True) for seed in size.seeds]
    one = {
        tasks: [run.arm(f"{tasks} alone, {seed}", read, size, shape(size, tasks=tasks), seed) for seed in size.seeds]
        for tasks in ("walls", "openings")
    }
    if run.quick:  # a few steps are not conclusive; the other arms run all the same
        for name, arm in (("inserted", inserted), ("styles", stressed)):
            run.arm(f"{name}, 0", arm, size, 0)
        for name, (balance, clip) in BALANCES.items():
            run.arm(f"{name}, 0", read, size, shape(size), 0, balance=balance, clip=clip)
        run.arm("a coupled head, 0", read, size, shape(size, head="coupled"), 0)
        return
    learns(run, size, both, floor)
    together_or_alone(run, both, one)
    balances(run, size, both)
    heads(run, size, both)
    converges(run, size, both)
    inserts(run, size)
    parts(run, size, both, one)
    styles(run, size)


def learns(run: Run, size: Size, both: Sequence[Mapping[str, Any]], floor: Mapping[str, float]) -> None:
    """Check claim 1: the pipeline learns the task, with the results of an earlier step for comparison."""
    rows = [[f"grey below {threshold}", 100 * iou] for threshold, iou in floor.items()]
    run.table("Wall IoU without training", ["", "wall IoU"], rows)
    early = [{"parameters": each["parameters"], **each["early"]} for each in both]
    rows = [row(f"step {EARLY}, on the way", early), row(f"step {size.steps}", both)]
    run.table("One network for both tasks; percent", COLUMNS, rows)
    walls = Measured.over_seeds([100 * each["wall iou"] for each in both])
    run.exact(
        f"wall IoU of one network for both tasks after {size.steps} steps", "at least 90", walls, walls.figure >= 90
    )
    above = walls.figure - 100 * max(floor.values())
    run.exact("wall IoU above the best threshold of grey", "at least 25 points", above, above >= 25)
    for kind, at, bound in (("door", "ap50", 90), ("window", "ap50", 90), ("door", "ap75", 50)):
        sure = Measured.over_seeds([100 * each["openings"][kind][at] for each in both])
        run.exact(f"{at.upper()} of {kind}s", f"at least {bound}", sure, sure.figure >= bound)


def together_or_alone(
    run: Run, both: Sequence[Mapping[str, Any]], one: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Check claim 2: one network for both tasks, against one network per task."""
    rows = [row("both tasks", both), *(row(f"{tasks} only", found) for tasks, found in one.items())]
    run.table("One network or two, trained with the same clipping; percent", COLUMNS, rows)
    less = Measured.over_seeds([100 * (a["wall iou"] - b["wall iou"]) for a, b in zip(both, one["walls"], strict=True)])
    run.main("wall IoU, one network - two", "at least -2.5 points", less, less.at_least(-2.5))
    for at, bound in (("ap50", -1.0), ("ap75", 0.0)):
        gains = [100 * (precision(a, at) - precision(b, at)) for a, b in zip(both, one["openings"], strict=True)]
        gain = Measured.over_seeds(gains)
        run.main(f"{at.upper()}, one network - two", f"at least {bound:g} points", gain, gain.at_least(bound))
    share = both[0]["parameters"] / sum(found[0]["parameters"] for found in one.values())
    run.exact("parameters of one network, of those of two", "below 0.9", share, share < 0.9)


def balances(run: Run, size: Size, both: Sequence[Mapping[str, Any]]) -> None:
    """Compare the weights of the two losses, and joint clipping of their gradients, with one seed."""
    seed = size.seeds[0]
    found = {
        name: run.arm(f"{name}, {seed}", read, size, shape(size), seed, balance=balance, clip=clip)
        for name, (balance, clip) in BALANCES.items()
    }
    rows = [row("10 to 1, no clip", both[:1]), *(row(name, [each]) for name, each in found.items())]
    run.table(f"Loss weights of walls and openings, seed {seed}; percent", COLUMNS, rows)


def heads(run: Run, size: Size, both: Sequence[Mapping[str, Any]]) -> None:
    """Compare the decoupled head with a coupled one, with one seed."""
    seed = size.seeds[0]
    coupled = run.arm(f"a coupled head, {seed}", read, size, shape(size, head="coupled"), seed)
    rows = [row("a decoupled head", both[:1]), row("a coupled head", [coupled])]
    run.table(f"Coupled head, seed {seed}; percent", COLUMNS, rows)


def ratios(ours: Sequence[float], theirs: Sequence[float], late: float) -> list[float]:
    """Return the ratio of steps by seed.

    A network that never reaches the level counts as late; seeds in which neither does are skipped.
    """
    arrived = [pair for pair in zip(ours, theirs, strict=True) if min(pair) < math.inf]
    return [max(1, min(a, late)) / max(1, min(b, late)) for a, b in arrived]


def converges(run: Run, size: Size, both: Sequence[Mapping[str, Any]]) -> None:
    """Check claim 3: steps until walls and openings are detected, with relation attention and without."""
    form = shape(size, attention="depthwise")
    without = [run.arm(f"no attention, {seed}", read, size, form, seed, looks=True) for seed in size.seeds]
    run.table("With relation attention, and without; percent", COLUMNS, [row("with", both), row("without", without)])
    for place, name, level in ((1, "wall IoU 80", WALLS), (2, "AP50 40", OPENINGS)):
        steps = [[reached(each["curve"], place, level) for each in found] for found in (both, without)]
        run.table(f"Steps to {name}, seed by seed; inf is never", ["", *map(str, size.seeds)],
                  [["with", *map(str, steps[0])], ["without", *map(str, steps[1])]])  # fmt: skip
        known = ratios(*steps, size.steps + size.every)
        ratio = Measured.over_seeds(known) if known else None
        said = "reached by neither" if ratio is None else ratio
        run.further(f"steps to {name}, with attention / without", "at most 1", said,
                    None if ratio is None else ratio.at_most(1))  # fmt: skip
    seed = size.seeds[0]
    brief = {kind: run.arm(f"{kind}, {seed}", variant, size, kind, seed) for kind in VARIANTS}
    rows = [[kind, *(100 * each for each in found)] for kind, found in brief.items()]
    title = f"Variants of the attention after {size.brief} steps on {FEW} plans, seed {seed}; percent"
    run.table(title, ["", "wall IoU", "AP50", "AP"], rows)


def inserts(run: Run, size: Size) -> None:
    """Check claim 4: attention in a frozen encoder."""
    found = [run.arm(f"inserted, {seed}", inserted, size, seed) for seed in size.seeds]
    rows = [[arm, *(fmean(each[arm][place] for each in found) for place in (0, -1))] for arm in ("frozen", "inserted")]
    run.table("Loss on test plans over a frozen encoder", ["", "before", f"after {size.inserted} steps"], rows)
    counts = f"{100 * found[0]['counts'][0]:.1f}"
    run.table(
        "Accuracy of the frozen encoder, percent", ["rendered shapes", "correct of 1 to 4"], [["counted", counts]]
    )
    same = all(each["frozen"][0] == each["inserted"][0] for each in found)
    run.exact("loss before training, with attention inserted and without", "equal", "equal" if same else "not", same)
    lower = Measured.over_seeds([each["frozen"][-1] - each["inserted"][-1] for each in found])
    run.further("loss over a frozen encoder - with attention inserted", "above 0", lower, lower.at_least(0))


def parts(
    run: Run, size: Size, both: Sequence[Mapping[str, Any]], one: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Check claim 5: the stage at which the tasks split."""
    stages = range(len(both[0]["cosines"]))
    rows = [[f"stage {n}", *(each["cosines"][n] for each in both)] for n in stages]
    run.table("Cosine of the tasks' gradients by stage, seed by seed", ["", *map(str, size.seeds)], rows)
    run.table("Stages to share, by seed", ["", *map(str, size.seeds)], [["shared", *(e["split"] for e in both)]])
    apart = [  # a split before the first stage shares nothing
        {"parameters": each["separate"], "wall iou": walls["wall iou"], "openings": openings["openings"], "split": 0}
        for each, walls, openings in zip(both, one["walls"], one["openings"], strict=True)
    ]
    chosen = [
        each if each["split"] == len(stages) else alone if each["split"] == 0
        else run.arm(f"split, {seed}", read, size, shape(size, split=each["split"]), seed)
        for seed, each, alone in zip(size.seeds, both, apart, strict=True)
    ]  # fmt: skip
    mean = [*row("as chosen", chosen)]
    mean[1] = fmean(each["parameters"] for each in chosen)
    run.table(
        "Shared, split as chosen, and separate; percent",
        COLUMNS,
        [row("all shared", both), mean, row("separate", apart)],
    )


def styles(run: Run, size: Size) -> None:
    """Check claim 6: a style of wall that does not occur in training."""
    found = [run.arm(f"styles, {seed}", stressed, size, seed) for seed in size.seeds]
    rows = [
        [name, *(100 * fmean(each[name][place] for each in found) for place in range(3))] for name in ("seen", "unseen")
    ]
    title = f"Trained on {' and '.join(SEEN)} walls; {' and '.join(UNSEEN)} ones are unseen; percent"
    run.table(title, ["", "wall IoU", "AP50", "AP"], rows)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="small plans, a few dozen steps, one seed"))
