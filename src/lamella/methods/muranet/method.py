"""MuraNet: floor plans read by one network, walls as pixels, openings as boxes (Huang et al., 2023, arXiv 2309.00348).

One encoder serves two tasks, and each informs the other: walls are long and thin, doors and windows are small and stand
in walls::

    picture -> stages with relation attention -> U-Net -> wall or not, for each pixel       (encoder.py, attention.py)
                          |                                                                 (modules.py)
                          `-> pyramid -> decoupled heads -> class, box, objectness of cells (assign.py, loss.py)

How the two losses are balanced: see balance.py. Where the gradients of the tasks
disagree, they may part and have stages of their own (branch.py). What is read becomes vectors (vector.py). Plans whose
truth is known are drawn from vectors (drawing.py, raster.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, Lt

from lamella.errors import CalibrationError, MethodError
from lamella.files import Work
from lamella.methods.muranet.balance import Balance
from lamella.methods.muranet.branch import branch_point, gradients_of, size_of, worth
from lamella.methods.muranet.judge import grey_floor, judged, median_box, recognise
from lamella.methods.muranet.plans import FloorPlans
from lamella.methods.muranet.readings import SHOWN, Readings, beside
from lamella.methods.muranet.recipe import TRAINING, Practice, curves, practise
from lamella.methods.muranet.result import Recogniser, Shape, accelerator, in_zoo
from lamella.progress import track
from lamella.registry import command, method
from lamella.results import Study
from lamella.signature import Split
from lamella.train import TrainConfig
from lamella.zoo import pull

EPOCHS = 1000  # the paper's
FITTING = TrainConfig(steps=100, lr=1e-3, schedule="cosine", warmup=0.05, batch=8, clip=TRAINING.clip)
PERSISTENT = 0.75  # share of batches in which gradients disagree


@method(
    "muranet",
    paper="2309.00348",
    purpose="vision",
    on="any",
    brief={"encoder": "nano", "size": 64, "steps": 4, "batch": 1, "save_every": 2, "neck": 8, "scales": 1},
)
def muranet(
    plans: FloorPlans,
    *,
    shape: Shape = Shape(),  # noqa: B008, frozen
    practice: Practice = Practice(),  # noqa: B008, frozen
    balance: Balance = Balance(),  # noqa: B008, frozen
    weights: str = "",
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Recogniser:
    """Train one network that reads walls, doors and windows from floor plans.

    Args:
        plans: whose walls and openings are known.
        shape: of the network; the paper's base when left out.
        practice: how plans are practised on.
        balance: of the two losses.
        weights: a file of safetensors with those of an encoder of timm; one that the zoo has is pulled.
        config: of the training: AdamW with the paper's 1000 epochs and their 50 of warm-up, when left out.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The network, with its losses, and the gradients of both tasks on the stages that they share.

    Raises:
        CalibrationError: for plans without walls or boxes.
        DownloadError: when weights have to be pulled and cannot be.
        MethodError: for a shape that does not fit.
        TrainingError: when training cannot start, go on or stay finite.
    """
    plans.check()
    file = Path(weights) if weights else None
    if file is None and in_zoo(shape.encoder):
        file = pull(shape.encoder) / "model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = shape.build(len(plans.classes), file)
    return _trained(model, shape, plans, practice, balance, config, work)


@command(
    "muranet",
    "tune",
    on="any",
    brief={"insert": (1,), "split": 2, "steps": 4, "batch": 1, "save_every": 2},
)
def tune(
    model: Recogniser,
    plans: FloorPlans,
    *,
    insert: tuple[Annotated[int, Ge(0)], ...] = (),
    split: Annotated[int, Ge(0)] | None = None,
    practice: Practice = Practice(),  # noqa: B008, frozen
    balance: Balance = Balance(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Recogniser:
    """Train a network further, with attention inserted behind stages, or stages of its own for each task.

    Args:
        model: what muranet has written; it is not changed.
        plans: whose walls and openings are known.
        insert: stages, the first being 0, behind which relation attention is inserted; it begins without effect.
        split: how many stages the two tasks go on sharing; the others are copied.
        practice: how plans are practised on; ``frozen`` stages stay as they are, but for what is inserted behind them.
        balance: of the two losses.
        config: of the training.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The network.

    Raises:
        CalibrationError: for plans without walls or boxes, or of other classes.
        MethodError: for stages that there are not.
        TrainingError: when training cannot start, go on or stay finite.
    """
    plans.check(model.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        changed = model.changed(insert, split)
    return _trained(changed.model, changed.shape, plans, practice, balance, config, work)


def _trained(
    model: Any, shape: Shape, plans: FloorPlans, practice: Practice, balance: Balance, config: TrainConfig, work: Work
) -> Recogniser:
    model.to(accelerator())
    config = replace(config, steps=config.steps or max(1, EPOCHS * len(plans) // (config.batch * config.accumulate)))
    if practice.frozen > model.encoder.shared:
        raise MethodError(f"frozen {practice.frozen}: {model.encoder.shared} stages are shared, so give at most these")
    inserted = set(shape.insert)
    stages = enumerate(model.encoder.stages[: practice.frozen])
    model.hold(*(stage[0] if place in inserted else stage for place, stage in stages))
    log = practise(model.train(), plans, config, practice, balance, frame=shape.frame, out=work.directory("run"))
    model.hold()
    counted = {
        "parameters": sum(each.numel() for each in model.parameters()),
        "parameters of the encoder": sum(each.numel() for each in model.encoder.parameters()),
    }
    findings = counted | {"loss": [point.loss for point in log.train], "curves": curves(log)}
    return Recogniser(model=model.eval(), shape=shape, classes=plans.classes, log=log, findings=findings)


@command("muranet", "judge", on="any", brief={"count": 2})
def judge(model: Recogniser, plans: Annotated[FloorPlans, Split("test")]) -> Study:
    """Judge a network on plans whose truth is known: wall IoU, and average precision of openings.

    Args:
        model: what muranet has written.
        plans: whose walls and openings are known, and which it was not trained on.

    Returns:
        Wall IoU, pooled over all pixels, beside that of thresholds of grey, and average precision of each class.

    Raises:
        CalibrationError: for plans without walls or boxes, or of other classes.
        LamellaError: when pycocotools or torchmetrics is missing.
    """
    plans.check(model.classes)
    found = judged(model.model, plans, model.shape.frame, model.classes)
    pictures = [
        {
            "plan": plan.name,
            "picture": beside(plan, recognise(model.model, plan, model.shape.frame), model.classes),
            "truth": plan.labelled,
        }
        for plan in plans[:SHOWN]
    ]
    told = {"grey": grey_floor(plans), "plans": len(plans), "median box": median_box(plans), "pictures": pictures}
    notes = ["Walls go through their openings: pixels of doors and windows are wall."]
    return Study(findings=found | told, notes=notes)


@command("muranet", "read", on="any", brief={"count": 2})
def read(
    model: Recogniser,
    plans: Annotated[FloorPlans, Split("test")],
    *,
    score: Annotated[float, Gt(0), Lt(1)] = 0.25,
    overlap: Annotated[float, Gt(0), Le(1)] = 0.45,
) -> Readings:
    """Read plans: write walls as masks, openings as boxes, and all of it as SVG.

    Args:
        model: what muranet has written.
        plans: pictures.
        score: of an opening, at least.
        overlap: IoU of two openings of a class, above which the less sure one goes.

    Returns:
        For each plan a mask, an SVG and a JSON of outlines and openings in their walls; and boxes in the form of COCO.
    """
    seen = [
        recognise(model.model, plan, model.shape.frame, score=score, overlap=overlap)
        for plan in track(plans, "plans", len(plans))
    ]
    return Readings.of(plans, seen, model.classes)


@command("muranet", "branch", on="any", brief={"group": 1, "count": 2})
def branch(
    model: Recogniser,
    plans: FloorPlans,
    *,
    group: Annotated[int, Ge(1)] = 8,
    persistent: Annotated[float, Gt(0), Le(1)] = PERSISTENT,
) -> Study:
    """Say where the two tasks should part, by how far their gradients agree on each stage that they share.

    Args:
        model: what muranet has written.
        plans: whose walls and openings are known.
        group: plans whose gradients are added up before they are compared.
        persistent: the share of such groups in which the cosine must be negative, for a stage to be split off.

    Returns:
        Norms and cosines by stage, how many stages to share, and what that costs in parameters; ``tune`` does it.

    Raises:
        CalibrationError: for plans without walls or boxes, or of other classes.
        MethodError: for a network of one task, or one whose tasks share no stage.
    """
    plans.check(model.classes)
    seen = gradients_of(model.model, plans, model.shape.frame, group)
    split = branch_point(seen[..., 2], persistent)
    rows = [
        {
            "stage": stage,
            "walls": float(seen[:, stage, 0].mean()),
            "openings": float(seen[:, stage, 1].mean()),
            "cosine": float(seen[:, stage, 2].mean()),
            "spread": float(seen[:, stage, 2].std(correction=0)),
            "against": float((seen[:, stage, 2] < 0).double().mean()),
            "parameters": size_of(model.model, stage),
        }
        for stage in range(seen.shape[1])
    ]
    shared = seen.shape[1]
    costs = {"shared": size_of(model.model, shared), "split": size_of(model.model, split)}
    return Study(findings={"stages": rows, "split": split, "shared": shared, "parameters": costs, "groups": len(seen)})


@command("muranet", "stages", on="any", brief={"steps": 2, "batch": 1, "stages": (0, 2), "count": 4})
def stages_worth(
    model: Recogniser,
    plans: FloorPlans,
    *,
    stages: tuple[Annotated[int, Ge(0)], ...] = (),
    kept: Annotated[float, Gt(0), Lt(1)] = 0.25,
    balance: Balance = Balance(),  # noqa: B008, frozen
    config: TrainConfig = FITTING,
    work: Work = Work(),
) -> Study:
    """Say behind which stages relation attention is worth inserting, by a short training of each block alone.

    Args:
        model: what muranet has written; it is not changed.
        plans: whose walls and openings are known.
        stages: that are tried, the first being 0; all without inserted attention when left out.
        kept: the share of the plans, the last ones, on which a block is judged.
        balance: of the two losses.
        config: of each short training.
        work: where an interrupted run goes on from.

    Returns:
        For each stage how far the loss on kept plans fell, both tasks weighed as at the beginning, the best first;
        ``tune`` inserts.

    Raises:
        CalibrationError: for plans without walls or boxes, of other classes, or too few.
        MethodError: for a network of one task, or stages that there are not.
    """
    plans.check(model.classes)
    judges = round(kept * len(plans))
    if not 0 < judges < len(plans):
        raise CalibrationError(f"{len(plans)} plans and kept {kept:g}: give more, so that some train and some judge")
    if model.shape.tasks != "both":
        raise MethodError(f"this network reads {model.shape.tasks} alone: give one of both tasks")
    known = [place for place in range(len(model.model.encoder.stages)) if place not in model.shape.insert]
    chosen = stages or known
    given, tested = plans[: len(plans) - judges], plans[len(plans) - judges :]
    rows = [worth(model, given, tested, stage, config, balance, work.directory(f"stage-{stage}")) for stage in chosen]
    rows.sort(key=lambda row: -row["gain"])
    return Study(findings={"gains": rows, "steps": config.steps, "plans": len(given), "judges": judges})
