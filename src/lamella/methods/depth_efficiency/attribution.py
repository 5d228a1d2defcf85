"""Which layers and tokens an answer rests on: integrated gradients, and erasing the stream (arXiv 2505.13898).

The paper gives no formulas for either. For a layer, the path goes from the run in which it adds nothing, behind the
front, to the run in which it adds all; the attributions of a layer then sum to what leaving it out would change:

    IG[l, t] = ⟨ c_{l,t} , Σ_k w_k ∂f/∂c at x_k c_l ⟩,     Σ_t IG[l, t] = f - f without layer l

with the nodes x and weights w of Gauss and Legendre, which come far closer than the mean over equal steps. In models
with experts the sum is not exact: which expert a token goes to jumps along the path, and gradients do not see jumps.

Erasing puts the mean stream of many tokens in the place of one token's, before one layer. The deepest layer at which
that still hurts is how far into the model the token's own content is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.measure import Scores, Tokens
from lamella.methods.depth_efficiency.contributions import Recorded, run_once, runs
from lamella.progress import track
from lamella.stack import Stack, join

ROWS = 8  # variants of a sequence that run at once


@dataclass(frozen=True)
class Attribution:
    """What each layer adds at each token, as a share of an answer's log-probability.

    Attributes:
        values: in nats, ``("layer", "token")`` [layers, time].
        removed: for each layer, what leaving it out behind the front takes from the log-probability, in nats
            [layers]: what its values should sum to.
    """

    values: Scores
    removed: np.ndarray

    @property
    def completeness_error(self) -> np.ndarray:
        """How far the values of each layer are from their sum, relative to the largest of them [layers]."""
        return np.abs(self.values.values.sum(axis=1) - self.removed) / np.abs(self.removed).max()


def integrated_gradients(stack: Stack, ids: Tensor, answer: int, *, steps: int = 32, front: int = 1) -> Attribution:
    """Attribute the log-probability of one token to what each layer adds at each token before it.

    Args:
        ids: prompt and answer [time].
        answer: the position of the token that counts.
        steps: nodes on the path, K.
        front: tokens at the front whose layers stay as they are.

    Raises:
        CalibrationError: when ``answer`` is not a position behind the first token.
    """
    ids, run = _prefix(stack, ids, answer)
    wanted = ids[answer]
    nodes = torch.from_numpy(np.stack(np.polynomial.legendre.leggauss(steps))).float().to(stack.device)
    nodes = torch.stack([(nodes[0] + 1) / 2, nodes[1] / 2], dim=1)  # from [-1, 1] to [0, 1]
    values, removed = [], []
    with torch.no_grad():
        whole = _log_probability(stack, run.h[-1:], wanted)
    for layer in track(range(len(stack)), "integrated gradients"):
        c = run.c[layer, front:]
        total = torch.zeros_like(c)
        for some in nodes.split(ROWS):
            added = (some[:, 0, None, None] * c).requires_grad_()
            f = _log_probability(stack, _after(stack, run, layer, front, added), wanted)
            (gradient,) = torch.autograd.grad(some[:, 1] @ f, added)
            total += gradient.sum(0)
        with torch.no_grad():
            without = _after(stack, run, layer, front, torch.zeros_like(c)[None])
            removed.append(float(whole - _log_probability(stack, without, wanted)))
        attributed = (total * c).sum(-1).double().cpu().numpy()
        values.append(np.concatenate([np.zeros(front), attributed]))
    about = {"answer": answer, "steps": steps, "front": front}
    scores = Scores("attribution to the answer's log-probability (nats)", ("layer", "token"), np.stack(values), about)
    return Attribution(scores, np.array(removed))


def _prefix(stack: Stack, ids: Tensor, answer: int) -> tuple[Tensor, Recorded]:
    """The tokens up to the answer, and the run of those before it."""
    if not 0 < answer < len(ids):
        raise CalibrationError(f"answer {answer}: give a position behind the first of the {len(ids)} tokens")
    ids = ids.to(stack.device)
    return ids, run_once(stack, ids[:answer])


def _after(stack: Stack, run: Recorded, layer: int, front: int, added: Tensor) -> Tensor:
    """The last stream when a layer adds something else behind the front [variants, time, hidden]."""
    kept = run.h[layer + 1, :front].expand(len(added), -1, -1)
    h = torch.cat([kept, run.h[layer, front:] + added], dim=1)
    return join(stack.run(h, layer + 1, len(stack), run.context))


def _log_probability(stack: Stack, h: Tensor, token: Tensor) -> Tensor:
    """Of the token behind the last stream [variants, time, hidden] -> [variants], nats."""
    return stack.head(h[:, -1:])[:, 0].float().log_softmax(-1)[:, token]


@torch.no_grad()
def mean_stream(stack: Stack, tokens: Tokens, *, front: int = 1) -> Tensor:
    """The mean of the stream at every point over many tokens [layers + 1, hidden], for :func:`residual_erasure`."""
    total, seen = torch.zeros((), dtype=torch.float64), 0
    for run in runs(stack, tokens, "mean stream"):
        total = total + run.h[:, front:].double().sum(1)
        seen += run.time - front
    return (total / seen).to(stack.unembedding.weight.dtype)


@torch.no_grad()
def residual_erasure(stack: Stack, ids: Tensor, answer: int, mean: Tensor) -> Scores:
    """What erasing one token's stream before one layer takes from the probability of the answer.

    Args:
        ids: prompt and answer [time].
        answer: the position of the token that counts.
        mean: what a token is replaced by at each point [layers + 1, hidden]; see :func:`mean_stream`.

    Returns:
        ``("layer", "token")`` [layers, answer]: the probability in the unchanged run minus that without the token;
        position 0, the attention sink, is left out as NaN.

    Raises:
        CalibrationError: when ``answer`` is not a position behind the first token.
    """
    ids, run = _prefix(stack, ids, answer)
    wanted = ids[answer]
    whole = _log_probability(stack, run.h[-1:], wanted).exp()
    lost = np.full((len(stack), run.time), np.nan)
    for layer in track(range(len(stack)), "erasing tokens"):
        for places in torch.arange(1, run.time, device=stack.device).split(ROWS):
            h = run.h[layer].repeat(len(places), 1, 1)
            h[torch.arange(len(places)), places] = mean[layer]
            last = join(stack.run(h, layer, len(stack), run.context))
            lost[layer, places.cpu().numpy()] = (whole - _log_probability(stack, last, wanted).exp()).cpu().numpy()
    return Scores("probability of the answer lost without a token", ("layer", "token"), lost, {"answer": answer})


def deepest_use(lost: Scores, threshold: float = 0.01) -> np.ndarray:
    """For each token, the last layer before which erasing it still changes the answer's probability by as much.

    Returns:
        [time], -1 where none does.
    """
    matters = np.nan_to_num(np.abs(lost.values)) >= threshold
    layers = len(matters)
    return np.where(matters.any(0), layers - 1 - matters[::-1].argmax(0), -1)
