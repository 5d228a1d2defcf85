"""What is measured of a vision transformer before anything is decided: spectra, locality, and what each head is worth.

A head is worth what the output moves by when the head's fitted convolution stands in its place (KL divergence in nats
from what the model says as it is). Convolutions are fitted on four fifths of the pictures and judged on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import conv2d, kl_div, log_softmax

from lamella.data import Captioned
from lamella.errors import CalibrationError, MethodError, NumericsError
from lamella.files import Finished
from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.locality import Moments, attention_distance, heads_of, kernels, on_grid
from lamella.methods.iformer.modules import LocalAttention
from lamella.methods.iformer.network import InceptionTransformer
from lamella.methods.iformer.spectra import Spectra
from lamella.methods.iformer.vision import BATCH, Vision
from lamella.progress import track

Replacement = Callable[[int, Tensor, Tensor], Tensor]  # layer, V and output of its heads, to what stands for the output
JUDGED = 0.2  # of the pictures
FEWEST = 10  # pictures


@dataclass(frozen=True)
class Fit:
    """The convolutions that stand for the heads of one layer.

    Attributes:
        weights: of each channel, its bias last [n d, k k + 1].
        prefix: what heads give tokens before the grid, on average [prefix, n d].
        explained: R^2 of each head on pictures that were not fitted.
        distance: how far each head looks, in places.
    """

    weights: Tensor
    prefix: Tensor
    explained: list[float]
    distance: list[float]


def halves(pictures: Sequence[Captioned]) -> tuple[Sequence[Captioned], Sequence[Captioned]]:
    """Pictures to fit on, and to judge on.

    Raises:
        CalibrationError: for too few of them.
    """
    if len(pictures) < FEWEST:
        raise CalibrationError(f"{len(pictures)} pictures are too few to fit and to judge: give {FEWEST} or more")
    judged = max(2, round(JUDGED * len(pictures)))
    return pictures[:-judged], pictures[-judged:]


@torch.no_grad()
def fits(vision: Vision, geometry: Geometry, pictures: Sequence[Captioned], kernel: int, ridge: float) -> list[Fit]:
    """The convolution that stands for each head of each layer."""
    depth, heads, width = geometry.depth, geometry.heads, geometry.width
    sums = [[Moments.empty(width, kernel) for _ in range(2)] for _ in range(depth)]
    prefix = torch.zeros(depth, geometry.prefix, width, dtype=torch.float64)
    distance = torch.zeros(depth, heads, dtype=torch.float64)

    def look(layer: int, part: int, attn: Any, given: Any) -> None:
        weights, v, out = heads_of(attn, given[0])
        if not torch.isfinite(out).all():
            raise NumericsError(f"what layer {layer} of {vision.name} gives is not finite: check its weights")
        sums[layer][part].add(on_grid(v, geometry.grid), on_grid(out, geometry.grid), kernel)
        if part == 0:
            prefix[layer] += out[:, :, : geometry.prefix].sum(0).transpose(0, 1).flatten(1).double().cpu()
            distance[layer] += len(out) * attention_distance(weights, geometry.grid).double().cpu()

    both = halves(pictures)
    for part, chosen in enumerate(both):
        hooks = [block.attn.register_forward_pre_hook(partial(look, layer, part))
                 for layer, block in enumerate(vision.model.blocks)]  # fmt: skip
        try:
            what, count = f"fitting convolutions ({'judging' if part else 'sums'})", -(-len(chosen) // BATCH)
            for x in track(vision.batches(chosen), what, count):
                vision.model(x)
        finally:
            for hook in hooks:
                hook.remove()
    found = []
    for layer, (fitted, judged) in enumerate(sums):
        weights = fitted.solve(ridge)
        found.append(
            Fit(weights, (prefix[layer] / len(both[0])).float(), judged.explained(weights, heads),
                (distance[layer] / len(both[0])).tolist())
        )  # fmt: skip
    return found


def convolved(found: Sequence[Fit], geometry: Geometry, kernel: int) -> Replacement:
    """What fitted convolutions give in place of heads."""

    def replaced(layer: int, v: Tensor, out: Tensor) -> Tensor:
        weight, bias = (each.to(v) for each in kernels(found[layer].weights, kernel, range(geometry.width)))
        maps = conv2d(on_grid(v, geometry.grid), weight, bias, padding=kernel // 2, groups=geometry.width)
        rows = maps.unflatten(1, (geometry.heads, -1)).flatten(3).transpose(2, 3)  # [B, n, H W, d]
        first = found[layer].prefix.to(v).unflatten(1, (geometry.heads, -1)).transpose(0, 1)  # [n, prefix, d]
        return torch.cat([first.expand(len(v), -1, -1, -1), rows], dim=2)

    return replaced


@torch.no_grad()
def importance(
    vision: Vision,
    geometry: Geometry,
    pictures: Sequence[Captioned],
    replaced: Replacement,
    finished: Finished,
    what: str = "heads",
) -> npt.NDArray[np.float64]:
    """What each head is worth [L, n], in nats: by how much the output moves without it.

    Args:
        replaced: what stands in its place.
        finished: layers that an earlier run has measured.
        what: is measured, for the journal.

    Raises:
        MethodError: for a model whose output is no classes.
    """
    if geometry.classes < 2:
        raise MethodError(f"{vision.name} names no classes, so nothing says what a head is worth: give a classifier")
    _, judged = halves(pictures)
    rows = [
        finished.once(f"{what} of layer {layer}", partial(_of_layer, vision, geometry, judged, replaced, layer))
        for layer in track(range(geometry.depth), "what heads are worth")
    ]
    return np.array(rows, dtype=np.float64).clip(min=0)


def _of_layer(
    vision: Vision, geometry: Geometry, pictures: Sequence[Captioned], replaced: Replacement, layer: int
) -> list[float]:
    model, block = vision.model, vision.model.blocks[layer]
    lost = [0.0] * geometry.heads
    for x in vision.batches(pictures):
        with caught(block, block.attn) as given:
            base = log_softmax(model(x).float(), -1)
        h, normed = given
        _, v, out = heads_of(block.attn, normed)
        other = replaced(layer, v, out)
        for head in range(geometry.heads):
            changed = out.clone()
            changed[:, head] = other[:, head]
            told = log_softmax(resumed(model, layer, h, changed).float(), -1)
            lost[head] += float(kl_div(told, base, reduction="sum", log_target=True))
    return [each / len(pictures) for each in lost]


@contextmanager
def caught(*modules: Any) -> Iterator[list[Tensor]]:
    """What goes into modules, in the order in which they are called."""
    given: list[Tensor] = []
    hooks = [each.register_forward_pre_hook(lambda module, args: given.append(args[0])) for each in modules]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def resumed(model: Any, layer: int, h: Tensor, out: Tensor) -> Tensor:
    """What the model says when the heads of a layer give something else.

    Args:
        h: what goes into the layer's block [B, N, C].
        out: what its heads give [B, n, N, d].
    """
    rows = out.transpose(1, 2).flatten(2)
    hook = model.blocks[layer].attn.proj.register_forward_pre_hook(lambda module, given: (rows,))
    try:
        for block in model.blocks[layer:]:
            h = block(h)
    finally:
        hook.remove()
    told: Tensor = model.forward_head(model.norm(h))
    return told


# Spectra


@torch.no_grad()
def spectra(vision: Vision, pictures: Sequence[Captioned]) -> list[dict[str, Any]]:
    """The spectra of what each layer's mixer adds, and of its parts.

    Args:
        vision: a plain vision transformer, one with local paths, or an iFormer.

    Returns:
        For each layer its number and the spectrum of each part: ``mixer``; ``head 0`` and so on; ``conv`` and
        ``attention`` of a layer with local paths; ``high`` and ``low`` of an Inception mixer.
    """
    found: list[dict[str, Spectra]] = []
    hooks: list[Any] = []
    for layer, mixer in enumerate(mixers(vision.model)):
        found.append({})
        hooks += _watched(mixer, found[layer], vision)
    if not found:
        raise MethodError(f"{vision.name} has no layers whose spectra are known: give a plain ViT or an iFormer")
    try:
        for x in vision.batches(pictures):
            vision.model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        {"layer": layer, **{part: asdict(each.result()) for part, each in sorted(parts.items(), key=_heads_last)}}
        for layer, parts in enumerate(found)
    ]


def mixers(model: Any) -> list[Any]:
    """The modules that mix tokens, from the first layer to the last."""
    if isinstance(model, InceptionTransformer):
        stages: list[Any] = [model.get_submodule(f"blocks{stage + 1}") for stage in range(model.stages)]
        return [block.attn for stage in stages for block in stage]
    return [block.attn for block in getattr(model, "blocks", [])]


def _heads_last(item: tuple[str, Spectra]) -> tuple[bool, int]:
    name = item[0]
    return name.startswith("head "), int(name[5:]) if name.startswith("head ") else 0


def _watched(mixer: Any, parts: dict[str, Spectra], vision: Vision) -> list[Any]:
    """Hooks that add to the spectra of a mixer's parts whenever it runs."""

    def add(name: str, z: Tensor) -> None:
        parts.setdefault(name, Spectra((z.shape[-2], z.shape[-1]))).add(z)

    def inception(module: Any, given: Any, out: Tensor) -> None:
        add("mixer", out.permute(0, 3, 1, 2))

    if hasattr(mixer, "high_dim"):
        hooks = [mixer.register_forward_hook(inception)]
        for name in ("high", "low"):
            if hasattr(mixer, f"{name}_mixer"):
                branch = getattr(mixer, f"{name}_mixer")
                hooks.append(branch.register_forward_hook(lambda m, given, out, name=name: add(name, out)))
        return hooks
    grid = vision.model.patch_embed.grid_size

    def tokens(module: Any, given: Any, out: Tensor) -> None:
        add("mixer", on_grid(out[:, None], grid))
        if isinstance(module, LocalAttention):
            v = module.value(given[0][:, module.before :]).transpose(1, 2).unflatten(-1, grid)
            add("conv", module.conv(v))
            if module.layer.kept:
                add("attention", on_grid(module.attended(given[0])[:, None], grid))
        else:
            _, _, heads = heads_of(module, given[0])
            for head in range(module.num_heads):
                add(f"head {head}", on_grid(heads[:, head : head + 1], grid))

    return [mixer.register_forward_hook(tokens)]
