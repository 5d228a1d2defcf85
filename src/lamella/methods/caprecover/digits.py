"""A small built-in victim: a network of four stages trained on scikit-learn's digits."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lamella.data import Captioned, CaptionedImages, InputContext
from lamella.plan.filling import fill
from lamella.train import TrainConfig, class_cross_entropy, fit, supervised
from lamella.zoo.cache import build_once

NAME = "digits"
WIDTHS = ((16, 1), (32, 1), (64, 2), (64, 2))  # channels and strides
CUTS = {f"stage{number}": f"stage{number}" for number in range(1, 5)} | {"pooled": "pool"}
TRAINED = 700  # training images of the victim; the others are for attackers and their evaluation
EPOCHS = 20


class FourStages(nn.Module):
    """Four stages of convolution, batch norm and ReLU, then average pooling and a linear layer to ten classes."""

    def __init__(self) -> None:
        super().__init__()
        before = 1
        for number, (width, stride) in enumerate(WIDTHS, start=1):
            convolution = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
            self.add_module(f"stage{number}", nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [batch, 10] of images [batch, 1, height, width]."""
        for number in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"stage{number}")(x)
        logits: Tensor = self.classifier(self.pool(x))
        return logits


def prepare(images: Sequence[Captioned]) -> Tensor:
    """Convert images to grey values from 0 to 1 [images, 1, height, width]."""
    return torch.stack([torch.from_numpy(each.image[..., 0])[None] / 255 for each in images])


def digest(each: Captioned) -> str:
    """Return the SHA-256 of an image."""
    return hashlib.sha256(each.image.tobytes()).hexdigest()


def victim() -> tuple[nn.Module, frozenset[str]]:
    """Return the trained network and the digests of its training images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FourStages()
    images = _training_images()
    folder = build_once("caprecover-digits", lambda folder: _train(model, folder), megabytes=20)
    fill(model, load_file(folder / "model.safetensors"), folder)
    return model.eval().requires_grad_(False), frozenset(map(digest, images))


def _training_images() -> Sequence[Captioned]:
    return CaptionedImages.open(NAME, InputContext(), count=TRAINED).items


def _train(model: nn.Module, folder: Path) -> dict[str, Any]:
    images = _training_images()
    rows = [{"x": x, "y": torch.tensor(each.label)} for x, each in zip(prepare(images), images, strict=True)]
    config = TrainConfig(
        steps=EPOCHS * len(rows) // 64, lr=2e-3, batch=64, schedule="cosine", warmup=0.1, save_every=10_000
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        fit(model, rows, supervised(class_cross_entropy), config, out=Path(work) / "run", trainable=lambda name: True)
    save_file(model.state_dict(), folder / "model.safetensors")
    return {"images": len(rows), "steps": config.steps}
