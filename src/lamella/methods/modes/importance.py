"""What the experts of each layer are worth to each modality: how far answers move when all of them are left out.

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


class Answers:
    """What a model with experts says at the answers of calibration samples, whole and with some experts skipped.

    The original's log-probabilities are kept, so that every question takes one pass over the samples.

    Args:
        stack: the model.
        batches: of samples with their ``labels``, which are the answers.
        policy: what decides which experts run; nothing is skipped at first.

    Raises:
        CalibrationError: when no sample has an answer.
    """

    def __init__(self, stack: Stack, batches: Sequence[Batch], policy: ExpertSkipping | None = None) -> None:
        self.policy = policy or ExpertSkipping(stack, alpha=dict.fromkeys(MODALITIES, [1.0] * len(stack)))
        self.view = with_policy(stack, Plan(model=ModelReference.of(stack)), self.policy)
        self.batches = batches
        self.original = list(self._said())
        self.count = sum(map(len, self.original))
        if self.count == 0:
            raise CalibrationError("modes: the calibration samples have no answers")

    @torch.no_grad()
    def distance(self) -> tuple[float, Tensor]:
        """KL of the answers from the original's in nats, mean over positions, under what the policy now says.

        Returns:
            It, and the pairs of a token and a chosen expert, and those that ran [layers, text and image, both].
        """
        total, counts = 0.0, torch.zeros(self.policy.layers, 2, 2, dtype=torch.long)
        for before, after in zip(self.original, self._said(), strict=True):
            kl = (before.exp() * (before - after)).sum(-1).sum()
            total += max(float(kl), 0.0)
            counts += self.policy.counts
        return total / self.count, counts

    def scores(self, alpha: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
        """The scores of all pairs while nothing is skipped, by modality [pairs]."""
        self.policy.alpha = torch.tensor([list(alpha[name]) for name in MODALITIES])
        self.policy.tau = torch.zeros(2)
        heard: list[tuple[Tensor, Tensor]] = []
        self.policy.heard = heard
        for _ in self._said():
            pass
        self.policy.heard = None
        pairs, image = (torch.cat(each) for each in zip(*heard, strict=True))
        return {"text": pairs[~image].flatten(), "image": pairs[image].flatten()}

    def _said(self) -> Iterator[Tensor]:
        """The log-probabilities at the answers of each batch [answers, vocabulary]."""
        stack = last_stack(self.view)
        for batch in self.batches:
            with torch.no_grad():
                states, _ = scored_states(self.view, batch)
                yield stack.logits(states).float().log_softmax(-1)


def layer_importance(
    answers: Answers, bypass: Bypass = "zero", modality: Literal["apart", "joint"] = "apart"
) -> dict[str, list[float]]:
    """alpha of every layer, for text and for images; each sums to 1 over the layers that have experts.

    Args:
        answers: of the calibration samples.
        bypass: what tokens take that skip all experts of a layer: ``zero`` is what skipping does later; ``identity`` is
            what the experts would have read, as the authors' code does.
        modality: ``apart``, or ``joint``: one alpha for both, of their sum.
    """
    policy = answers.policy
    _, counts = answers.distance()
    layers = counts[..., 0].sum(-1).nonzero().flatten().tolist()
    moved = torch.zeros(2, policy.layers, dtype=torch.float64)
    for layer in track(layers, "modes: importance of each layer"):
        for place, name in enumerate(MODALITIES):
            if counts[layer, place, 0] > 0:
                policy.bypass = (layer, name, bypass)
                moved[place, layer], _ = answers.distance()
    policy.bypass = None
    if modality == "joint":
        moved = moved.sum(0).expand(2, -1)
    some = torch.zeros(policy.layers, dtype=torch.float64)
    some[layers] = 1 / len(layers)
    total = moved.sum(1, keepdim=True)
    alpha = torch.where(total > 0, moved / total.clamp(min=1e-300), some)
    return {name: alpha[place].tolist() for place, name in enumerate(MODALITIES)}
