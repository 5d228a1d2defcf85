"""AGILE3D: attention guided interactive multi-object 3D segmentation (Yue et al., ICLR 2024, arXiv 2306.00977).

A person labels several objects of a scan at once, by clicks; after each click every point has exactly one label::

    points -> voxels -> sparse U-Net -> f [N, d]           once for each scene (scene.py, sparse.py, modules.py)
                                        |
    clicks -> queries [Q, d]  --L layers of attention-->  logits [N, M + 1] -> argmax
              (decoder.py)    <-- who clicks where is wrong (clicks.py)       after each click

Clicks of all objects are in one sequence, so that a click on one is evidence against its neighbours, and one argmax
decides. In training a simulated user clicks where the model is most deeply wrong (recipe.py); by the same user it is
judged (judge.py). Sessions of real users are undone, saved and played again (session.py), in a page of the browser
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
from lamella.methods.agile3d.labelled import ClickLogs, Labelled
from lamella.methods.agile3d.recipe import TRAINING, Practice, practise
from lamella.methods.agile3d.result import Segmenter, Shape
from lamella.methods.agile3d.scenes import Scenes
from lamella.methods.agile3d.session import ClickLog
from lamella.methods.agile3d.viewer import Viewer, opened
from lamella.progress import say
from lamella.registry import command, method
from lamella.results import Study
from lamella.signature import Split
from lamella.train import TrainConfig
from lamella.zoo import pull

EPOCHS = 1100  # the paper's
AT = (1, 2, 3, 5, 10, 15, 20)  # clicks for each object at which IoU is told
QUALITIES = (0.5, 0.65, 0.8, 0.85, 0.9)  # IoU to which clicks are counted


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
    shape: Shape = Shape(),  # noqa: B008, frozen
    practice: Practice = Practice(),  # noqa: B008, frozen
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Segmenter:
    """Train a model that segments the objects of a scan, or of a picture, by clicks.

    Args:
        scenes: whose objects are known.
        shape: of the model; the paper's when left out.
        practice: how clicks are simulated; the paper's when left out.
        config: of the training; the paper's rate, batch and clipping, and its 1100 epochs, when left out.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The model.

    Raises:
        CalibrationError: when a scene shows no object, or is none of those that the encoder takes.
        DownloadError: when a public network has to be pulled and cannot be.
        TrainingError: when training cannot start, go on or stay finite.
    """
    size = config.batch * config.accumulate
    config = replace(config, steps=config.steps or max(1, EPOCHS * len(scenes) // size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = shape.build(pull(shape.encoder) / "model.safetensors" if shape.public else None, practice.frozen)
    log = practise(model, scenes.scenes, config, practice, work.directory("run"))
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
    """Let a simulated user segment scenes with a model, and say how good that is after how many clicks.

    Args:
        model: what agile3d has written.
        scenes: whose objects are known, and which it was not trained on.
        budget: clicks for each object, on average; the paper's 20.
        objects: at most so many of a scene are segmented at once, a number and objects drawn by chance; 10.
        depth: layers of the decoder that run; all when left out.
        seed: of what is drawn.

    Returns:
        Mean IoU by clicks for each object, and clicks until an IoU is reached, of the model and of labelling every
        point as the nearest click.

    Raises:
        MethodError: for a depth that the model does not have.
        CalibrationError: when a scene shows no object.
    """
    if depth is not None and depth > model.shape.layers and not model.shape.shared:
        raise MethodError(
            f"depth {depth}: the model has {model.shape.layers} layers, and none that is shared; give fewer"
        )
    drawn = np.random.default_rng(seed)
    curves: dict[str, list[Curve]] = {"agile3d": [], "nearest click": []}
    for scene in scenes:
        tokens = model.model.tokenise(scene)
        here = visible(tokens)
        chosen = drawn.choice(here, int(drawn.integers(1, min(objects, len(here)) + 1)), replace=False).tolist()
        with torch.no_grad():
            (encoded,) = model.model.encode([tokens])
        predicted = {"agile3d": answers(model.model, encoded, depth), "nearest click": nearest_click(tokens)}
        for name, predict in predicted.items():
            curves[name].append(play(predict, tokens, chosen, budget, seed))
    return Study(findings={name: told(each, budget) for name, each in curves.items()} | {"scenes": len(scenes)})


@command("agile3d", "label", on="any", brief={"page": False, "clicks": None, "count": 1})
def label(
    model: Segmenter,
    scenes: Annotated[Scenes, Split("test")],
    clicks: ClickLogs | None = None,
    *,
    page: bool = True,
    port: Annotated[int, Ge(0), Le(65535)] = 0,
    work: Work = Work(),
) -> Labelled:
    """Label scenes by clicks, in a page in the browser that this machine alone can reach.

    Args:
        model: what agile3d has written.
        scenes: to label; more can be opened in the page.
        clicks: that are made first, on those of the scenes that they belong to.
        page: serve the page until its button Done is pressed; otherwise the clicks that are given are all.
        port: of the page; any that is free when 0.
        work: where a session that was stopped goes on from: every click is kept at once.

    Returns:
        Of the scenes that were looked at or have clicks, the labels of all points and the clicks that gave them.

    Raises:
        CalibrationError: for clicks on none of the scenes.
        LamellaError: when viser is missing.
    """
    logs = dict(clicks.of_scenes) if clicks else {}
    if strangers := logs.keys() - {scene.digest for scene in scenes}:
        raise CalibrationError(f"clicks: {len(strangers)} of {len(logs)} logs are on none of the scenes: give those")
    kept = Journal(work.journal("clicks"), is_log)
    logs |= {log.scene: log for log in map(ClickLog.of, kept.found)}
    sessions = {} if page else {place: opened(model.model, scene, logs) for place, scene in enumerate(scenes)}
    if page:
        viewer = Viewer(model.model, scenes, logs, port=port, changed=lambda log: kept.add(log.document()))
        say(f"Label in a browser at {viewer.address} until you press Done there.")
        try:
            viewer.wait()
        finally:
            viewer.stop()
        sessions = viewer.sessions
        for place, scene in enumerate(scenes):
            if scene.digest in logs and place not in sessions:
                sessions[place] = opened(model.model, scene, logs)
    return Labelled.of(session for _, session in sorted(sessions.items()))


def is_log(value: Any) -> bool:
    """Whether a line of a journal is a log of clicks."""
    try:
        return bool(ClickLog.of(value))
    except (ValueError, KeyError, TypeError):
        return False


def told(curves: list[Curve], budget: int) -> dict[str, dict[str, float]]:
    """IoU at so many clicks for each object, and clicks for each object until so much IoU."""
    return {
        "iou": {str(k): iou_at(curves, k) for k in AT if k <= budget},
        "clicks": {f"{quality:g}": clicks_to(curves, quality, budget) for quality in QUALITIES},
    }
