"""Size and direction of contributions, and the logit lens: steps 1, 2 and 7 of the paper."""

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

TINY = 1e-6  # lower bound of norms in denominators
CHUNK = 64  # number of positions whose logits are in memory at once
PARTS = ("layer", "attn", "mlp")


class TokenMean:
    """Running mean and maximum over tokens of arrays of values.

    Args:
        *shape: shape of the arrays.
    """

    def __init__(self, *shape: int) -> None:
        self.total, self.count, self.maximum = np.zeros(shape), np.zeros(shape), np.full(shape, -np.inf)

    def add(self, index: Any, values: Tensor) -> None:
        """Add the values of some tokens.

        Args:
            index: index into the arrays [...].
            values: values [..., tokens].
        """
        values = values.double().cpu()
        if values.shape[-1]:
            self.total[index] += values.sum(-1).numpy()
            self.count[index] += values.shape[-1]
            self.maximum[index] = np.maximum(self.maximum[index], values.amax(-1).numpy())

    def scores(self, name: str, dims: tuple[str, ...], about: dict[str, Any]) -> dict[str, Scores]:
        """Return mean and maximum as scores, NaN if there were no tokens.

        Args:
            name: name of the score.
            dims: names of the dimensions.
            about: provenance.
        """
        with np.errstate(invalid="ignore"):
            mean = self.total / self.count
        maximum = np.where(self.count > 0, self.maximum, np.nan)
        return {"mean": Scores(name, dims, mean, about), "max": Scores(f"{name}, maximum", dims, maximum, about)}


def depth_profile(stack: Stack, tokens: Tokens, *, front: int = 1, modality: str | None = None) -> dict[str, Scores]:
    """Measure the contribution of each layer to the residual stream, and the logit lens before each layer.

    Args:
        stack: the model.
        tokens: token ids [sequences, time], optionally with an attention mask; or rows of images with text.
        front: number of tokens at the front of each sequence that are ignored.
        modality: ``text`` or ``image`` tokens only; if None, all tokens.

    Returns:
        ``norm_attn``, ``norm_mlp`` [layers] and ``norm_residual`` [layers + 1]: L2 norms. ``ratio_attn``,
        ``ratio_mlp``,
        ``ratio_layer``: norm of the contribution over that of its input [layers], and their maxima with suffix
            ``_max``.
        ``cosine_attn``, ``cosine_mlp``, ``cosine_layer``: cosine of contribution and input (negative if a layer erases,
        about 0 if it writes something new), ``cosine_through``: cosine of a layer's input and output [layers].
        ``lens_kl`` [layers + 1]: KL(y || prediction of the head at this point) in nats; ``lens_top5``: fraction of
        their five most likely tokens that agree.
    """
    layers = len(stack)
    found = {name: TokenMean(layers) for name in ("norm_attn", "norm_mlp", "ratio_attn", "ratio_mlp", "ratio_layer")}
    found |= {f"cosine_{name}": TokenMean(layers) for name in ("attn", "mlp", "layer", "through")}
    found |= {name: TokenMean(layers + 1) for name in ("norm_residual", "lens_kl", "lens_top5")}
    for run in runs(stack, tokens, "depth profile"):
        selected = run.token_mask(front, modality)
        h, a, m, c, middle = (part[:, selected].float() for part in (run.h, run.attn, run.mlp, run.c, run.middle))
        found["norm_residual"].add(..., h.norm(dim=-1))
        found["cosine_through"].add(..., cosine_similarity(h[1:], h[:-1], dim=-1))
        for name, wrote, read in (("attn", a, h[:-1]), ("mlp", m, middle), ("layer", c, h[:-1])):
            found[f"ratio_{name}"].add(..., wrote.norm(dim=-1) / read.norm(dim=-1).clamp(min=TINY))
            found[f"cosine_{name}"].add(..., cosine_similarity(wrote, read, dim=-1))
        found["norm_attn"].add(..., a.norm(dim=-1))
        found["norm_mlp"].add(..., m.norm(dim=-1))
        for kl, top5 in _lens(stack, run.h[:, selected]):
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
    """Yield KL and overlap of the five most likely tokens at every point [layers + 1, some tokens], in chunks."""
    for part in h.split(CHUNK, dim=1):
        y = log_probabilities(stack, part[-1])
        top_tokens = y.topk(5).indices
        kls, overlaps = [], []
        for point in part:
            q = log_probabilities(stack, point)
            kls.append(kl_div(q, y, reduction="none", log_target=True).sum(-1).clamp(min=0))
            same = q.topk(5).indices[:, :, None] == top_tokens[:, None, :]
            overlaps.append(same.any(-1).float().mean(-1))
        yield torch.stack(kls), torch.stack(overlaps)


def log_probabilities(stack: Stack, h: Tensor) -> Tensor:
    """Apply the head to hidden states [tokens, hidden]: log-probabilities in float32 [tokens, vocabulary].

    Args:
        stack: the model.
        h: hidden states [tokens, hidden].
    """
    return stack.head(h[None])[0].float().log_softmax(-1)


def refinement(lens_kl: np.ndarray) -> int:
    """Return the point after which every layer brings the logit lens closer to the output: where refinement begins.

    Args:
        lens_kl: KL of the lens at each point [layers + 1].
    """
    start = len(lens_kl) - 1
    while start > 0 and lens_kl[start - 1] > lens_kl[start]:
        start -= 1
    return start


def turning_point(cosine: np.ndarray) -> int | None:
    """Return the layer from which contributions amplify the residual stream; None if there is none.

    Of several sign changes from negative to positive, the one with the smallest cosine is taken.

    Args:
        cosine: cosine of contribution and input [layers].
    """
    changes = [layer for layer in range(1, len(cosine)) if cosine[layer - 1] < 0 <= cosine[layer]]
    return min(changes, key=lambda layer: abs(cosine[layer]), default=None)
