"""Importance of each layer's experts to each modality: how much the answers change when all of them are skipped.

D[l, c] = KL(P || P without the experts of layer l for the tokens of modality c), mean over answer positions
alpha[l, c] = D[l, c] / sum over layers
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lamella.errors import CalibrationError
from lamella.evaluate.scored import scored_states
from lamella.methods.modes.policy import MODALITIES, Bypass, ExpertSkipping
from lamella.plan import ModelReference, Plan
from lamella.progress import track
from lamella.runtime import with_policy
from lamella.stack import Stack, last_stack

Batch = Mapping[str, Any]
CHUNK = 64  # positions whose distributions are in memory at once


class AnswerDistance:
    """Measure how much the answers of a model change when some experts are skipped.

    The original's final states are cached, so that every measurement takes one pass over the samples. Distributions
    over the vocabulary, which are much larger, are made for a few positions at a time.

    Args:
        stack: the model.
        batches: batches of samples with their ``labels``, which are the answers.
        policy: decides which experts run; by default none is skipped at first.

    Raises:
        CalibrationError: when no sample has an answer.
    """

    def __init__(self, stack: Stack, batches: Sequence[Batch], policy: ExpertSkipping | None = None) -> None:
        self.policy = policy or ExpertSkipping(stack, alpha=dict.fromkeys(MODALITIES, [1.0] * len(stack)))
        self.view = with_policy(stack, Plan(model=ModelReference.of(stack)), self.policy)
        self.batches = batches
        self.original = list(self._states())
        self.count = sum(map(len, self.original))
        if self.count == 0:
            raise CalibrationError("modes: the calibration samples have no answers")

    @torch.no_grad()
    def distance(self) -> tuple[float, Tensor]:
        """Return the KL divergence of the answers from the original's under the policy, and the counts of experts.

        Returns:
            The divergence in nats, mean over answer positions; and the number of pairs of a token and a chosen expert
            and of those that ran [layers, text and image, chosen and run].
        """
        total, counts = 0.0, torch.zeros(self.policy.layers, 2, 2, dtype=torch.long)
        for before, after in zip(self.original, self._states(), strict=True):
            total += max(sum(map(self._divergence, before.split(CHUNK), after.split(CHUNK))), 0.0)
            counts += self.policy.counts
        return total / self.count, counts

    def scores(self, alpha: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
        """Return the scores of all pairs while nothing is skipped, by modality: [pairs] each."""
        self.policy.alpha = torch.tensor([list(alpha[name]) for name in MODALITIES])
        self.policy.tau = torch.zeros(2)
        recorded: list[tuple[Tensor, Tensor]] = []
        self.policy.recorded_scores = recorded
        for _ in self._states():
            pass
        self.policy.recorded_scores = None
        pairs, image = (torch.cat(each) for each in zip(*recorded, strict=True))
        return {"text": pairs[~image].flatten(), "image": pairs[image].flatten()}

    def _divergence(self, before: Tensor, after: Tensor) -> float:
        """Return the KL divergence of the answers of some positions, summed, from their final states."""
        stack = last_stack(self.view)
        log_p, log_q = (stack.logits(each).float().log_softmax(-1) for each in (before, after))
        return float((log_p.exp() * (log_p - log_q)).sum())

    def _states(self) -> Iterator[Tensor]:
        """Yield the final states that predict the answers of each batch: [answers, hidden]."""
        for batch in self.batches:
            with torch.no_grad():
                yield scored_states(self.view, batch)[0]


def layer_importance(
    answers: AnswerDistance, bypass: Bypass = "zero", modality: Literal["apart", "joint"] = "apart"
) -> dict[str, list[float]]:
    """Return alpha of every layer, for text and for images; each sums to 1 over the layers that have experts.

    Args:
        answers: the measurement on the calibration samples.
        bypass: output of the experts for tokens that skip all of them: ``zero``, as in later skipping; or ``identity``,
            the input of the experts, as in the authors' code.
        modality: ``apart`` for one alpha per modality, or ``joint`` for one alpha from their sum.
    """
    policy = answers.policy
    _, counts = answers.distance()
    layers = counts[..., 0].sum(-1).nonzero().flatten().tolist()
    moved = torch.zeros(2, policy.layers, dtype=torch.float64)
    for layer in track(layers, "modes: importance of each layer"):
        for index, name in enumerate(MODALITIES):
            if counts[layer, index, 0] > 0:
                policy.bypass = (layer, name, bypass)
                moved[index, layer], _ = answers.distance()
    policy.bypass = None
    if modality == "joint":
        moved = moved.sum(0).expand(2, -1)
    uniform = torch.zeros(policy.layers, dtype=torch.float64)
    uniform[layers] = 1 / len(layers)
    total = moved.sum(1, keepdim=True)
    alpha = torch.where(total > 0, moved / total.clamp(min=1e-300), uniform)
    return {name: alpha[index].tolist() for index, name in enumerate(MODALITIES)}
