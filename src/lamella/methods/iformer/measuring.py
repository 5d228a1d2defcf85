"""Measurements of a vision transformer before the conversion: spectra, locality, and the importance of each head.

The importance of a head is the change of the output when the head's fitted convolution replaces it (KL divergence in
nats from the original output). Convolutions are fitted on four fifths of the images and evaluated on the others.
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

Replacement = Callable[[int, Tensor, Tensor], Tensor]  # layer, V and output of its heads, to the replaced output
HELD_OUT = 0.2  # fraction of the images for evaluation
FEWEST = 10  # minimum number of images


@dataclass(frozen=True)
class Fit:
    """The convolutions fitted to the heads of one layer.

    Attributes:
        weights: of each channel, its bias last [n d, k k + 1].
        prefix: mean output of the heads for tokens before the grid [prefix, n d].
        explained: R^2 of each head on held-out images.
        distance: mean attention distance of each head, in grid steps.
    """

    weights: Tensor
    prefix: Tensor
    explained: list[float]
    distance: list[float]


def split_images(images: Sequence[Captioned]) -> tuple[Sequence[Captioned], Sequence[Captioned]]:
    """Split images into those to fit on and those to evaluate on.

    Args:
        images: the images.

    Raises:
        CalibrationError: for too few images.
    """
    if len(images) < FEWEST:
        raise CalibrationError(f"{len(images)} images are too few to fit and to evaluate: give at least {FEWEST}")
    judged = max(2, round(HELD_OUT * len(images)))
    return images[:-judged], images[-judged:]


@torch.no_grad()
def fit_convolutions(
    vision: Vision, geometry: Geometry, images: Sequence[Captioned], kernel: int, ridge: float
) -> list[Fit]:
    """Fit a convolution to each head of each layer.

    Args:
        vision: the vision transformer.
        geometry: its geometry.
        images: the images.
        kernel: side of the convolutions.
        ridge: penalty of the regression, relative to the mean square of the input.

    Returns:
        The fit of each layer.
    """
    depth, heads, width = geometry.depth, geometry.heads, geometry.width
    sums = [[Moments.empty(width, kernel) for _ in range(2)] for _ in range(depth)]
    prefix = torch.zeros(depth, geometry.prefix, width, dtype=torch.float64)
    distance = torch.zeros(depth, heads, dtype=torch.float64)

    def look(layer: int, part: int, attn: Any, given: Any) -> None:
        weights, v, out = heads_of(attn, given[0])
        if not torch.isfinite(out).all():
            raise NumericsError(f"the output of layer {layer} of {vision.name} is not finite: check its weights")
        sums[layer][part].add(on_grid(v, geometry.grid), on_grid(out, geometry.grid), kernel)
        if part == 0:
            prefix[layer] += out[:, :, : geometry.prefix].sum(0).transpose(0, 1).flatten(1).double().cpu()
            distance[layer] += len(out) * attention_distance(weights, geometry.grid).double().cpu()

    both = split_images(images)
    for part, chosen in enumerate(both):
        hooks = [block.attn.register_forward_pre_hook(partial(look, layer, part))
                 for layer, block in enumerate(vision.model.blocks)]  # fmt: skip
        try:
            what, count = f"fitting convolutions ({'evaluation' if part else 'sums'})", -(-len(chosen) // BATCH)
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


def convolution_replacement(found: Sequence[Fit], geometry: Geometry, kernel: int) -> Replacement:
    """Create the replacement that computes fitted convolutions in place of heads.

    Args:
        found: the fit of each layer.
        geometry: geometry of the network.
        kernel: side of the convolutions.
    """

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
    images: Sequence[Captioned],
    replaced: Replacement,
    finished: Finished,
    what: str = "heads",
) -> npt.NDArray[np.float64]:
    """Measure the importance of each head [L, n], in nats: the change of the output when it is replaced.

    Args:
        vision: the vision transformer.
        geometry: its geometry.
        images: the images.
        replaced: the replacement.
        finished: journal of layers that an earlier run has measured.
        what: key of the measurement in the journal.

    Raises:
        MethodError: for a model without classes.
    """
    if geometry.classes < 2:
        raise MethodError(f"{vision.name} has no classes, so head importance cannot be measured: give a classifier")
    _, judged = split_images(images)
    rows = [
        finished.once(f"{what} of layer {layer}", partial(_of_layer, vision, geometry, judged, replaced, layer))
        for layer in track(range(geometry.depth), "head importance")
    ]
    return np.array(rows, dtype=np.float64).clip(min=0)


def _of_layer(
    vision: Vision, geometry: Geometry, images: Sequence[Captioned], replaced: Replacement, layer: int
) -> list[float]:
    model, block = vision.model, vision.model.blocks[layer]
    lost = [0.0] * geometry.heads
    for x in vision.batches(images):
        with record_inputs(block, block.attn) as given:
            base = log_softmax(model(x).float(), -1)
        h, normed = given
        _, v, out = heads_of(block.attn, normed)
        other = replaced(layer, v, out)
        for head in range(geometry.heads):
            changed = out.clone()
            changed[:, head] = other[:, head]
            logits = log_softmax(resume(model, layer, h, changed).float(), -1)
            lost[head] += float(kl_div(logits, base, reduction="sum", log_target=True))
    return [each / len(images) for each in lost]


@contextmanager
def record_inputs(*modules: Any) -> Iterator[list[Tensor]]:
    """Record the inputs of modules, in the order in which they are called."""
    given: list[Tensor] = []
    hooks = [each.register_forward_pre_hook(lambda module, args: given.append(args[0])) for each in modules]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def resume(model: Any, layer: int, h: Tensor, out: Tensor) -> Tensor:
    """Compute the logits with another output of the heads of one layer.

    Args:
        model: the vision transformer.
        layer: index of the layer.
        h: input of the layer's block [B, N, C].
        out: output of its heads [B, n, N, d].
    """
    rows = out.transpose(1, 2).flatten(2)
    hook = model.blocks[layer].attn.proj.register_forward_pre_hook(lambda module, given: (rows,))
    try:
        for block in model.blocks[layer:]:
            h = block(h)
    finally:
        hook.remove()
    logits: Tensor = model.forward_head(model.norm(h))
    return logits


# Spectra


@torch.no_grad()
def spectra(vision: Vision, images: Sequence[Captioned]) -> list[dict[str, Any]]:
    """Measure the spectra of each layer's mixer output, and of its parts.

    Args:
        vision: a plain vision transformer, one with local paths, or an iFormer.
        images: the images.

    Returns:
        For each layer its index and the spectrum of each part: ``mixer``; ``head 0`` and so on; ``conv`` and
        ``attention`` of a layer with local paths; ``high`` and ``low`` of an Inception mixer.
    """
    found: list[dict[str, Spectra]] = []
    hooks: list[Any] = []
    for layer, mixer in enumerate(mixers(vision.model)):
        found.append({})
        hooks += _watched(mixer, found[layer], vision)
    if not found:
        raise MethodError(f"{vision.name} has no layers that can be measured: give a plain ViT or an iFormer")
    try:
        for x in vision.batches(images):
            vision.model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        {"layer": layer, **{part: asdict(each.result()) for part, each in sorted(parts.items(), key=_heads_last)}}
        for layer, parts in enumerate(found)
    ]


def mixers(model: Any) -> list[Any]:
    """The token mixers, from the first layer to the last."""
    if isinstance(model, InceptionTransformer):
        stages: list[Any] = [model.get_submodule(f"blocks{stage + 1}") for stage in range(model.stages)]
        return [block.attn for stage in stages for block in stage]
    return [block.attn for block in getattr(model, "blocks", [])]


def _heads_last(item: tuple[str, Spectra]) -> tuple[bool, int]:
    name = item[0]
    return name.startswith("head "), int(name[5:]) if name.startswith("head ") else 0


def _watched(mixer: Any, parts: dict[str, Spectra], vision: Vision) -> list[Any]:
    """Register hooks that add to the spectra of a mixer's parts."""

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
