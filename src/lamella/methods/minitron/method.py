"""Minitron: prune width and depth in one shot by the size of activations, then re-train by distillation alone.

Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", arXiv 2407.14679.

    1  a forward pass scores MLP neurons, heads, channels of the residual stream, and layers  (section 2.2)
    2  every axis is sorted, and its best part is kept: an ordinary, smaller model            (section 2.3)
    3  shapes near a parameter budget are enumerated, and the best after brief training taken (section 2.3)
    4  the smaller model learns the original's output distribution                            (section 3)

Scores are measured once and serve every shape. Pruning alone ruins a model: the plans of this method are meant to be
healed by :func:`lamella.train.distil`.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from math import inf
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt

from lamella.data import Text
from lamella.errors import MethodError
from lamella.files import Work
from lamella.measure import OutputDistance, Tokens, angular_distance, block_influence
from lamella.methods.minitron.activations import Importance, activation_importance
from lamella.methods.minitron.contest import Contest
from lamella.methods.minitron.space import ModelShape, ShapeSpace
from lamella.plan import HeadWidth, HiddenWidth, ModelReference, PlanSeries, Point
from lamella.registry import method
from lamella.search import window
from lamella.stack import Stack, groups_at
from lamella.stack.wiring import Sizes

HARD = 0.5  # fraction of the parameters that one pruning step should at least keep; below, the paper takes two steps


@dataclass(frozen=True)
class Ranking:
    """Indices along every axis, most important first.

    Attributes:
        hidden: channels of the residual stream [hidden].
        channels: MLP channels of each layer [layers, mlp].
        heads: query heads of each key-value head [layers, kv_heads, heads / kv_heads].
        groups: key-value heads of each layer [layers, kv_heads].
        layers: layer indices [layers].
    """

    hidden: np.ndarray
    channels: np.ndarray
    heads: np.ndarray
    groups: np.ndarray
    layers: np.ndarray


def rank(importance: Importance, depth: np.ndarray, kv_heads: int) -> Ranking:
    """Sort every axis by its scores; equal scores keep their order.

    Args:
        importance: the scores of the widths.
        depth: the score of each layer [layers]; 0 for a layer that does nothing.
        kv_heads: number of key-value heads of a layer, each shared by heads / kv_heads adjacent query heads.
    """
    layers, heads = importance.heads.values.shape
    grouped = importance.heads.values.reshape(layers, kv_heads, heads // kv_heads)
    first = np.arange(kv_heads)[:, None] * (heads // kv_heads)
    return Ranking(
        hidden=_descending(importance.hidden.values),
        channels=_descending(importance.channels.values),
        heads=_descending(grouped) + first,
        groups=_descending(np.linalg.norm(grouped, axis=-1)),  # L2 over all query heads of the group
        layers=_descending(depth),
    )


def _descending(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, axis=-1, kind="stable")


def trim(
    ranking: Ranking, shape: ModelShape, whole: Sizes, *, merge_heads: bool = False, rescale: bool = False
) -> Point:
    """Return the plan that keeps the most important part of every axis (section 2.3).

    Args:
        ranking: the ranking of the model.
        shape: the sizes to keep.
        whole: the sizes of the original model.
        merge_heads: add to each of the least important remaining heads its difference from a removed head.
        rescale: let norms compensate for the removed channels; the paper does not.

    Raises:
        MethodError: for a shape that is larger than the model.
    """
    _check_shape(shape, whole, len(ranking.layers))
    kept = sorted(ranking.layers[: shape.layers].tolist())
    width: dict[str, Any] = {}
    if shape.hidden < whole.hidden:
        width["hidden.channels"] = HiddenWidth(keep=ranking.hidden[: shape.hidden].tolist(), rescale=rescale)
    for layer in kept:
        if shape.mlp < whole.channels:
            width[f"layers.{layer}.mlp.channels"] = ranking.channels[layer, : shape.mlp].tolist()
        if (shape.heads, shape.kv_heads) != (whole.heads, whole.kv_heads):
            each = shape.heads // shape.kv_heads
            groups = ranking.groups[layer, : shape.kv_heads].tolist()
            width[f"layers.{layer}.attn.heads"] = HeadWidth(
                keep=[int(head) for group in groups for head in ranking.heads[layer, group, :each]],
                kv_of=[group for group in groups for _ in range(each)],
                merge=_merged(ranking, layer, groups, each) if merge_heads else None,
            )
    drop = [f"layers.{layer}" for layer in range(len(ranking.layers)) if layer not in kept]
    return Point(drop=drop, width=width)


def _check_shape(shape: ModelShape, whole: Sizes, layers: int) -> None:
    most = ModelShape(layers, whole.hidden, whole.channels, whole.heads, whole.kv_heads)
    for name, size in vars(shape).items():
        if not 1 <= size <= getattr(most, name):
            raise MethodError(f"minitron: {name} {size} is out of range: give 1 to {getattr(most, name)}")
    if shape.heads % shape.kv_heads or shape.heads // shape.kv_heads > whole.heads // whole.kv_heads:
        raise MethodError(
            f"minitron: heads {shape.heads} with kv_heads {shape.kv_heads}: each key-value head keeps the same number "
            f"of its {whole.heads // whole.kv_heads} query heads, so give a multiple of kv_heads, and both together"
        )


def _merged(ranking: Ranking, layer: int, groups: list[int], each: int) -> list[int | None]:
    """Return for each kept head the removed head whose difference from it is added, or None.

    Heads are numbered 1 to n by importance and K are kept: head i takes the difference from head 2K - i + 1, for i from
    2K - n + 1 to K (the paper prints 2K - n, whose partner would be head n + 1).

    If every query head has its own key-value head, all heads of a layer are ordered together; otherwise those of each
    group.
    """
    size = ranking.heads.shape[-1]
    lists = [ranking.heads[layer, group].tolist() for group in groups]
    if size == 1:
        lists, each = [ranking.heads[layer, ranking.groups[layer], 0].tolist()], len(groups)
    partners = [2 * each - i for i in range(1, each + 1)]  # of head 2K - i + 1, counted from 0
    return [ordered[index] if index < len(ordered) else None for ordered in lists for index in partners]


@dataclass(frozen=True)
class TargetSizes:
    """The sizes to keep; sizes that are None are searched or stay at their full size.

    Attributes:
        hidden: hidden size to keep. If both hidden and mlp are given, nothing is searched.
        mlp: MLP intermediate size of every layer to keep.
        heads: number of query heads of every layer to keep.
        kv_heads: number of key-value heads of every layer to keep; it requires heads.
        layers: number of layers to keep; defaults to all, since removing width costs less than removing depth after
            healing (practice 4).
    """

    hidden: Annotated[int, Ge(1)] | None = None
    mlp: Annotated[int, Ge(1)] | None = None
    heads: Annotated[int, Ge(1)] | None = None
    kv_heads: Annotated[int, Ge(1)] | None = None
    layers: Annotated[int, Ge(1)] | None = None


ANY, TRIALS = TargetSizes(), Contest()


@method(
    "minitron",
    paper="2407.14679",
    purpose="prune",
    on=("llama", "mistral", "qwen2", "qwen3", "gpt2"),
    brief={"candidates": 2, "trial_steps": 2},
)
def minitron(
    stack: Stack,
    calibration: Text,
    *,
    params: Annotated[float, Gt(0), Lt(1)] = 0.55,
    target: TargetSizes = ANY,
    trials: Contest = TRIALS,
    batch_agg: Literal["l2", "mean", "var"] = "l2",
    seq_agg: Literal["mean", "l2", "var"] = "mean",
    depth: Literal["bi", "ppl", "contiguous"] = "bi",
    merge_heads: bool = False,
    rescale: bool = False,
    multiple: Annotated[int, Ge(1)] = 64,
    tolerance: Annotated[float, Ge(0)] = 0.05,
    work: Work = Work(),
) -> PlanSeries:
    """Prune neurons, heads, hidden channels and layers by their activations, to be healed by distillation.

    Unless the shape is given completely, the remaining sizes are searched: of the shapes within ``tolerance`` of the
    budget, the one whose widths shrink most evenly is taken. All of them are in the provenance, for
    :func:`lamella.methods.minitron.contest.contest` to train and compare.

    Args:
        stack: the opened model.
        calibration: text, or token ids [sequences, time], alone or with an attention mask; the paper: 1024 sequences.
        params: fraction of the parameters to keep at the end of the series; the default is the paper's 15B to 8B.
        target: sizes to keep.
        trials: the brief training by which a shape is chosen, if there are several.
        batch_agg: reduction of activations over sequences: ``l2``, ``mean`` or ``var``.
        seq_agg: reduction over the tokens of a sequence: ``mean`` (of absolute values), ``l2`` or ``var``.
        depth: score of layers: block influence (``bi``), the perplexity without the layer (``ppl``), or, with
            ``layers``, one ``contiguous`` run, the one across which the residual stream turns least.
        merge_heads: merge removed heads into remaining ones (section 2.3).
        rescale: let RMS norms compensate for the removed channels; the paper does not.
        multiple: hidden and MLP sizes are multiples of this, or of an eighth of the axis where that is less.
        tolerance: how far the number of parameters of a shape may be from the budget, as a fraction of the budget.
        work: folder from which an interrupted choice of the shape resumes.

    Returns:
        The series of plans, starting with the whole model, each with its number of parameters.

    Raises:
        BudgetError: when no shape meets the budget; the message names the nearest ones.
        MethodError: for sizes that are larger than the model's.
    """
    if target.kv_heads is not None and target.heads is None:
        raise MethodError(
            "minitron: kv_heads without heads: give both, since every group keeps the same number of query heads"
        )
    if rescale and stack.architecture.wiring.centred:
        raise MethodError(f"minitron: the norms of {stack.architecture.name} models subtract the mean: omit rescale")
    importance = activation_importance(stack, calibration, batch_agg=batch_agg, seq_agg=seq_agg)
    space = ShapeSpace.of(stack, multiple)
    ranking = rank(importance, _depth(stack, calibration, depth, target.layers), space.whole.kv_heads)
    fixed = {name: size for name, size in asdict(target).items() if size is not None}
    _check_shape(space.shape(fixed), space.whole, len(stack))
    model = ModelReference.of(stack)

    def cut(shape: ModelShape) -> Point:
        point = trim(ranking, shape, space.whole, merge_heads=merge_heads, rescale=rescale)
        return point.model_copy(update={"scores": {"parameters": float(space.parameters(shape))}})

    shapes, candidates, compared = [space.shape(fixed)], list[ModelShape](), dict[ModelShape, float]()
    if target.hidden is None or target.mlp is None:
        candidates = space.near(params, fixed, tolerance)
        shortlist = space.shortlist(candidates, trials.candidates)
        if len(shortlist) > 1:
            plans = list(PlanSeries(model=model, points=list(map(cut, shortlist))))
            compared = dict(zip(shortlist, trials.divergences(stack, plans, calibration, work), strict=True))
        best = min(compared, key=compared.__getitem__, default=shortlist[0])
        shapes = space.descent(best, params, fixed, tolerance)
    points = [Point(scores={"parameters": space.parameters(space.everything)}), *map(cut, shapes)]
    left = space.parameters(shapes[-1]) / space.parameters(space.everything)
    if left < HARD:
        warnings.warn(
            f"minitron: {left:.0%} of the parameters are left: more than half at once is hard to heal; prune to "
            f"about {left**0.5:.0%}, heal, and prune the result again",
            stacklevel=2,
        )
    provenance = {
        "shapes": [asdict(shape) for shape in (space.everything, *shapes)],
        "candidates": [asdict(shape) for shape in candidates],
        "contest": [asdict(shape) | {"kl": kl} for shape, kl in compared.items()],
    }
    return PlanSeries(model=model, points=points, provenance=provenance)


def _depth(stack: Stack, calibration: Tokens, score: str, layers: int | None) -> np.ndarray:
    """Return the score of each layer: its block influence, or the perplexity without it (section 2.2): [layers].

    ``contiguous`` scores runs of the required length: the layers of the run across which the residual stream turns
    least get 0, all others 1.
    """
    if score == "bi":
        return block_influence(stack, calibration).values
    if score == "ppl":
        measure = OutputDistance(stack, calibration, "perplexity")
        return np.array([measure.cost((), layer, inf).value for layer in groups_at("block", stack.positions)])
    if layers is None or not 0 < layers < len(stack):
        raise MethodError("minitron: depth contiguous removes one run of layers: give with layers how many to keep")
    removed = len(stack) - layers
    start = window(len(stack), removed, angular_distance(stack, calibration).values[:, removed].__getitem__)
    return np.array([float(not start <= layer < start + removed) for layer in range(len(stack))])
