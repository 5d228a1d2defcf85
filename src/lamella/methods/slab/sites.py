"""Positions of norms and the layers beside them: of a stack by its wiring, of vision transformers by name."""

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
        readers: paths of the linear layers and convolutions after it, the only modules that use its output.
        writer: path of the linear layer or convolution before it, if it folds into that.
    """

    path: str
    readers: tuple[str, ...] = ()
    writer: str = ""


def sites_of(model: Any) -> list[Site]:
    """Return the norms of a model that fold, in the order in which they run.

    Args:
        model: a stack, a ViT or Swin of timm, or a PVT of :class:`lamella.methods.slab.networks.VisionConfig`.

    Raises:
        ArchitectureError: for a model whose wiring is not known, or a Swin that pads its windows.
    """
    found = list(_of_stack(model) if isinstance(model, Stack) else _of_vision(model))
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


def _of_vision(model: Any) -> Iterator[Site]:
    for site in _of_pvt(model) if hasattr(model, "encoder") else _of_timm(model):
        parent, _, name = site.path.rpartition(".")
        if isinstance(getattr(model.get_submodule(parent), name, None), NORMS):
            yield site


def _of_timm(model: Any) -> Iterator[Site]:
    if hasattr(model, "patch_embed"):
        yield Site("patch_embed.norm", writer="patch_embed.proj")
    for path, module in model.named_modules():
        if hasattr(module, "reduction"):
            yield Site(f"{path}.norm", (f"{path}.reduction",))
        elif hasattr(module, "norm1") and hasattr(module, "attn"):
            sides, windows = (getattr(module, name, (1,)) for name in ("input_resolution", "window_size"))
            if any(side % window for side, window in zip(sides, windows, strict=True)):
                raise ArchitectureError(f"{path} pads its windows with zeros after the norm: give whole windows")
            yield Site(f"{path}.norm1", (f"{path}.attn.qkv",))
            yield Site(f"{path}.norm2", (f"{path}.mlp.fc1",))
    head = getattr(model, "head", None)
    readers = ("head.fc",) if isinstance(getattr(head, "fc", None), nn.Linear) else ("head",)
    if isinstance(head, nn.Linear) or readers == ("head.fc",):
        yield from (Site("norm", readers), Site("fc_norm", readers))


def _of_pvt(model: Any) -> Iterator[Site]:
    for stage, layers in enumerate(model.encoder.block):
        embedding = f"encoder.patch_embeddings.{stage}"
        yield Site(f"{embedding}.layer_norm", writer=f"{embedding}.projection")
        for index, layer in enumerate(layers):
            path = f"encoder.block.{stage}.{index}"
            inner = f"{path}.attention.self"
            readers: tuple[str, ...] = ("query", "key", "value")
            if hasattr(layer.attention, "attention"):  # linear
                inner, readers = f"{path}.attention.attention", ("qkv",)
            elif layer.attention.self.sequences_reduction_ratio > 1:
                readers = ("query", "sequence_reduction")
                yield Site(f"{inner}.layer_norm", writer=f"{inner}.sequence_reduction")
            yield Site(f"{path}.layer_norm_1", tuple(f"{inner}.{each}" for each in readers))
            yield Site(f"{path}.layer_norm_2", (f"{path}.mlp.dense1",))
    yield Site("encoder.layer_norm", ("head",))
