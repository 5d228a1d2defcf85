"""Do language models use their depth efficiently? (Csordas, Manning and Potts, 2025, arXiv 2505.13898)

A layer adds its *contribution* to the stream, c = a + m, from its attention and its MLP:

    h_0 ──(+ c_0)── h_1 ──(+ c_1)── ··· ── h_L ── norm ── head ── y

Three questions are asked of it. How large is what it adds, and which way does it point (profile.py)? Who misses it:
how do the contributions of later layers, and the output, change when it is left out, for all tokens, or for those
before some position with everything measured behind it, so that only what *other tokens* use later counts (effects.py)?
And who reads it directly, when nothing propagates (effects.py)?

The first token takes no part: it holds the attention sink, a stream so large that it would decide every mean, and
whose loss would destroy every other token.
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
from lamella.methods.depth_efficiency.profile import depth_profile, refinement, turning
from lamella.progress import track
from lamella.registry import method
from lamella.results import Study
from lamella.stack import Group, Stack, groups_at
from lamella.zoo import open_tokenizer

LENGTH = 128  # tokens in the sequences of the study, which runs the model some hundred times
BEGINNING = 128  # tokens on which sublayers and layers are left out, in a brief look
PROMPTS = 16  # rows of images with text in which layers are left out
MAPPED = 30  # tokens for each channel of the source that maps are fitted on and tested with


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
    """Study what each layer does for the stream, for later layers and tokens, and for the output.

    Block influence (how far a layer turns the stream), stream norms, angular distances between layers, and the
    Jensen-Shannon divergence of the output when one layer or one sublayer is left out. Higher means it matters more.

    Then the study of Csordas et al.: how large what a layer adds is and which way it points, what the head would say
    half-way (logit lens), which later layers and tokens miss a layer, and how many layers hold nine tenths of what
    layers do for one another. The page draws them all.

    Example: lamella inspect smollm2 -o depth

    Args:
        stack: the model; it is not changed.
        calibration: text to measure on, or token ids [sequences, time]; the paper takes 10 to 20 prompts. Of images
            with text, what layers do for the tokens of each modality too; layers are left out in the first 16 rows.
        compare: a second model, often a deeper one, with the same tokenizer: linear maps to it.
        brief: leave out what takes minutes: who misses each layer, and who reads it; and leave sublayers and layers
            out of the first tokens alone. All of it then takes less time than a dozen passes over the text.
        splits: in the study of later tokens, at how many points each sequence is split.
        stride: of what those points are multiples, in tokens.
        front: tokens at the front of each sequence at which nothing is measured, but for the output without a sublayer
            or a layer, which is compared at all tokens. In the study they keep every layer.
        seed: draws the sequences and the split points.

    Returns:
        The findings ``scores``, each as :meth:`lamella.measure.Scores.as_dict` gives it: ``block_influence`` [layers],
        ``sublayer_influence`` [sublayers], ``stream_norm`` [layers + 1], ``angular_distance`` [start, length], and the
        output's Jensen-Shannon divergence in nats without one sublayer or one layer, ``sublayer_removed`` [sublayers]
        and ``layer_removed`` [layers]; the ``study`` unless brief, and the ``maps`` to ``compare``. Of images with text
        the ``modalities``: the profile of ``text`` and ``image`` tokens, and unless brief what text tokens lose where
        those of one modality skip a layer. A stack that gives features to others, such as a vision tower, has the
        scores alone, the last two as how far its features turn (1 - cosine).

    Raises:
        CalibrationError: for no tokens, sequences too short for a split point, or tokenizers that differ.
        MethodError: for maps on images.
        NumericsError: for activations that are not finite, named by site.
    """
    if compare is not None and isinstance(calibration, ImageText):
        raise MethodError(
            "depth-efficiency: maps between models are made on text: give calibration, or leave compare out"
        )
    few = (
        ImageText(calibration[:PROMPTS], calibration.processing) if isinstance(calibration, ImageText) else calibration
    )
    some = _beginning(few) if brief else few
    measured = {
        "block_influence": block_influence(stack, calibration, front=front),
        "sublayer_influence": sublayer_influence(stack, calibration, front=front),
        "stream_norm": hidden_norms(stack, calibration, front=front),
        "angular_distance": angular_distance(stack, calibration, front=front),
        "sublayer_removed": _removed_alone(stack, some, "sublayer"),
        "layer_removed": _removed_alone(stack, some, "layer"),
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
    """What :func:`study` returns; three estimates of where the use of depth changes come with it."""

    profile: dict[str, Scores]
    current: SkipEffect
    future: SkipEffect
    local: dict[str, Scores]

    @property
    def effective_depth(self) -> int:
        """In layers; see :meth:`SkipEffect.effective_depth`."""
        return self.future.effective_depth()

    @property
    def refinement(self) -> int:
        """The point from which layers only bring the output closer; see :func:`refinement`."""
        return refinement(self.profile["lens_kl"].values)

    @property
    def turning(self) -> int | None:
        """The layer from which layers amplify the stream; see :func:`turning`."""
        return turning(self.profile["cosine_layer"].values)

    def as_dict(self) -> dict[str, Any]:
        return {
            "effective_depth": self.effective_depth,
            "refinement": self.refinement,
            "turning": self.turning,
            "profile": {name: scores.as_dict() for name, scores in self.profile.items()},
            "skip_current": self.current.as_dict(),
            "skip_future": self.future.as_dict(),
            "direct": {how: scores.as_dict() for how, scores in self.local.items()},
        }


def study(
    stack: Stack, tokens: Tokens, *, splits: int = 4, stride: int = 8, front: int = 1, seed: int = 0
) -> DepthStudy:
    """The paper's own measurements; see :func:`depth_efficiency`."""
    return DepthStudy(
        depth_profile(stack, tokens, front=front),
        skip_effect(stack, tokens, scope="current", front=front, seed=seed),
        skip_effect(stack, tokens, splits=splits, stride=stride, front=front, seed=seed),
        local_effect(stack, tokens, splits=splits, stride=stride, front=front, seed=seed),
    )


