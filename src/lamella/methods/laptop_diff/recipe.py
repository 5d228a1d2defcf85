"""Distillation: the pruned network learns what the whole one says, at its output and at the end of every stage.

    L = L_task + lambda_out L_out + lambda_feat sum_i alpha_i L_feat_i              each a mean over elements
    L_task = || eps - eps_S ||^2,   L_out = || eps_T - eps_S ||^2,   L_feat_i = || f_T^i - f_S^i ||^2

    normalized   alpha_i = c / E || f_T^i ||^2     of the teacher and of this batch, without gradient; c = 1
    vanilla      alpha_i = 1                       few stages with large numbers carry nearly all of the sum

With c = 1 every term is a relative error, and lambda_feat is such that features and output begin as equals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Lt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.data import Captioned, CaptionedImages, Encoded, Lazy
from lamella.files import Work
from lamella.methods.laptop_diff.denoiser import Denoiser
from lamella.methods.laptop_diff.tuples import Tuples
from lamella.train import Hook, Task, TrainConfig, TrainingLog, TrainingRun, fit
from lamella.train.supervised import stacked

Features = Literal["normalized", "vanilla", "none"]
TRAINING = TrainConfig(steps=50_000, lr=5e-5, schedule="constant", warmup=0, batch=64, accumulate=4, weight_decay=1e-2)
PROBES = 32  # rows on which the weight of features is found


@dataclass(frozen=True)
class Weights:
    """What the parts of the loss weigh.

    Attributes:
        features: how the stages are weighed: ``normalized`` by the teacher's squares, ``vanilla``, or not compared.
        output_weight: lambda_out.
        feature_weight: lambda_feat; left out, 1 for vanilla, else such that features and output begin as equals.
        average: share of the old in a running average of the weights, which is what is kept; 0: the last ones.
    """

    features: Features = "normalized"
    output_weight: Annotated[float, Ge(0)] = 1.0
    feature_weight: Annotated[float, Ge(0)] | None = None
    average: Annotated[float, Ge(0), Lt(1)] = 0.0


def stages(network: Any) -> list[str]:
    """The paths of what features are taken behind: every block down, the middle, every block up; of a transformer four
    layers, evenly."""
    if hasattr(network, "down_blocks"):
        down, up = (
            [f"{side}_blocks.{number}" for number in range(len(getattr(network, f"{side}_blocks")))]
            for side in ("down", "up")
        )
        return [*down, *(["mid_block"] if network.mid_block is not None else []), *up]
    count = len(network.transformer_blocks)
    return [f"transformer_blocks.{number * count // 4 - 1}" for number in range(1, 5) if number * count >= 4]


def with_features(network: Any, paths: Sequence[str], call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What a call gives, and what the network has behind some of its parts meanwhile."""
    seen: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        return lambda module, args, out: seen.update({path: out if isinstance(out, Tensor) else out[0]})

    hooks = [network.get_submodule(path).register_forward_hook(note(path)) for path in dict.fromkeys(paths)]
    try:
        output = call()
    finally:
        for hook in hooks:
            hook.remove()
    return output, [seen[path] for path in paths]


def matched(teacher: Any, student: Any) -> list[tuple[str, str]]:
    """Where features are compared: the teacher's stages, each with the student's own, or the one before where that is
    gone (a middle that was dropped)."""
    ours = set(stages(student))
    pairs = []
    for path in stages(teacher):
        before = f"down_blocks.{len(teacher.down_blocks) - 1}" if path == "mid_block" else path
        pairs.append((path, path if path in ours else before))
    return pairs


