"""The layers that others would convert: the authors' modes of conversion, and chance."""

from __future__ import annotations

import torch

from lamella.errors import MethodError

MODES = ("first_half", "second_half", "sparse", "dense", "first_last_dense", "first_five_dense", "last_two_thirds",
         "arank_mod")  # fmt: skip


def mode_layers(mode: str, layers: int) -> list[int]:
    """The layers that one of the authors' modes converts, by its name in their code.

    >>> mode_layers("arank_mod", 8)
    [3, 4, 5, 6]
    >>> mode_layers("second_half", 8)
    [4, 5, 6]
    """
    last = layers - 1
    spans = {
        "first_half": range(layers // 2),
        "second_half": range(layers // 2, last),
        "sparse": range(0, layers, 2),
        "dense": range(layers),
        "first_last_dense": range(1, last),
        "first_five_dense": range(5, last),
        "last_two_thirds": range(layers // 3 + 2, last),
        "arank_mod": range(3, last),
    }
    if mode not in spans or not spans[mode]:
        raise MethodError(f"gamma-mod: {mode} converts no layer of {layers}; its modes are {', '.join(MODES)}")
    return list(spans[mode])


def random_layers(layers: int, count: int, seed: int) -> list[int]:
    """So many layers by chance."""
    return sorted(torch.randperm(layers, generator=torch.Generator().manual_seed(seed))[:count].tolist())
