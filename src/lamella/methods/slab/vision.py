"""Vision transformers that end without norms and, where it is wanted, without a softmax: trained, merged, exported."""

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
from lamella.methods.slab.recipe import Schedule
from lamella.methods.slab.sites import sites_of
from lamella.methods.slab.transition import Transition, convert, merge, places, refresh
from lamella.registry import command
from lamella.results import TrainedNetwork
from lamella.train import TrainConfig, TrainingLog, class_cross_entropy, fit, supervised

Norms = Literal["layer", "batch", "rep", "progressive batch", "progressive"]
Attention = Literal["softmax", "linear"]
LARGEST = 65_536  # pixels of a side, and the width of a layer
ONNX = "model.onnx"
TRAINING = TrainConfig(lr=1e-3, schedule="cosine", warmup=0.1, batch=64, weight_decay=0.05, clip=5.0)
EPOCHS = 20
JUDGED = 256  # pictures in a batch that is judged


@dataclass(frozen=True)
class Network:
    """A vision transformer of timm, without a class token: the mean over tokens is what the head reads.

    Attributes:
        size: pixels on a side.
        patch: pixels on a side of a token.
        channels: 1 for grey pictures, 3 for colours.
        width, depth, heads: of its layers; those of DeiT-T when left out.
        attention: ``softmax``, or ``linear`` with its local term.
        kernel: of the local term, on a side; 0: none.
        linear: how many layers have linear attention, the first ones; all when left out.
        drop: share of the branches that are left out in training, the most in the last layer.

    Raises:
        MethodError: for pixels that are no whole patches, or a width that is no whole heads.
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
                f"{self.size} pixels in patches of {self.patch}, {self.width} wide with {self.heads} heads: give whole "
                "patches, and whole heads"
            )

    def build(self, classes: int) -> Any:
        """The network with fresh weights."""
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
        network, classes: its shape.
        merged: whether norms are gone.
        onnx: whether it is written for other runtimes, too.
    """

    network: Network
    classes: int
    merged: bool
    onnx: bool = False

    kind: ClassVar[str] = "classifier"
    schema: ClassVar[str] = "lamella.slab/1"
    shaped: ClassVar[tuple[str, ...]] = ("network", "classes", "merged")
    made_by: ClassVar[str] = "lamella run slab vision"

    @classmethod
    def build(cls, *, network: Network, classes: int, merged: bool) -> Any:  # type: ignore[override]
        """A fresh network, without norms where they are merged."""
        model = network.build(classes)
        for site in sites_of(model) if merged else ():
            model.set_submodule(site.path, nn.Identity())
        return model

    def write(self, folder: Path) -> None:
        """Weights, shape, log, and the network for other runtimes."""
        super().write(folder)
        if self.onnx:
            export_onnx(self.model, self.network, folder / ONNX)

    @classmethod
    def read(cls, path: str | Path) -> Classifier:
        """The network in a folder; see :meth:`lamella.results.TrainedNetwork.read`."""
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
    network: Network = Network(),
    norms: Schedule = Schedule(share=0.8, init="vision"),  # noqa: B008, frozen
    kind: Norms = "progressive",
    onnx: bool = False,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> Classifier:
    """Train a vision transformer from scratch whose norms become batch norms and are folded away.

    Args:
        images: pictures with classes; one in five is kept to judge.
        network: its shape.
        norms: how they go; the paper's four fifths of the steps, and eta 1, when left out.
        kind: ``progressive``, from layer norms to RepBN; ``progressive batch``, without eta; ``rep`` or ``batch`` from
            the first step; or ``layer``, which stay.
        onnx: write the network for other runtimes, too.
        config: of the training: 20 passes over the pictures when left out.
        work: where an interrupted run goes on from, to the bit.

    Returns:
        The network, with how many of the kept pictures it names before and after statistics are counted anew and after
        folding.

    Raises:
        CalibrationError: for pictures without classes.
        TrainingError: when training cannot start or stay finite.
    """
    test = list(images.part("test").items)
    if any(each.label is None for each in (*images.items, *test)):
        raise CalibrationError("these pictures have no classes: give a folder with a folder for each class, or digits")
    classes = 1 + max(each.label or 0 for each in (*images.items, *test))
    x, y = pixels(images.items, network), torch.tensor([each.label for each in images.items])
    config = replace(config, steps=config.steps or EPOCHS * max(1, len(x) // config.batch))
    model, log, findings = trained(network, classes, x, y, norms, kind, config, work.directory("run"))
    test_x, test_y = pixels(test, network), torch.tensor([each.label for each in test])
    findings["accuracy"] = finished(model, x, test_x, test_y, norms, kind, config.batch)
    findings["loss"] = [point.loss for point in log.train]
    merged = kind != "layer"
    return Classifier(
        model=model, network=network, classes=classes, merged=merged, log=log, onnx=onnx, findings=findings
    )


def trained(
    network: Network,
    classes: int,
    x: Sequence[Tensor],
    y: Tensor,
    norms: Schedule,
    kind: Norms,
    config: TrainConfig,
    out: Path,
) -> tuple[Any, TrainingLog, dict[str, Any]]:
    """A network trained from scratch, whose norms are not folded yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = network.build(classes)
    whole = config.steps or 1
    if kind != "layer":
        steps, warm = norms.steps(whole) if kind.startswith("progressive") else (0, 0)
        convert(model, sites_of(model), steps=steps, warm=warm, first=norms.first, init=norms.init)
    if "batch" in kind:
        for each in places(model):
            each.rep.eta.data.zero_()
            each.rep.eta.requires_grad_(False)
    still = {id(each.rep.eta) for each in places(model)} if "batch" in kind else set()
    names = {name for name, each in model.named_parameters() if id(each) not in still}
    rows = Lazy(range(len(y)), lambda row: {"x": x[row], "y": y[row]})
    settings = {"network": asdict(network), "kind": kind, "norms": asdict(norms)}
    log = fit(
        model, rows, supervised(class_cross_entropy), config, out=out, trainable=names.__contains__,
        hooks=[Transition()], settings=settings,
    )  # fmt: skip
    for each in places(model):
        each.step.fill_(whole)
    return model.eval(), log, {"parameters": sum(each.numel() for each in model.parameters())}


@torch.no_grad()
def finished(
    model: Any, x: Sequence[Tensor], test_x: Sequence[Tensor], test_y: Tensor, norms: Schedule, kind: Norms, batch: int
) -> dict[str, float]:
    """Statistics counted anew, and norms folded, in place; how many pictures are named at each point, and the loss."""
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
    return float((logits(model, x).argmax(1) == y).double().mean())


@torch.no_grad()
def logits(model: Any, x: Sequence[Tensor]) -> Tensor:
    """The logits of pictures [pictures, classes], computed in batches."""
    return torch.cat([model(rows) for rows in batches(x, JUDGED, torch.stack)])


def pixels(pictures: Sequence[Captioned], network: Network) -> Lazy[Tensor]:
    """Pictures as the network reads them, each decoded when it is asked for."""
    return Lazy(pictures, lambda each: prepared([each], network)[0])


def prepared(pictures: Sequence[Captioned], network: Network) -> Tensor:
    """Pictures as the network reads them [pictures, channels, size, size], from -1 to 1."""
    transforms = require("torchvision.transforms.v2", "vision", "scaling pictures")
    fit_ = transforms.Compose([transforms.Resize(network.size), transforms.CenterCrop(network.size)])
    rows = [torch.from_numpy(each.image).permute(2, 0, 1) for each in pictures]
    sides = (network.size, network.size)
    pixels = torch.stack([each if each.shape[1:] == sides else fit_(each) for each in rows]) / 127.5 - 1
    return pixels.mean(dim=1, keepdim=True) if network.channels == 1 else pixels


def export_onnx(model: Any, network: Network, file: Path) -> None:
    """Write a network for onnxruntime and its like, for batches of any size.

    Raises:
        LamellaError: when onnx or onnxscript is missing.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "onnx", "the export")
    x = torch.zeros(2, network.channels, network.size, network.size)
    batch = torch.export.Dim("batch")
    torch.onnx.export(model, (x,), file, dynamo=True, dynamic_shapes=({0: batch},), input_names=["pixels"],
                      output_names=["logits"], external_data=False, verbose=False)  # fmt: skip
