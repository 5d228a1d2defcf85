"""Positions of norms and the linear layers after them: of a stack by its wiring, of timm's ViTs by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lamella.errors import ArchitectureError
from lamella.methods.slab.modules import PRepBN
from lamella.methods.slab.rewrite import norms
from lamella.stack import Stack

NORMS = (nn.LayerNorm, nn.RMSNorm, PRepBN)


@dataclass(frozen=True)
class Site:
    """A norm.

    Attributes:
        path: its path in the model.
        readers: paths of the linear layers after it, the only modules that use its output.
        writer: path of the linear layer or convolution before it, if it folds into that.
    """

    path: str
    readers: tuple[str, ...] = ()
    writer: str = ""


def sites_of(model: Any) -> list[Site]:
    """Return the norms of a model that fold, in the order in which they run.

    Args:
        model: a stack, or a ViT of timm.

    Raises:
        ArchitectureError: for a model whose wiring is not known.
    """
    found = list(_of_stack(model) if isinstance(model, Stack) else _of_timm(model))
    if not found:
        raise ArchitectureError(f"{type(model).__name__} has no norms whose next layers are known")
    return found


def _of_stack(stack: Stack) -> Iterator[Site]:
    wiring = stack.architecture.wired
    if wiring is None:
        raise ArchitectureError(f"it is not known what the modules of {stack.architecture.name} models read and write")
    layers = stack.architecture.prefix.removesuffix(".")
    for path, readers in norms(stack.model, layers, wiring).items():
        yield Site(path, readers)


def _of_timm(model: Any) -> Iterator[Site]:
    for index, block in enumerate(getattr(model, "blocks", ())):
        for norm, reader in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            if isinstance(getattr(block, norm, None), NORMS):
                yield Site(f"blocks.{index}.{norm}", (f"blocks.{index}.{reader}",))
    for norm in ("norm", "fc_norm"):
        if isinstance(getattr(model, norm, None), NORMS) and isinstance(getattr(model, "head", None), nn.Linear):
            yield Site(norm, ("head",))
