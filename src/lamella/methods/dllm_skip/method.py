"""dLLM-Skip: skip layers that hardly change the residual stream, never two adjacent ones (arXiv 2603.07475).

Goel et al., "Skip to the Good Part: Representation Structure & Inference-Time Layer Skipping in Diffusion vs.
Autoregressive LLMs", 2026.

    sim_l = mean cos(h_l, h_{l+1})      over tokens, noise levels, masked and visible tokens

    layer   0    1    2    3    4    5    6    7
    sim    .71  .97  .98  .96  .97  .93  .88  .80        theta = 0.95, k = 2
    skip         .    x    .    x                        2 first; 1 and 3 are adjacent to it; then 4

The choice is made once and applies to every denoising step, position, block and task; nothing is trained, and a skipped
layer is the identity. Models trained to denoise from scratch have a long plateau of such layers, autoregressive models
and those initialised from one do not: look at the curves (``study``) first.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le, MinLen

from lamella import provenance
from lamella.data import Text
from lamella.errors import MethodError
from lamella.measure import RATIOS, draws, spearman
from lamella.methods.dllm_skip.similarity import Similarity, similarity
from lamella.methods.dllm_skip.skipping import rises
from lamella.plan import ModelReference, PlanSeries, Point
from lamella.registry import command, method
from lamella.results import Study
from lamella.stack import Stack

Cosine = Annotated[float, Ge(-1), Le(1)]
Ratios = Annotated[tuple[Annotated[float, Gt(0), Le(1)], ...], MinLen(1)]

THETA = 0.95
OF_PLATEAU = 0.3  # the paper skips 6 of LLaDA's 32 layers, whose plateau has about 21


@method(
    "dllm-skip",
    paper="2603.07475",
    purpose="skip",
    on=("decoder", "masked tokens"),
    brief={"theta": -1.0, "ratios": (0.3, 0.7)},
)
def dllm_skip(
    stack: Stack,
    calibration: Text,
    *,
    theta: Cosine = THETA,
    k: Annotated[int, Ge(1)] | None = None,
    non_adjacent: bool = True,
    protect: Annotated[int, Ge(0)] = 1,
    ratios: Ratios = RATIOS,
    front: Annotated[int, Ge(0)] = 1,
    seed: Annotated[int, Ge(0)] = 0,
) -> PlanSeries:
    """Skip layers whose input and output are similar, the most similar first and no two adjacent ones (Algorithm 1).

    Args:
        stack: a model that predicts masked tokens, or a decoder for comparison; it is not changed.
        calibration: text, or token ids [sequences, time].
        theta: only layers with a higher similarity may be skipped, -1 to 1; 0.95 in the paper.
        k: number of layers to skip; if None, as many as possible.
        non_adjacent: never skip two adjacent layers. This is the paper's rule for denoising models; decoders may do
            better without it.
        protect: number of layers at either end that are never skipped; an addition of Lamella.
        ratios: fractions of masked tokens at which similarity is measured.
        front: number of tokens at the front of each sequence that are ignored.
        seed: random seed of the masks.

    Returns:
        The plan series that skips one layer after the other, with the similarity of the last one. If fewer than k
        layers may be skipped, it ends there with a warning.

    Raises:
        MethodError: if ``k`` exceeds the number of unprotected layers, or all layers are protected; for the decoder of
            an encoder-decoder.
    """
    _check(stack)
    allowed = _allowed(len(stack), protect)
    if k is not None and k > len(allowed):
        raise MethodError(f"k {k}: only {len(allowed)} of the {len(stack)} layers of {stack.name} may be skipped")
    noised = draws(stack, calibration, ratios, front=front, seed=seed)
    sim = similarity(stack, noised, front=front).by_layer
    chosen = select(sim, theta, len(allowed) if k is None else k, allowed, non_adjacent)
    if k is not None and len(chosen) < k:
        warnings.warn(
            f"only {len(chosen)} layers are above theta {theta:g}"
            f"{' and not adjacent' if non_adjacent else ''}: fewer than k {k} are skipped.",
            stacklevel=3,
        )
    points = [Point()]
    for count, layer in enumerate(chosen, start=1):
        drop = [f"layers.{each}" for each in sorted(chosen[:count])]
        points.append(Point(drop=drop, scores={"similarity": float(sim[layer])}))
    return PlanSeries(model=ModelReference.of(stack), points=points)


def select(
    sim: Sequence[float] | np.ndarray, theta: float, k: int, allowed: Sequence[int], non_adjacent: bool = True
) -> list[int]:
    """Algorithm 1: return the layers to skip, in the order in which they are chosen.

    Args:
        sim: similarity of each layer.
        theta: minimum similarity, exclusive.
        k: maximum number of layers.
        allowed: layers that may be skipped.
        non_adjacent: never skip two adjacent layers.

    >>> select([0.71, 0.97, 0.98, 0.96, 0.97, 0.93, 0.88, 0.80], 0.95, 3, range(1, 7))
    [2, 4]
    """
    candidates = sorted((layer for layer in allowed if sim[layer] > theta), key=lambda layer: (-sim[layer], layer))
    skip: list[int] = []
    for layer in candidates:
        if len(skip) == k:
            break
        if non_adjacent and (layer - 1 in skip or layer + 1 in skip):
            continue
        skip.append(layer)
    return skip


def plateau(sim: Sequence[float] | np.ndarray, theta: float) -> tuple[int, int]:
    """Return the longest run of layers above theta, as [start, end).

    Args:
        sim: similarity of each layer.
        theta: the threshold.

    >>> plateau([0.71, 0.97, 0.98, 0.96, 0.97, 0.93], 0.95)
    (1, 5)
    """
    best, start = (0, 0), 0
    for layer, value in enumerate([*sim, -1.0]):
        if value <= theta:
            best = max(best, (start, layer), key=lambda each: each[1] - each[0])
            start = layer + 1
    return best


def _check(stack: Stack) -> None:
    if "cross" in stack.architecture.names:
        raise MethodError(f"dllm-skip works on text-only models; {stack.name} has a decoder with cross-attention")


def _allowed(layers: int, protect: int) -> list[int]:
    if 2 * protect >= layers:
        raise MethodError(f"protect {protect}: no layer is left of {layers}: give a smaller number")
    return list(range(protect, layers - protect))


@command("dllm-skip", "study", on=("decoder", "masked tokens"), brief={"ratios": (0.3, 0.7), "compare": None})
def study(
    stack: Stack,
    calibration: Text,
    compare: Stack | None = None,
    *,
    theta: Cosine = THETA,
    ratios: Ratios = RATIOS,
    front: Annotated[int, Ge(0)] = 1,
    lags: Annotated[int, Ge(1)] = 32,
    seed: Annotated[int, Ge(0)] = 0,
) -> Study:
    """Study the similarity of layers and tokens, and the loss without each layer.

    Args:
        stack: a model that predicts masked tokens, or a decoder.
        calibration: text to measure on, or token ids [sequences, time].
        compare: another model with the same tokenizer, such as the decoder from which the model was initialised.
        theta: similarity threshold of the plateau.
        ratios: fractions of masked tokens.
        front: number of tokens at the front of each sequence that are ignored.
        lags: maximum distance of the earlier tokens with which a token is compared.
        seed: random seed of the masks.

    Returns:
        The findings of each model, as ``model`` and ``compare``: the similarity of its layers at every mask ratio, of
            its
        points and of its tokens, the ``rise`` of the loss without each layer, the longest ``plateau`` above theta, how
        many of its layers the paper's proportion would skip (``recommended``), and the rank correlation of 1 -
        similarity with the rise (``spearman``). For two models ``curve_distance``: the mean absolute difference of
        their curves over relative depth.

    Raises:
        MethodError: for the decoder of an encoder-decoder.
        NumericsError: for activations that are not finite, named by site.
    """
    for each in (stack, compare):
        if each is not None:
            _check(each)
    findings: dict[str, Any] = {
        "theta": theta,
        "model": _study_model(stack, calibration, theta, ratios, front, lags, seed),
    }
    if compare is not None:
        findings["compare"] = _study_model(compare, calibration, theta, ratios, front, lags, seed)
        findings["curve_distance"] = curve_distance(findings["model"]["by_layer"], findings["compare"]["by_layer"])
    notes = ["Similar layers are not necessarily redundant: compare the loss without each of them."]
    return Study(findings={"data": provenance.describe(calibration)} | findings, notes=notes)


def _study_model(
    stack: Stack, text: Text, theta: float, ratios: tuple[float, ...], front: int, lags: int, seed: int
) -> dict[str, Any]:
    noised = draws(stack, text, ratios, front=front, seed=seed)
    found: Similarity = similarity(stack, noised, front=front, lags=lags)
    rise = rises(stack, noised, [(layer,) for layer in range(len(stack))])
    start, end = plateau(found.by_layer, theta)
    return {
        "name": stack.name,
        "objective": stack.architecture.objective,
        **found.as_dict(),
        "rise": rise,
        "plateau": [start, end],
        "recommended": int(OF_PLATEAU * (end - start)),
        "spearman": spearman(1 - found.by_layer, rise),
    }


def curve_distance(sim: Sequence[float], other: Sequence[float]) -> float:
    """Return the mean absolute difference of two curves over relative depth.

    Args:
        sim: similarity of each layer of one model.
        other: similarity of each layer of the other.

    >>> round(curve_distance([0.9, 0.8], [0.8, 0.9]), 6)
    0.1
    """
    depths = np.linspace(0, 1, max(len(sim), len(other)))
    ours, theirs = (np.interp(depths, np.linspace(0, 1, len(each)), each) for each in (sim, other))
    return float(np.abs(ours - theirs).mean())
