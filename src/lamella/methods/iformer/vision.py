"""An image network as input, with its preprocessing."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lamella.data import Captioned
from lamella.errors import MethodError
from lamella.extras import require
from lamella.methods.iformer.folder import LARGEST, NETWORK, WEIGHTS, Preprocessing, kind_of, read_folder
from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.network import InceptionTransformer
from lamella.methods.iformer.textures import CLASSES, SIDE, textures
from lamella.plan import fingerprint
from lamella.signature import Fixture
from lamella.train import TrainConfig, class_cross_entropy, fit, supervised
from lamella.zoo import open_model
from lamella.zoo.cache import build_once
from lamella.zoo.views import View

BUILT_IN = "textures"
CONFIG = "config.json"
SMALL = {"img_size": SIDE, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 4}  # of the built-in model
LOOKED_AT = 2000  # training images of the built-in model
BATCH = 32


@dataclass(frozen=True, eq=False)
class Vision(View):
    """A trained network with its preprocessing.

    Attributes:
        model: in evaluation mode, from images [B, channels, height, width] to logits [B, classes].
        name: name for messages.
        size: height and width in pixels.
        channels: 1 for greyscale images, 3 for colour.
        mean: mean of a channel's values between 0 and 1.
        std: standard deviation of a channel's values between 0 and 1.
        crop: fraction of the image side that is used.
    """

    source_help = (
        "a folder with config.json and model.safetensors of a timm model, a folder written by iformer, or textures: a "
        "small vision transformer that is trained on first use"
    )
    noun = "vision transformer of timm"
    libraries = ("timm",)
    names = (BUILT_IN,)
    example = Fixture(BUILT_IN)

    model: Any
    name: str
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0

    @classmethod
    def open(cls, name: Any, *, size: int | None = None) -> Vision:
        """Open a network.

        Args:
            name: a timm model that ``lamella.open`` takes, a network written by iformer, or ``textures``.
            size: side in pixels, for which position embeddings are interpolated; defaults to the model's own. A network
                with local paths has a fixed size.

        Raises:
            CheckpointError: for a folder that is missing, damaged, or holds another kind of model.
            MethodError: for a size that patches do not divide, or a network with a fixed size.
        """
        if isinstance(name, str | Path) and (Path(name) / NETWORK).is_file():
            parts, preprocessing = read_folder(Path(name), kind_of(Path(name)))
            found = cls.from_model(parts["model"], preprocessing)
        else:
            found = super().open(name)
        return found if size is None else found.with_size(size)

    @classmethod
    def from_model(cls, model: Any, preprocessing: Preprocessing) -> Vision:
        """Wrap a network written by a command.

        Args:
            model: the network.
            preprocessing: its preprocessing.
        """
        return cls(model.eval(), **vars(preprocessing))

    @property
    def preprocessing(self) -> Preprocessing:
        """Its preprocessing."""
        return Preprocessing(**{each.name: getattr(self, each.name) for each in fields(Preprocessing)})

    @classmethod
    def built_in(cls, name: str) -> Vision:
        """The built-in ``textures`` model, which is trained on first use."""
        return replace(cls.of(open_model(built_in(), dtype=cls.dtype)), name=name)

    @classmethod
    def of(cls, model: Any, name: str | None = None, *, crop: float | None = None) -> Vision:
        """Wrap a timm model, with the mean and the standard deviation of its own configuration.

        Args:
            model: opened, or in memory.
            name: name for messages.
            crop: fraction of the image side that is used; defaults to the folder's setting, and to 1 for a model in
                memory.

        Raises:
            MethodError: for a model that is not a plain vision transformer.
        """
        opened = open_model(model)
        model, name = opened.model, name or opened.name
        Geometry.of(model, name)
        cfg = getattr(model, "pretrained_cfg", None) or {}
        if crop is None:
            crop = 1.0 if opened.path is None else float(cfg["crop_pct"])
        channels = model.patch_embed.proj.in_channels
        mean, std = (_by_channel(cfg.get(key), channels) for key in ("mean", "std"))
        return cls(model.eval(), name, tuple(model.patch_embed.img_size), channels, mean, std, crop)

    def with_size(self, size: int) -> Vision:
        """Adapt the network to images of another size.

        Args:
            size: side in pixels.

        Raises:
            MethodError: for a size that patches do not divide, or a network with a fixed size.
        """
        any_grid = isinstance(self.model, InceptionTransformer)  # it resizes its position embeddings itself
        patch = (1, 1) if any_grid else Geometry.of(self.model, self.name).patch
        if size < 1 or size % patch[0] or size % patch[1] or size > LARGEST:
            raise MethodError(
                f"size {size}: {self.name} has patches of {patch[0]} x {patch[1]}: give a multiple of at most {LARGEST}"
            )
        if not any_grid:
            self.model.set_input_size(img_size=(size, size))
        return replace(self, size=(size, size))

    def prepare(self, images: Sequence[Captioned]) -> Tensor:
        """Preprocess images [images, channels, height, width]."""
        data = require("timm.data", "vision", "scaling images")
        fitting = data.transforms_factory.transforms_imagenet_eval(
            self.size, crop_pct=self.crop, interpolation="bicubic", normalize=False
        )
        x = torch.stack([fitting(torch.from_numpy(each.image).permute(2, 0, 1)) for each in images]) / 255
        x = x.mean(dim=1, keepdim=True) if self.channels == 1 else x
        return (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)

    def batches(self, images: Sequence[Captioned]) -> Iterator[Tensor]:
        """Preprocessed images in batches, on the device and in the dtype of the model."""
        like = next(self.model.parameters())
        for first in range(0, len(images), BATCH):
            yield self.prepare(images[first : first + BATCH]).to(like)

    @torch.no_grad()
    def logits(self, images: Sequence[Captioned]) -> Tensor:
        """Compute the logits of images [images, classes], on the CPU."""
        return torch.cat([self.model(x).float().cpu() for x in self.batches(images)])

    def describe(self) -> dict[str, Any]:
        """Metadata for provenance."""
        parameters = sum(each.numel() for each in self.model.parameters())
        return {"name": self.name, "size": list(self.size), "mean": list(self.mean), "std": list(self.std),
                "crop": self.crop, "parameters": parameters, "sha256": fingerprint.state(self.model)}  # fmt: skip


def _by_channel(values: Any, channels: int) -> tuple[float, ...]:
    """Values per channel; defaults to 0.5."""
    found = [float(each) for each in values or [0.5] * channels]
    return tuple(found if len(found) == channels else [sum(found) / len(found)] * channels)


# The built-in one


def built_in() -> Path:
    """Folder of a small vision transformer trained on textures, created on first use."""
    decides = [inspect.getsource(sys.modules[textures.__module__]), inspect.getsource(_train), SMALL, LOOKED_AT]
    digest = hashlib.sha256(repr(decides).encode()).hexdigest()[:8]
    return build_once(f"iformer-textures-{digest}", _train, megabytes=20)


def _train(folder: Path) -> dict[str, Any]:
    timm = require("timm", "vision", "vision transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **SMALL)
        model.pos_embed.data.mul_(25)  # to the scale of patches: timm's 0.02 is too small for this short a training
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": CLASSES, "model_args": SMALL,
              "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}}  # fmt: skip
    vision = Vision(model, BUILT_IN, (SIDE, SIDE), 3, (0.5,) * 3, (0.5,) * 3)
    images = list(islice(textures("calibration"), LOOKED_AT))
    rows = [{"x": x, "y": torch.tensor(each.label)}
            for x, each in zip(vision.prepare(images), images, strict=True)]  # fmt: skip
    learn = TrainConfig(
        steps=500, lr=1.5e-3, batch=64, schedule="cosine", warmup=0.1, weight_decay=0.05, save_every=10_000
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        fit(model, rows, supervised(class_cross_entropy), learn, out=Path(work) / "run", trainable=lambda name: True)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file({name: each.contiguous() for name, each in model.state_dict().items()}, folder / WEIGHTS)
    return {"images": len(rows), "steps": learn.steps}