class Distillation:
    """The loss.

    Args:
        denoiser: the whole model, which teaches.
        pairs: where features are compared.
        weights: of the parts; ``feature`` is known.
    """

    def __init__(self, denoiser: Denoiser, pairs: Sequence[tuple[str, str]], weights: Weights) -> None:
        self.denoiser, self.pairs, self.weights = denoiser, pairs, weights

    def __call__(self, student: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        rows = self.drawn(batch)
        parts, features = self.parts(student, rows)
        loss = parts["task"] + self.weights.output_weight * parts["output"]
        if features:
            parts["features"] = torch.stack(features).sum()
            loss = loss + (self.weights.feature_weight or 0.0) * parts["features"]
        return loss, {name: each.detach() for name, each in parts.items()}

    def drawn(self, batch: Mapping[str, Tensor]) -> Tuples:
        """Times and noise for a batch of clean pictures, by torch's own state, which a checkpoint has."""
        told = dict(batch)
        clean = told.pop("clean")
        timesteps = torch.randint(self.denoiser.timesteps, (len(clean),), device=clean.device)
        return Tuples(clean, timesteps, torch.randn_like(clean), told)

    def parts(self, student: Any, rows: Tuples) -> tuple[dict[str, Tensor], list[Tensor]]:
        """L_task and L_out, and alpha_i L_feat_i for every stage."""
        noisy = self.denoiser.noising.add_noise(rows.clean, rows.noise, rows.timesteps)

        def says(network: Any) -> Callable[[], Tensor]:
            return lambda: self.denoiser.predict(network, noisy, rows.timesteps, rows.conditions)

        pairs = self.pairs if self.weights.features != "none" else ()
        teacher = self.denoiser.network
        with torch.no_grad():
            taught, theirs = with_features(teacher, [path for path, _ in pairs], says(teacher))
        said, ours = with_features(student, [path for _, path in pairs], says(student))
        target = self.denoiser.target(rows.clean, rows.noise, rows.timesteps)
        parts = {"task": _mean((said - target).square()), "output": _mean((said - taught).square())}
        return parts, [self.alpha(t) * _mean((t - s).square()) for t, s in zip(theirs, ours, strict=True)]

    def alpha(self, feature: Tensor) -> float | Tensor:
        """What a stage weighs, by what the teacher has there."""
        return 1.0 if self.weights.features == "vanilla" else 1 / _mean(feature.square())


def _mean(squares: Tensor) -> Tensor:
    return squares.float().mean()  # in half precision, sums of squares overflow


class Average(Hook):
    """Keeps a running average of what trains, and leaves the model with it.

    Args:
        share: of the old, at each step.
    """

    FILE = "average.safetensors"

    def __init__(self, share: float) -> None:
        self.share = share
        self.kept: dict[str, Tensor] = {}

    def begin(self, run: TrainingRun) -> None:
        self.kept = self.kept or {name: each.detach().clone() for name, each in run.trained.items()}

    def after_step(self, run: TrainingRun) -> None:
        for name, each in run.trained.items():
            self.kept[name].lerp_(each.detach(), 1 - self.share)

    @torch.no_grad()
    def end(self, run: TrainingRun) -> None:
        for name, each in self.kept.items():
            run.trained[name].copy_(each)

    def save(self, folder: Path) -> None:
        save_file(self.kept, folder / self.FILE)

    def load(self, folder: Path) -> None:
        self.kept = load_file(folder / self.FILE)


def distil(
    denoiser: Denoiser,
    student: nn.Module,
    pictures: CaptionedImages,
    *,
    weights: Weights,
    config: TrainConfig,
    out: Path,
    pairs: Sequence[tuple[str, str]] | None = None,
    work: Work = Work(),
) -> tuple[TrainingLog, dict[str, Any]]:
    """Train a pruned network, in place; an interrupted run goes on from ``out``.

    Args:
        denoiser: the whole model.
        student: with tensors of its own.
        pictures: to train on.
        pairs: where features are compared; the stages of the teacher when left out.
        work: where encodings of the pictures are kept.

    Returns:
        The log; and how the terms stood at the beginning: the features' weight, and each stage's term.
    """
    pairs = matched(denoiser.network, student) if pairs is None else list(pairs)
    samples = encoded(denoiser, pictures, work)
    loss, begins = balanced(denoiser, student, Tuples.of(denoiser, pictures, PROBES, config.seed), pairs, weights)
    task = Task(loss, collate=stacked, weight=lambda batch: len(batch["clean"]), frozen=(denoiser.network,))
    hooks = [Average(weights.average)] if weights.average else []
    settings = {**vars(loss.weights), "teacher": denoiser.describe()["sha256"], "pairs": [list(each) for each in pairs]}
    log = fit(student, samples, task, config, out=out, trainable=lambda name: True, hooks=hooks, settings=settings)
    return log, begins


def encoded(denoiser: Denoiser, pictures: CaptionedImages, work: Work = Work()) -> Sequence[dict[str, Tensor]]:
    """Training samples: x_0 and conditions of each picture.

    Latents, and the conditions of each distinct caption and class, are computed once and kept in files. Pictures of a
    pipeline without an autoencoder are decoded when they are asked for, which is as fast as reading what they become.

    Args:
        work: where an interrupted run finds what it has encoded.
    """
    items = pictures.items
    depends = [denoiser.describe(), denoiser.encoders(), denoiser.size, pictures.describe()]
    clean: Sequence[dict[str, Tensor]] = Lazy(items, lambda each: {"clean": denoiser.clean([each])[0]})
    if getattr(denoiser.pipeline, "vae", None) is not None:
        clean = Encoded.of(items, lambda rows: {"clean": denoiser.clean(rows)}, work, "latents", depends)
    told = list(dict.fromkeys((each.text, each.label) for each in items))
    unseen = [Captioned(np.empty((0, 0, 3), np.uint8), *each) for each in told]
    conditions = Encoded.of(unseen, denoiser.conditions, work, "conditions", depends)
    place = {each: number for number, each in enumerate(told)}
    return Lazy(range(len(items)), lambda row: {**clean[row], **conditions[place[items[row].text, items[row].label]]})


@torch.no_grad()
def balanced(
    denoiser: Denoiser, student: Any, rows: Tuples, pairs: Sequence[tuple[str, str]], weights: Weights
) -> tuple[Distillation, dict[str, Any]]:
    """The loss with a known weight of features, and how its terms stand on some rows."""
    loss = Distillation(denoiser, pairs, weights)
    parts, features = loss.parts(student, rows.to(denoiser.network.device))
    total = float(sum(features))
    feature = weights.feature_weight
    if feature is None:
        feature = float(parts["output"]) / total if weights.features == "normalized" and total > 0 else 1.0
    told = {path: float(each) for (path, _), each in zip(pairs, features, strict=False)}
    begins = {"feature": feature, "task": float(parts["task"]), "output": float(parts["output"]), "stages": told}
    return Distillation(denoiser, pairs, replace(weights, feature_weight=feature)), begins
