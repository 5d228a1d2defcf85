"""Which tokens of an image to keep: the criteria of the literature, as functions of tensors of one image or row.

    criterion    looks at                        keeps                                   source
    fastv        attention to image tokens       those that are attended to most         arXiv 2403.06764
    sparsevlm    attention of rater text tokens  the same, and means of the rest         arXiv 2410.04417
    divprune     states of image tokens          those farthest from one another         arXiv 2503.02175
    trim         likeness to the question        the most alike, and the mean of others  arXiv 2409.10994
    tome         states of image tokens          means of the most alike pairs           arXiv 2210.09461
    withdraw     nothing                         none (VTW)                              arXiv 2405.05803
    signal       gradient of the answer          what it would change most               a reading of arXiv 2511.15098
    random       nothing                         any

All choose exactly as many as they are told, ties in the order of the image. What merges tokens also says what becomes
of the states of those that stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lamella.errors import MethodError

AGGREGATES = 0.1  # SparseVLM: the share of the tokens kept that are means of others; one at least
NEIGHBOURS = 5  # of a token, in its density
RANK = 1.5  # TRIM: interquartile ranges above the third quartile


@dataclass(frozen=True)
class TokenFeatures:
    """What criteria look at; each needs some of it alone.

    Attributes:
        image: states of the image tokens [image, hidden].
        text: states of the text tokens [text, hidden].
        attention: of every token to image tokens, by head [heads, queries, image].
        of_text: that of the text tokens [heads, text, image].
        gradient: of the answer's log-probability by the states of the image tokens [image, hidden].
        generator: of what is drawn.
    """

    image: Tensor
    text: Tensor | None = None
    attention: Tensor | None = None
    of_text: Tensor | None = None
    gradient: Tensor | None = None
    generator: torch.Generator | None = None


@dataclass(frozen=True)
class Selection:
    """What is kept of an image.

    Attributes:
        index: the tokens, the best first [kept].
        states: what becomes of them [kept, hidden]; None where they stay as they are.
    """

    index: Tensor
    states: Tensor | None = None


Criterion = Callable[[TokenFeatures, int], Selection]


def best(scores: Tensor, k: int) -> Tensor:
    """The k tokens with the highest scores, the best first, of equal ones the first [k].

    >>> best(torch.tensor([0.1, 0.5, 0.5, 0.9]), 2).tolist()
    [3, 1]
    """
    return scores.argsort(descending=True, stable=True)[:k]


def fastv(seen: TokenFeatures, k: int) -> Selection:
    """Those that are attended to most: the mean over heads, summed over queries."""
    assert seen.attention is not None
    return Selection(best(seen.attention.mean(dim=0).sum(dim=0), k))


def raters(image: Tensor, text: Tensor) -> Tensor:
    """The text tokens that speak of the image: more like it than they are in the mean [text] bool; all where none is.

    Args:
        image: [image, hidden].
        text: [text, hidden].
    """
    alike = (normalize(text, dim=-1) @ normalize(image, dim=-1).T).mean(dim=1)
    chosen = alike > alike.mean()
    return chosen if chosen.any() else torch.ones_like(chosen)


def sparsevlm(seen: TokenFeatures, k: int) -> Selection:
    """What the raters attend to most; some of the k are means of clusters of the rest, where these are densest."""
    assert seen.text is not None and seen.of_text is not None
    scores = seen.of_text[:, raters(seen.image, seen.text)].mean(dim=(0, 1))
    order = best(scores, len(scores))
    count = min(max(1, int(AGGREGATES * k)), k - 1, len(order) - k)
    if count <= 0:
        return Selection(order[:k])
    top, rest = order[: k - count], order[k - count :]
    centres, member = clusters(seen.image[rest], count)
    means = torch.stack([seen.image[rest[member == place]].mean(dim=0) for place in range(count)])
    return Selection(torch.cat([top, rest[centres]]), torch.cat([seen.image[top], means]))


def clusters(states: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Density peaks (Rodriguez and Laio, 2014): the centres [count], and the cluster of each token [tokens].

    A centre is dense, and far from whatever is denser. Every token joins the centre nearest to it.
    """
    apart = torch.cdist(states, states)
    nearest = apart.topk(min(NEIGHBOURS + 1, len(states)), largest=False).values
    density = (-(nearest**2).mean(dim=1)).exp()
    place = torch.arange(len(states), device=states.device)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (place[None] < place[:, None]))
    away = apart.masked_fill(~denser, torch.inf).min(dim=1).values
    away = torch.where(away.isinf(), apart.max(), away)
    centres = best(density * away, count)
    member = apart[:, centres].argmin(dim=1)
    member[centres] = torch.arange(count, device=states.device)  # also where two centres are the same point
    return centres, member


