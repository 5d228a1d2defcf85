"""iFormer: high frequencies by convolution and pooling, low ones by attention (Si et al., 2022, arXiv 2205.12956).

Attention averages: it lets low frequencies pass and is weak on edges and textures. An iFormer splits the channels of
every layer, and the share that attends grows with depth, the frequency ramp (network.py). Of a trained vision
transformer the same can be measured and made::

    measure    how local each head is, and what the output loses with a convolution in its place    (measuring.py)
    allocate   heads per layer, non-decreasing in depth, within a cost, at the least loss            (ramp.py)
    apply      heads that go become a fitted convolution and a max-pooling, which begins at zero     (modules.py)
    heal       distil from what the model was                                                        (recipe.py)
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
from lamella.methods.iformer.measuring import Fit, convolved, fits, importance, mixers, spectra
from lamella.methods.iformer.modules import Cost, Layer, cost_of, planned
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
    """Put convolution and pooling in place of the heads of a vision transformer that are missed least.

    Early layers keep no more heads than later ones. What stands in place of a head gives what the fitted convolution
    gives: heal it, with ``lamella run iformer heal``.

    Args:
        model: a plain vision transformer of timm with classes; it is not changed.
        images: pictures of the kind that it reads; classes play no part. One in five is kept to judge.
        share: what all attention sublayers may cost, of what they do.
        of: whether cost is products for one picture, or parameters.
        least: heads that every layer keeps; the published networks keep one.
        kernel: of the convolutions, on a side, odd; the paper's.
        pool: channels of the max-pooling, as a share of those of the heads that go; 1 as in the paper, 0 for none.
        ridge: of the regression, in the mean square of what goes in.
        work: where an interrupted run goes on from.
        seed: of the weights that will read the pooling.

    Returns:
        The network, its plan, what was measured, and how far it is from what it was, on pictures that judge.

    Raises:
        MethodError: for a model that is no plain vision transformer with classes, an even ``kernel``, or a ``least``
            above its number of heads.
        BudgetError: for a share below the smallest shape.
        CalibrationError: for too few pictures.
    """
    geometry = checked(model, kernel)
    afford = [getattr(each, of) for each in by_heads(model, geometry, kernel, pool)]
    check_budget(afford, geometry, share, of, least)
    depends = [model.describe(), asdict(geometry), images.describe(), kernel, ridge]
    finished = Finished(work.journal("iformer"), depends)
    found = fits(model, geometry, images.items, kernel, ridge)
    worth = importance(model, geometry, images.items, convolved(found, geometry, kernel), finished)
    kept = allocate(worth, afford, int(share * geometry.depth * afford[-1]), least=least)
    layers = plan(geometry, most_important(worth, kept), pool)
    built = applied(model, geometry, layers, found, kernel, seed)
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
        "judged": compared(model, built, test, images.classes),
    }  # fmt: skip
    return Ramped(
        vision=built, geometry=geometry, layers=layers, kernel=kernel, origin=revision(model.model), findings=findings
    )


@command("iformer", "spectra", on="any", brief={"count": 12})
def measured(
    model: Vision,
    images: Album,
    *,
    kernel: Annotated[int, Ge(1)] = 3,
    ridge: Annotated[float, Ge(0)] = 1e-3,
) -> Study:
    """Measure the frequencies that each layer and head of a network gives, and how local its heads are.

    Args:
        model: a plain vision transformer, one with local paths, or an iFormer; it is not changed.
        images: pictures of the kind that it reads.
        kernel: of the convolutions that stand for heads, on a side, odd.
        ridge: of their regression, in the mean square of what goes in.

    Returns:
        By layer and part the relative log amplitude over frequencies and the share of energy beyond pi / 2; for each
        head of a plain vision transformer how far it looks and how much of it a convolution explains, too.

    Raises:
        MethodError: for a model whose layers are not known, or an even ``kernel``.
        CalibrationError: for too few pictures.
    """
    findings: dict[str, Any] = {"spectra": spectra(model, images.items)}
    if all("head 0" in each for each in findings["spectra"]):
        geometry = checked(model, kernel)
        found = fits(model, geometry, images.items, kernel, ridge)
        findings["layers"] = [{"explained": each.explained, "distance": each.distance} for each in found]
    return Study(findings=findings)


def checked(model: Vision, kernel: int = 3) -> Geometry:
    """The geometry of a plain vision transformer.

    Raises:
        MethodError: for another model, or an even kernel.
    """
    if kernel % 2 == 0:
        raise MethodError(f"kernel {kernel}: give an odd number, so that a place has as many neighbours either side")
    geometry = Geometry.of(model.model, model.name)
    geometry.proved(model.model, model.name)
    return geometry


def by_heads(model: Vision, geometry: Geometry, kernel: int, pool: float) -> list[Cost]:
    """What the attention of one layer costs with so many heads, from none to all."""
    attn = model.model.blocks[0].attn
    places = geometry.grid[0] * geometry.grid[1]
    tokens = geometry.prefix + places
    with torch.device("meta"):
        fewer = [
            local(attn, geometry, planned(geometry.heads, attn.head_dim, range(kept), pool), kernel)
            for kept in range(geometry.heads)
        ]
    return [cost_of(each, tokens, places) for each in (*fewer, attn)]


def check_budget(afford: Sequence[int], geometry: Geometry, share: float, of: str, least: int) -> None:
    """Raise an error for a share that no plan meets, before anything is measured.

    Raises:
        BudgetError: for a share below the smallest shape.
        MethodError: for more heads than there are.
    """
    if least > geometry.heads:
        raise MethodError(f"least {least}: layers have {geometry.heads} heads, so give 0 to {geometry.heads}")
    smallest = min(afford[least:]) / afford[-1]
    if share < smallest:
        raise BudgetError(
            f"share {share:g} is below the smallest shape: with {least} of {geometry.heads} heads in each layer "
            f"attention costs {smallest:.4f} of its {of}: give more, or a smaller least or pool"
        )


def plan(geometry: Geometry, kept: Sequence[tuple[int, ...]], pool: float) -> tuple[Layer, ...]:
    """The plan of all layers, from the heads that stay in each."""
    head_dim = geometry.width // geometry.heads
    return tuple(planned(geometry.heads, head_dim, each, pool) for each in kept)


def applied(
    model: Vision, geometry: Geometry, layers: Sequence[Layer], found: Sequence[Fit], kernel: int, seed: int
) -> Vision:
    """A copy of a vision transformer with local paths in place of some heads; it gives what the fits give."""
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
    """What all attention sublayers cost, those of a model and those in their place.

    Args:
        before, after: the attentions, layer by layer.
    """
    places = geometry.grid[0] * geometry.grid[1]

    def whole(mixers: Sequence[Any], name: str) -> int:
        return sum(getattr(cost_of(each, geometry.prefix + places, places), name) for each in mixers)

    return {name: {"before": whole(before, name), "after": whole(after, name)} for name in Cost._fields}


@torch.no_grad()
def compared(model: Vision, built: Vision, pictures: Sequence[Captioned], classes: int) -> dict[str, Any]:
    """How far a network is from what it was: KL divergence, agreement, and accuracy where its classes are known."""
    base, changed = model.logits(pictures), built.logits(pictures)
    kl = kl_div(log_softmax(changed, -1), log_softmax(base, -1), reduction="batchmean", log_target=True)
    agree = (base.argmax(1) == changed.argmax(1)).double().mean()
    found: dict[str, Any] = {"pictures": len(pictures), "kl": float(kl), "agreement": float(agree)}
    if classes == base.shape[1]:
        labels = torch.tensor([each.label for each in pictures])
        found |= {"accuracy before": _right(base, labels), "accuracy": _right(changed, labels)}
    return found


def _right(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())
