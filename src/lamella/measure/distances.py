"""Distances between the output of a model and that of its original, position by position.

All are non-negative, so a partial sum over positions is a lower bound of the whole sum, which lets a search abandon a
candidate early. For the Jensen-Shannon and the Kullback-Leibler divergence, a few tokens of the vocabulary already give
a lower bound at every position, without the rest of the head's work. All are computed in float32 from raw logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import cross_entropy, normalize, softplus

DistanceName = Literal["jsd", "jsd_repo", "kl", "angular", "norm", "perplexity"]
LN2 = math.log(2)
TINY = 1e-12  # a probability that is treated as zero
TANGENTS = 3


@dataclass(frozen=True)
class Distance:
    """One distance.

    Attributes:
        prepare: what to keep of the original's logits [positions, vocabulary] float32.
        at_positions: the distance of logits [positions, vocabulary] to what was kept, given the next tokens
            [positions]; one non-negative value per position.
        reduce: the distance of a whole set from the sums [sequences] and counts [sequences] of its positions; it must
            increase with every sum.
        from_some: a lower bound of ``at_positions``, from the logits of some tokens only [positions, some] and the same
            tokens of what was kept; None if there is no bound.
    """

    prepare: Callable[[Tensor], Tensor]
    at_positions: Callable[[Tensor, Tensor, Tensor], Tensor]
    reduce: Callable[[Tensor, Tensor], Tensor]
    from_some: Callable[[Tensor, Tensor], Tensor] | None = None


def jensen_shannon(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence in nats, between 0 and ln 2.

    With d = log q - log p it is half the sum of q d - (p + q) (softplus(d) - ln 2), which has no quotient and keeps its
    precision where p and q agree. It is computed in place, since allocating the temporaries would cost more than the
    arithmetic.

    Args:
        logits: logits of the changed model [positions, vocabulary].
        reference: log-probabilities of the original [positions, vocabulary].
    """
    log_q = torch.log_softmax(logits, dim=-1)
    d = log_q - reference
    q = log_q.exp_()
    cross = vecdot(q, d)
    mixture = q.add_(reference.exp())
    return (cross - vecdot(mixture, softplus(d).sub_(LN2))).mul_(0.5).clamp_(0.0, LN2)