def divprune(seen: TokenFeatures, k: int) -> Selection:
    """Greedily the token farthest, by cosine, from those chosen; the first is the one farthest from its nearest."""
    unit = normalize(seen.image, dim=-1)
    apart = 1 - unit @ unit.T
    alone = apart + torch.diag(torch.full((len(apart),), torch.inf, dtype=apart.dtype, device=apart.device))
    chosen = [int(alone.min(dim=1).values.argmax())] if len(apart) > 1 else [0]
    nearest = apart[chosen[0]].clone()
    while len(chosen) < k:
        nearest[chosen] = -torch.inf
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, apart[chosen[-1]])
    return Selection(torch.tensor(chosen[:k], device=seen.image.device))


def above_quartiles(scores: Tensor) -> Tensor:
    """TRIM's own rule for how many: what lies above the third quartile by 1.5 interquartile ranges [tokens] bool."""
    first, third = scores.float().quantile(torch.tensor([0.25, 0.75], device=scores.device))
    return scores > third + RANK * (third - first)


def trim(seen: TokenFeatures, k: int) -> Selection:
    """Those most like the mean of the question, and one that is the mean of the rest, where the best of these is.

    TRIM compares in CLIP's space, of which small models have no text side: here it is the language model's own.
    """
    assert seen.text is not None
    alike = normalize(seen.image, dim=-1) @ normalize(seen.text.mean(dim=0), dim=0)
    order = best(alike, len(alike))
    if k >= len(order) or k < 2:
        return Selection(order[:k])
    rest = order[k - 1 :]
    return Selection(order[:k], torch.cat([seen.image[order[: k - 1]], seen.image[rest].mean(dim=0, keepdim=True)]))


def tome(seen: TokenFeatures, k: int) -> Selection:
    """Bipartite soft matching, again and again until k are left: each round merges at most half of them."""
    index = torch.arange(len(seen.image), device=seen.image.device)
    states, sizes = seen.image, torch.ones(len(index), dtype=seen.image.dtype, device=index.device)
    while len(index) > k:
        index, states, sizes = matched(index, states, sizes, min(len(index) - k, len(index) // 2))
    return Selection(index, states)


def matched(index: Tensor, states: Tensor, sizes: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the r pairs most alike between even and odd places, as means weighted by size.

    Args:
        index: the tokens [tokens].
        states: [tokens, hidden].
        sizes: how many tokens each stands for [tokens].

    Returns:
        The same of those that are left; the odd one of a pair stands for both.
    """
    unit = normalize(states, dim=-1)
    a, b = torch.arange(0, len(index), 2), torch.arange(1, len(index), 2)
    alike, partner = (unit[a] @ unit[b].T).max(dim=1)
    gone = best(alike, r)
    mass = states * sizes[:, None]
    into = b[partner[gone].cpu()].to(states.device)
    mass = mass.index_add(0, into, mass[a[gone.cpu()]])
    sizes = sizes.index_add(0, into, sizes[a[gone.cpu()]])
    left = torch.ones(len(index), dtype=torch.bool, device=states.device)
    left[a[gone.cpu()]] = False
    return index[left], (mass / sizes[:, None])[left], sizes[left]


def signal(seen: TokenFeatures, k: int) -> Selection:
    """Those whose absence would change the answer most, to first order: abs(h_v . d log p / d h_v)."""
    assert seen.gradient is not None
    return Selection(best((seen.image * seen.gradient).sum(dim=-1).abs(), k))


def at_random(seen: TokenFeatures, k: int) -> Selection:
    """Any of them."""
    return Selection(torch.randperm(len(seen.image), generator=seen.generator)[:k].to(seen.image.device))


def withdraw(seen: TokenFeatures, k: int) -> Selection:
    """None."""
    return Selection(torch.empty(0, dtype=torch.long, device=seen.image.device))


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
CriterionName = Literal["fastv", "sparsevlm", "divprune", "trim", "tome", "withdraw", "signal", "random"]  # its keys
ATTENDING = ("fastv", "sparsevlm")  # need the attention weights of a layer
MERGING = ("sparsevlm", "trim", "tome")  # change states


def choose(criterion: str, seen: TokenFeatures, k: int) -> Selection:
    """The k tokens of an image that a criterion keeps.

    Raises:
        MethodError: for a criterion that there is not.
    """
    if criterion not in CRITERIA:
        raise MethodError(f"no criterion '{criterion}' for image tokens: choose one of {', '.join(CRITERIA)}")
    return CRITERIA[criterion](seen, k)
