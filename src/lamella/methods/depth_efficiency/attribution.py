"""Layers and tokens on which an answer depends: integrated gradients and residual erasure (arXiv 2505.13898).

The paper gives no formulas for either. For a layer, the integration path goes from the run in which it adds nothing at
the tokens after the front, to the unchanged run; the attributions of a layer then sum to the effect of removing it:

    IG[l, t] = ⟨ c_{l,t} , Σ_k w_k ∂f/∂c at x_k c_l ⟩,     Σ_t IG[l, t] = f - f without layer l

with Gauss-Legendre nodes x and weights w, which are far more accurate than the mean over equal steps. In
mixture-of-expert models the sum is not exact: the routing of a token changes discontinuously along the path, which
gradients do not see.

Residual erasure replaces the hidden state of one token before one layer by the mean over many tokens. The deepest layer
at which that still changes the answer shows how far into the model the token's own content is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.measure import Scores, Tokens
from lamella.methods.depth_efficiency.contributions import RecordedRun, run_once, runs
from lamella.progress import track
from lamella.stack import Stack, join

ROWS = 8  # number of variants of a sequence that run at once


@dataclass(frozen=True)
class Attribution:
    """Contribution of each layer at each token to an answer's log-probability.

    Attributes:
        values: attributions in nats, ``("layer", "token")`` [layers, time].
        removed: for each layer, the decrease of the log-probability when it is removed after the front, in nats
            [layers]: the expected sum of its values.
    """

    values: Scores
    removed: np.ndarray

    @property
    def completeness_error(self) -> np.ndarray:
        """Error of the sum of each layer's values, relative to the largest expected sum [layers]."""
        return np.abs(self.values.values.sum(axis=1) - self.removed) / np.abs(self.removed).max()


def integrated_gradients(stack: Stack, ids: Tensor, answer: int, *, steps: int = 32, front: int = 1) -> Attribution:
    """Attribute the log-probability of one token to the contribution of each layer at each token before it.

    Args:
        stack: the model.
        ids: prompt and answer [time].
        answer: position of the answer token.
        steps: K, the number of nodes on the path.
        front: number of tokens at the front whose layers are unchanged.

    Raises:
        CalibrationError: if ``answer`` is not a position after the first token.
    """
    ids, run = _prefix(stack, ids, answer)
    token = ids[answer]
    nodes = torch.from_numpy(np.stack(np.polynomial.legendre.leggauss(steps))).float().to(stack.device)
    nodes = torch.stack([(nodes[0] + 1) / 2, nodes[1] / 2], dim=1)  # from [-1, 1] to [0, 1]
    values, removed = [], []
    with torch.no_grad():
        whole = _log_probability(stack, run.h[-1:], token)
    for layer in track(range(len(stack)), "integrated gradients"):
        c = run.c[layer, front:]
        total = torch.zeros_like(c)
        for some in nodes.split(ROWS):
            contribution = (some[:, 0, None, None] * c).requires_grad_()
            f = _log_probability(stack, _after(stack, run, layer, front, contribution), token)
            (gradient,) = torch.autograd.grad(some[:, 1] @ f, contribution)
            total += gradient.sum(0)
        with torch.no_grad():
            without = _after(stack, run, layer, front, torch.zeros_like(c)[None])
            removed.append(float(whole - _log_probability(stack, without, token)))
        attributed = (total * c).sum(-1).double().cpu().numpy()
        values.append(np.concatenate([np.zeros(front), attributed]))
    about = {"answer": answer, "steps": steps, "front": front}
    scores = Scores("attribution to the answer's log-probability (nats)", ("layer", "token"), np.stack(values), about)
    return Attribution(scores, np.array(removed))


def _prefix(stack: Stack, ids: Tensor, answer: int) -> tuple[Tensor, RecordedRun]:
    """Return the tokens up to the answer, and the run of those before it."""
    if not 0 < answer < len(ids):
        raise CalibrationError(f"answer {answer}: give a position after the first of the {len(ids)} tokens")
    ids = ids.to(stack.device)
    return ids, run_once(stack, ids[:answer])


def _after(stack: Stack, run: RecordedRun, layer: int, front: int, contribution: Tensor) -> Tensor:
    """Return the final hidden states when a layer adds something else after the front [variants, time, hidden]."""
    kept = run.h[layer + 1, :front].expand(len(contribution), -1, -1)
    h = torch.cat([kept, run.h[layer, front:] + contribution], dim=1)
    return join(stack.run(h, layer + 1, len(stack), run.context))


def _log_probability(stack: Stack, h: Tensor, token: Tensor) -> Tensor:
    """Return the log-probability of the next token in nats, [variants, time, hidden] -> [variants]."""
    return stack.head(h[:, -1:])[:, 0].float().log_softmax(-1)[:, token]


@torch.no_grad()
def mean_hidden(stack: Stack, tokens: Tokens, *, front: int = 1) -> Tensor:
    """Return the mean hidden state at every point over many tokens [layers + 1, hidden].

    Args:
        stack: the model.
        tokens: token ids [sequences, time].
        front: number of tokens at the front of each sequence that are ignored.
    """
    total, seen = torch.zeros((), dtype=torch.float64), 0
    for run in runs(stack, tokens, "mean hidden state"):
        total = total + run.h[:, front:].double().sum(1)
        seen += run.time - front
    return (total / seen).to(stack.unembedding.weight.dtype)


@torch.no_grad()
def residual_erasure(stack: Stack, ids: Tensor, answer: int, mean: Tensor) -> Scores:
    """Measure the decrease of the answer's probability when one token is erased before one layer.

    Args:
        stack: the model.
        ids: prompt and answer [time].
        answer: position of the answer token.
        mean: replacement of an erased token at each point [layers + 1, hidden]; see :func:`mean_hidden`.

    Returns:
        ``("layer", "token")`` [layers, answer]: the probability in the unchanged run minus that without the token;
        position 0, the attention sink, is NaN.

    Raises:
        CalibrationError: if ``answer`` is not a position after the first token.
    """
    ids, run = _prefix(stack, ids, answer)
    token = ids[answer]
    whole = _log_probability(stack, run.h[-1:], token).exp()
    lost = np.full((len(stack), run.time), np.nan)
    for layer in track(range(len(stack)), "erasing tokens"):
        for positions in torch.arange(1, run.time, device=stack.device).split(ROWS):
            h = run.h[layer].repeat(len(positions), 1, 1)
            h[torch.arange(len(positions)), positions] = mean[layer]
            last = join(stack.run(h, layer, len(stack), run.context))
            lost[layer, positions.cpu().numpy()] = (whole - _log_probability(stack, last, token).exp()).cpu().numpy()
    return Scores("probability of the answer lost without a token", ("layer", "token"), lost, {"answer": answer})


def deepest_use(lost: Scores, threshold: float = 0.01) -> np.ndarray:
    """Return for each token the last layer before which erasing it still changes the answer's probability.

    Args:
        lost: result of :func:`residual_erasure`.
        threshold: minimum change of the probability.

    Returns:
        [time], -1 if there is no such layer.
    """
    matters = np.nan_to_num(np.abs(lost.values)) >= threshold
    layers = len(matters)
    return np.where(matters.any(0), layers - 1 - matters[::-1].argmax(0), -1)
