"""Every model whose layers i to j - 1 are those of another checkpoint, without building one of them.

    h_0 -post-> h_1 -post-> ... -> h_i -pre-> ... -pre-> r_j -post-> ... -post-> head

The stream h_i is shared by all intervals that begin at i or later, the stream r_j by [i, j) and all longer ones; what
comes behind r_j is no other interval's. What comes out is what the models themselves would give.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from lamella.errors import MethodError, NumericsError
from lamella.methods.slr.answers import Asked
from lamella.plan import fingerprint
from lamella.progress import tracker
from lamella.search import Memo
from lamella.stack import Hidden, Prefixes, Stack, join

Interval = tuple[int, int]  # [start, stop), in layers


class Means(NamedTuple):
    """Mean validity Q and diversity D over questions."""

    quality: float
    diversity: float


def intervals(layers: int, stride: int = 1) -> list[Interval]:
    """All intervals whose ends are multiples of ``stride``, or the last layer: L (L + 1) / 2 of them for stride 1."""
    ends = sorted({*range(0, layers, stride), layers})
    return [(i, j) for i in ends for j in ends if i < j]


def layer_runs(layers: int, wanted: Iterable[Interval]) -> int:
    """How many layers the original and :func:`answer_restored` run for these intervals, of each batch of questions."""
    stops = _by_start(wanted)
    return layers + sum(max(ends) - start + sum(layers - stop for stop in ends) for start, ends in stops.items())


@torch.no_grad()
def answer_restored(
    post: Stack, pre: Stack, asked: Asked, wanted: Iterable[Interval], journal: Path | None = None
) -> dict[Interval, Means]:
    """Q and D of the model with the layers of ``pre`` in each of some intervals.

    Args:
        post: the model whose front, other layers, final norm and head run.
        pre: the model whose layers stand in.
        asked: the questions.
        wanted: intervals [i, j) of layers, 0 <= i < j <= L.
        journal: a file for what is measured, with which an interrupted run goes on.

    Raises:
        MethodError: for an interval out of range.
        NumericsError: for logits that are not finite, with their interval.
    """
    stops, layers = _by_start(wanted), len(post)
    for start, ends in stops.items():
        if not 0 <= start < min(ends) <= max(ends) <= layers:
            raise MethodError(f"interval [{start}, {max(ends)}): give 0 <= i < j <= {layers}")
    known = Memo(journal, {} if journal is None else _search(post, pre, asked))
    batches = list(asked.batches())
    contexts = [post.context(batch.inputs(post.device)) for batch in batches]
    models = {True: pre, False: post}

    def take(streams: list[Hidden], chain: tuple[bool, ...]) -> list[Hidden]:
        """The streams of all batches behind one more layer, which is that of ``pre`` or not."""
        layer, model = len(chain) - 1, models[chain[-1]]
        return [model.run(h, layer, layer + 1, context) for h, context in zip(streams, contexts, strict=True)]

    prefixes: Prefixes[bool, list[Hidden]] = Prefixes([context.h for context in contexts])
    found: dict[Interval, Means] = {}
    with tracker("intervals of layers", sum(map(len, stops.values()))) as count:
        for start, ends in sorted(stops.items()):
            before = (False,) * start
            for stop in sorted(ends):
                if f"D {start} {stop}" not in known:
                    prefixes.behind(before, take, way=False)
                    restored = before + (True,) * (stop - start)
                    streams = prefixes.behind(restored, take, way=False)
                    prefixes.keep([before, restored])
                    try:
                        parts = [
                            batch.answers(post.head(join(post.run(h, stop, layers, context))[:, -1:])[:, 0])
                            for batch, h, context in zip(batches, streams, contexts, strict=True)
                        ]
                    except NumericsError as error:
                        raise NumericsError(f"layers [{start}, {stop}) of {pre.name}: {error}") from None
                    for name, each in zip("QD", zip(*parts, strict=True), strict=True):
                        known[f"{name} {start} {stop}"] = float(torch.cat(each).mean())
                found[start, stop] = Means(*(known[f"{name} {start} {stop}"] for name in "QD"))
                count()
    return found


def _by_start(wanted: Iterable[Interval]) -> dict[int, set[int]]:
    stops: dict[int, set[int]] = defaultdict(set)
    for start, stop in wanted:
        stops[start].add(stop)
    return stops


def _search(post: Stack, pre: Stack, asked: Asked) -> dict[str, object]:
    """What the result depends on, for the journal."""
    return {
        "post": fingerprint.tensors(post.model),
        "pre": fingerprint.tensors(pre.model),
        "asked": [asked.input_ids.tolist(), asked.attention_mask.tolist(), asked.tokens.tolist()],
    }
