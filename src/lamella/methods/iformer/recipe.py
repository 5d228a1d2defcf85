"""Training: healing a network with local paths by distillation, and training an iFormer from scratch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lamella.data import Captioned, Lazy
from lamella.errors import CalibrationError, MethodError
from lamella.files import Work
from lamella.methods.iformer.album import Album
from lamella.methods.iformer.folder import network
from lamella.methods.iformer.measuring import mixers
from lamella.methods.iformer.method import check_model, compare, costs
from lamella.methods.iformer.network import StageShape
from lamella.methods.iformer.result import IFormerClassifier, Ramped
from lamella.methods.iformer.vision import Vision
from lamella.plan.fingerprint import revision, state
from lamella.registry import command
from lamella.train import Augmentation, AugmentedLoss, TrainConfig, fit, supervised

HEALING = TrainConfig(lr=3e-4, schedule="cosine", warmup=0.1, batch=32, weight_decay=0.05)
TRAINING = TrainConfig(lr=1e-3, schedule="cosine", warmup=0.1, batch=64, weight_decay=0.05)
EPOCHS = 20  # of training, if ``steps`` is None
PASSES = 5  # epochs of healing, if ``steps`` is None
SMOOTHED = 0.1  # label smoothing, as published


def rows(vision: Vision, images: Sequence[Captioned]) -> Lazy[dict[str, Tensor]]:
    """Prepare images lazily as inputs of a network, with their classes (-1 if unknown).

    Args:
        vision: the network with its preprocessing.
        images: the images.
    """

    def row(each: Captioned) -> dict[str, Tensor]:
        return {"x": vision.prepare([each])[0], "y": torch.tensor(-1 if each.label is None else each.label)}

    return Lazy(images, row)


@dataclass(frozen=True)
class Distilled:
    """KL divergence from the teacher's classes, the squared error of the last tokens, and the label loss.

    Attributes:
        teacher: the frozen teacher.
        temperature: temperature of both distributions.
        features: weight of the squared error, relative to the teacher's mean square.
        labels: weight of the cross-entropy with the images' own classes.
    """

    teacher: Any
    temperature: float
    features: float
    labels: float

    def __call__(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch and its parts."""
        with torch.no_grad():
            teacher_features = self.teacher.forward_features(batch["x"].to(next(self.teacher.parameters()).dtype))
            targets = self.teacher.forward_head(teacher_features)
        student_features = model.forward_features(batch["x"].to(next(model.parameters()).dtype))
        logits = model.forward_head(student_features)
        soft, hard = (log_softmax(each.float() / self.temperature, -1) for each in (logits, targets))
        parts = {"kl": kl_div(soft, hard, reduction="batchmean", log_target=True) * self.temperature**2}
        loss = parts["kl"]
        if self.features:
            parts["features"] = (
                student_features.float() - teacher_features
            ).square().mean() / teacher_features.float().square().mean()
            loss = loss + self.features * parts["features"]
        if self.labels:
            parts["labels"] = cross_entropy(logits.float(), batch["y"])
            loss = loss + self.labels * parts["labels"]
        return loss, parts