def by_modality(stack: Stack, rows: ImageText, *, front: int = 1, brief: bool = False) -> dict[str, Any]:
    """What layers do for the tokens of each modality, and what text tokens lose where those of one skip a layer."""
    found: dict[str, Any] = {}
    for name in stack.context(sequences(rows)[0]).modalities:
        profile = depth_profile(stack, rows, front=front, modality=name)
        found[name] = {"profile": {score: each.as_dict() for score, each in profile.items()}}
        if not brief:
            found[name]["skip"] = skip_effect(stack, rows, scope="current", modality=name, front=front).as_dict()
    return found


def _gives_features(stack: Stack) -> bool:
    """Whether nothing but another stack reads this one: it has no head, whose output could be compared."""
    return stack.architecture.objective == "features"


def _beginning(tokens: Tokens) -> Tokens:
    """The first tokens of the first sequence, an eighth of what is usual; or the first row of images with text."""
    if isinstance(tokens, ImageText):
        return ImageText(tokens[:1], tokens.processing)
    given = sequences(tokens)[0]
    start = int(given["attention_mask"][0].argmax()) if "attention_mask" in given else 0  # padding may stand in front
    return {name: each[:1, start : start + BEGINNING] for name, each in given.items()}


def _removed_alone(stack: Stack, tokens: Tokens, what: str) -> Scores:
    """What the output loses with one sublayer, or one layer, left out."""
    groups = groups_at("sublayer" if what == "sublayer" else "block", stack.positions)
    if _gives_features(stack):
        name = f"turn of the features without the {what} (1 - cosine)"
        return Scores(name, (what,), _turned(stack, tokens, groups), {"tokens": describe(tokens)})
    distance = OutputDistance(stack, tokens, "jsd")
    values = [distance.cost((), group, np.inf).value for group in track(groups, f"each {what} alone")]
    name = f"output JSD without the {what} (nats)"
    return Scores(name, (what,), np.array(values), {"tokens": describe(tokens)})


@torch.no_grad()
def _turned(stack: Stack, tokens: Tokens, groups: Sequence[Group]) -> np.ndarray:
    """How far the features turn without each group of sublayers, mean over positions of 1 - cosine [groups]."""
    total, seen = np.zeros(len(groups)), 0
    for row in track(sequences(tokens), "features without each part"):
        context = stack.context(row)
        whole = stack.normed(stack.run(context.h, 0, len(stack), context))[context.real].float()
        seen += len(whole)
        for place, group in enumerate(groups):
            left = stack.normed(stack.run(context.h, 0, len(stack), context, skip=group))[context.real].float()
            total[place] += float((1 - cosine_similarity(left, whole, dim=-1)).double().sum())
    return total / seen


def _maps(stack: Stack, other: Stack, text: Text, front: int) -> dict[str, Any]:
    """How well the streams of another model follow from those of this one, by linear maps."""
    if open_tokenizer(other.path or other.name).get_vocab() != text.tokenizer.get_vocab():
        raise CalibrationError(f"{stack.name} and {other.name} have different tokenizers: maps need one for both")
    length = text.tokens.shape[1]
    rows = text.cut(-(-MAPPED * stack.unembedding.weight.shape[1] // length), length)
    return {"data": rows.describe(), "target": other.name} | linear_maps(stack, other, rows, front=front).as_dict()