def divergences(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(P||Q) and the Jensen-Shannon divergence of the same distributions, in nats, each [positions].

    Args:
        log_p: log-probabilities of the original [positions, vocabulary].
        log_q: log-probabilities of the changed model [positions, vocabulary].
    """
    d = log_q - log_p
    p, q = log_p.exp(), log_q.exp()
    kl = -vecdot(p, d)
    cross = vecdot(q, d)
    jsd = (cross - vecdot(q.add_(p), softplus(d).sub_(LN2))).mul_(0.5)
    return kl.clamp_(min=0.0), jsd.clamp_(0.0, LN2)


def jensen_shannon_from_some(logits: Tensor, reference: Tensor) -> Tensor:
    """Return a lower bound of :func:`jensen_shannon` from some tokens of the vocabulary.

    Merging all other tokens into one can only lower a divergence (data processing inequality). The probability s of the
    chosen tokens under q is unknown, since their logits determine q only up to a factor. So the bound is the minimum
    over s of

        f(s) = JSD( (p_1, .., p_n, 1 - sum p) || (s q_1, .., s q_n, 1 - s) ),      q = softmax of the chosen logits

    f is convex, so the maximum of any of its tangents bounds it from below; they are taken along Newton's steps.

    Args:
        logits: logits of the chosen tokens [positions, chosen].
        reference: log p of the same tokens, normalised over the whole vocabulary [positions, chosen].
    """
    p, log_q = reference.exp(), torch.log_softmax(logits, dim=-1)
    q = log_q.exp()
    elsewhere = (1 - p.sum(-1)).clamp_(min=TINY)
    s = 1 - elsewhere
    tangents: list[tuple[Tensor, Tensor]] = []  # slope, and height at s = 0
    for _ in range(TANGENTS):
        s = s.clamp(1e-4, 1 - 1e-4)
        m = torch.addcmul(p, q, s.unsqueeze(-1)).clamp_(min=TINY)  # twice the mixture
        log_m, rest = m.log(), 1 - s
        of_q = vecdot(q, log_q - log_m) + s.log()
        of_rest = (rest / (elsewhere + rest)).log()
        of_p = vecdot(p, reference - log_m) + elsewhere * (elsewhere / (elsewhere + rest)).log()
        value, slope = 0.5 * (of_p + s * of_q + rest * of_rest) + LN2, 0.5 * (of_q - of_rest)
        tangents.append((slope, value - slope * s))
        s = s - slope / (0.5 * (vecdot(q / m, p) / s + elsewhere / (rest * (elsewhere + rest))))
    # The maximum of some lines is lowest where two of them cross, or at an end.
    crossings = [torch.zeros_like(s), torch.ones_like(s)]
    for (slope, height), (other, other_height) in combinations(tangents, 2):
        apart = other - slope
        crossings.append(((height - other_height) / torch.where(apart == 0, 1.0, apart)).clamp_(0, 1))
    highest = [torch.stack([slope * at + height for slope, height in tangents]).amax(0) for at in crossings]
    return (torch.stack(highest).amin(0) * (1 - 1e-4) - 1e-6).clamp_(min=0.0)  # subtract what rounding may have added


def reversed_jensen_shannon(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    """Return what FinerCut's code calls JSD: half of KL(M||P) + KL(M||Q), averaged over the vocabulary.

    It is unbounded.

    Args:
        logits: logits of the changed model [positions, vocabulary].
        reference: log-probabilities of the original [positions, vocabulary].
    """
    log_q = torch.log_softmax(logits, dim=-1)
    log_m = torch.logaddexp(log_q, reference) - LN2
    terms = log_m.exp() * (log_m - 0.5 * (log_q + reference))
    return terms.mean(-1).clamp_(min=0.0)


def kullback_leibler(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    """Return KL(P||Q) in nats, where P is the original.

    Args:
        logits: logits of the changed model [positions, vocabulary].
        reference: log-probabilities of the original [positions, vocabulary].
    """
    log_q = torch.log_softmax(logits, dim=-1)
    return (reference.exp() * (reference - log_q)).sum(-1).clamp_(min=0.0)


def kullback_leibler_from_some(logits: Tensor, reference: Tensor) -> Tensor:
    """Return a lower bound of :func:`kullback_leibler` from some tokens of the vocabulary.

    All other tokens are merged into one, as in :func:`jensen_shannon_from_some`. Here the minimum over the unknown
    probability of the chosen tokens under q has a closed form: it is at their probability P under p, which leaves P
    KL(p / P || softmax of their logits).

    Args:
        logits: logits of the chosen tokens [positions, chosen].
        reference: log p of the same tokens, normalised over the whole vocabulary [positions, chosen].
    """
    p, log_q = reference.exp(), torch.log_softmax(logits, dim=-1)
    share = p.sum(-1)
    least = vecdot(p, reference - log_q) - share * share.clamp(min=TINY).log()
    return (least * (1 - 1e-4) - 1e-6).clamp_(min=0.0)  # subtract what rounding may have added


def angle(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    """Return the angle between the two logit vectors, in radians, with cosines clamped to [0, 1].

    It is computed from the half angle, since the arccosine of a float32 cosine near 1 has errors up to 5e-4.

    Args:
        logits: logits of the changed model [positions, vocabulary].
        reference: logits of the original [positions, vocabulary].
    """
    ours, original = normalize(logits, dim=-1), normalize(reference, dim=-1)
    angles = 2 * torch.atan2((ours - original).norm(dim=-1), (ours + original).norm(dim=-1))
    return angles.clamp(max=math.pi / 2)


def squared_difference(logits: Tensor, reference: Tensor, _: Tensor) -> Tensor:
    """Return the squared Euclidean distance of the logits at each position.

    Args:
        logits: logits [..., vocabulary].
        reference: reference logits of the same shape.
    """
    return (logits - reference).square().sum(-1)


def negative_log_likelihood(logits: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of the next token in nats; 0 at a sequence's last position (label -100).

    Args:
        logits: logits [positions, vocabulary].
        labels: id of the next token [positions].
    """
    return cross_entropy(logits, labels, reduction="none", ignore_index=-100)


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    return sums.sum() / counts.sum()


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)


def _keep(logits: Tensor) -> Tensor:
    return logits


def _empty(logits: Tensor) -> Tensor:
    return logits[:, :0]


DISTANCES: dict[str, Distance] = {
    "jsd": Distance(_log_softmax, jensen_shannon, _mean, jensen_shannon_from_some),
    "jsd_repo": Distance(_log_softmax, reversed_jensen_shannon, _mean),
    "kl": Distance(_log_softmax, kullback_leibler, _mean, kullback_leibler_from_some),
    "angular": Distance(_keep, angle, _mean),
    "norm": Distance(_keep, squared_difference, lambda sums, counts: sums.sqrt().mean()),
    "perplexity": Distance(_empty, negative_log_likelihood, lambda sums, counts: (sums / (counts - 1)).exp().mean()),
}
