"""iFormer: high frequencies by convolution and pooling, low ones by attention (Si et al., 2022, arXiv 2205.12956).

Attention averages: it passes low frequencies and is weak on edges and textures. An iFormer splits the channels of every
layer, and the fraction that attends grows with depth, the frequency ramp (network.py). A trained vision transformer can
be measured and converted accordingly::

    measure    how local each head is, and how much the output changes if a convolution replaces it    (measuring.py)
    allocate   heads per layer, non-decreasing in depth, within a cost, at the least loss               (ramp.py)
    apply      replace heads by a fitted convolution and a max-pooling, which is initialised to zero    (modules.py)
    heal       distil from the original                                                                 (recipe.py)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from lamella.data import Captioned
from lamella.errors import BudgetError, MethodError
from lamella.files import Finished, Work
from lamella.methods.iformer.album import Album
from lamella.methods.iformer.folder import local
from lamella.methods.iformer.geometry import Geometry
from lamella.methods.iformer.locality import kernels
from lamella.methods.iformer.measuring import (
    Fit,
    convolution_replacement,
    fit_convolutions,
    importance,
    mixers,
    spectra,
)
from lamella.methods.iformer.modules import AttentionCost, LayerPlan, cost_of, plan_layer
from lamella.methods.iformer.ramp import allocate, most_important
from lamella.methods.iformer.result import Ramped
from lamella.methods.iformer.vision import Vision
from lamella.plan.fingerprint import revision
from lamella.registry import command, method
from lamella.results import Study

Counted = Literal["flops", "parameters"]


@method(
    "iformer", paper="2205.12956", purpose="vision", on="any", brief={"count": 20, "share": 0.9},
)  # fmt: skip
def iformer(
    model: Vision,
    images: Album,
    *,
    share: Annotated[float, Gt(0), Le(1)] = 0.85,
    of: Counted = "flops",
    least: Annotated[int, Ge(0)] = 1,
    kernel: Annotated[int, Ge(1)] = 3,
    pool: Annotated[float, Ge(0), Le(1)] = 0.5,
    ridge: Annotated[float, Ge(0)] = 1e-3,
    work: Work = Work(),
    seed: Annotated[int, Ge(0)] = 0,
) -> Ramped:
    """Replace the least important attention heads of a vision transformer by convolution and pooling.

    Early layers keep no more heads than later ones. The replaced network reproduces the fitted convolutions: heal it
    with ``lamella run iformer heal``.

    Args:
        model: a plain timm vision transformer with classes; it is not changed.
        images: images of its domain; their classes are not used. One in five is held out for evaluation.
        share: cost of all attention sublayers as a fraction of the original cost.
        of: cost measure: ``flops`` (multiply-adds per image) or ``parameters``.
        least: minimum number of heads per layer; the published networks keep one.
        kernel: side of the convolutions, odd; the paper's is 3.
        pool: channels of the max-pooling as a fraction of those of the replaced heads; 1 in the paper, 0 for none.
        ridge: penalty of the regression, relative to the mean square of the input.
        work: folder from which an interrupted run resumes.
        seed: random seed of the projection of the pooling.

    Returns:
        The network, its plan, the measurements, and its distance from the original on held-out images.

    Raises:
        MethodError: for a model that is not a plain vision transformer with classes, an even ``kernel``, or a ``least``
            above its number of heads.
        BudgetError: for a fraction below the smallest shape.
        CalibrationError: for too few images.
    """
    geometry = check_model(model, kernel)
    afford = [getattr(each, of) for each in costs_by_heads(model, geometry, kernel, pool)]
    check_budget(afford, geometry, share, of, least)
    depends = [model.describe(), asdict(geometry), images.describe(), kernel, ridge]
    finished = Finished(work.journal("iformer"), depends)
    found = fit_convolutions(model, geometry, images.items, kernel, ridge)
    worth = importance(model, geometry, images.items, convolution_replacement(found, geometry, kernel), finished)
    kept = allocate(worth, afford, int(share * geometry.depth * afford[-1]), least=least)
    layers = plan(geometry, most_important(worth, kept), pool)
    built = apply_plan(model, geometry, layers, found, kernel, seed)
    test = images.part("test").items
    findings: dict[str, Any] = {
        "layers": [
            {"kept": list(each.kept), "conv": each.conv, "pool": each.pool, "worth": row.tolist(),
             "explained": fit.explained, "distance": fit.distance}
            for each, row, fit in zip(layers, worth, found, strict=True)
        ],
        "heads": geometry.heads,
        "cost": costs(geometry, mixers(model.model), mixers(built.model)),
        "spectra": spectra(model, images.items),
        "judged": compare(model, built, test, images.classes),
    }  # fmt: skip
    return Ramped(
        vision=built, geometry=geometry, layers=layers, kernel=kernel, origin=revision(model.model), findings=findings
    )


@command("iformer", "spectra", on="any", brief={"count": 12})
def measure_spectra(
    model: Vision,
    images: Album,
    *,
    kernel: Annotated[int, Ge(1)] = 3,
    ridge: Annotated[float, Ge(0)] = 1e-3,
) -> Study:
    """Measure the frequency spectrum of each layer and head of a network, and how local its heads are.

    Args:
        model: a plain vision transformer, one with local paths, or an iFormer; it is not changed.
        images: images of its domain.
        kernel: side of the convolutions fitted to heads, odd.
        ridge: penalty of the regression, relative to the mean square of the input.

    Returns:
        By layer and part the relative log amplitude over frequencies and the fraction of energy beyond pi / 2; for each
        head of a plain vision transformer also its attention distance and the R^2 of a convolution.

    Raises:
        MethodError: for an unsupported model, or an even ``kernel``.
        CalibrationError: for too few images.
    """
    findings: dict[str, Any] = {"spectra": spectra(model, images.items)}
    if all("head 0" in each for each in findings["spectra"]):
        geometry = check_model(model, kernel)
        found = fit_convolutions(model, geometry, images.items, kernel, ridge)
        findings["layers"] = [{"explained": each.explained, "distance": each.distance} for each in found]
    return Study(findings=findings)


def check_model(model: Vision, kernel: int = 3) -> Geometry:
    """Read the geometry of a plain vision transformer and verify it.

    Args:
        model: the model.
        kernel: side of the convolutions.

    Raises:
        MethodError: for another model, or an even kernel.
    """
    if kernel % 2 == 0:
        raise MethodError(f"kernel {kernel}: give an odd number")
    geometry = Geometry.of(model.model, model.name)
    geometry.verify(model.model, model.name)
    return geometry


def costs_by_heads(model: Vision, geometry: Geometry, kernel: int, pool: float) -> list[AttentionCost]:
    """Cost of the attention of one layer for every number of heads, from none to all.

    Args:
        model: the vision transformer.
        geometry: its geometry.
        kernel: side of the convolutions.
        pool: pooled fraction of the replaced channels.
    """
    attn = model.model.blocks[0].attn
    positions = geometry.grid[0] * geometry.grid[1]
    tokens = geometry.prefix + positions
    with torch.device("meta"):
        fewer = [
            local(attn, geometry, plan_layer(geometry.heads, attn.head_dim, range(kept), pool), kernel)
            for kept in range(geometry.heads)
        ]
    return [cost_of(each, tokens, positions) for each in (*fewer, attn)]


def check_budget(afford: Sequence[int], geometry: Geometry, share: float, of: str, least: int) -> None:
    """Check that some plan meets the budget, before anything is measured.

    Args:
        afford: cost of a layer by its number of heads.
        geometry: geometry of the network.
        share: the requested fraction.
        of: cost measure.
        least: minimum number of heads per layer.

    Raises:
        BudgetError: for a fraction below the smallest shape.
        MethodError: for a minimum above the number of heads.
    """
    if least > geometry.heads:
        raise MethodError(f"least {least}: layers have {geometry.heads} heads: give 0 to {geometry.heads}")
    smallest = min(afford[least:]) / afford[-1]
    if share < smallest:
        raise BudgetError(
            f"share {share:g} is below the smallest shape: with {least} of {geometry.heads} heads in each layer "
            f"attention costs {smallest:.4f} of its {of}: allow more, or use a smaller least or pool"
        )


def plan(geometry: Geometry, kept: Sequence[tuple[int, ...]], pool: float) -> tuple[LayerPlan, ...]:
    """Plan all layers from the heads to keep in each.

    Args:
        geometry: geometry of the network.
        kept: the heads to keep in each layer.
        pool: pooled fraction of the replaced channels.
    """
    head_dim = geometry.width // geometry.heads
    return tuple(plan_layer(geometry.heads, head_dim, each, pool) for each in kept)


def apply_plan(
    model: Vision, geometry: Geometry, layers: Sequence[LayerPlan], found: Sequence[Fit], kernel: int, seed: int
) -> Vision:
    """Copy a vision transformer with local paths in place of some heads, initialised from the fits.

    Args:
        model: the vision transformer.
        geometry: its geometry.
        layers: plan of each layer.
        found: fit of each layer.
        kernel: side of the convolutions.
        seed: random seed of the projection of the pooling.
    """
    built = copy.deepcopy(model.model)
    head_dim = geometry.width // geometry.heads
    for number, (layer, block, fit) in enumerate(zip(layers, built.blocks, found, strict=True)):
        if not layer.conv:
            continue
        gone = [head for head in range(geometry.heads) if head not in layer.kept]
        channels = [head * head_dim + each for head in gone for each in range(head_dim)]
        weight, bias = kernels(fit.weights, kernel, channels)
        paths = local(block.attn, geometry, layer, kernel).to(block.attn.qkv.weight)
        paths.begin(block.attn, weight, bias, fit.prefix[:, channels], seed * geometry.depth + number)
        block.attn = paths
    return Vision(built.eval(), model.name, model.size, model.channels, model.mean, model.std, model.crop)


def costs(geometry: Geometry, before: Sequence[Any], after: Sequence[Any]) -> dict[str, Any]:
    """Cost of all attention sublayers before and after the conversion.

    Args:
        geometry: geometry of the network.
        before: the original attentions, layer by layer.
        after: the converted attentions, layer by layer.
    """
    positions = geometry.grid[0] * geometry.grid[1]

    def whole(mixers: Sequence[Any], name: str) -> int:
        return sum(getattr(cost_of(each, geometry.prefix + positions, positions), name) for each in mixers)

    return {name: {"before": whole(before, name), "after": whole(after, name)} for name in AttentionCost._fields}


@torch.no_grad()
def compare(model: Vision, built: Vision, images: Sequence[Captioned], classes: int) -> dict[str, Any]:
    """Compare a network with the original: KL divergence, agreement, and accuracy if the classes are known.

    Args:
        model: the original.
        built: the converted network.
        images: the images.
        classes: number of classes of the images.
    """
    base, changed = model.logits(images), built.logits(images)
    kl = kl_div(log_softmax(changed, -1), log_softmax(base, -1), reduction="batchmean", log_target=True)
    agree = (base.argmax(1) == changed.argmax(1)).double().mean()
    found: dict[str, Any] = {"images": len(images), "kl": float(kl), "agreement": float(agree)}
    if classes == base.shape[1]:
        labels = torch.tensor([each.label for each in images])
        found |= {"accuracy_before": _right(base, labels), "accuracy": _right(changed, labels)}
    return found


def _right(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())
