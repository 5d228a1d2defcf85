"""Training: clicks are simulated on the model as it is, and one pass with a gradient learns from all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.methods.agile3d.clicks import Clicks, relabelled, simulated
from lamella.methods.agile3d.decoder import Encoded
from lamella.methods.agile3d.judge import visible
from lamella.methods.agile3d.loss import Dice, click_loss, click_weights
from lamella.methods.agile3d.modules import ClickSegmenter
from lamella.methods.agile3d.scene import Scene, Tokens
from lamella.train import Hook, Task, TrainConfig, TrainingLog, fit

TRAINING = TrainConfig(lr=1e-4, schedule="step", warmup=0, batch=5, weight_decay=1e-4, clip=0.1, seed=42)


@dataclass(frozen=True)
class Practice:
    """How clicks are simulated in training.

    Attributes:
        rounds: at most so many of them, of which a scene gets a number drawn anew; the paper's 20.
        objects: at most so many are segmented at once, a number and objects drawn anew; 10.
        dice: over what the Dice loss sums: ``token`` is the authors' code, ``class`` the textbook.
        turn: mirror scenes and turn them about the z axis by chance; pictures are mirrored from left to right.
        frozen: of a network with public weights, train what stands above it alone.
    """

    rounds: Annotated[int, Ge(1)] = 20
    objects: Annotated[int, Ge(1)] = 10
    dice: Dice = "token"
    turn: bool = True
    frozen: bool = False


def practise(
    model: ClickSegmenter, scenes: Sequence[Scene], config: TrainConfig, practice: Practice, out: Path
) -> TrainingLog:
    """Train a model on scenes whose objects are known, in place.

    Raises:
        CalibrationError: when a scene shows no object.
        TrainingError: when training cannot start, go on or stay finite.
    """
    samples = [model.tokenise(scene) for scene in scenes]
    for tokens in samples:
        visible(tokens)  # else there is nothing to click
    task = Task(Lesson(practice), collate=together, weight=lambda batch: len(batch["scenes"]))
    settings = {"rounds": practice.rounds, "objects": practice.objects, "dice": practice.dice, "turn": practice.turn}
    settings |= {"frozen": practice.frozen}
    return fit(model, samples, task, config, out=out, hooks=[Statistics(model)], settings=settings)


def together(scenes: Sequence[Tokens]) -> dict[str, list[Tokens]]:
    return {"scenes": list(scenes)}


@dataclass(frozen=True)
class Lesson:
    """The loss of a batch: one pass through the encoder, whose features serve all rounds of all scenes."""

    practice: Practice

    def __call__(self, model: ClickSegmenter, batch: dict[str, list[Tokens]]) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = np.random.default_rng(int(torch.randint(2**62, ())))  # torch's state is in the checkpoint
        scenes = batch["scenes"]
        if self.practice.turn:
            scenes = [model.tokenise(turned(each.scene, drawn)) for each in scenes]
        found = [
            self._of_scene(model, tokens, encoded, drawn)
            for tokens, encoded in zip(scenes, model.encode(scenes), strict=True)
        ]
        parts = {name: torch.stack([each[name] for _, each in found]).mean() for name in found[0][1]}
        return torch.stack([loss for loss, _ in found]).mean(), parts

    def _of_scene(
        self, model: ClickSegmenter, tokens: Tokens, encoded: Encoded, drawn: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        here = visible(tokens)
        count = int(drawn.integers(1, min(self.practice.objects, len(here)) + 1))
        truth = relabelled(tokens.objects, drawn.choice(here, count, replace=False).tolist())
        rounds = 1 + int(drawn.integers(self.practice.rounds))
        clicks = worked(model, tokens, encoded.detached(), truth, rounds, drawn)
        logits = model.decode(encoded, clicks)  # the one pass with a gradient
        weights = click_weights(tokens.coords, clicks, model.encoder.reach)
        return click_loss(logits, truth, weights, self.practice.dice)


def worked(
    model: ClickSegmenter, tokens: Tokens, encoded: Encoded, truth: Tensor, rounds: int, drawn: np.random.Generator
) -> Clicks:
    """The clicks of some rounds: as many at once as there are objects, where the model is most deeply wrong."""
    clicks: Clicks = ()
    for _ in range(rounds):
        labels = model.labels(encoded, clicks)
        clicks += simulated(truth, labels, tokens.coords, int(truth.max()), drawn)
    return clicks


def turned(scene: Scene, drawn: np.random.Generator) -> Scene:
    """A scene, mirrored along x and y or not, and turned about the z axis; a picture, mirrored along x or not."""
    if scene.flat:
        x, y = scene.coords.T
        return scene if drawn.random() < 0.5 else replace(scene, coords=np.stack([x.max() - x, y], axis=1))
    flipped = np.diag([*drawn.choice([-1, 1], 2), 1])
    angle = drawn.uniform(-math.pi, math.pi)
    c, s = math.cos(angle), math.sin(angle)
    turn = flipped @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    return replace(scene, coords=(scene.coords @ turn).astype(np.float32))


class Statistics(Hook):
    """Keeps the running statistics of batch norms, which training changes though they are no parameters.

    Args:
        model: that trains.
    """

    FILE = "statistics.safetensors"

    def __init__(self, model: nn.Module) -> None:
        self.buffers = dict(model.named_buffers())

    def save(self, folder: Path) -> None:
        save_file({name: each.contiguous() for name, each in self.buffers.items()}, folder / self.FILE)

    def load(self, folder: Path) -> None:
        for name, kept in load_file(folder / self.FILE).items():
            self.buffers[name].copy_(kept)
