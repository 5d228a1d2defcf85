"""The input: a network that looks at pictures, with how it wants them."""

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
from lamella.methods.iformer.folder import LARGEST, NETWORK, WEIGHTS, Looks, kind_of, read_folder
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
LOOKED_AT = 2000  # pictures that it learns from
BATCH = 32


@dataclass(frozen=True, eq=False)
class Vision(View):
    """A trained network and how it wants its pictures.

    Attributes:
        model: in evaluation mode, from pictures [B, channels, height, width] to logits [B, classes].
        name: what to call it.
        size: pixels, height and width.
        channels: 1 for grey pictures, 3 for colours.
        mean, std: of a channel's values between 0 and 1.
        crop: the share of a picture, on a side, that is looked at.
    """

    source_help = (
        "the folder of a timm model with its config.json and model.safetensors, of a network that iformer wrote, or "
        "textures: a small vision transformer that is trained when it is first asked for"
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
            name: a timm model that ``lamella.open`` takes, a network that iformer wrote, or ``textures``.
            size: pixels on a side, for which positions are interpolated; the model's own when left out. One with local
                paths has no other.

        Raises:
            CheckpointError: for a folder that is missing, damaged, or holds another kind of model.
            MethodError: for a size that patches do not divide, or a network that has one size.
        """
        if isinstance(name, str | Path) and (Path(name) / NETWORK).is_file():
            parts, looks = read_folder(Path(name), kind_of(Path(name)))
            found = cls.around(parts["model"], looks)
        else:
            found = super().open(name)
        return found if size is None else found.sized(size)

    @classmethod
    def around(cls, model: Any, looks: Looks) -> Vision:
        """A network that a command wrote, for pictures as it wants them."""
        return cls(model.eval(), **vars(looks))

    @property
    def looks(self) -> Looks:
        """How it wants its pictures."""
        return Looks(**{each.name: getattr(self, each.name) for each in fields(Looks)})

    @classmethod
    def built_in(cls, name: str) -> Vision:
        """``textures``, which is trained when it is first asked for."""
        return replace(cls.of(open_model(built_in(), dtype=cls.dtype)), name=name)

    @classmethod
    def of(cls, model: Any, name: str | None = None, *, crop: float | None = None) -> Vision:
        """A timm model, with the mean and the deviation of its own configuration.

        Args:
            model: opened, or in memory.
            name: what to call it.
            crop: the share of a picture, on a side, that is looked at; left out, what a folder says, and all for a
                model in memory.

        Raises:
            MethodError: for one that is no plain vision transformer.
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

    def sized(self, size: int) -> Vision:
        """The same network for pictures of another size.

        Raises:
            MethodError: for a size that patches do not divide, or a network that has one size.
        """
        any_grid = isinstance(self.model, InceptionTransformer)  # it interpolates whenever it runs
        patch = (1, 1) if any_grid else Geometry.of(self.model, self.name).patch
        if size < 1 or size % patch[0] or size % patch[1] or size > LARGEST:
            raise MethodError(
                f"size {size}: {self.name} has patches of {patch[0]} x {patch[1]}, so give a multiple up to {LARGEST}"
            )
        if not any_grid:
            self.model.set_input_size(img_size=(size, size))
        return replace(self, size=(size, size))

    def prepare(self, pictures: Sequence[Captioned]) -> Tensor:
        """Pictures as the network reads them [pictures, channels, height, width]."""
        data = require("timm.data", "vision", "scaling pictures")
        fitting = data.transforms_factory.transforms_imagenet_eval(
            self.size, crop_pct=self.crop, interpolation="bicubic", normalize=False
        )
        x = torch.stack([fitting(torch.from_numpy(each.image).permute(2, 0, 1)) for each in pictures]) / 255
        x = x.mean(dim=1, keepdim=True) if self.channels == 1 else x
        return (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)

    def batches(self, pictures: Sequence[Captioned]) -> Iterator[Tensor]:
        """Prepared pictures, some at a time, where the model is and in its type of numbers."""
        like = next(self.model.parameters())
        for first in range(0, len(pictures), BATCH):
            yield self.prepare(pictures[first : first + BATCH]).to(like)

    @torch.no_grad()
    def logits(self, pictures: Sequence[Captioned]) -> Tensor:
        """What it says of pictures [pictures, classes], on the host."""
        return torch.cat([self.model(x).float().cpu() for x in self.batches(pictures)])

    def describe(self) -> dict[str, Any]:
        """What provenance says of it."""
        parameters = sum(each.numel() for each in self.model.parameters())
        return {"name": self.name, "size": list(self.size), "mean": list(self.mean), "std": list(self.std),
                "crop": self.crop, "parameters": parameters, "sha256": fingerprint.state(self.model)}  # fmt: skip


def _by_channel(values: Any, channels: int) -> tuple[float, ...]:
    """Numbers for each channel; a half where there are none."""
    found = [float(each) for each in values or [0.5] * channels]
    return tuple(found if len(found) == channels else [sum(found) / len(found)] * channels)


# The built-in one


def built_in() -> Path:
    """The folder of a small vision transformer that knows textures, trained when it is first asked for."""
    decides = [inspect.getsource(sys.modules[textures.__module__]), inspect.getsource(_train), SMALL, LOOKED_AT]
    digest = hashlib.sha256(repr(decides).encode()).hexdigest()[:8]
    return build_once(f"iformer-textures-{digest}", _train, megabytes=20)


def _train(folder: Path) -> dict[str, Any]:
    timm = require("timm", "vision", "vision transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **SMALL)
        model.pos_embed.data.mul_(25)  # as large as patches: from timm's 0.02 so short a training never learns to look
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": CLASSES, "model_args": SMALL,
              "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}}  # fmt: skip
    vision = Vision(model, BUILT_IN, (SIDE, SIDE), 3, (0.5,) * 3, (0.5,) * 3)
    pictures = list(islice(textures("calibration"), LOOKED_AT))
    rows = [{"x": x, "y": torch.tensor(each.label)}
            for x, each in zip(vision.prepare(pictures), pictures, strict=True)]  # fmt: skip
    learn = TrainConfig(
        steps=500, lr=1.5e-3, batch=64, schedule="cosine", warmup=0.1, weight_decay=0.05, save_every=10_000
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        fit(model, rows, supervised(class_cross_entropy), learn, out=Path(work) / "run", trainable=lambda name: True)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file({name: each.contiguous() for name, each in model.state_dict().items()}, folder / WEIGHTS)
    return {"pictures": len(rows), "steps": learn.steps}
