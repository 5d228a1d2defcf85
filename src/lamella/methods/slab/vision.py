"""Vision transformers that end up without norms and optionally without a softmax: training, merging, export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lamella.data import Captioned, LabelledImages, Lazy, batches
from lamella.errors import CalibrationError
from lamella.extras import require
from lamella.files import Work
from lamella.methods.slab.networks import VisionConfig
from lamella.methods.slab.recipe import GammaSchedule
from lamella.methods.slab.sites import sites_of
from lamella.methods.slab.transition import (
    BestCheckpoint,
    Transition,
    convert,
    merge,
    prepbn_modules,
    refresh,
    reshuffled,
)
from lamella.registry import command
from lamella.results import TrainedNetwork
from lamella.train import (
    Augmentation,
    AugmentedLoss,
    TrainConfig,
    TrainingLog,
    class_cross_entropy,
    fit,
    supervised,
)

Norms = Literal["layer", "batch", "rep", "progressive batch", "progressive"]
ONNX = "model.onnx"
TRAINING = TrainConfig(lr=1e-3, schedule="cosine", warmup=0.1, batch=64, weight_decay=0.05, clip=5.0)
EPOCHS = 20
JUDGED = 256  # batch size of the evaluation


@dataclass(kw_only=True)
class Classifier(TrainedNetwork):
    """A trained network, merged.

    Attributes:
        network: configuration of the network.
        classes: number of classes.
        merged: whether its norms are folded.
        onnx: whether it is exported to ONNX as well.
    """

    network: VisionConfig
    classes: int
    merged: bool
    onnx: bool = False

    kind: ClassVar[str] = "classifier"
    schema: ClassVar[str] = "lamella.slab/1"
    shaped: ClassVar[tuple[str, ...]] = ("network", "classes", "merged")
    made_by: ClassVar[str] = "lamella run slab vision"

    @classmethod
    def build(cls, *, network: VisionConfig, classes: int, merged: bool) -> Any:  # type: ignore[override]
        """Build a network with random weights, without norms if they are merged.

        Args:
            network: sizes of the network.
            classes: number of classes.
            merged: whether the norms are folded into the linear layers.
        """
        model = network.build(classes)
        for site in sites_of(model) if merged else ():
            model.set_submodule(site.path, nn.Identity())
            for path in site.readers:
                linear = model.get_submodule(path)
                if linear.bias is None:
                    linear.bias = nn.Parameter(torch.zeros(len(linear.weight)))
        return model

    def write(self, folder: Path) -> None:
        """Write weights, configuration, log, and the ONNX export."""
        super().write(folder)
        if self.onnx:
            export_onnx(self.model, self.network, folder / ONNX)

    @classmethod
    def read(cls, path: str | Path) -> Classifier:
        """Read the network from a folder; see :meth:`lamella.results.TrainedNetwork.read`."""
        found = super().read(path)
        found.onnx = (Path(path) / ONNX).is_file()
        return found


@command(
    "slab",
    "vision",
    on="any",
    brief={"size": 8, "patch": 4, "channels": 1, "width": 8, "depth": (1,), "heads": 2, "steps": 3, "batch": 8,
           "save_every": 2},
)  # fmt: skip
def vision(
    images: LabelledImages,
    *,
    network: VisionConfig = VisionConfig(),  # noqa: B008, frozen
    norms: GammaSchedule = GammaSchedule(share=0.8, init="vision", passes=10),  # noqa: B008, frozen
    kind: Norms = "progressive",
    augment: Augmentation | None = None,
    onnx: bool = False,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Classifier:
    """Train a vision transformer from scratch whose norms become batch norms and are folded away.

    A tenth of the training images chooses the checkpoint and the statistics. The checkpoints are judged by RepBN alone,
    which is what remains after folding.

    Args:
        images: images with classes; one in five is held out for the accuracy.
        network: configuration of the network.
        norms: schedule of the transition; defaults to the paper's four fifths of the steps, eta 1, and ten passes.
        kind: ``progressive``, from layer norms to RepBN; ``progressive batch``, without eta; ``rep`` or ``batch`` from
            the first step; or ``layer``, whose norms stay.
        augment: augmentation of the training images by timm; none by default.
        onnx: export the network to ONNX as well.
        config: training settings; defaults to 20 epochs.
        work: folder from which an interrupted run resumes, with bitwise equal results.

    Returns:
        The network, with its accuracy on held-out images before and after refreshing the statistics and after folding.

    Raises:
        CalibrationError: for fewer than ten images, or images without classes.
        TrainingError: when training cannot start or stay finite.
    """
    split = Splits.of(images, network)
    classes = 1 + int(torch.cat([y for _, y in vars(split).values()]).max())
    steps = config.steps or EPOCHS * max(1, len(split.train[1]) // config.batch)
    config = replace(config, steps=steps)
    model, log, findings = train_network(network, classes, split, norms, kind, config, work.directory("run"), augment)
    findings["accuracy"] = refresh_and_merge(model, split, norms, kind, config)
    findings["loss"] = [point.loss for point in log.train]
    merged = kind != "layer"
    return Classifier(
        model=model, network=network, classes=classes, merged=merged, log=log, onnx=onnx, findings=findings
    )


@dataclass(frozen=True)
class Splits:
    """Images and their classes: to train on, to choose on, and to judge by.

    Attributes:
        train: images, decoded on access, and classes [images].
        held_out: the same of a random tenth of the training images.
        test: the same of the test split.
    """

    train: tuple[Sequence[Tensor], Tensor]
    held_out: tuple[Sequence[Tensor], Tensor]
    test: tuple[Sequence[Tensor], Tensor]

    @classmethod
    def of(cls, images: LabelledImages, network: VisionConfig) -> Splits:
        """Split images at random, always in the same way.

        Args:
            images: the images.
            network: sizes of the network.

        Raises:
            CalibrationError: for fewer than ten images, or images without classes.
        """
        test = images.part("test").items
        if any(each.label is None for each in (*images.items, *test)):
            raise CalibrationError("these images have no classes: give a folder with one folder per class, or digits")
        if len(images) < 10:
            raise CalibrationError(f"{len(images)} images are too few: give at least 10, of which one is held out")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
        cut = len(images) // 10
        parts = ([images.items[each] for each in order[cut:]], [images.items[each] for each in order[:cut]], test)
        return cls(*((pixels(part, network), torch.tensor([each.label for each in part])) for part in parts))


def train_network(
    network: VisionConfig,
    classes: int,
    images: Splits,
    norms: GammaSchedule,
    kind: Norms,
    config: TrainConfig,
    out: Path,
    augment: Augmentation | None = None,
) -> tuple[Any, TrainingLog, dict[str, Any]]:
    """Train a network from scratch, without folding its norms, and keep its state with the lowest held-out loss.

    Args:
        network: configuration of the network.
        classes: number of classes.
        images: the images.
        norms: schedule of the transition.
        kind: kind of norms.
        config: training settings.
        out: folder of the run.
        augment: augmentation of the training images, if any.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = network.build(classes)
    whole = config.steps or 1
    if kind != "layer":
        steps, warm = norms.steps(whole) if kind.startswith("progressive") else (0, 0)
        convert(model, sites_of(model), steps=steps, warm=warm, first=norms.first, init=norms.init)
    if "batch" in kind:
        for each in prepbn_modules(model):
            each.rep.eta.data.zero_()
            each.rep.eta.requires_grad_(False)
    fixed = {id(each.rep.eta) for each in prepbn_modules(model)} if "batch" in kind else set()
    names = {name for name, each in model.named_parameters() if id(each) not in fixed}
    half = (0.5,) * network.channels
    loss = class_cross_entropy if augment is None else AugmentedLoss(augment, classes, half, half)
    changes = None if augment is None else asdict(augment)
    settings = {"network": asdict(network), "kind": kind, "norms": asdict(norms), "augment": changes}
    config = replace(config, eval_every=config.eval_every or max(1, len(images.train[1]) // config.batch))
    log = fit(
        model, rows(*images.train), supervised(loss), config, out=out, trainable=names.__contains__,
        held_out=rows(*images.held_out), hooks=[Transition(), BestCheckpoint()], settings=settings,
    )  # fmt: skip
    for each in prepbn_modules(model):
        each.step.fill_(whole)
    return model.eval(), log, {"parameters": sum(each.numel() for each in model.parameters())}


def rows(x: Sequence[Tensor], y: Tensor) -> Lazy[dict[str, Tensor]]:
    """Return images with their classes as samples, each decoded on access.

    Args:
        x: images [channels, size, size].
        y: classes [images].
    """
    return Lazy(range(len(y)), lambda row: {"x": x[row], "y": y[row]})


@torch.no_grad()
def refresh_and_merge(
    model: Any, images: Splits, norms: GammaSchedule, kind: Norms, config: TrainConfig
) -> dict[str, float]:
    """Refresh the statistics and fold the norms, in place; return the accuracy on test images at each point.

    Args:
        model: the trained network.
        images: the images.
        norms: schedule of the transition.
        kind: kind of norms.
        config: training settings, with the batch size and the random seed.
    """
    x, y = images.test
    found = {"trained": accuracy(model, x, y)}
    if kind == "layer":
        return found
    passes = reshuffled(images.train[0], norms.passes, config.batch, torch.stack, config.seed)
    chosen_on, labels = images.held_out
    refresh(model, passes, model, lambda: float(cross_entropy(logits(model, chosen_on), labels)))
    found["refreshed"] = accuracy(model, x, y)
    before = logits(model, x)
    merge(model, sites_of(model))
    return found | {"merged": accuracy(model, x, y), "moved": float((logits(model, x) - before).abs().max())}


def accuracy(model: Any, x: Sequence[Tensor], y: Tensor) -> float:
    """Return the fraction of images that are classified correctly.

    Args:
        model: a classifier.
        x: the images, each `[channels, size, size]`.
        y: labels `[images]`.
    """
    return float((logits(model, x).argmax(1) == y).double().mean())


@torch.no_grad()
def logits(model: Any, x: Sequence[Tensor]) -> Tensor:
    """Return the logits of images [images, classes], computed in batches.

    Args:
        model: a classifier.
        x: the images, each `[channels, size, size]`.
    """
    return torch.cat([model(rows) for rows in batches(x, JUDGED, torch.stack)])


def pixels(images: Sequence[Captioned], network: VisionConfig) -> Lazy[Tensor]:
    """Return images as network inputs, each decoded on access.

    Args:
        images: images as uint8 RGB.
        network: sizes of the network, with the image size and the number of channels.
    """
    return Lazy(images, lambda each: prepare_images([each], network)[0])


def prepare_images(images: Sequence[Captioned], network: VisionConfig) -> Tensor:
    """Convert images to network inputs [images, channels, size, size] in [-1, 1].

    Args:
        images: images as uint8 RGB of any size; others than the network's are resized and center-cropped.
        network: sizes of the network; with one channel, images become greyscale.
    """
    transforms = require("torchvision.transforms.v2", "vision", "resizing images")
    fit_ = transforms.Compose([transforms.Resize(network.size), transforms.CenterCrop(network.size)])
    rows = [torch.from_numpy(each.image).permute(2, 0, 1) for each in images]
    sides = (network.size, network.size)
    pixels = torch.stack([each if each.shape[1:] == sides else fit_(each) for each in rows]) / 127.5 - 1
    return pixels.mean(dim=1, keepdim=True) if network.channels == 1 else pixels


def export_onnx(model: Any, network: VisionConfig, file: Path) -> None:
    """Export a network to ONNX, for batches of any size.

    Args:
        model: a classifier.
        network: sizes of the network, with the image size and the number of channels.
        file: the ONNX file to write; its input is ``pixels``, its output is ``logits``.

    Raises:
        LamellaError: when onnx or onnxscript is missing.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "onnx", "the export")
    x = torch.zeros(2, network.channels, network.size, network.size)
    batch = torch.export.Dim("batch")
    torch.onnx.export(model, (x,), file, dynamo=True, dynamic_shapes=({0: batch},), input_names=["pixels"],
                      output_names=["logits"], external_data=False, verbose=False)  # fmt: skip
