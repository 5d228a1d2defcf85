"""Vision transformers of timm, which are no stacks: their wiring, and their rewrite in Python."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lamella.errors import MethodError
from lamella.extras import require
from lamella.methods.pre_rmsnorm.report import MOST
from lamella.methods.pre_rmsnorm.rewrite import Fold, Form, Norm, rewrite
from lamella.stack.wiring import Part, Wiring

LAYERS = "blocks"
IMAGES = 2


def wiring_of(model: Any) -> Wiring:
    """Return what the modules of a vision transformer of timm read and write.

    Args:
        model: a ``VisionTransformer`` with blocks of the class ``Block``.

    Raises:
        MethodError: for another model, such as one whose norms follow its sublayers.
    """
    timm = require("timm.models.vision_transformer", "vision", "models of timm")
    if not isinstance(model, timm.VisionTransformer) or any(type(each) is not timm.Block for each in model.blocks):
        raise MethodError(f"{type(model).__name__} is not a vision transformer of timm with its usual blocks")
    first = "embedded" if isinstance(model.norm_pre, nn.LayerNorm) else "hidden"  # the norm before the first block
    norm = "norm" if isinstance(model.norm, nn.LayerNorm) else "fc_norm"
    tokens = ("cls_token", "reg_token", "dist_token", "pos_embed")
    return Wiring(
        sublayers={
            "attn": (
                Part("norm1", None, ("hidden",)),
                Part("attn.qkv", "hidden", ("heads",)),
                Part("attn.gate", "hidden", ("queries",)),
                *(Part(f"attn.{each}", "heads", ("heads",)) for each in ("q_norm", "k_norm", "norm")),
                Part("attn.proj", "queries", ("branch",)),
                Part("ls1", "branch", ("hidden",)),
            ),
            "mlp": (
                Part("norm2", None, ("hidden",)),
                Part("mlp.fc1", "hidden", ("channels",)),
                Part("mlp.norm", "channels", ("channels",)),
                Part("mlp.fc2", "channels", ("branch",)),
                Part("ls2", "branch", ("hidden",)),
            ),
        },
        outside=(
            *(Part(each, "tokens", (first,)) for each in tokens),
            Part("patch_embed.proj", "patches", (first,)),
            *((Part("norm_pre", "embedded", ("hidden",)),) if first == "embedded" else ()),
            Part(norm, None, ("hidden",)),
            *(Part(each, "hidden", ()) for each in ("head", "head_dist") if isinstance(_of(model, each), nn.Linear)),
        ),
        centred=True,
    )


def _of(model: Any, name: str) -> Any:
    return getattr(model, name, None)


@torch.no_grad()
def rewrite_timm(model: Any, *, norm: Norm = "rms", fold: Fold | None = None, seed: int = 0) -> Any:
    """Return a copy of a vision transformer of timm with RMSNorm or CRMSNorm, which computes the same.

    The copy is compared with the model on random images in float64, and in its own precision.

    Args:
        model: a ``VisionTransformer`` of timm; it is not changed.
        norm: ``rms`` for RMSNorm, ``crms`` for CRMSNorm.
        fold: part of each norm that is folded into the linear layers after it; by default all of it (``affine``) for
            CRMSNorm, otherwise ``nothing``.
        seed: random seed of the images.

    Raises:
        MethodError: for a model that cannot be rewritten, or when the result differs.
    """
    try:
        form, wirings = Form(norm, fold or ("affine" if norm == "crms" else "nothing"), "untie"), wiring_of(model)
        exact, found = (copy.deepcopy(model).eval() for _ in range(2))
        rewrite(found, {LAYERS: wirings}, form)
        precise = copy.deepcopy(exact).double()
        rewrite(precise, {LAYERS: wirings}, form)
    except ValueError as error:
        raise MethodError(str(error)) from None
    like = next(model.parameters())
    drawn = torch.Generator().manual_seed(seed)
    pixels = torch.randn(IMAGES, model.patch_embed.proj.in_channels, *model.patch_embed.img_size, generator=drawn)
    for ours, theirs, dtype in ((precise, copy.deepcopy(exact).double(), torch.float64), (found, exact, like.dtype)):
        x = pixels.to(like.device, dtype)
        expected, result = theirs(x).double(), ours(x).double()
        distance, size = float((result - expected).abs().max()), float(expected.abs().max())
        if not distance <= MOST[str(dtype).removeprefix("torch.")] * size:
            raise MethodError(
                f"the rewritten {type(model).__name__} differs by {distance:.2g} where outputs reach {size:.2g}: some "
                "module reads or writes its residual stream in an unknown way"
            )
    return found.train(model.training)
