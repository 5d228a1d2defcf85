"""scikit-learn's digits, and convolutional networks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from torch import Tensor, nn

Set = tuple[Tensor, Tensor]  # images [images, 1, 8, 8] from 0 to 1, and their digits [images]


def split_digits(seed: int, test: int) -> tuple[Set, Set]:
    """Return the training and the test images in a random order.

    Args:
        seed: random seed.
        test: the number of test images.
    """
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], torch.tensor(data.target)[order]
    return (images[test:], labels[test:]), (images[:test], labels[:test])


def parts_of_digits(sets: tuple[Set, Set], parts: int) -> tuple[Set, Set]:
    """Return the sets with sub-classes as labels: k-means of the training images of each digit.

    Args:
        sets: training and test images with their digits.
        parts: number of sub-classes of each digit; the labels of digit d begin at ``parts * d``, the largest first.
    """
    (images, digits), _ = sets
    found = [KMeans(parts, n_init=4, random_state=0).fit(images[digits == digit].flatten(1)) for digit in range(10)]

    ranks = [np.bincount(each.labels_).argsort()[::-1].argsort() for each in found]

    def relabelled(images: Tensor, digits: Tensor) -> Set:
        labels = [parts * d + int(ranks[d][found[d].predict(each.flatten()[None])[0]])
                  for each, d in zip(images, digits.tolist(), strict=True)]  # fmt: skip
        return images, torch.tensor(labels)

    return relabelled(*sets[0]), relabelled(*sets[1])


def network(
    seed: int, convolutions: Sequence[tuple[int, bool]], hidden: int, bias: bool = True, classes: int = 10
) -> nn.Module:
    """Return an untrained network of 3 x 3 convolutions, some with pooling, and two linear layers.

    Args:
        seed: random seed.
        convolutions: channels of each convolution, and whether it is followed by pooling.
        hidden: the size of the first linear layer.
        bias: whether convolutions have a bias.
        classes: number of classes.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    before = 1
    for after, pools in convolutions:
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=bias), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pools else []
        before = after
    pixels = (8 >> sum(pools for _, pools in convolutions)) ** 2
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(before * pixels, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    ).eval()
