"""Evaluation of a model's answers: exact matches and loss per example, for paired comparisons of two models.

Greedy generation writes an answer exactly if the model's most likely next token equals the answer's at every position,
including its end. So one forward pass determines the result of generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from lamella.data import Sample
from lamella.data.samples import NO_LOSS
from lamella.evaluate import Estimate
from lamella.stack import Stack
from lamella.train import collate, scored_states

SURE = 1.96  # half width of a 95 % interval, in standard errors


@dataclass(frozen=True)
class AnswerScores:
    """Results of a model on some examples, in their order.

    Attributes:
        exact: 1 if greedy generation writes the answer, else 0.
        nats: mean loss of each answer's tokens.
    """

    exact: tuple[float, ...]
    nats: tuple[float, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, samples: Sequence[Sample], batch: int = 8) -> AnswerScores:
        """Evaluate a model or a view; its training mode is preserved.

        Args:
            model: the model.
            samples: the examples.
            batch: batch size.
        """
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        exact, nats, logits = [], [], Stack(model).logits
        try:
            for start in range(0, len(samples), batch):
                each = {name: values.to(device) for name, values in collate(samples[start : start + batch]).items()}
                states, labels = scored_states(model, each)
                sizes = (each["labels"][:, 1:] != NO_LOSS).sum(1).tolist()
                for rows, wanted in zip(states.split(sizes), labels.split(sizes), strict=True):
                    answer_logits = logits(rows).float()
                    exact.append(float((answer_logits.argmax(-1) == wanted).all()))
                    nats.append(float(cross_entropy(answer_logits, wanted)))
        finally:
            model.train(was_training)
        return cls(tuple(exact), tuple(nats))

    @property
    def accuracy(self) -> float:
        """Fraction of exact answers."""
        return sum(self.exact) / len(self.exact)

    @property
    def loss(self) -> float:
        """Mean loss over examples, in nats per token."""
        return sum(self.nats) / len(self.nats)

    def of_examples(self, start: int, stop: int | None = None) -> AnswerScores:
        """Restrict the results to some of the examples.

        Args:
            start: index of the first example.
            stop: index after the last example; None for all.
        """
        return AnswerScores(self.exact[start:stop], self.nats[start:stop])

    def above(self, other: AnswerScores) -> Estimate:
        """Paired difference of accuracy to another model."""
        return Estimate.of(torch.tensor(self.exact) - torch.tensor(other.exact))

    def below(self, other: AnswerScores) -> Estimate:
        """Paired difference by which this model's loss is lower than another's, in nats per token."""
        return Estimate.of(torch.tensor(other.nats) - torch.tensor(self.nats))


def is_sure(difference: Estimate) -> bool | None:
    """Whether a difference is significantly above 0 (True) or below 0 (False); None if its 95 % interval contains 0."""
    half = SURE * difference.error
    return True if difference.mean - half > 0 else False if difference.mean + half < 0 else None
