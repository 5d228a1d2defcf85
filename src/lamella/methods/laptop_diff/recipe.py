"""Distillation: the pruned network learns the original's output, and its features after every stage.

    L = L_task + lambda_out L_out + lambda_feat sum_i alpha_i L_feat_i              each a mean over elements
    L_task = || eps - eps_S ||^2,   L_out = || eps_T - eps_S ||^2,   L_feat_i = || f_T^i - f_S^i ||^2

    normalized   alpha_i = c / E || f_T^i ||^2     of the teacher and this batch, without gradient; c = 1
    vanilla      alpha_i = 1                       few stages with large values dominate the sum

With c = 1 every term is a relative error, and lambda_feat is chosen so that the sum of the features starts at a
multiple of the output loss. A multiple of 1 counts features far less than vanilla weights do.
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
PROBES = 32  # rows for choosing the weight of features
OVER_OUTPUT = 7290.0  # the initial sum of normalized features over the output loss; chosen on validation data


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of the loss.

    Attributes:
        features: weighting of the stages: ``normalized`` by the teacher's mean squares, ``vanilla``, or ``none``.
        output_weight: weight of the output loss, the paper's lambda_out.
        feature_weight: weight of the feature loss, the paper's lambda_feat. If None, it is 1 for ``vanilla``, as in
            BK-SDM, else chosen so that the features start at 7,290 times the output loss: in a short training on
            digits, larger multiples up to 5 million gain at most 1.3 % more.
        average: decay of an exponential moving average of the weights, which are the trained model; 0 for none.
    """

    features: Features = "normalized"
    output_weight: Annotated[float, Ge(0)] = 1.0
    feature_weight: Annotated[float, Ge(0)] | None = None
    average: Annotated[float, Ge(0), Lt(1)] = 0.0


def stages(network: Any) -> list[str]:
    """Paths of the compared modules: every down block, the middle, every up block; four layers of a DiT."""
    if hasattr(network, "down_blocks"):
        down, up = (
            [f"{side}_blocks.{number}" for number in range(len(getattr(network, f"{side}_blocks")))]
            for side in ("down", "up")
        )
        return [*down, *(["mid_block"] if network.mid_block is not None else []), *up]
    count = len(network.transformer_blocks)
    return [f"transformer_blocks.{number * count // 4 - 1}" for number in range(1, 5) if number * count >= 4]


