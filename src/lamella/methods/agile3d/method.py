"""AGILE3D: attention guided interactive multi-object 3D segmentation (Yue et al., ICLR 2024, arXiv 2306.00977).

A person labels several objects of a scan at once by clicking; after each click every point has exactly one label::

    points -> voxels -> sparse U-Net -> f [N, d]           once per scene (scene.py, sparse.py, modules.py)
                                        |
    clicks -> queries [Q, d]  --L layers of attention-->  logits [N, M + 1] -> argmax
              (decoder.py)    <-- the user clicks where the labels are wrong (clicks.py)

The clicks of all objects form one sequence, so a click on one object is evidence against its neighbours, and one argmax
decides. In training, a simulated user clicks where the model is most deeply wrong (recipe.py); the evaluation uses the
same user (judge.py). Sessions of real users can be undone, saved and replayed (session.py), in a browser page
(viewer.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le

from lamella.errors import CalibrationError, MethodError
from lamella.files import Journal, Work
from lamella.methods.agile3d.judge import BUDGET, Curve, answers, clicks_to, iou_at, nearest_click, play, visible
from lamella.methods.agile3d.labelled import ClickLogs, LabelledScenes
from lamella.methods.agile3d.recipe import TRAINING, ClickSimulation, train_segmenter
from lamella.methods.agile3d.result import Segmenter, SegmenterShape
from lamella.methods.agile3d.scenes import Scenes
from lamella.methods.agile3d.session import ClickLog
from lamella.methods.agile3d.viewer import Viewer, open_session
from lamella.progress import notify
from lamella.registry import command, method
from lamella.results import Study
from lamella.signature import Split
from lamella.train import TrainConfig
from lamella.zoo import pull

EPOCHS = 1100  # the paper's
CLICK_COUNTS = (1, 2, 3, 5, 10, 15, 20)  # clicks per object at which IoU is reported
QUALITIES = (0.5, 0.65, 0.8, 0.85, 0.9)  # IoU thresholds for which the number of clicks is reported


@method(
    "agile3d",
    paper="2306.00977",
    purpose="vision",
    on="any",
    brief={
        "encoder": "nano",
        "voxel": 0.25,
        "hidden": 16,
        "heads": 2,
        "feedforward": 32,
        "layers": 2,
        "rounds": 2,
        "steps": 2,
        "batch": 1,
        "save_every": 1,
    },
)
def agile3d(
    scenes: Scenes,
    *,
    shape: SegmenterShape = SegmenterShape(),  # noqa: B008, frozen
    simulation: ClickSimulation = ClickSimulation(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Segmenter:
    """Train a model that segments several objects of a 3D scan or an image at once from a user's clicks.

    Args:
        scenes: training scenes with known objects.
        shape: size of the model; the paper's by default.
        simulation: simulation of clicks; the paper's by default.
        config: training configuration; by default the paper's learning rate, batch size, clipping and 1100 epochs.
        work: folder from which an interrupted run resumes, bit-exact.

    Returns:
        The trained model.

    Raises:
        CalibrationError: if a scene shows no object, or does not fit the encoder.
        DownloadError: if a public backbone cannot be downloaded.
        TrainingError: if training cannot start or resume, or the loss is not finite.
    """
    size = config.batch * config.accumulate
    config = replace(config, steps=config.steps or max(1, EPOCHS * len(scenes) // size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = shape.build(pull(shape.encoder) / "model.safetensors" if shape.public else None, simulation.frozen)
    log = train_segmenter(model, scenes.scenes, config, simulation, work.directory("run"))
    sizes = {name: each.numel() for name, each in model.named_parameters()}
    encoder = sum(size for name, size in sizes.items() if name.startswith("encoder."))
    findings: dict[str, Any] = {"parameters": sum(sizes.values()), "parameters of the encoder": encoder}
    findings["loss"] = [point.loss for point in log.train]
    return Segmenter(model=model.eval(), shape=shape, log=log, findings=findings)


@command("agile3d", "judge", on="any", brief={"budget": 2, "objects": 2, "count": 1})
def judge(
    model: Segmenter,
    scenes: Annotated[Scenes, Split("test")],
    *,
    budget: Annotated[int, Ge(1)] = BUDGET,
    objects: Annotated[int, Ge(1)] = 10,
    depth: Annotated[int, Ge(1)] | None = None,
    seed: Annotated[int, Ge(0)] = 0,
) -> Study:
    """Evaluate a model with a simulated user: mean IoU against the number of clicks.

    Args:
        model: a folder that agile3d has written, or the weights that the authors of the paper released (a .pth file).
        scenes: test scenes with known objects.
        budget: clicks per object, on average; the paper uses 20.
        objects: maximum number of objects segmented at once in a scene; a random subset is chosen. The paper uses 10.
        depth: number of decoder layers to run; all if None.
        seed: random seed of the chosen objects and of the order of the first clicks.

    Returns:
        Mean IoU against clicks per object, and clicks until an IoU is reached, of the model and of the baseline that
        gives every point the label of the nearest click.

    Raises:
        MethodError: for more layers than the model has.
        CalibrationError: if a scene shows no object.
    """
    if depth is not None and depth > model.shape.layers and not model.shape.shared:
        raise MethodError(
            f"depth {depth}: the model has {model.shape.layers} layers and does not share them: give at most that many"
        )
    generator = np.random.default_rng(seed)
    curves: dict[str, list[Curve]] = {"agile3d": [], "nearest click": []}
    for scene in scenes:
        tokens = model.model.tokenise(scene)
        candidates = visible(tokens)
        chosen = generator.choice(
            candidates, int(generator.integers(1, min(objects, len(candidates)) + 1)), replace=False
        ).tolist()
        with torch.no_grad():
            (encoded,) = model.model.encode([tokens])
        predicted = {"agile3d": answers(model.model, encoded, depth), "nearest click": nearest_click(tokens)}
        for name, predict in predicted.items():
            curves[name].append(play(predict, tokens, chosen, budget, seed))
    return Study(
        findings={name: curve_findings(each, budget) for name, each in curves.items()} | {"scenes": len(scenes)}
    )


@command("agile3d", "label", on="any", brief={"page": False, "clicks": None, "count": 1})
def label(
    model: Segmenter,
    scenes: Annotated[Scenes, Split("test")],
    clicks: ClickLogs | None = None,
    *,
    page: bool = True,
    port: Annotated[int, Ge(0), Le(65535)] = 0,
    work: Work = Work(),
) -> LabelledScenes:
    """Label scenes by clicks, in a browser page served to this machine only.

    Args:
        model: a folder that agile3d has written, or the weights that the authors of the paper released (a .pth file).
        scenes: scenes to label; more can be opened in the page.
        clicks: click logs to replay first, on the scenes that they belong to.
        page: serve the page until its button Done is pressed; if false, only ``clicks`` are replayed.
        port: port of the page; 0 chooses a free one.
        work: folder from which a stopped session resumes; every click is saved immediately.

    Returns:
        The labels of all points and the clicks, for every scene that was viewed or has clicks.

    Raises:
        CalibrationError: if a click log belongs to none of the scenes.
        LamellaError: if viser is not installed.
    """
    logs = dict(clicks.of_scenes) if clicks else {}
    if strangers := logs.keys() - {scene.digest for scene in scenes}:
        raise CalibrationError(
            f"clicks: {len(strangers)} of {len(logs)} logs belong to none of the scenes: give their scenes as well"
        )
    kept = Journal(work.journal("clicks"), is_log)
    logs |= {log.scene: log for log in map(ClickLog.of, kept.found)}
    sessions = {} if page else {index: open_session(model.model, scene, logs) for index, scene in enumerate(scenes)}
    if page:
        viewer = Viewer(model.model, scenes.scenes, logs, port=port, changed=lambda log: kept.add(log.document()))
        notify(f"Label in a browser at {viewer.address} until you press Done there.")
        try:
            viewer.wait()
        finally:
            viewer.stop()
        sessions = viewer.sessions
        for index, scene in enumerate(scenes):
            if scene.digest in logs and index not in sessions:
                sessions[index] = open_session(model.model, scene, logs)
    return LabelledScenes.of(session for _, session in sorted(sessions.items()))


def is_log(value: Any) -> bool:
    """Return whether a value from a journal is a valid click log."""
    try:
        return bool(ClickLog.of(value))
    except (ValueError, KeyError, TypeError):
        return False


def curve_findings(curves: list[Curve], budget: int) -> dict[str, dict[str, float]]:
    """Summarise curves as IoU at several numbers of clicks per object, and clicks per object until an IoU is reached.

    Args:
        curves: evaluation curves.
        budget: clicks per object.
    """
    return {
        "iou": {str(k): iou_at(curves, k) for k in CLICK_COUNTS if k <= budget},
        "clicks": {f"{quality:g}": clicks_to(curves, quality, budget) for quality in QUALITIES},
    }
