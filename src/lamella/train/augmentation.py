"""Augmentation of training images by timm: crops, RandAugment and erasing of images, mixup and CutMix of batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lamella.errors import TrainingError
from lamella.extras import require
from lamella.train.task import Batch


@dataclass(frozen=True)
class Augmentation:
    """Random changes of training images; defaults are those with which vision transformers are trained on ImageNet.

    Attributes:
        crop: smallest area of a random crop, as a fraction of the image; 1 for none.
        flip: probability of a horizontal flip.
        policy: timm's name of a policy, such as ``rand-m9-mstd0.5-inc1`` for RandAugment; "" for none.
        erasing: probability that a rectangle is erased.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix, which alternates with mixup; 0 for none.
        smoothing: label smoothing.
    """

    crop: Annotated[float, Gt(0), Le(1)] = 0.08
    flip: Annotated[float, Ge(0), Le(1)] = 0.5
    policy: str = "rand-m9-mstd0.5-inc1"
    erasing: Annotated[float, Ge(0), Le(1)] = 0.25
    mixup: Annotated[float, Ge(0)] = 0.8
    cutmix: Annotated[float, Ge(0)] = 1.0
    smoothing: Annotated[float, Ge(0), Lt(1)] = 0.1

    prefixed: ClassVar[bool] = True


class AugmentedLoss:
    """Cross-entropy of a classifier on augmented images in training, and on the images themselves in evaluation.

    The random state is that of training, so that an interrupted run resumes bit-exactly.

    Args:
        augmentation: the random changes.
        classes: number of classes.
        mean: mean by which images are normalised, for values between 0 and 1, one value per channel.
        std: standard deviation by which they are normalised, one value per channel.
    """

    def __init__(
        self, augmentation: Augmentation, classes: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        self.augmentation = augmentation
        self.mean, self.std = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))
        self._change: Callable[[Any], Tensor] | None = None
        self._changes = augmentation.crop < 1 or any((augmentation.flip, augmentation.policy, augmentation.erasing))
        self._mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        if augmentation.mixup or augmentation.cutmix:
            data = require("timm.data", "vision", "augmentation")
            self._mix = data.Mixup(
                mixup_alpha=augmentation.mixup, cutmix_alpha=augmentation.cutmix,
                label_smoothing=augmentation.smoothing, num_classes=classes,
            )  # fmt: skip

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch in nats.

        Args:
            model: maps ``x`` to logits [rows, classes].
            batch: normalised images ``x`` [rows, channels, height, width] and the indices of their classes ``y``.

        Raises:
            TrainingError: for an odd number of images, which mixup cannot pair.
        """
        x, y = batch["x"], batch["y"]
        if not model.training:
            return cross_entropy(model(x).float(), y)
        x = torch.stack([self.changed(each) for each in x]) if self._changes else x.clone()
        if self._mix is None:
            return cross_entropy(model(x).float(), y, label_smoothing=self.augmentation.smoothing)
        if len(x) % 2:
            raise TrainingError(f"batch {len(x)}: mixup pairs images: give an even batch")
        x, targets = self._mix(x, y)
        return cross_entropy(model(x).float(), targets)

    def changed(self, x: Tensor) -> Tensor:
        """Return one image after random changes, normalised like the given one.

        Args:
            x: a normalised image [channels, height, width].
        """
        functional = require("torchvision.transforms.functional", "vision", "augmentation")
        if self._change is None:
            chosen = self.augmentation
            self._change = change = require("timm.data", "vision", "augmentation").create_transform(
                tuple(x.shape[1:]), is_training=True, scale=(chosen.crop, 1.0), hflip=chosen.flip,
                color_jitter=None, auto_augment=chosen.policy or None, interpolation="bicubic",
                re_prob=chosen.erasing, re_mode="pixel", mean=(0.5,) * 3, std=(0.5,) * 3,
            )  # fmt: skip
            for step in change.transforms:
                for operation in getattr(step, "ops", ()):
                    if operation.name.startswith("Posterize"):
                        operation.level_fn = partial(_at_least_a_bit, operation.level_fn)
        pixels = (255 * (x.cpu().float() * self.std + self.mean)).round().clamp(0, 255).byte()
        found = self._change(functional.to_pil_image(pixels.expand(3, -1, -1))) / 2 + 0.5  # between 0 and 1
        found = found.mean(0, keepdim=True) if len(x) == 1 else found
        return ((found - self.mean) / self.std).to(x)


def _at_least_a_bit(level: Callable[..., tuple[int, ...]], *arguments: Any) -> tuple[int, ...]:
    """Return timm's number of bits for posterisation; it may be 0, which Pillow refuses."""
    return (max(1, level(*arguments)[0]),)
