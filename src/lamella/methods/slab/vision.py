"""Vision transformers that end up without norms and optionally without a softmax: training, merging, export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lamella.data import Captioned, LabelledImages, Lazy, batches
from lamella.errors import CalibrationError, MethodError
from lamella.extras import require
from lamella.files import Work
from lamella.methods.slab.modules import LinearAttention
from lamella.methods.slab.recipe import GammaSchedule
from lamella.methods.slab.sites import sites_of
from lamella.methods.slab.transition import Transition, convert, merge, prepbn_modules, refresh
from lamella.registry import command
from lamella.results import TrainedNetwork
from lamella.train import TrainConfig, TrainingLog, class_cross_entropy, fit, supervised

Norms = Literal["layer", "batch", "rep", "progressive batch", "progressive"]
Attention = Literal["softmax", "linear"]
LARGEST = 65_536  # maximum side in pixels, and maximum hidden size
ONNX = "model.onnx"
TRAINING = TrainConfig(lr=1e-3, schedule="cosine", warmup=0.1, batch=64, weight_decay=0.05, clip=5.0)
EPOCHS = 20
JUDGED = 256  # batch size of the evaluation


@dataclass(frozen=True)
class VitConfig:
    """A timm vision transformer without a class token: the head uses the mean over tokens.

    Attributes:
        size: side of the image in pixels.
        patch: side of a patch in pixels.
        channels: 1 for greyscale images, 3 for RGB.
        width: hidden size; that of DeiT-T by default.
        depth: number of layers; that of DeiT-T by default.
        heads: number of attention heads; that of DeiT-T by default.
        attention: ``softmax``, or ``linear`` with its local term.
        kernel: kernel size of the local term; 0: none.
        linear: number of layers with linear attention, from the first; all if None.
        drop: stochastic depth rate of the last layer, which grows linearly from 0.

    Raises:
        MethodError: for a size that is no multiple of the patch, or a width that is no multiple of the heads.
    """

    size: Annotated[int, Ge(1), Le(LARGEST)] = 224
    patch: Annotated[int, Ge(1)] = 16
    channels: Annotated[int, Ge(1)] = 3
    width: Annotated[int, Ge(1), Le(LARGEST)] = 192
    depth: Annotated[int, Ge(1)] = 12
    heads: Annotated[int, Ge(1)] = 3
    attention: Attention = "softmax"
    kernel: Annotated[int, Ge(0)] = 5
    linear: Annotated[int, Ge(0)] | None = None
    drop: Annotated[float, Ge(0), Lt(1)] = 0.0

    def __post_init__(self) -> None:
        if self.size % self.patch or self.width % self.heads:
            raise MethodError(
                f"{self.size} pixels in patches of {self.patch}, {self.width} wide with {self.heads} heads: give a "
                "multiple of the patch, and a multiple of the heads"
            )

    def build(self, classes: int) -> Any:
        """Build the network with random weights."""
        timm = require("timm", "vision", "vision transformers")
        model = timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, class_token=False, global_pool="avg", img_size=self.size,
            patch_size=self.patch, in_chans=self.channels, embed_dim=self.width, depth=self.depth,
            num_heads=self.heads, num_classes=classes, drop_path_rate=self.drop,
        )  # fmt: skip
        if self.attention == "linear":
            tokens = (self.size // self.patch) ** 2
            for block in model.blocks[: self.linear]:
                block.attn = LinearAttention(self.width, self.heads, tokens, self.kernel)
        return model


@dataclass(kw_only=True)
class Classifier(TrainedNetwork):
    """A trained network, merged.

    Attributes:
        network: configuration of the network.
        classes: number of classes.
        merged: whether its norms are folded.
        onnx: whether it is exported to ONNX as well.
    """

    network: VitConfig
    classes: int
    merged: bool
    onnx: bool = False

    kind: ClassVar[str] = "classifier"
    schema: ClassVar[str] = "lamella.slab/1"
    shaped: ClassVar[tuple[str, ...]] = ("network", "classes", "merged")
    made_by: ClassVar[str] = "lamella run slab vision"

    @classmethod
    def build(cls, *, network: VitConfig, classes: int, merged: bool) -> Any:  # type: ignore[override]
        """Build a network with random weights, without norms if they are merged.

        Args:
            network: sizes of the network.
            classes: number of classes.
            merged: whether the norms are folded into the linear layers.
        """
        model = network.build(classes)
        for site in sites_of(model) if merged else ():
            model.set_submodule(site.path, nn.Identity())
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
    brief={"size": 8, "patch": 4, "channels": 1, "width": 8, "depth": 1, "heads": 2, "steps": 3, "batch": 8,
           "save_every": 2},
)  # fmt: skip
def vision(
    images: LabelledImages,
    *,
    network: VitConfig = VitConfig(),
    norms: GammaSchedule = GammaSchedule(share=0.8, init="vision"),  # noqa: B008, frozen
    kind: Norms = "progressive",
    onnx: bool = False,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Classifier:
    """Train a vision transformer from scratch whose norms become batch norms and are folded away.

    Args:
        images: images with classes; one in five is held out.
        network: configuration of the network.
        norms: schedule of the transition; defaults to the paper's four fifths of the steps, and eta 1.
        kind: ``progressive``, from layer norms to RepBN; ``progressive batch``, without eta; ``rep`` or ``batch`` from
            the first step; or ``layer``, whose norms stay.
        onnx: export the network to ONNX as well.
        config: training settings; defaults to 20 epochs.
        work: folder from which an interrupted run resumes, with bitwise equal results.

    Returns:
        The network, with its accuracy on held-out images before and after refreshing the statistics and after folding.

    Raises:
        CalibrationError: for images without classes.
        TrainingError: when training cannot start or stay finite.
    """
    test = list(images.part("test").items)
    if any(each.label is None for each in (*images.items, *test)):
        raise CalibrationError("these images have no classes: give a folder with one folder per class, or digits")
    classes = 1 + max(each.label or 0 for each in (*images.items, *test))
    x, y = pixels(images.items, network), torch.tensor([each.label for each in images.items])
    config = replace(config, steps=config.steps or EPOCHS * max(1, len(x) // config.batch))
    model, log, findings = train_network(network, classes, x, y, norms, kind, config, work.directory("run"))
    test_x, test_y = pixels(test, network), torch.tensor([each.label for each in test])
    findings["accuracy"] = refresh_and_merge(model, x, test_x, test_y, norms, kind, config.batch)
    findings["loss"] = [point.loss for point in log.train]
    merged = kind != "layer"
    return Classifier(
        model=model, network=network, classes=classes, merged=merged, log=log, onnx=onnx, findings=findings
    )


def train_network(
    network: VitConfig,
    classes: int,
    x: Sequence[Tensor],
    y: Tensor,
    norms: GammaSchedule,
    kind: Norms,
    config: TrainConfig,
    out: Path,
) -> tuple[Any, TrainingLog, dict[str, Any]]:
    """Train a network from scratch, without folding its norms.

    Args:
        network: configuration of the network.
        classes: number of classes.
        x: images [channels, size, size].
        y: classes [images].
        norms: schedule of the transition.
        kind: kind of norms.
        config: training settings.
        out: folder of the run.
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
    rows = Lazy(range(len(y)), lambda row: {"x": x[row], "y": y[row]})
    settings = {"network": asdict(network), "kind": kind, "norms": asdict(norms)}
    log = fit(
        model, rows, supervised(class_cross_entropy), config, out=out, trainable=names.__contains__,
        hooks=[Transition()], settings=settings,
    )  # fmt: skip
    for each in prepbn_modules(model):
        each.step.fill_(whole)
    return model.eval(), log, {"parameters": sum(each.numel() for each in model.parameters())}