@command("iformer", "heal", on="any", brief={"count": 20, "steps": 3, "batch": 4, "save_every": 2})
def heal(
    model: Vision,
    ramped: Ramped,
    images: Album,
    *,
    features: Annotated[float, Ge(0)] = 1.0,
    temperature: Annotated[float, Gt(0)] = 1.0,
    labels: Annotated[float, Ge(0)] = 0.0,
    config: TrainConfig = HEALING,
    work: Work = Work(),
) -> Ramped:
    """Heal a vision transformer with local paths by distilling logits and last features from the original.

    Args:
        model: the original; it is not changed.
        ramped: the network to heal; it is not changed.
        images: training images. One in five is held out for evaluation.
        features: weight of the error of the last tokens.
        temperature: temperature of both class distributions.
        labels: weight of the cross-entropy with the images' classes, which must be those of the model.
        config: training settings; defaults to 5 epochs.
        work: folder from which an interrupted run resumes, with bitwise identical results.

    Returns:
        The healed network, and its distance from the original before and after.

    Raises:
        MethodError: for a model that is not the original of the network.
        CalibrationError: for images whose classes are not the model's, if ``labels`` is not 0.
        TrainingError: when training cannot start or does not stay finite.
    """
    geometry = ramped.geometry
    if check_model(model) != geometry or revision(model.model) != ramped.origin:
        raise MethodError(f"{model.name} is not the original of that network: give the model that iformer converted")
    if labels and images.classes != geometry.classes:
        raise CalibrationError(
            f"the images have {images.classes} classes but {model.name} has {geometry.classes}: set labels to 0"
        )
    built = copy.deepcopy(ramped.vision.model)
    vision = replace(ramped.vision, model=built)
    config = replace(config, steps=config.steps or PASSES * max(1, len(images) // config.batch))
    loss = Distilled(model.model, temperature, features, labels)
    test = images.part("test").items
    before = compare(model, vision, test, images.classes)
    settings = {"features": features, "temperature": temperature, "labels": labels,
                "geometry": asdict(geometry), "layers": [asdict(each) for each in ramped.layers],
                "kernel": ramped.kernel, "of": state(model.model), "ramped": state(built)}  # fmt: skip
    log = fit(
        built, rows(vision, images.items), supervised(loss), config, out=work.directory("run"),
        trainable=lambda name: True, settings=settings,
    )  # fmt: skip
    built.eval()
    findings = {
        "layers": [{"kept": list(each.kept), "conv": each.conv, "pool": each.pool} for each in ramped.layers],
        "heads": geometry.heads,
        "cost": costs(geometry, [block.attn for block in model.model.blocks], mixers(built)),
        "before": before,
        "judged": compare(model, vision, test, images.classes),
        "loss": [point.loss for point in log.train],
    }
    return Ramped(
        vision=vision, geometry=geometry, layers=ramped.layers, kernel=ramped.kernel, origin=ramped.origin, log=log,
        findings=findings,
    )  # fmt: skip


def smoothed_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy with label smoothing, in nats.

    Args:
        model: the network.
        batch: images and classes.
    """
    return cross_entropy(model(batch["x"]).float(), batch["y"], label_smoothing=SMOOTHED)


@command(
    "iformer", "train", on="any",
    brief={"depths": (1, 1), "widths": (16, 32), "attention": (1, 3), "head_dim": 8, "size": 32, "steps": 3, "batch": 8,
           "save_every": 2},
)  # fmt: skip
def train(
    images: Album,
    *,
    shape: StageShape = StageShape(),  # noqa: B008, frozen
    size: Annotated[int, Ge(1), Le(16384)] = 224,
    channels: Annotated[int, Ge(1), Le(3)] = 3,
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.0,
    augment: Augmentation | None = None,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> IFormerClassifier:
    """Train an iFormer from scratch on images with classes.

    Args:
        images: images with classes; one in five is held out for evaluation.
        shape: the shape; defaults to iFormer-S.
        size: side of the images in pixels.
        channels: 1 for greyscale images, 3 for colour.
        drop_path: stochastic depth rate of the last layer; the published networks use 0.2, 0.4 and 0.5.
        augment: augmentation of the training images by timm; its defaults are the published ones, and without it labels
            are smoothed only.
        config: training settings; defaults to the published learning rate and weight decay, and 20 epochs.
        work: folder from which an interrupted run resumes, with bitwise identical results.

    Returns:
        The network, and its accuracy on held-out images.

    Raises:
        MethodError: for a shape that does not fit.
        CalibrationError: for images without classes.
        TrainingError: when training cannot start or does not stay finite.
    """
    if images.classes < 2:
        raise CalibrationError("these images have no classes: give a folder with one folder per class, or textures")
    config = replace(config, steps=config.steps or EPOCHS * max(1, len(images) // config.batch))
    vision = new_network(shape, size, channels, images.classes, seed=config.seed, drop_path=drop_path)
    loss = smoothed_loss if augment is None else AugmentedLoss(augment, images.classes, vision.mean, vision.std)
    changes = {} if augment is None else {"augment": asdict(augment)}
    log = fit(
        vision.model, rows(vision, images.items), supervised(loss), config, out=work.directory("run"),
        trainable=lambda name: True,
        settings={"shape": asdict(shape), "size": size, "channels": channels, "drop_path": drop_path} | changes,
    )  # fmt: skip
    vision.model.eval()
    findings = {
        "parameters": sum(each.numel() for each in vision.model.parameters()),
        "accuracy": accuracy(vision, images.part("test").items),
        "loss": [point.loss for point in log.train],
    }
    return IFormerClassifier(vision=vision, shape=shape, classes=images.classes, log=log, findings=findings)


def new_network(
    shape: StageShape, size: int, channels: int, classes: int, *, seed: int = 0, drop_path: float = 0.0
) -> Vision:
    """Create an iFormer with random weights.

    Args:
        shape: the shape.
        size: side of the images in pixels.
        channels: 1 for greyscale images, 3 for colour.
        classes: number of classes.
        seed: random seed.
        drop_path: stochastic depth rate of the last layer.

    Raises:
        MethodError: for a number of channels that no image has, or a shape that does not fit.
    """
    if channels == 2:
        raise MethodError("channels 2: give 1 for greyscale images or 3 for colour")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(shape, (size, size), channels, classes, drop_path)
    return Vision(model, "an iFormer", (size, size), channels, (0.5,) * channels, (0.5,) * channels)


@torch.no_grad()
def accuracy(vision: Vision, images: Sequence[Captioned]) -> float:
    """Fraction of images that a network classifies correctly.

    Args:
        vision: the network.
        images: images with classes.
    """
    labels = torch.tensor([each.label for each in images])
    return float((vision.logits(images).argmax(1) == labels).double().mean())
