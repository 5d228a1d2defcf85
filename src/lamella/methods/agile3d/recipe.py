"""Training: clicks are simulated with the current model, then one pass with gradient learns from all of them."""

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

from lamella.data import Lazy
from lamella.methods.agile3d.clicks import Clicks, simulate_clicks, task_labels
from lamella.methods.agile3d.decoder import EncodedScene
from lamella.methods.agile3d.judge import visible
from lamella.methods.agile3d.loss import Dice, click_loss, click_weights
from lamella.methods.agile3d.modules import ClickSegmenter
from lamella.methods.agile3d.scene import ClickScene, Tokens
from lamella.train import Hook, Task, TrainConfig, TrainingLog, fit

TRAINING = TrainConfig(lr=1e-4, schedule="step", warmup=0, batch=5, weight_decay=1e-4, clip=0.1, seed=42)


@dataclass(frozen=True)
class ClickSimulation:
    """Simulation of clicks in training.

    Attributes:
        rounds: maximum number of click rounds; each scene gets a random number of them. The paper uses 20.
        objects: maximum number of objects segmented at once; a random subset is chosen each time. The paper uses 10.
        dice: kind of Dice loss: ``token`` as in the authors' code, or ``class`` as in textbooks.
        turn: randomly mirror scenes and rotate them about the z axis; images are only mirrored horizontally.
        frozen: freeze a pretrained backbone and train only the layers above it.
    """

    rounds: Annotated[int, Ge(1)] = 20
    objects: Annotated[int, Ge(1)] = 10
    dice: Dice = "token"
    turn: bool = True
    frozen: bool = False


def train_segmenter(
    model: ClickSegmenter, scenes: Sequence[ClickScene], config: TrainConfig, simulation: ClickSimulation, out: Path
) -> TrainingLog:
    """Train a model in place on scenes with known objects.

    Args:
        model: the model.
        scenes: training scenes with ground truth.
        config: training configuration.
        simulation: simulation of clicks.
        out: folder for checkpoints.

    Raises:
        CalibrationError: if a scene shows no object.
        TrainingError: if training cannot start or resume, or the loss is not finite.
    """
    samples: Sequence[Tokens] = Lazy(scenes, model.tokenise)
    for tokens in samples:
        visible(tokens)  # raises if there is nothing to click
    if not simulation.turn:
        samples = list(samples)  # with their kernel maps; augmented scenes have new ones in every step
    task = Task(ClickLoss(simulation), collate=together, weight=lambda batch: len(batch["scenes"]))
    settings = {
        "rounds": simulation.rounds,
        "objects": simulation.objects,
        "dice": simulation.dice,
        "turn": simulation.turn,
    }
    settings |= {"frozen": simulation.frozen}
    return fit(model, samples, task, config, out=out, hooks=[Statistics(model)], settings=settings)


def together(scenes: Sequence[Tokens]) -> dict[str, list[Tokens]]:
    """Collate scenes into a batch."""
    return {"scenes": list(scenes)}


@dataclass(frozen=True)
class ClickLoss:
    """The loss of a batch: one pass through the encoder, whose features serve all click rounds of all scenes.

    Attributes:
        simulation: simulation of clicks.
    """

    simulation: ClickSimulation

    def __call__(self, model: ClickSegmenter, batch: dict[str, list[Tokens]]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and its terms."""
        generator = np.random.default_rng(int(torch.randint(2**62, ())))  # torch's random state is in the checkpoint
        scenes = batch["scenes"]
        if self.simulation.turn:
            scenes = [model.tokenise(augment_scene(each.scene, generator)) for each in scenes]
        found = [
            self._of_scene(model, tokens, encoded, generator)
            for tokens, encoded in zip(scenes, model.encode(scenes), strict=True)
        ]
        parts = {name: torch.stack([each[name] for _, each in found]).mean() for name in found[0][1]}
        return torch.stack([loss for loss, _ in found]).mean(), parts

    def _of_scene(
        self, model: ClickSegmenter, tokens: Tokens, encoded: EncodedScene, generator: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        candidates = visible(tokens)
        count = int(generator.integers(1, min(self.simulation.objects, len(candidates)) + 1))
        truth = task_labels(tokens.objects, generator.choice(candidates, count, replace=False).tolist())
        rounds = 1 + int(generator.integers(self.simulation.rounds))
        clicks = simulate_rounds(model, tokens, encoded.detached(), truth, rounds, generator)
        logits = model.decode(encoded, clicks)  # the one pass with a gradient
        weights = click_weights(tokens.coords, clicks, model.encoder.reach)
        return click_loss(logits, truth, weights, self.simulation.dice)


def simulate_rounds(
    model: ClickSegmenter,
    tokens: Tokens,
    encoded: EncodedScene,
    truth: Tensor,
    rounds: int,
    generator: np.random.Generator,
) -> Clicks:
    """Simulate rounds of clicks on the current prediction, in each round at most one per object.

    Args:
        model: the model.
        tokens: tokens of the scene.
        encoded: the encoded scene.
        truth: labels of the tokens [N].
        rounds: number of rounds.
        generator: random generator.
    """
    clicks: Clicks = ()
    for _ in range(rounds):
        labels = model.labels(encoded, clicks)
        clicks += simulate_clicks(truth, labels, tokens.coords, int(truth.max()), generator)
    return clicks


def augment_scene(scene: ClickScene, generator: np.random.Generator) -> ClickScene:
    """Augment a scene by mirroring along x and y and rotation about the z axis, or an image by horizontal mirroring.

    Args:
        scene: the scene.
        generator: random generator.
    """
    if scene.is_image:
        x, y = scene.coords.T
        return scene if generator.random() < 0.5 else replace(scene, coords=np.stack([x.max() - x, y], axis=1))
    flipped = np.diag([*generator.choice([-1, 1], 2), 1])
    angle = generator.uniform(-math.pi, math.pi)
    c, s = math.cos(angle), math.sin(angle)
    turn = flipped @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    return replace(scene, coords=(scene.coords @ turn).astype(np.float32))


class Statistics(Hook):
    """Save the running statistics of batch norms in checkpoints, since they are buffers and not parameters.

    Args:
        model: the model in training.
    """

    FILE = "statistics.safetensors"

    def __init__(self, model: nn.Module) -> None:
        self.buffers = dict(model.named_buffers())

    def save(self, folder: Path) -> None:
        """Save the buffers."""
        save_file({name: each.contiguous() for name, each in self.buffers.items()}, folder / self.FILE)

    def load(self, folder: Path) -> None:
        """Load the buffers."""
        for name, kept in load_file(folder / self.FILE).items():
            self.buffers[name].copy_(kept)
