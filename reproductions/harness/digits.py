"""scikit-learn's digits, and convolutional networks for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

Set = tuple[Tensor, Tensor]  # images [images, 1, 8, 8] from 0 to 1, and their digits [images]


def split_digits(seed: int, test: int) -> tuple[Set, Set]:
    """The images to train on, and as many to test on, in an order that the seed draws."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], torch.tensor(data.target)[order]
    return (images[test:], labels[test:]), (images[:test], labels[:test])


def network(seed: int, convolutions: Sequence[tuple[int, bool]], hidden: int, bias: bool = True) -> nn.Module:
    """Convolutions of 3 x 3 by their channels, some halving the image, and two linear maps; not trained yet."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    before = 1
    for after, pools in convolutions:
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=bias), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pools else []
        before = after
    pixels = (8 >> sum(pools for _, pools in convolutions)) ** 2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(before * pixels, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    ).eval()
