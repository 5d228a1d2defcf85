"""MuraNet: recognise floor plans with one network, walls as pixels, openings as boxes (arXiv 2309.00348).

Huang et al., "MuraNet: Multi-task Floor Plan Recognition with Relation Attention", 2023. One encoder serves two tasks,
and each informs the other: walls are long and thin, doors and windows are small and lie in walls::

    image -> stages with relation attention -> U-Net -> wall or not, for each pixel         (encoder.py, attention.py)
                        |                                                                   (modules.py)
                        `-> pyramid -> decoupled heads -> class, box, objectness of cells   (assign.py, loss.py)

For the balance of the two losses see balance.py. Where the gradients of the tasks disagree, the tasks may split and get
their own stages (branch.py). Predictions are vectorised (vector.py). Synthetic labelled plans are drawn from vectors
(drawing.py, raster.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, Lt

from lamella.errors import CalibrationError, MethodError
from lamella.files import Work
from lamella.methods.muranet.balance import LossBalance
from lamella.methods.muranet.branch import branch_point, gradients_of, size_of, worth
from lamella.methods.muranet.judge import evaluate_plans, grey_floor, median_box, recognise
from lamella.methods.muranet.plans import FloorPlans
from lamella.methods.muranet.readings import SHOWN, Readings, side_by_side
from lamella.methods.muranet.recipe import TRAINING, PlanTraining, curves, train_network
from lamella.methods.muranet.result import Recogniser, RecogniserShape, accelerator, in_zoo
from lamella.progress import track
from lamella.registry import command, method
from lamella.results import Study
from lamella.signature import Split
from lamella.train import TrainConfig
from lamella.zoo import pull

EPOCHS = 1000  # the paper's
FITTING = TrainConfig(steps=100, lr=1e-3, schedule="cosine", warmup=0.05, batch=8, clip=TRAINING.clip)
PERSISTENT = 0.75  # fraction of batches in which gradients must disagree


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
    shape: RecogniserShape = RecogniserShape(),  # noqa: B008, frozen
    training: PlanTraining = PlanTraining(),  # noqa: B008, frozen
    balance: LossBalance = LossBalance(),  # noqa: B008, frozen
    weights: str = "",
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Recogniser:
    """Train one network to recognise walls, doors and windows in images of floor plans.

    Args:
        plans: plans with known walls and openings.
        shape: shape of the network; defaults to the paper's base.
        training: augmentation and frozen stages.
        balance: balance of the two losses.
        weights: a safetensors file with weights of a timm encoder; those of an encoder in Lamella's zoo are downloaded.
        config: training settings: AdamW; defaults to the paper's 1000 epochs with 50 epochs of warm-up.
        work: folder from which an interrupted run resumes, with bitwise equal results.

    Returns:
        The network, with its losses, and the gradients of both tasks on the stages that they share.

    Raises:
        CalibrationError: for plans without walls or boxes.
        DownloadError: when weights have to be downloaded and cannot be.
        MethodError: for a shape that does not fit.
        TrainingError: when training cannot start, resume or stay finite.
    """
    plans.check_labels()
    file = Path(weights) if weights else None
    if file is None and in_zoo(shape.encoder):
        file = pull(shape.encoder) / "model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = shape.build(len(plans.classes), file)
    return _trained(model, shape, plans, training, balance, config, work)


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
    training: PlanTraining = PlanTraining(),  # noqa: B008, frozen
    balance: LossBalance = LossBalance(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Recogniser:
    """Train a network further, with attention inserted after stages, or with separate stages for each task.

    Args:
        model: a network trained by muranet; it is not changed.
        plans: plans with known walls and openings.
        insert: indices of stages, from 0, after which relation attention is inserted; it has no effect at first.
        split: number of stages that the two tasks keep sharing; the others are copied.
        training: augmentation and frozen stages; ``frozen`` stages do not train, but blocks inserted after them do.
        balance: balance of the two losses.
        config: training settings.
        work: folder from which an interrupted run resumes, with bitwise equal results.

    Returns:
        The network.

    Raises:
        CalibrationError: for plans without walls or boxes, or of other classes.
        MethodError: for stages that the network does not have.
        TrainingError: when training cannot start, resume or stay finite.
    """
    plans.check_labels(model.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        changed = model.changed(insert, split)
    return _trained(changed.model, changed.shape, plans, training, balance, config, work)


def _trained(
    model: Any,
    shape: RecogniserShape,
    plans: FloorPlans,
    training: PlanTraining,
    balance: LossBalance,
    config: TrainConfig,
    work: Work,
) -> Recogniser:
    model.to(accelerator())
    config = replace(config, steps=config.steps or max(1, EPOCHS * len(plans) // (config.batch * config.accumulate)))
    if training.frozen > model.encoder.shared:
        raise MethodError(f"frozen {training.frozen}: {model.encoder.shared} stages are shared: give at most that")
    inserted = set(shape.insert)
    stages = enumerate(model.encoder.stages[: training.frozen])
    model.freeze(*(stage[0] if index in inserted else stage for index, stage in stages))
    log = train_network(model.train(), plans, config, training, balance, frame=shape.frame, out=work.directory("run"))
    model.freeze()
    sizes = {
        "parameters": sum(each.numel() for each in model.parameters()),
        "parameters of the encoder": sum(each.numel() for each in model.encoder.parameters()),
    }
    findings = sizes | {"loss": [point.loss for point in log.train], "curves": curves(log)}
    return Recogniser(model=model.eval(), shape=shape, classes=plans.classes, log=log, findings=findings)


@command("muranet", "judge", on="any", brief={"count": 2})
def judge(model: Recogniser, plans: Annotated[FloorPlans, Split("test")]) -> Study:
    """Evaluate a network on labelled plans: wall IoU, and average precision of openings.

    Args:
        model: a network trained by muranet.
        plans: held-out plans with known walls and openings.

    Returns:
        Wall IoU, pooled over all pixels, with that of grey thresholds, and the average precision of each class.

    Raises:
        CalibrationError: for plans without walls or boxes, or of other classes.
        LamellaError: when pycocotools or torchmetrics is missing.
    """
    plans.check_labels(model.classes)
    found = evaluate_plans(model.model, plans, model.shape.frame, model.classes)
    images = [
        {
            "plan": plan.name,
            "image": side_by_side(plan, recognise(model.model, plan, model.shape.frame), model.classes),
            "truth": plan.labelled,
        }
        for plan in plans[:SHOWN]
    ]
    details = {"grey": grey_floor(plans), "plans": len(plans), "median box": median_box(plans), "images": images}
    notes = ["Walls include their openings: pixels of doors and windows count as wall."]
    return Study(findings=found | details, notes=notes)


@command("muranet", "read", on="any", brief={"count": 2})
def read(
    model: Recogniser,
    plans: Annotated[FloorPlans, Split("test")],
    *,
    score: Annotated[float, Gt(0), Lt(1)] = 0.25,
    overlap: Annotated[float, Gt(0), Le(1)] = 0.45,
) -> Readings:
    """Recognise plans: write walls as masks, openings as boxes, and both as SVG.

    Args:
        model: a network trained by muranet.
        plans: images of plans.
        score: minimum score of an opening.
        overlap: IoU of two openings of a class above which the one with the lower score is suppressed.

    Returns:
        For each plan a mask, an SVG and a JSON of outlines and openings in their walls; and boxes in COCO format.
    """
    outputs = [
        recognise(model.model, plan, model.shape.frame, score=score, overlap=overlap)
        for plan in track(plans, "plans", len(plans))
    ]
    return Readings.of(plans, outputs, model.classes)


@command("muranet", "branch", on="any", brief={"group": 1, "count": 2})
def branch(
    model: Recogniser,
    plans: FloorPlans,
    *,
    group: Annotated[int, Ge(1)] = 8,
    persistent: Annotated[float, Gt(0), Le(1)] = PERSISTENT,
) -> Study:
    """Find where the two tasks should split, by the agreement of their gradients on each shared stage.

    Args:
        model: a network trained by muranet.
        plans: plans with known walls and openings.
        group: number of plans whose gradients are summed before they are compared.
        persistent: fraction of such groups in which the cosine must be negative for a stage to be split off.

    Returns:
        Norms and cosines by stage, the number of stages to share, and the cost of the split in parameters; ``tune``
        applies it.

    Raises:
        CalibrationError: for plans without walls or boxes, or of other classes.
        MethodError: for a network of one task, one whose tasks share no stage, or one whose gradients are not finite.
    """
    plans.check_labels(model.classes)
    outputs = gradients_of(model.model, plans, model.shape.frame, group)
    split = branch_point(outputs[..., 2], persistent)
    rows = [
        {
            "stage": stage,
            "walls": float(outputs[:, stage, 0].mean()),
            "openings": float(outputs[:, stage, 1].mean()),
            "cosine": float(outputs[:, stage, 2].mean()),
            "spread": float(outputs[:, stage, 2].std(correction=0)),
            "negative": float((outputs[:, stage, 2] < 0).double().mean()),
            "parameters": size_of(model.model, stage),
        }
        for stage in range(outputs.shape[1])
    ]
    shared = outputs.shape[1]
    costs = {"shared": size_of(model.model, shared), "split": size_of(model.model, split)}
    return Study(
        findings={"stages": rows, "split": split, "shared": shared, "parameters": costs, "groups": len(outputs)}
    )


@command("muranet", "stages", on="any", brief={"steps": 2, "batch": 1, "stages": (0, 2), "count": 4})
def stages_worth(
    model: Recogniser,
    plans: FloorPlans,
    *,
    stages: tuple[Annotated[int, Ge(0)], ...] = (),
    held_out: Annotated[float, Gt(0), Lt(1)] = 0.25,
    balance: LossBalance = LossBalance(),  # noqa: B008, frozen
    config: TrainConfig = FITTING,
    work: Work = Work(),
) -> Study:
    """Find the stages after which relation attention is worth inserting, by a short training of each block alone.

    Args:
        model: a network trained by muranet; it is not changed.
        plans: plans with known walls and openings.
        stages: indices of stages to try, from 0; defaults to all without inserted attention.
        held_out: fraction of the plans, the last ones, on which a block is evaluated.
        balance: balance of the two losses.
        config: settings of each short training.
        work: folder from which an interrupted run resumes.

    Returns:
        For each stage the decrease of the loss on held-out plans, with the initial weights of both tasks, the best
        first; ``tune`` inserts the attention.

    Raises:
        CalibrationError: for plans without walls or boxes, of other classes, or too few.
        MethodError: for a network of one task, or stages that it does not have.
    """
    plans.check_labels(model.classes)
    evaluation = round(held_out * len(plans))
    if not 0 < evaluation < len(plans):
        raise CalibrationError(
            f"{len(plans)} plans and held_out {held_out:g}: give more plans, so that both parts have some"
        )
    if model.shape.tasks != "both":
        raise MethodError(f"this network has the task {model.shape.tasks} only: give one with both tasks")
    known = [index for index in range(len(model.model.encoder.stages)) if index not in model.shape.insert]
    chosen = stages or known
    trained_on, tested = plans[: len(plans) - evaluation], plans[len(plans) - evaluation :]
    rows = [
        worth(model, trained_on, tested, stage, config, balance, work.directory(f"stage-{stage}")) for stage in chosen
    ]
    rows.sort(key=lambda row: -row["gain"])
    return Study(findings={"gains": rows, "steps": config.steps, "plans": len(trained_on), "judges": evaluation})
