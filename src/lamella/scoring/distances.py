"""Distances between the output of a model and that of its original, position by position.

Every one is non-negative, so a partial sum over positions is a lower bound of the whole: that is what lets a search
abandon a candidate early. All are computed in float32 from raw logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import cross_entropy, normalize, softplus

LN2 = math.log(2)


@dataclass(frozen=True)
class Distance:
    """One distance.

    Attributes:
        prepare: what to keep of the original's logits [positions, vocabulary] float32.
        at_positions: the distance of logits [positions, vocabulary] to what was kept, given the next tokens
            [positions]; one non-negative value per position.
        reduce: the distance of a whole set from the sums [sequences] and counts [sequences] of its positions; it must
            grow with every sum.
    """

    prepare: Callable[[Tensor], Tensor]
    at_positions: Callable[[Tensor, Tensor, Tensor], Tensor]
    reduce: Callable[[Tensor, Tensor], Tensor]


def jensen_shannon(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, between 0 and ln 2.

    With d = log q - log p it is half the sum of q d - (p + q) (softplus(d) - ln 2), which has no quotient and keeps its
    digits where p and q agree. In place, since allocating the temporaries would cost more than the arithmetic.
    """
    log_q = torch.log_softmax(logits, dim=-1)
    d = log_q - reference
    q = log_q.exp_()
    cross = vecdot(q, d)
    mixture = q.add_(reference.exp())
    return (cross - vecdot(mixture, softplus(d).sub_(LN2))).mul_(0.5).clamp_(0.0, LN2)


def reversed_jensen_shannon(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    """What the authors' code calls JSD: half of KL(M||P) + KL(M||Q), also averaged over the vocabulary; unbounded."""
    log_q = torch.log_softmax(logits, dim=-1)
    log_m = torch.logaddexp(log_q, reference) - LN2
    terms = log_m.exp() * (log_m - 0.5 * (log_q + reference))
    return terms.mean(-1).clamp_(min=0.0)


def kullback_leibler(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    """KL(P||Q) in nats, P the original."""
    log_q = torch.log_softmax(logits, dim=-1)
    return (reference.exp() * (reference - log_q)).sum(-1).clamp_(min=0.0)


def angle(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    """The angle between the two logit vectors, in radians, cosines clamped to [0, 1].

    From the half angle, since the arccosine of a float32 cosine near 1 is off by up to 5e-4.
    """
    ours, original = normalize(logits, dim=-1), normalize(reference, dim=-1)
    angles = 2 * torch.atan2((ours - original).norm(dim=-1), (ours + original).norm(dim=-1))
    return angles.clamp(max=math.pi / 2)


def squared_difference(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    return (logits - reference).square().sum(-1)


def negative_log_likelihood(logits: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    """The surprise in nats at the next token; 0 at a sequence's last position, which has none (label -100)."""
    return cross_entropy(logits, labels, reduction="none", ignore_index=-100)


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    return sums.sum() / counts.sum()


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)


def _keep(logits: Tensor) -> Tensor:
    return logits


def _nothing(logits: Tensor) -> Tensor:
    return logits[:, :0]


DISTANCES: dict[str, Distance] = {
    "jsd": Distance(_log_softmax, jensen_shannon, _mean),
    "jsd_repo": Distance(_log_softmax, reversed_jensen_shannon, _mean),
    "kl": Distance(_log_softmax, kullback_leibler, _mean),
    "angular": Distance(_keep, angle, _mean),
    "norm": Distance(_keep, squared_difference, lambda sums, counts: sums.sqrt().mean()),
    "perplexity": Distance(_nothing, negative_log_likelihood, lambda sums, counts: (sums / (counts - 1)).exp().mean()),
}
