"""A model without some of its norms: what read behind them reads the stream itself, and has a bias.

The numbers are in the weights; this says which norms are gone. It stands on the wiring, torch and transformers alone:
checkpoints carry it with them, word for word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lamella.stack.wiring import Wiring

EXACT = False  # what it makes of a model is the same function of other weights


@dataclass(frozen=True)
class Form:
    """Which norms are gone.

    Attributes:
        gone: their paths in the model.
    """

    gone: tuple[str, ...] = ()


def rewrite(model: Any, wirings: Mapping[str, Wiring], form: Form) -> None:
    """Take norms out of a model, in place; what read behind them gets a bias of zeros where it has none.

    Args:
        model: a copy that may be changed.
        wirings: what its modules read and write, by the path of each list of layers.

    Raises:
        ValueError: for a path that is no norm which linear maps read.
    """
    known: dict[str, tuple[str, ...]] = {}
    for layers, wiring in wirings.items():
        known |= norms(model, layers, wiring)
    for path in form.gone:
        if path not in known:
            raise ValueError(f"{path} is no norm that linear maps read")
        model.set_submodule(path, nn.Identity())
        for reader in known[path]:
            linear = model.get_submodule(reader)
            if linear.bias is None:
                written = linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]
                zeros = torch.zeros(written, dtype=linear.weight.dtype, device=linear.weight.device)
                linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)


def norms(model: Any, layers: str, wiring: Wiring) -> dict[str, tuple[str, ...]]:
    """The norms of a stack by their paths, each with the linear maps that read it."""
    count = len(model.get_submodule(layers))
    parts = [(f"{layers}.{number}.{part.path}", part) for number in range(count) for part in wiring.layer]
    found: dict[str, list[str]] = {}
    last = ""
    for path, part in parts + [(part.path, part) for part in wiring.outside]:
        parent, _, name = path.rpartition(".")
        module = getattr(model.get_submodule(parent), name, None)
        vector = getattr(getattr(module, "weight", None), "ndim", 0) == 1
        if part.reads is None and part.writes == ("hidden",) and vector:
            last, found[path] = path, []
        elif part.reads == "hidden" and module is not None:
            found[last].append(path)
    return {path: tuple(readers) for path, readers in found.items() if readers}
