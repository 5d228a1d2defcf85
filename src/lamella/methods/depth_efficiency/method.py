"""Do language models use their depth efficiently? After Csordas, Manning and Potts, 2025, arXiv 2505.13898.

A layer adds its *contribution* to the residual stream, c = a + m, from its attention and its MLP:

    h_0 ──(+ c_0)── h_1 ──(+ c_1)── ··· ── h_L ── norm ── head ── y

Three questions are studied. How large is a contribution, and what is its direction (profile.py)? How do the
contributions of later layers, and the output, change when a layer is skipped, for all tokens, or for those before some
position with everything measured after it, so that only the use by *other tokens* counts (effects.py)? And which layers
use it directly, when nothing propagates (effects.py)?

The first token is excluded: it is an attention sink with a hidden state so large that it would dominate every mean, and
skipping its layers would destroy every other token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch.nn.functional import cosine_similarity

from lamella import provenance
from lamella.data import ImageText, Text
from lamella.errors import CalibrationError, MethodError
from lamella.measure import (
    OutputDistance,
    Scores,
    Tokens,
    angular_distance,
    block_influence,
    describe,
    hidden_norms,
    sequences,
    sublayer_influence,
)
from lamella.methods.depth_efficiency.effects import SkipEffect, local_effect, skip_effect
from lamella.methods.depth_efficiency.linear_maps import linear_maps
from lamella.methods.depth_efficiency.profile import depth_profile, refinement, turning_point
from lamella.progress import track
from lamella.registry import method
from lamella.results import Study
from lamella.stack import Group, Stack, groups_at
from lamella.zoo import open_tokenizer

LENGTH = 128  # length of the sequences of the study, which runs the model some hundred times
BRIEF_TOKENS = 128  # number of tokens for the removal of sublayers and layers in brief mode
MAX_ROWS = 16  # number of rows of images with text for the removal of layers
MAP_TOKENS = 30  # tokens per channel of the source for training and testing linear maps


@method(
    "depth-efficiency",
    paper="2505.13898",
    purpose="measure",
    verb="inspect",
    on=("decoder", "features"),
    brief={"splits": 2, "compare": None},
)
def depth_efficiency(
    stack: Stack,
    calibration: Text | ImageText,
    compare: Stack | None = None,
    *,
    brief: bool = False,
    splits: Annotated[int, Ge(1)] = 4,
    stride: Annotated[int, Ge(1)] = 8,
    front: Annotated[int, Ge(0)] = 1,
    seed: Annotated[int, Ge(0)] = 0,
) -> Study:
    """Study what each layer contributes to the residual stream, to later layers and tokens, and to the output.

    Block influence (change of the residual stream's direction), norms, angular distances between layers, and the
    Jensen-Shannon divergence of the output when one layer or one sublayer is removed. Higher means more important.

    Then the study of Csordas et al.: size and direction of each contribution, predictions of intermediate layers (logit
    lens), effects of skipping a layer on later layers and tokens, and the number of layers that account for nine tenths
    of the effects of layers on one another. The page plots all of them.

    Example: lamella inspect smollm2 -o depth

    Args:
        stack: the model; it is not changed.
        calibration: text to measure on, or token ids [sequences, time]; the paper uses 10 to 20 prompts. For images
            with text, contributions are also measured per modality, and layers are removed in the first 16 rows.
        compare: a second model, often a deeper one, with the same tokenizer, for linear maps to it.
        brief: omit the measurements that take minutes (effects of skipping layers), and remove sublayers and layers
            only for the first tokens. Everything then takes less time than a dozen passes over the text.
        splits: number of split points per sequence, for effects on later tokens.
        stride: split points are multiples of this number of tokens.
        front: number of tokens at the front of each sequence that are not measured, except for the output without a
            sublayer or layer, which is compared at all tokens. In the study they keep every layer.
        seed: random seed of the sequences and the split points.

    Returns:
        The findings ``scores``, each in the format of :meth:`lamella.measure.Scores.as_dict`: ``block_influence``
        [layers], ``sublayer_influence`` [sublayers], ``residual_norm`` [layers + 1], ``angular_distance`` [start,
        length], and the output's Jensen-Shannon divergence in nats without one sublayer or one layer,
        ``sublayer_removed`` [sublayers] and ``layer_removed`` [layers]; the ``study`` unless brief, and the linear
        ``maps`` to ``compare``. For
        images with text the ``modalities``: the profile of ``text`` and ``image`` tokens, and unless brief the effect
            on
        text tokens if the tokens of one modality skip a layer. A stack that provides features to others, such as a
        vision tower, has the scores only, the last two as change of its features (1 - cosine).

    Raises:
        CalibrationError: if there are no tokens, sequences are too short for a split point, or tokenizers differ.
        MethodError: for linear maps on images.
        NumericsError: for activations that are not finite, named by site.
    """
    if compare is not None and isinstance(calibration, ImageText):
        raise MethodError(
            "depth-efficiency: linear maps between models need text: give text as calibration, or omit compare"
        )
    few = (
        ImageText(calibration[:MAX_ROWS], calibration.processing) if isinstance(calibration, ImageText) else calibration
    )
    some = _first_tokens(few) if brief else few
    measured = {
        "block_influence": block_influence(stack, calibration, front=front),
        "sublayer_influence": sublayer_influence(stack, calibration, front=front),
        "residual_norm": hidden_norms(stack, calibration, front=front),
        "angular_distance": angular_distance(stack, calibration, front=front),
        "sublayer_removed": _removal_scores(stack, some, "sublayer"),
        "layer_removed": _removal_scores(stack, some, "layer"),
    }
    findings: dict[str, Any] = {"scores": {name: scores.as_dict() for name, scores in measured.items()}}
    if isinstance(few, ImageText) and stack.architecture.images:
        findings["modalities"] = by_modality(stack, few, front=front, brief=brief)
    if not brief and not _gives_features(stack):
        rows = calibration.cut(len(calibration.tokens), LENGTH) if isinstance(calibration, Text) else few
        done = study(stack, rows, splits=splits, stride=stride, front=front, seed=seed)
        findings["study"] = {"data": provenance.describe(rows)} | done.as_dict()
    if compare is not None and not isinstance(calibration, ImageText):
        findings["maps"] = _maps(stack, compare, calibration, front)
    return Study(findings=findings)


@dataclass(frozen=True)
class DepthStudy:
    """The result of :func:`study`, with three estimates of where the use of depth changes.

    Attributes:
        profile: see :func:`depth_profile`.
        current: effects of skipping a layer for all tokens.
        future: effects of skipping a layer on later tokens.
        local: see :func:`local_effect`.
    """

    profile: dict[str, Scores]
    current: SkipEffect
    future: SkipEffect
    local: dict[str, Scores]

    @property
    def effective_depth(self) -> int:
        """The number of layers; see :meth:`SkipEffect.effective_depth`."""
        return self.future.effective_depth()

    @property
    def refinement(self) -> int:
        """The point after which layers only bring the prediction closer to the output; see :func:`refinement`."""
        return refinement(self.profile["lens_kl"].values)

    @property
    def turning_point(self) -> int | None:
        """The layer from which layers amplify the residual stream; see :func:`turning_point`."""
        return turning_point(self.profile["cosine_layer"].values)

    def as_dict(self) -> dict[str, Any]:
        """Return the study as JSON values."""
        return {
            "effective_depth": self.effective_depth,
            "refinement": self.refinement,
            "turning_point": self.turning_point,
            "profile": {name: scores.as_dict() for name, scores in self.profile.items()},
            "skip_current": self.current.as_dict(),
            "skip_future": self.future.as_dict(),
            "direct": {how: scores.as_dict() for how, scores in self.local.items()},
        }


def study(
    stack: Stack, tokens: Tokens, *, splits: int = 4, stride: int = 8, front: int = 1, seed: int = 0
) -> DepthStudy:
    """Run the paper's own measurements; see :func:`depth_efficiency`.

    Args:
        stack: the model.
        tokens: token ids [sequences, time], or rows of images with text.
        splits: number of split points per sequence.
        stride: split points are multiples of this number of tokens.
        front: number of tokens at the front of each sequence that are not measured.
        seed: random seed of the split points.
    """
    return DepthStudy(
        depth_profile(stack, tokens, front=front),
        skip_effect(stack, tokens, scope="current", front=front, seed=seed),
        skip_effect(stack, tokens, splits=splits, stride=stride, front=front, seed=seed),
        local_effect(stack, tokens, splits=splits, stride=stride, front=front, seed=seed),
    )


def by_modality(stack: Stack, rows: ImageText, *, front: int = 1, brief: bool = False) -> dict[str, Any]:
    """Measure contributions for the tokens of each modality, and the effect on text if one modality skips a layer.

    Args:
        stack: the model.
        rows: images with text.
        front: number of tokens at the front of each sequence that are not measured.
        brief: measure the contributions only.
    """
    found: dict[str, Any] = {}
    for name in stack.context(sequences(rows)[0]).modalities:
        profile = depth_profile(stack, rows, front=front, modality=name)
        found[name] = {"profile": {score: each.as_dict() for score, each in profile.items()}}
        if not brief:
            found[name]["skip"] = skip_effect(stack, rows, scope="current", modality=name, front=front).as_dict()
    return found


def _gives_features(stack: Stack) -> bool:
    """Return whether the stack only provides features to another stack, so it has no output to compare."""
    return stack.architecture.objective == "features"


def _first_tokens(tokens: Tokens) -> Tokens:
    """Return the first tokens of the first sequence, or the first row of images with text."""
    if isinstance(tokens, ImageText):
        return ImageText(tokens[:1], tokens.processing)
    inputs = sequences(tokens)[0]
    start = int(inputs["attention_mask"][0].argmax()) if "attention_mask" in inputs else 0  # there may be left padding
    return {name: each[:1, start : start + BRIEF_TOKENS] for name, each in inputs.items()}


def _removal_scores(stack: Stack, tokens: Tokens, what: str) -> Scores:
    """Measure the change of the output without one sublayer or one layer."""
    groups = groups_at("sublayer" if what == "sublayer" else "block", stack.positions)
    if _gives_features(stack):
        name = f"change of the features without the {what} (1 - cosine)"
        return Scores(name, (what,), _feature_change(stack, tokens, groups), {"tokens": describe(tokens)})
    distance = OutputDistance(stack, tokens, "jsd")
    values = [distance.cost((), group, np.inf).value for group in track(groups, f"each {what} alone")]
    name = f"output JSD without the {what} (nats)"
    return Scores(name, (what,), np.array(values), {"tokens": describe(tokens)})


@torch.no_grad()
def _feature_change(stack: Stack, tokens: Tokens, groups: Sequence[Group]) -> np.ndarray:
    """Return the mean change of the features (1 - cosine) without each group of sublayers [groups]."""
    total, seen = np.zeros(len(groups)), 0
    for row in track(sequences(tokens), "features without each part"):
        context = stack.context(row)
        whole = stack.normed(stack.run(context.h, 0, len(stack), context))[context.real].float()
        seen += len(whole)
        for index, group in enumerate(groups):
            left = stack.normed(stack.run(context.h, 0, len(stack), context, skip=group))[context.real].float()
            total[index] += float((1 - cosine_similarity(left, whole, dim=-1)).double().sum())
    return total / seen


def _maps(stack: Stack, other: Stack, text: Text, front: int) -> dict[str, Any]:
    """Fit linear maps from this model's residual stream to another model's."""
    if open_tokenizer(other.path or other.name).get_vocab() != text.tokenizer.get_vocab():
        raise CalibrationError(
            f"{stack.name} and {other.name} have different tokenizers: linear maps need the same one"
        )
    length = text.tokens.shape[1]
    rows = text.cut(-(-MAP_TOKENS * stack.unembedding.weight.shape[1] // length), length)
    return {"data": rows.describe(), "target": other.name} | linear_maps(stack, other, rows, front=front).as_dict()
