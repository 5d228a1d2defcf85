"""The rewrite of a model without some of its norms: the layers after them read the residual stream, and have biases.

The values are in the weights; the form only names the removed norms. This module depends on the wiring, torch and
transformers only: checkpoints contain a verbatim copy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lamella.stack.wiring import Wiring

EXACT = False  # the weights change with the rewrite


@dataclass(frozen=True)
class Form:
    """The removed norms.

    Attributes:
        gone: their paths in the model.
    """

    gone: tuple[str, ...] = ()


def rewrite(model: Any, wirings: Mapping[str, Wiring], form: Form) -> None:
    """Remove norms from a model in place; the layers after them get a zero bias if they have none.

    Args:
        model: a copy that may be changed.
        wirings: which parts of it read and write what, by the path of each list of layers.
        form: the removed norms.

    Raises:
        ValueError: for a path that is no norm before linear layers.
    """
    known: dict[str, tuple[str, ...]] = {}
    for layers, wiring in wirings.items():
        known |= norms(model, layers, wiring)
    for path in form.gone:
        if path not in known:
            raise ValueError(f"{path} is no norm before linear layers")
        model.set_submodule(path, nn.Identity())
        for reader in known[path]:
            linear = model.get_submodule(reader)
            if linear.bias is None:
                written = linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]
                zeros = torch.zeros(written, dtype=linear.weight.dtype, device=linear.weight.device)
                linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)


def norms(model: Any, layers: str, wiring: Wiring) -> dict[str, tuple[str, ...]]:
    """Return the norms of a stack by their paths, each with the linear layers after it.

    Args:
        model: a model that contains the stack.
        layers: path of the list of layers in the model.
        wiring: which modules of the architecture read from and write to the residual stream.
    """
    count = len(model.get_submodule(layers))
    parts = [(f"{layers}.{index}.{part.path}", part) for index in range(count) for part in wiring.layer]
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