@torch.no_grad()
def refresh_and_merge(
    model: Any,
    x: Sequence[Tensor],
    test_x: Sequence[Tensor],
    test_y: Tensor,
    norms: GammaSchedule,
    kind: Norms,
    batch: int,
) -> dict[str, float]:
    """Refresh the statistics and fold the norms, in place; return the accuracy at each point, and the loss.

    Args:
        model: the trained network.
        x: training images.
        test_x: held-out images.
        test_y: classes of these.
        norms: schedule of the transition.
        kind: kind of norms.
        batch: batch size.
    """
    found = {"trained": accuracy(model, test_x, test_y)}
    if kind != "layer":
        for _ in range(norms.passes):
            refresh(model, batches(x, batch, torch.stack), model)
        found["refreshed"] = accuracy(model, test_x, test_y)
        before = logits(model, test_x)
        merge(model, sites_of(model))
        found["merged"] = accuracy(model, test_x, test_y)
        found["moved"] = float((logits(model, test_x) - before).abs().max())
    found["nats"] = float(cross_entropy(logits(model, test_x), test_y))
    return found


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


def pixels(images: Sequence[Captioned], network: VitConfig) -> Lazy[Tensor]:
    """Return images as network inputs, each decoded on access.

    Args:
        images: images as uint8 RGB.
        network: sizes of the network, with the image size and the number of channels.
    """
    return Lazy(images, lambda each: prepare_images([each], network)[0])


def prepare_images(images: Sequence[Captioned], network: VitConfig) -> Tensor:
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


def export_onnx(model: Any, network: VitConfig, file: Path) -> None:
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
