"""A small vision transformer with and without tokens before its grid, and pictures for it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from lamella.data import Captioned
from lamella.methods.iformer import Vision
from lamella.methods.iformer.textures import textures


def vit(**other: Any) -> Any:
    """Random weights, with heads that look somewhere."""
    import timm

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 20} | other
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", **sizes)
        with torch.no_grad():
            for each in model.parameters():
                each.add_(0.2 * torch.randn_like(each))
    return model.eval()


@pytest.fixture
def vision() -> Vision:
    return Vision.of(vit(), "a small ViT")


@pytest.fixture(scope="session")
def images() -> tuple[Captioned, ...]:
    return tuple(islice(textures("calibration"), 20))
