"""Criteria for the tokens of an image to keep, as functions of tensors of one image or row.

    criterion    uses                            keeps                                       source
    fastv        attention to image tokens       the tokens that receive most attention      arXiv 2403.06764
    sparsevlm    attention of rater text tokens  the same, and cluster means of the rest     arXiv 2410.04417
    divprune     states of image tokens          the tokens farthest from one another        arXiv 2503.02175
    trim         similarity to the question      the most similar, and the mean of others    arXiv 2409.10994
    tome         states of image tokens          means of the most similar pairs             arXiv 2210.09461
    withdraw     nothing                         none (VTW)                                  arXiv 2405.05803
    signal       gradient of the answer          the tokens with the largest first-order     an interpretation of
                                                 effect on the answer                        arXiv 2511.15098
    random       nothing                         random tokens

All keep exactly the requested number of tokens; ties are resolved in the order of the image. Criteria that merge tokens
also return the new states of those that stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lamella.errors import MethodError

AGGREGATES = 0.1  # SparseVLM: fraction of the kept tokens that are cluster means; at least one
NEIGHBOURS = 5  # number of neighbours in the density of a token
RANK = 1.5  # TRIM: interquartile ranges above the third quartile


@dataclass(frozen=True)
class TokenFeatures:
    """The inputs of criteria, of which each criterion needs only some.

    Attributes:
        image: states of the image tokens [image, hidden].
        text: states of the text tokens [text, hidden].
        attention: attention of every token to image tokens, by head [heads, queries, image].
        of_text: attention of the text tokens [heads, text, image].
        gradient: gradient of the answer's log-probability with respect to the image states [image, hidden].
        generator: random generator.
    """

    image: Tensor
    text: Tensor | None = None
    attention: Tensor | None = None
    of_text: Tensor | None = None
    gradient: Tensor | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class TokenSelection:
    """The tokens of an image that are kept.

    Attributes:
        index: indices of the tokens, the best first [kept].
        states: their new states [kept, hidden]; None if they stay unchanged.
    """

    index: Tensor
    states: Tensor | None = None


Criterion = Callable[[TokenFeatures, int], TokenSelection]


def best(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k highest scores, the best first; among equal scores, the first token wins [k].

    Args:
        scores: score of each token [tokens].
        k: number of tokens.

    >>> best(torch.tensor([0.1, 0.5, 0.5, 0.9]), 2).tolist()
    [3, 1]
    """
    return scores.argsort(descending=True, stable=True)[:k]


def fastv(features: TokenFeatures, k: int) -> TokenSelection:
    """Keep the tokens that receive most attention: the mean over heads, summed over queries.

    Args:
        features: needs ``attention``.
        k: number of tokens to keep.
    """
    assert features.attention is not None
    return TokenSelection(best(features.attention.mean(dim=0).sum(dim=0), k))


def raters(image: Tensor, text: Tensor) -> Tensor:
    """Return the text tokens more similar to the image than average [text] bool; all of them if there is none.

    Args:
        image: image states [image, hidden].
        text: text states [text, hidden].
    """
    alike = (normalize(text, dim=-1) @ normalize(image, dim=-1).T).mean(dim=1)
    chosen = alike > alike.mean()
    return chosen if chosen.any() else torch.ones_like(chosen)


def sparsevlm(features: TokenFeatures, k: int) -> TokenSelection:
    """Keep the tokens that the raters attend to most; some of the k are means of the densest clusters of the rest.

    Args:
        features: needs ``image``, ``text`` and ``of_text``.
        k: number of tokens to keep.
    """
    assert features.text is not None and features.of_text is not None
    scores = features.of_text[:, raters(features.image, features.text)].mean(dim=(0, 1))
    order = best(scores, len(scores))
    count = min(max(1, int(AGGREGATES * k)), k - 1, len(order) - k)
    if count <= 0:
        return TokenSelection(order[:k])
    top, rest = order[: k - count], order[k - count :]
    centres, member = clusters(features.image[rest], count)
    means = torch.stack([features.image[rest[member == cluster]].mean(dim=0) for cluster in range(count)])
    return TokenSelection(torch.cat([top, rest[centres]]), torch.cat([features.image[top], means]))


