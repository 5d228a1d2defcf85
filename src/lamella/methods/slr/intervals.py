"""Evaluation of all models whose layers i to j - 1 come from another checkpoint, without building any of them.

    h_0 -post-> h_1 -post-> ... -> h_i -pre-> ... -pre-> r_j -post-> ... -post-> head

The hidden states h_i are shared by all intervals that begin at i or later, r_j by [i, j) and all longer ones;
everything after r_j is specific to one interval. The results equal those of the models themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from lamella.errors import MethodError, NumericsError
from lamella.methods.slr.answers import EncodedQuestions
from lamella.plan import fingerprint
from lamella.progress import tracker
from lamella.search import Memo
from lamella.stack import Hidden, Prefixes, Stack, join

Interval = tuple[int, int]  # [start, stop), in layers


class Means(NamedTuple):
    """Mean validity Q and diversity D over questions.

    Attributes:
        quality: Q.
        diversity: D.
    """

    quality: float
    diversity: float


def intervals(layers: int, stride: int = 1) -> list[Interval]:
    """Return all intervals whose ends are multiples of ``stride``, or the last layer: L (L + 1) / 2 for stride 1.

    Args:
        layers: the number of layers.
        stride: the step between ends.
    """
    ends = sorted({*range(0, layers, stride), layers})
    return [(i, j) for i in ends for j in ends if i < j]


def layer_runs(layers: int, requested: Iterable[Interval]) -> int:
    """Return how many layers :func:`answer_restored` and the original run for these intervals per batch of questions.

    Args:
        layers: the number of layers.
        requested: the intervals.
    """
    stops = _by_start(requested)
    return layers + sum(max(ends) - start + sum(layers - stop for stop in ends) for start, ends in stops.items())


@torch.no_grad()
def answer_restored(
    post: Stack, pre: Stack, encoded: EncodedQuestions, requested: Iterable[Interval], journal: Path | None = None
) -> dict[Interval, Means]:
    """Measure Q and D of the model with the layers of ``pre`` in each interval.

    Args:
        post: the model that provides the embedding, the other layers, final norm and head.
        pre: the model that provides the restored layers.
        encoded: the questions.
        requested: intervals [i, j) of layers, 0 <= i < j <= L.
        journal: a file for the measurements, from which an interrupted run resumes.

    Raises:
        MethodError: for an interval out of range.
        NumericsError: for logits that are not finite, with their interval.
    """
    stops, layers = _by_start(requested), len(post)
    for start, ends in stops.items():
        if not 0 <= start < min(ends) <= max(ends) <= layers:
            raise MethodError(f"interval [{start}, {max(ends)}): give 0 <= i < j <= {layers}")
    known = Memo(journal, {} if journal is None else _journal_key(post, pre, encoded))
    batches = list(encoded.batches())
    contexts = [post.context(batch.inputs(post.device)) for batch in batches]
    models = {True: pre, False: post}

    def run_layer(states: list[Hidden], chain: tuple[bool, ...]) -> list[Hidden]:
        """Return the hidden states of all batches after one more layer, of ``pre`` or of ``post``."""
        layer, model = len(chain) - 1, models[chain[-1]]
        return [model.run(h, layer, layer + 1, context) for h, context in zip(states, contexts, strict=True)]

    prefixes: Prefixes[bool, list[Hidden]] = Prefixes([context.h for context in contexts])
    scores: dict[Interval, Means] = {}
    with tracker("intervals of layers", sum(map(len, stops.values()))) as count:
        for start, ends in sorted(stops.items()):
            before = (False,) * start
            for stop in sorted(ends):
                if f"D {start} {stop}" not in known:
                    prefixes.behind(before, run_layer, way=False)
                    restored = before + (True,) * (stop - start)
                    states = prefixes.behind(restored, run_layer, way=False)
                    prefixes.keep([before, restored])
                    try:
                        parts = [
                            batch.scores(post.head(join(post.run(h, stop, layers, context))[:, -1:])[:, 0])
                            for batch, h, context in zip(batches, states, contexts, strict=True)
                        ]
                    except NumericsError as error:
                        raise NumericsError(f"layers [{start}, {stop}) of {pre.name}: {error}") from None
                    for name, each in zip("QD", zip(*parts, strict=True), strict=True):
                        known[f"{name} {start} {stop}"] = float(torch.cat(each).mean())
                scores[start, stop] = Means(*(known[f"{name} {start} {stop}"] for name in "QD"))
                count()
    return scores


def _by_start(requested: Iterable[Interval]) -> dict[int, set[int]]:
    stops: dict[int, set[int]] = defaultdict(set)
    for start, stop in requested:
        stops[start].add(stop)
    return stops


def _journal_key(post: Stack, pre: Stack, encoded: EncodedQuestions) -> dict[str, object]:
    """Return everything that the result depends on, for the journal."""
    return {
        "post": fingerprint.tensors(post.model),
        "pre": fingerprint.tensors(pre.model),
        "asked": [encoded.input_ids.tolist(), encoded.attention_mask.tolist(), encoded.tokens.tolist()],
    }