def with_features(network: Any, paths: Sequence[str], call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Run a call, and record the outputs of some modules of the network.

    Args:
        network: the network.
        paths: paths of the modules.
        call: runs the network.

    Returns:
        The output, and the features in the order of ``paths``.
    """
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


def match_stages(teacher: Any, student: Any) -> list[tuple[str, str]]:
    """Pairs of paths in the teacher and the student whose features are compared.

    If the student's middle was dropped, the block before it is used.

    Args:
        teacher: the original network.
        student: the pruned network.
    """
    ours = set(stages(student))
    pairs = []
    for path in stages(teacher):
        before = f"down_blocks.{len(teacher.down_blocks) - 1}" if path == "mid_block" else path
        pairs.append((path, path if path in ours else before))
    return pairs


class DistillationLoss:
    """The distillation loss.

    Args:
        denoiser: the original model, used as the teacher.
        pairs: pairs of paths whose features are compared.
        weights: weights of the parts, with ``feature_weight`` set.
    """

    def __init__(self, denoiser: Denoiser, pairs: Sequence[tuple[str, str]], weights: LossWeights) -> None:
        self.denoiser, self.pairs, self.weights = denoiser, pairs, weights

    def __call__(self, student: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch and its parts."""
        rows = self.sample_noise(batch)
        parts, features = self.parts(student, rows)
        loss = parts["task"] + self.weights.output_weight * parts["output"]
        if features:
            parts["features"] = torch.stack(features).sum()
            loss = loss + (self.weights.feature_weight or 0.0) * parts["features"]
        return loss, {name: each.detach() for name, each in parts.items()}

    def sample_noise(self, batch: Mapping[str, Tensor]) -> Tuples:
        """Sample timesteps and noise for a batch of clean images from torch's global random state."""
        stage_terms = dict(batch)
        clean = stage_terms.pop("clean")
        timesteps = torch.randint(self.denoiser.timesteps, (len(clean),), device=clean.device)
        return Tuples(clean, timesteps, torch.randn_like(clean), stage_terms)

    def parts(self, student: Any, rows: Tuples) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Compute L_task and L_out, and alpha_i L_feat_i for every stage.

        Args:
            student: the pruned network.
            rows: samples.
        """
        noisy = self.denoiser.noising.add_noise(rows.clean, rows.noise, rows.timesteps)

        def says(network: Any) -> Callable[[], Tensor]:
            return lambda: self.denoiser.predict(network, noisy, rows.timesteps, rows.conditions)

        pairs = self.pairs if self.weights.features != "none" else ()
        teacher = self.denoiser.network
        with torch.no_grad():
            teacher_output, theirs = with_features(teacher, [path for path, _ in pairs], says(teacher))
        student_output, ours = with_features(student, [path for _, path in pairs], says(student))
        target = self.denoiser.target(rows.clean, rows.noise, rows.timesteps)
        parts = {
            "task": _mean((student_output - target).square()),
            "output": _mean((student_output - teacher_output).square()),
        }
        return parts, [self.alpha(t) * _mean((t - s).square()) for t, s in zip(theirs, ours, strict=True)]

    def alpha(self, feature: Tensor) -> float | Tensor:
        """Weight of a stage, by the teacher's features."""
        return 1.0 if self.weights.features == "vanilla" else 1 / _mean(feature.square())


def _mean(squares: Tensor) -> Tensor:
    return squares.float().mean()  # sums of squares overflow in half precision


class Average(Hook):
    """Hook that keeps an exponential moving average of the trained weights, and copies it to the model at the end.

    Args:
        share: decay per step.
    """

    FILE = "average.safetensors"

    def __init__(self, share: float) -> None:
        self.share = share
        self.kept: dict[str, Tensor] = {}

    def begin(self, run: TrainingRun) -> None:
        """Start the average from the current weights."""
        self.kept = self.kept or {name: each.detach().clone() for name, each in run.trained.items()}

    def after_step(self, run: TrainingRun) -> None:
        """Update the average."""
        for name, each in run.trained.items():
            self.kept[name].lerp_(each.detach(), 1 - self.share)

    @torch.no_grad()
    def end(self, run: TrainingRun) -> None:
        """Copy the average to the model."""
        for name, each in self.kept.items():
            run.trained[name].copy_(each)

    def save(self, folder: Path) -> None:
        """Save the average with a checkpoint."""
        save_file(self.kept, folder / self.FILE)

    def load(self, folder: Path) -> None:
        """Load the average of a checkpoint."""
        self.kept = load_file(folder / self.FILE)


def distil(
    denoiser: Denoiser,
    student: nn.Module,
    images: CaptionedImages,
    *,
    weights: LossWeights,
    config: TrainConfig,
    out: Path,
    pairs: Sequence[tuple[str, str]] | None = None,
    work: Work = Work(),
) -> tuple[TrainingLog, dict[str, Any]]:
    """Distil a model into its pruned network, which is trained in place; an interrupted run resumes from ``out``.

    Args:
        denoiser: the original model.
        student: the pruned network, with its own tensors.
        images: training images.
        weights: weights of the parts of the loss.
        config: training settings.
        out: folder of the run.
        pairs: pairs of paths whose features are compared; defaults to the stages of the teacher.
        work: folder for encoded images.

    Returns:
        The log, and the loss before training: the weight of the features, and the initial loss of each stage.
    """
    pairs = match_stages(denoiser.network, student) if pairs is None else list(pairs)
    samples = encode_samples(denoiser, images, work)
    loss, initial = balance_loss(denoiser, student, Tuples.of(denoiser, images, PROBES, config.seed), pairs, weights)
    task = Task(loss, collate=stacked, weight=lambda batch: len(batch["clean"]), frozen=(denoiser.network,))
    hooks = [Average(weights.average)] if weights.average else []
    settings = {**vars(loss.weights), "teacher": denoiser.describe()["sha256"], "pairs": [list(each) for each in pairs]}
    log = fit(student, samples, task, config, out=out, trainable=lambda name: True, hooks=hooks, settings=settings)
    return log, initial


def encode_samples(denoiser: Denoiser, images: CaptionedImages, work: Work = Work()) -> Sequence[dict[str, Tensor]]:
    """Prepare training samples: x_0 and conditions of each image.

    Latents, and the conditions of each distinct caption and class, are computed once and kept in files. Images of a
    pipeline without an autoencoder are decoded on access, which is as fast as reading the prepared samples.

    Args:
        denoiser: the original model.
        images: training images.
        work: folder in which an interrupted run finds its encoded images.
    """
    items = images.items
    depends = [denoiser.describe(), denoiser.encoders(), denoiser.size, images.describe()]
    clean: Sequence[dict[str, Tensor]] = Lazy(items, lambda each: {"clean": denoiser.clean([each])[0]})
    if getattr(denoiser.pipeline, "vae", None) is not None:
        clean = Encoded.of(items, lambda rows: {"clean": denoiser.clean(rows)}, work, "latents", depends)
    stage_terms = list(dict.fromkeys((each.text, each.label) for each in items))
    unseen = [Captioned(np.empty((0, 0, 3), np.uint8), *each) for each in stage_terms]
    conditions = Encoded.of(unseen, denoiser.conditions, work, "conditions", depends)
    index = {each: number for number, each in enumerate(stage_terms)}
    return Lazy(range(len(items)), lambda row: {**clean[row], **conditions[index[items[row].text, items[row].label]]})


@torch.no_grad()
def balance_loss(
    denoiser: Denoiser, student: Any, rows: Tuples, pairs: Sequence[tuple[str, str]], weights: LossWeights
) -> tuple[DistillationLoss, dict[str, Any]]:
    """Create the loss with its weight of features, and report its initial terms on some rows.

    Args:
        denoiser: the original model.
        student: the pruned network.
        rows: samples.
        pairs: pairs of paths whose features are compared.
        weights: weights of the parts.
    """
    loss = DistillationLoss(denoiser, pairs, weights)
    parts, features = loss.parts(student, rows.to(denoiser.network.device))
    total = float(sum(features))
    feature = weights.feature_weight
    if feature is None:
        is_balanced = weights.features == "normalized" and total > 0
        feature = OVER_OUTPUT * float(parts["output"]) / total if is_balanced else 1.0
    stage_terms = {path: float(each) for (path, _), each in zip(pairs, features, strict=False)}
    initial = {
        "feature": feature,
        "task": float(parts["task"]),
        "output": float(parts["output"]),
        "stages": stage_terms,
    }
    return DistillationLoss(denoiser, pairs, replace(weights, feature_weight=feature)), initial
