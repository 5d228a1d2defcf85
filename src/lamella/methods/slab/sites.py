"""Where norms are, and which linear maps read what they give: of a stack by its wiring, of timm's ViTs by name."""

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
    """One norm.

    Attributes:
        path: of the norm in its model.
        readers: the paths of the linear maps that read it, and nothing else does.
        writer: the path of what it reads, where it stands behind a linear map or a convolution and folds into that.
    """

    path: str
    readers: tuple[str, ...] = ()
    writer: str = ""


def sites_of(model: Any) -> list[Site]:
    """The norms of a model that fold, in the order in which they run.

    Args:
        model: a stack, or a ViT of timm.

    Raises:
        ArchitectureError: for a model of which it is not known what reads behind its norms.
    """
    found = list(_of_stack(model) if isinstance(model, Stack) else _of_timm(model))
    if not found:
        raise ArchitectureError(f"{type(model).__name__} has no norms of which it is known what reads behind them")
    return found


def _of_stack(stack: Stack) -> Iterator[Site]:
    wiring = stack.architecture.wired
    if wiring is None:
        raise ArchitectureError(f"nothing says what the modules of {stack.architecture.name} models read and write")
    layers = stack.architecture.prefix.removesuffix(".")
    for path, readers in norms(stack.model, layers, wiring).items():
        yield Site(path, readers)


def _of_timm(model: Any) -> Iterator[Site]:
    for number, block in enumerate(getattr(model, "blocks", ())):
        for norm, reader in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            if isinstance(getattr(block, norm, None), NORMS):
                yield Site(f"blocks.{number}.{norm}", (f"blocks.{number}.{reader}",))
    for norm in ("norm", "fc_norm"):
        if isinstance(getattr(model, norm, None), NORMS) and isinstance(getattr(model, "head", None), nn.Linear):
            yield Site(norm, ("head",))
