"""iFormers as timm models: ``timm.create_model("iformer_small", ...)`` once this module is imported."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from lamella.methods.iformer.network import (
    BASE,
    LARGE,
    SMALL,
    InceptionTransformer,
    StageShape,
    adapt_checkpoint,
    start,
)

_CFG = {
    "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.9, "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "first_conv": "patch_embed.proj1", "classifier": "head",
    "fixed_input_size": False,
}  # fmt: skip
default_cfgs = generate_default_cfgs({f"iformer_{size}": _CFG for size in ("small", "base", "large")})


class Backbone(InceptionTransformer):
    """An iFormer with the interface that timm expects of a model."""

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Compute the feature maps after stages; see timm.

        Args:
            x: images [B, channels, H, W].
            indices: indices of the stages; a number selects that many last stages, None all.
            norm: apply the final norm to the last map.
            stop_early: stop after the last requested stage.
            output_fmt: NCHW or NHWC.
            intermediates_only: do not return the last map separately.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt '{output_fmt}': choose NCHW or NHWC")
        taken, last = feature_take_indices(self.stages, indices)
        found, whole = [], len(self.shape.depths) - 1  # the final norm belongs to the last map of the whole network
        for stage in range(last + 1 if stop_early else self.stages):
            x = self.stage(x, stage)
            if stage in taken:
                seen = self.norm(x) if norm and stage == whole else x
                found.append(seen.permute(0, 3, 1, 2) if output_fmt == "NCHW" else seen)
        return found if intermediates_only else (self.norm(x) if stage == whole else x, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last requested one, and the head; if a stage is dropped, so is the final norm.

        Args:
            indices: indices of the requested stages.
            prune_norm: drop the final norm.
            prune_head: drop the head.

        Returns:
            The indices of the requested stages.
        """
        taken, last = feature_take_indices(self.stages, indices)
        fewer = last + 1 < self.stages
        for stage in range(last + 1, self.stages):
            for name in ("patch_embed", "pos_embed", "blocks"):
                delattr(self, f"{name}{stage + 1}")
        self.stages = last + 1
        self.num_features = self.head_hidden_size = self.shape.widths[last]
        if prune_head or fewer:
            self.reset_classifier(0)
        if prune_norm or fewer:
            self.norm = nn.Identity()  # type: ignore[assignment]
        return list(taken)

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one.

        Args:
            num_classes: number of classes; 0 for no head.
            global_pool: pooling before the head; None keeps it.
        """
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = head.apply(start).to(next(self.parameters()).device)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing on or off."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that get no weight decay."""
        return {f"pos_embed{stage + 1}" for stage in range(self.stages)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters from input to output.

        Args:
            coarse: one group per stage.
        """
        return {
            "stem": r"^patch_embed\.|^pos_embed1",
            "blocks": r"^(?:blocks|patch_embed|pos_embed)(\d)"
            if coarse
            else [(r"^blocks(\d)\.(\d+)", None), (r"^(?:patch_embed|pos_embed)(\d)", (0,)), (r"^norm", (99999,))],
        }


def create_model(name: str, shape: StageShape, pretrained: bool = False, **options: Any) -> Any:
    """Create a model of any shape under the configuration of a name registered with timm.

    Args:
        name: registered name.
        shape: the shape.
        pretrained: load pre-trained weights.
        options: further arguments of the model.
    """
    return build_model_with_cfg(
        partial(Backbone, shape), name, pretrained, pretrained_filter_fn=adapt_checkpoint,
        feature_cfg={"out_indices": tuple(range(len(shape.depths))), "feature_cls": "getter"}, **options,
    )  # fmt: skip


@register_model
def iformer_small(pretrained: bool = False, **options: Any) -> Any:
    """Create iFormer-S: 19,866,344 parameters at 224 pixels."""
    return create_model("iformer_small", SMALL, pretrained, **options)


@register_model
def iformer_base(pretrained: bool = False, **options: Any) -> Any:
    """Create iFormer-B: 47,866,216 parameters at 224 pixels."""
    return create_model("iformer_base", BASE, pretrained, **options)


@register_model
def iformer_large(pretrained: bool = False, **options: Any) -> Any:
    """Create iFormer-L: 86,637,096 parameters at 224 pixels."""
    return create_model("iformer_large", LARGE, pretrained, **options)
