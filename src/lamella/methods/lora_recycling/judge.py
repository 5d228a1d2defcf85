"""How well a model answers: exact matches and loss, example by example, so that two models are compared in pairs.

A greedy generation writes an answer exactly if at every place of it the model's most likely next token is the
answer's, its end included. So one forward pass says what generation would, token for token.
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

SURE = 1.96  # standard errors on each side of a mean, of a 95 % interval


@dataclass(frozen=True)
class Judged:
    """What a model did on some examples, in their order.

    Attributes:
        exact: 1 where greedy generation writes the answer, else 0.
        nats: mean loss of each answer's tokens.
    """

    exact: tuple[float, ...]
    nats: tuple[float, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, samples: Sequence[Sample], batch: int = 8) -> Judged:
        """Judge a model or a view; its mode stays as it is."""
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        exact, nats, logits = [], [], Stack(model).logits
        try:
            for start in range(0, len(samples), batch):
                each = {name: values.to(device) for name, values in collate(samples[start : start + batch]).items()}
                states, labels = scored_states(model, each)
                sizes = (each["labels"][:, 1:] != NO_LOSS).sum(1).tolist()
                for rows, wanted in zip(states.split(sizes), labels.split(sizes), strict=True):
                    said = logits(rows).float()
                    exact.append(float((said.argmax(-1) == wanted).all()))
                    nats.append(float(cross_entropy(said, wanted)))
        finally:
            model.train(was_training)
        return cls(tuple(exact), tuple(nats))

    @property
    def accuracy(self) -> float:
        return sum(self.exact) / len(self.exact)

    @property
    def loss(self) -> float:
        """Mean over examples, in nats per token."""
        return sum(self.nats) / len(self.nats)

    def of_examples(self, start: int, stop: int | None = None) -> Judged:
        """The same on some of the examples."""
        return Judged(self.exact[start:stop], self.nats[start:stop])

    def above(self, other: Judged) -> Estimate:
        """By how much more of the examples this one answers than another, in pairs."""
        return Estimate.of(torch.tensor(self.exact) - torch.tensor(other.exact))

    def below(self, other: Judged) -> Estimate:
        """By how many nats per token the loss of this one is lower, in pairs."""
        return Estimate.of(torch.tensor(other.nats) - torch.tensor(self.nats))


def is_sure(difference: Estimate) -> bool | None:
    """Whether a difference is above 0 (True) or below (False); None where its 95 % interval holds 0."""
    half = SURE * difference.error
    return True if difference.mean - half > 0 else False if difference.mean + half < 0 else None