def clusters(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the centres [count] of density-peak clusters, and the cluster of each token [tokens].

    A centre is dense, and far from any denser token (Rodriguez and Laio, 2014). Every token joins the nearest centre.

    Args:
        states: states of the tokens [tokens, hidden].
        count: number of clusters.
    """
    apart = torch.cdist(states, states)
    nearest = apart.topk(min(NEIGHBOURS + 1, len(states)), largest=False).values
    density = (-(nearest**2).mean(dim=1)).exp()
    rank = torch.arange(len(states), device=states.device)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (rank[None] < rank[:, None]))
    away = apart.masked_fill(~denser, torch.inf).min(dim=1).values
    away = torch.where(away.isinf(), apart.max(), away)
    centres = best(density * away, count)
    member = apart[:, centres].argmin(dim=1)
    member[centres] = torch.arange(count, device=states.device)  # also if two centres are the same point
    return centres, member


def divprune(features: TokenFeatures, k: int) -> TokenSelection:
    """Keep, greedily, the token farthest by cosine from those chosen, starting with the most isolated one.

    Args:
        features: needs ``image``.
        k: number of tokens to keep.
    """
    unit = normalize(features.image, dim=-1)
    apart = 1 - unit @ unit.T
    alone = apart + torch.diag(torch.full((len(apart),), torch.inf, dtype=apart.dtype, device=apart.device))
    chosen = [int(alone.min(dim=1).values.argmax())] if len(apart) > 1 else [0]
    nearest = apart[chosen[0]].clone()
    while len(chosen) < k:
        nearest[chosen] = -torch.inf
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, apart[chosen[-1]])
    return TokenSelection(torch.tensor(chosen[:k], device=features.image.device))


def above_quartiles(scores: Tensor) -> Tensor:
    """Return TRIM's own selection [tokens] bool: scores above the third quartile by 1.5 interquartile ranges."""
    first, third = scores.float().quantile(torch.tensor([0.25, 0.75], device=scores.device))
    return scores > third + RANK * (third - first)


def trim(features: TokenFeatures, k: int) -> TokenSelection:
    """Keep the tokens most similar to the mean of the question; the best of the others is replaced by their mean.

    TRIM compares in CLIP's space, but small models have no text encoder for it: here the language model's space is
    used.

    Args:
        features: needs ``image`` and ``text``.
        k: number of tokens to keep.
    """
    assert features.text is not None
    alike = normalize(features.image, dim=-1) @ normalize(features.text.mean(dim=0), dim=0)
    order = best(alike, len(alike))
    if k >= len(order) or k < 2:
        return TokenSelection(order[:k])
    rest = order[k - 1 :]
    return TokenSelection(
        order[:k], torch.cat([features.image[order[: k - 1]], features.image[rest].mean(dim=0, keepdim=True)])
    )


def tome(features: TokenFeatures, k: int) -> TokenSelection:
    """Merge by bipartite soft matching until k tokens are left; each round merges at most half of them.

    Args:
        features: needs ``image``.
        k: number of tokens to keep.
    """
    index = torch.arange(len(features.image), device=features.image.device)
    states, sizes = features.image, torch.ones(len(index), dtype=features.image.dtype, device=index.device)
    while len(index) > k:
        index, states, sizes = matched(index, states, sizes, min(len(index) - k, len(index) // 2))
    return TokenSelection(index, states)


def matched(index: Tensor, states: Tensor, sizes: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the r most similar pairs of even and odd positions, as means weighted by size.

    Args:
        index: the tokens [tokens].
        states: their states [tokens, hidden].
        sizes: number of original tokens in each [tokens].
        r: number of pairs to merge.

    Returns:
        The same for the remaining tokens; the odd one of a pair stands for both.
    """
    unit = normalize(states, dim=-1)
    a, b = torch.arange(0, len(index), 2), torch.arange(1, len(index), 2)
    alike, partner = (unit[a] @ unit[b].T).max(dim=1)
    merged = best(alike, r)
    mass = states * sizes[:, None]
    into = b[partner[merged].cpu()].to(states.device)
    mass = mass.index_add(0, into, mass[a[merged.cpu()]])
    sizes = sizes.index_add(0, into, sizes[a[merged.cpu()]])
    left = torch.ones(len(index), dtype=torch.bool, device=states.device)
    left[a[merged.cpu()]] = False
    return index[left], (mass / sizes[:, None])[left], sizes[left]


def signal(features: TokenFeatures, k: int) -> TokenSelection:
    """Keep the tokens whose removal would change the answer most, to first order: abs(h_v . d log p / d h_v).

    Args:
        features: needs ``image`` and ``gradient``.
        k: number of tokens to keep.
    """
    assert features.gradient is not None
    return TokenSelection(best((features.image * features.gradient).sum(dim=-1).abs(), k))


def at_random(features: TokenFeatures, k: int) -> TokenSelection:
    """Keep random tokens.

    Args:
        features: needs ``image`` for its length, and ``generator`` for a reproducible choice.
        k: number of tokens to keep.
    """
    return TokenSelection(
        torch.randperm(len(features.image), generator=features.generator)[:k].to(features.image.device)
    )


def withdraw(features: TokenFeatures, k: int) -> TokenSelection:
    """Keep no token.

    Args:
        features: needs ``image`` for its device.
        k: ignored.
    """
    return TokenSelection(torch.empty(0, dtype=torch.long, device=features.image.device))


CRITERIA: dict[str, Criterion] = {
    "fastv": fastv,
    "sparsevlm": sparsevlm,
    "divprune": divprune,
    "trim": trim,
    "tome": tome,
    "withdraw": withdraw,
    "signal": signal,
    "random": at_random,
}
CriterionName = Literal[
    "fastv", "sparsevlm", "divprune", "trim", "tome", "withdraw", "signal", "random"
]  # keys of CRITERIA
ATTENDING = ("fastv", "sparsevlm")  # criteria that need the attention weights of a layer
MERGING = ("sparsevlm", "trim", "tome")  # criteria that change states


def choose(criterion: str, features: TokenFeatures, k: int) -> TokenSelection:
    """Return the k tokens of an image that a criterion keeps.

    Args:
        criterion: name of the criterion.
        features: its inputs.
        k: number of tokens.

    Raises:
        MethodError: for an unknown criterion.
    """
    if criterion not in CRITERIA:
        raise MethodError(f"unknown criterion '{criterion}' for image tokens: choose one of {', '.join(CRITERIA)}")
    return CRITERIA[criterion](features, k)
