"""What trains: healing a network with local paths by distillation, and an iFormer from scratch."""

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
from lamella.methods.iformer.method import checked, compared, costs
from lamella.methods.iformer.network import Shape
from lamella.methods.iformer.result import Classifier, Ramped
from lamella.methods.iformer.vision import Vision
from lamella.plan.fingerprint import revision, state
from lamella.registry import command
from lamella.train import TrainConfig, fit, supervised

HEALING = TrainConfig(lr=3e-4, schedule="cosine", warmup=0.1, batch=32, weight_decay=0.05)
TRAINING = TrainConfig(lr=1e-3, schedule="cosine", warmup=0.1, batch=64, weight_decay=0.05)
EPOCHS = 20  # of training, where the steps are left out
PASSES = 5  # of healing
SMOOTHED = 0.1  # of the labels, as published


def rows(vision: Vision, pictures: Sequence[Captioned]) -> Lazy[dict[str, Tensor]]:
    """Pictures as a network reads them, each prepared when it is asked for, with its class where it has one."""

    def row(each: Captioned) -> dict[str, Tensor]:
        return {"x": vision.prepare([each])[0], "y": torch.tensor(-1 if each.label is None else each.label)}

    return Lazy(pictures, row)


@dataclass(frozen=True)
class Distilled:
    """KL divergence from the teacher's classes, the squared error of the last tokens, and the labels.

    Attributes:
        teacher: frozen.
        temperature: of both distributions.
        features: weight of the squared error, in the teacher's mean square.
        labels: weight of the cross-entropy with the pictures' own classes.
    """

    teacher: Any
    temperature: float
    features: float
    labels: float

    def __call__(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            taught = self.teacher.forward_features(batch["x"].to(next(self.teacher.parameters()).dtype))
            said = self.teacher.forward_head(taught)
        learnt = model.forward_features(batch["x"].to(next(model.parameters()).dtype))
        logits = model.forward_head(learnt)
        soft, hard = (log_softmax(each.float() / self.temperature, -1) for each in (logits, said))
        parts = {"kl": kl_div(soft, hard, reduction="batchmean", log_target=True) * self.temperature**2}
        loss = parts["kl"]
        if self.features:
            parts["features"] = (learnt.float() - taught).square().mean() / taught.float().square().mean()
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
    """Train a vision transformer with local paths towards what it was before: logits, last features, and labels.

    Args:
        model: what it was; it is not changed.
        ramped: the network to heal; it is not changed.
        images: pictures to train on. One in five is kept to judge.
        features: weight of the error of the last tokens.
        temperature: of both distributions of classes.
        labels: weight of the pictures' own classes, which must be those of the model.
        config: of the training: 5 passes over the pictures when left out.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The healed network, and how far it is from what it was, before and after.

    Raises:
        MethodError: for a model that the network was not made of.
        CalibrationError: for pictures whose classes are not the model's, where ``labels`` asks for them.
        TrainingError: when training cannot start or stay finite.
    """
    geometry = ramped.geometry
    if checked(model) != geometry or revision(model.model) != ramped.origin:
        raise MethodError(f"{model.name} is not what that network was made of: give the model that iformer was given")
    if labels and images.classes != geometry.classes:
        raise CalibrationError(
            f"the pictures have {images.classes} classes and {model.name} names {geometry.classes}: leave labels out"
        )
    built = copy.deepcopy(ramped.vision.model)
    vision = replace(ramped.vision, model=built)
    config = replace(config, steps=config.steps or PASSES * max(1, len(images) // config.batch))
    loss = Distilled(model.model, temperature, features, labels)
    test = images.part("test").items
    before = compared(model, vision, test, images.classes)
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
        "judged": compared(model, vision, test, images.classes),
        "loss": [point.loss for point in log.train],
    }
    return Ramped(
        vision=vision, geometry=geometry, layers=ramped.layers, kernel=ramped.kernel, origin=ramped.origin, log=log,
        findings=findings,
    )  # fmt: skip


def smoothed(model: nn.Module, batch: Any) -> Tensor:
    """The mean cross-entropy with labels that are smoothed, in nats."""
    return cross_entropy(model(batch["x"]).float(), batch["y"], label_smoothing=SMOOTHED)


@command(
    "iformer", "train", on="any",
    brief={"depths": (1, 1), "widths": (16, 32), "attention": (1, 3), "head_dim": 8, "size": 32, "steps": 3, "batch": 8,
           "save_every": 2},
)  # fmt: skip
def train(
    images: Album,
    *,
    shape: Shape = Shape(),  # noqa: B008, frozen
    size: Annotated[int, Ge(1), Le(16384)] = 224,
    channels: Annotated[int, Ge(1), Le(3)] = 3,
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.0,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Classifier:
    """Train an iFormer from scratch on pictures with classes.

    Args:
        images: pictures with classes; one in five is kept to judge.
        shape: its layers: iFormer-S when left out.
        size: pixels on a side.
        channels: 1 for grey pictures, 3 for colours.
        drop_path: share of the branches that training leaves out in the last layer; the published networks have 0.2,
            0.4 and 0.5.
        config: of the training: the published rate and decay, and 20 passes over the pictures, when left out.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The network, and how many of the kept pictures it names.

    Raises:
        MethodError: for a shape that does not fit.
        CalibrationError: for pictures without classes.
        TrainingError: when training cannot start or stay finite.
    """
    if images.classes < 2:
        raise CalibrationError(
            "these pictures have no classes: give a folder with a folder for each class, or textures"
        )
    config = replace(config, steps=config.steps or EPOCHS * max(1, len(images) // config.batch))
    vision = fresh(shape, size, channels, images.classes, seed=config.seed, drop_path=drop_path)
    log = fit(
        vision.model, rows(vision, images.items), supervised(smoothed), config, out=work.directory("run"),
        trainable=lambda name: True,
        settings={"shape": asdict(shape), "size": size, "channels": channels, "drop_path": drop_path},
    )  # fmt: skip
    vision.model.eval()
    findings = {
        "parameters": sum(each.numel() for each in vision.model.parameters()),
        "accuracy": accuracy(vision, images.part("test").items),
        "loss": [point.loss for point in log.train],
    }
    return Classifier(vision=vision, shape=shape, classes=images.classes, log=log, findings=findings)


def fresh(shape: Shape, size: int, channels: int, classes: int, *, seed: int = 0, drop_path: float = 0.0) -> Vision:
    """An iFormer with weights drawn from a seed.

    Raises:
        MethodError: for a size that leaves no place in the last stage, or channels that are no picture's.
    """
    if channels == 2:
        raise MethodError("channels 2: give 1 for grey images, or 3")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(shape, (size, size), channels, classes, drop_path)
    return Vision(model, "an iFormer", (size, size), channels, (0.5,) * channels, (0.5,) * channels)


@torch.no_grad()
def accuracy(vision: Vision, pictures: Sequence[Captioned]) -> float:
    """The share of pictures whose class a network names."""
    labels = torch.tensor([each.label for each in pictures])
    return float((vision.logits(pictures).argmax(1) == labels).double().mean())
