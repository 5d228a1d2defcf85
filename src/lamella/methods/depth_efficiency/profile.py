"""How large what a layer adds is, and which way it points: steps 1, 2 and 7 of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from lamella.measure import Scores, Tokens, describe
from lamella.methods.depth_efficiency.contributions import runs
from lamella.stack import Stack

TINY = 1e-6  # norms below it count as this
CHUNK = 64  # positions whose logits are in memory at once
PARTS = ("layer", "attn", "mlp")


class Mean:
    """The mean over all tokens, and the greatest one, of values that come in pieces."""

    def __init__(self, *shape: int) -> None:
        self.total, self.count, self.most = np.zeros(shape), np.zeros(shape), np.full(shape, -np.inf)

    def add(self, place: Any, values: Tensor) -> None:
        """Add the values of some tokens [..., tokens] at a place [...]."""
        values = values.double().cpu()
        if values.shape[-1]:
            self.total[place] += values.sum(-1).numpy()
            self.count[place] += values.shape[-1]
            self.most[place] = np.maximum(self.most[place], values.amax(-1).numpy())

    def scores(self, name: str, dims: tuple[str, ...], about: dict[str, Any]) -> dict[str, Scores]:
        """Both, NaN where no token came."""
        with np.errstate(invalid="ignore"):
            mean = self.total / self.count
        most = np.where(self.count > 0, self.most, np.nan)
        return {"mean": Scores(name, dims, mean, about), "max": Scores(f"{name}, greatest", dims, most, about)}


def depth_profile(stack: Stack, tokens: Tokens, *, front: int = 1, modality: str | None = None) -> dict[str, Scores]:
    """What each layer adds to the stream, and what the head would say of the stream before each layer.

    Args:
        tokens: token ids [sequences, time], or them with an attention mask; or rows of images with text.
        front: tokens at the front of each sequence that are left out.
        modality: of ``text`` or ``image`` tokens alone; of all where none is named.

    Returns:
        ``norm_attn``, ``norm_mlp`` [layers] and ``norm_stream`` [layers + 1]: L2 norms. ``ratio_attn``, ``ratio_mlp``,
        ``ratio_layer``: those of what is added over the stream that it was made from [layers], and their greatest with
        ``_max`` behind the name. ``cosine_attn``, ``cosine_mlp``, ``cosine_layer``: between both (negative where a
        layer erases, about 0 where it writes something new), ``cosine_through``: between a layer's input and output
        [layers]. ``lens_kl`` [layers + 1]: KL(y || what the head says of the stream there) in nats; ``lens_top5``: the
        share of their five likeliest tokens that are the same.
    """
    layers = len(stack)
    found = {name: Mean(layers) for name in ("norm_attn", "norm_mlp", "ratio_attn", "ratio_mlp", "ratio_layer")}
    found |= {f"cosine_{name}": Mean(layers) for name in ("attn", "mlp", "layer", "through")}
    found |= {name: Mean(layers + 1) for name in ("norm_stream", "lens_kl", "lens_top5")}
    for run in runs(stack, tokens, "depth profile"):
        here = run.which(front, modality)
        h, a, m, c, middle = (part[:, here].float() for part in (run.h, run.attn, run.mlp, run.c, run.middle))
        found["norm_stream"].add(..., h.norm(dim=-1))
        found["cosine_through"].add(..., cosine_similarity(h[1:], h[:-1], dim=-1))
        for name, wrote, read in (("attn", a, h[:-1]), ("mlp", m, middle), ("layer", c, h[:-1])):
            found[f"ratio_{name}"].add(..., wrote.norm(dim=-1) / read.norm(dim=-1).clamp(min=TINY))
            found[f"cosine_{name}"].add(..., cosine_similarity(wrote, read, dim=-1))
        found["norm_attn"].add(..., a.norm(dim=-1))
        found["norm_mlp"].add(..., m.norm(dim=-1))
        for kl, top5 in _lens(stack, run.h[:, here]):
            found["lens_kl"].add(..., kl)
            found["lens_top5"].add(..., top5)
    about = {"tokens": describe(tokens), "front": front} | ({} if modality is None else {"modality": modality})
    scores = {}
    for name, each in found.items():
        dims = ("layer",) if len(each.total) == layers else ("point",)
        both = each.scores(name.replace("_", " "), dims, about)
        scores[name] = both["mean"]
        if name.startswith("ratio"):
            scores[f"{name}_max"] = both["max"]
    return scores


@torch.no_grad()
def _lens(stack: Stack, h: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """KL and overlap of the five likeliest tokens at every point [layers + 1, some tokens], piece by piece."""
    for part in h.split(CHUNK, dim=1):
        y = log_probabilities(stack, part[-1])
        likeliest = y.topk(5).indices
        kls, overlaps = [], []
        for point in part:
            q = log_probabilities(stack, point)
            kls.append(kl_div(q, y, reduction="none", log_target=True).sum(-1).clamp(min=0))
            same = q.topk(5).indices[:, :, None] == likeliest[:, None, :]
            overlaps.append(same.any(-1).float().mean(-1))
        yield torch.stack(kls), torch.stack(overlaps)


def log_probabilities(stack: Stack, h: Tensor) -> Tensor:
    """What the head says of a stream [tokens, hidden]: float32 [tokens, vocabulary]."""
    return stack.head(h[None])[0].float().log_softmax(-1)


def refinement(lens_kl: np.ndarray) -> int:
    """The point from which the lens comes closer to the output with every layer: where refinement begins."""
    start = len(lens_kl) - 1
    while start > 0 and lens_kl[start - 1] > lens_kl[start]:
        start -= 1
    return start


def turning(cosine: np.ndarray) -> int | None:
    """The layer from which what layers add begins to point along the stream, not against it; None where it never does.

    Of several changes of sign from negative to positive, the one whose cosine is the smallest.
    """
    changes = [layer for layer in range(1, len(cosine)) if cosine[layer - 1] < 0 <= cosine[layer]]
    return min(changes, key=lambda layer: abs(cosine[layer]), default=None)
