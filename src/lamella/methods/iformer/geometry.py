"""The geometry of a plain timm vision transformer, and the check that a model is one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lamella.errors import MethodError
from lamella.extras import require

SAME = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Geometry:
    """The sizes and options of a plain timm vision transformer: enough to rebuild it.

    Attributes:
        size, patch: height and width of an image and of a patch in pixels.
        channels, classes: channels of an image; number of classes, 0 for no head.
        width, depth, heads, hidden: hidden size, number of layers, attention heads and MLP intermediate size.
        qkv_bias, qk_norm, scaled: whether attention has biases and norms, and branches have LayerScale.
        class_token, registers, bare_prefix: tokens before those of the grid; whether these have no position embedding.
        pre_norm, final_norm, fc_norm: which norms it has.
        pool: pooling before the head.
        eps: epsilon of the norms.
    """

    size: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    classes: int
    width: int
    depth: int
    heads: int
    hidden: int
    qkv_bias: bool
    qk_norm: bool
    scaled: bool
    class_token: bool
    registers: int
    bare_prefix: bool
    pre_norm: bool
    final_norm: bool
    fc_norm: bool
    pool: str
    eps: float

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens of an image, rows and columns."""
        return self.size[0] // self.patch[0], self.size[1] // self.patch[1]

    @property
    def prefix(self) -> int:
        """Tokens before those of the grid."""
        return int(self.class_token) + self.registers

    @classmethod
    def of(cls, model: Any, name: str = "the model") -> Geometry:
        """Read the geometry of a model.

        Args:
            model: a timm model.
            name: name of the model for messages.

        Raises:
            MethodError: for a model that is not a plain timm vision transformer.
        """
        vit = require("timm.models.vision_transformer", "vision", "vision transformers")
        odd = _odd(model, vit)
        if odd:
            raise MethodError(f"{name} is not a timm vision transformer with plain attention: {odd}")
        first, sides = model.blocks[0], model.patch_embed
        found = cls(
            size=tuple(sides.img_size), patch=tuple(sides.patch_size), channels=sides.proj.in_channels,
            classes=model.num_classes, width=model.embed_dim, depth=len(model.blocks), heads=first.attn.num_heads,
            hidden=first.mlp.fc1.out_features, qkv_bias=first.attn.qkv.bias is not None,
            qk_norm=not isinstance(first.attn.q_norm, nn.Identity), scaled=not isinstance(first.ls1, nn.Identity),
            class_token=model.cls_token is not None, registers=getattr(model, "num_reg_tokens", 0),
            bare_prefix=model.no_embed_class, pre_norm=not isinstance(model.norm_pre, nn.Identity),
            final_norm=not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
            fc_norm=not isinstance(model.fc_norm, nn.Identity), pool=model.global_pool, eps=first.norm1.eps,
        )  # fmt: skip
        found.check(name)
        return found

    def check(self, name: str) -> None:
        """Raise a :class:`MethodError` for sizes that do not fit each other."""
        if min(*self.size, *self.patch, self.channels, self.width, self.depth, self.heads, self.hidden) < 1:
            raise MethodError(f"{name}: sizes must be 1 or more")
        if any(side % patch for side, patch in zip(self.size, self.patch, strict=True)):
            raise MethodError(
                f"{name} takes images of {self.size[0]} x {self.size[1]} pixels, which cannot be divided into patches "
                f"of {self.patch[0]} x {self.patch[1]}: give another size"
            )
        if self.width % self.heads:
            raise MethodError(f"{name}: {self.heads} heads do not divide a hidden size of {self.width}")

    def build(self) -> Any:
        """Build the network with new weights."""
        vit = require("timm.models.vision_transformer", "vision", "vision transformers")
        norm = partial(nn.LayerNorm, eps=self.eps)
        return vit.VisionTransformer(
            img_size=self.size, patch_size=self.patch, in_chans=self.channels, num_classes=self.classes,
            embed_dim=self.width, depth=self.depth, num_heads=self.heads, mlp_ratio=self.hidden / self.width,
            qkv_bias=self.qkv_bias, qk_norm=self.qk_norm, init_values=1e-5 if self.scaled else None,
            class_token=self.class_token, reg_tokens=self.registers, no_embed_class=self.bare_prefix,
            pre_norm=self.pre_norm, final_norm=self.final_norm, fc_norm=self.fc_norm, global_pool=self.pool,
            norm_layer=norm,
        )  # fmt: skip

    def verify(self, model: Any, name: str) -> None:
        """Check that the model equals the network that this geometry builds, by the logits of a random image.

        Args:
            model: the model.
            name: name of the model for messages.

        Raises:
            MethodError: if it is something else.
        """
        with torch.device("meta"):
            again = self.build().eval()
        try:
            again.load_state_dict(model.state_dict(), assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise MethodError(f"{name} is not a plain timm vision transformer: {reason}") from None
        noise = torch.randn(2, self.channels, *self.size, generator=torch.Generator().manual_seed(0))
        x = noise.to(next(model.parameters()))
        with torch.no_grad():
            logits, expected = (each.eval()(x) for each in (again, model))
        if not torch.allclose(logits, expected, rtol=SAME, atol=SAME * float(expected.abs().max())):
            raise MethodError(f"{name} is not a plain timm vision transformer: rebuilding it gives other logits")


def _odd(model: Any, vit: Any) -> str:
    """Return how a model differs from a plain vision transformer; empty if it does not."""
    if type(model) is not vit.VisionTransformer:
        return f"it is a {type(model).__name__}"
    if not len(model.blocks) or any(type(block) is not vit.Block for block in model.blocks):
        return "its blocks are of another class"
    for number, block in enumerate(model.blocks):
        attn = block.attn
        if type(attn) is not vit.Attention or getattr(attn, "gate", None) is not None:
            return f"block {number} has another kind of attention ({type(attn).__name__})"
        if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
            return f"block {number} has a norm after its attention"
        if attn.num_heads * attn.head_dim != model.embed_dim or attn.num_heads != model.blocks[0].attn.num_heads:
            return f"block {number} has {attn.num_heads} heads of {attn.head_dim}"
        if not isinstance(block.norm1, nn.LayerNorm):
            return f"block {number} has no layer norm"
    if getattr(model, "attn_pool", None) is not None:
        return "it pools by attention"
    return ""
