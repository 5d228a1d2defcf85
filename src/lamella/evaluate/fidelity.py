"""Fidelity: how close a changed model stays to its original, on text that no planner has seen.

What is compared follows from the objective: the next-token distributions of a continuation, or those at masks, of which
every sequence has several noise levels, the same for every model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from lamella.data import ImageText
from lamella.data.samples import count_labels
from lamella.errors import ArchitectureError, CalibrationError, NumericsError
from lamella.evaluate.scored import last_answers, scored_states
from lamella.measure import Draw, divergences, draws, predicting
from lamella.progress import track
from lamella.runtime import phase_options
from lamella.stack import Model, Stack

CHUNK = 64  # positions whose logits, of both models, are held at once


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over sequences."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """From one value per sequence [sequences]; a single sequence has no standard error (NaN)."""
        spread = float(values.std()) if len(values) > 1 else math.nan
        return cls(float(values.mean()), spread / math.sqrt(len(values)))

    def exp(self) -> Estimate:
        """The exponential, its error carried over to first order."""
        return Estimate(math.exp(self.mean), math.exp(self.mean) * self.error)

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Fidelity:
    """How far a model is from its original.

    Attributes:
        kl: KL(original || changed) of the distributions of what is predicted, nats.
        jsd: their Jensen-Shannon divergence, nats.
        top1: share of positions at which both name the same most likely token.
        perplexity: of the changed model; of one that predicts masked tokens, its bound from above.
        base_perplexity: of the original, on the same positions.
        sequences, positions: how much was scored.
    """

    kl: Estimate
    jsd: Estimate
    top1: Estimate
    perplexity: Estimate
    base_perplexity: Estimate
    sequences: int
    positions: int

    def as_dict(self) -> dict[str, Any]:
        values = {name: {"mean": e.mean, "error": e.error} for name, e in vars(self).items() if isinstance(e, Estimate)}
        return values | {"sequences": self.sequences, "positions": self.positions}


def continuing(model: Model) -> Stack:
    """The stack of a model that continues text: its only one, or the last of several.

    Raises:
        ArchitectureError: for a model that does not continue text by itself.
    """
    stack = model if isinstance(model, Stack) else list(model.stacks.values())[-1]
    if not stack.architecture.causal or "cross" in stack.architecture.names or stack.architecture.modality != "text":
        raise ArchitectureError(
            f"{stack.name} is a {stack.architecture.name}, which does not continue text by itself: fidelity and tasks "
            "are measured on models that do"
        )
    return stack


def judged(model: Model) -> Stack:
    """The stack of a model whose predictions of a text are compared: of the next token, or of masked ones.

    Raises:
        ArchitectureError: for a model that predicts no text by itself.
    """
    stack = model if isinstance(model, Stack) else list(model.stacks.values())[-1]
    return stack if stack.architecture.denoises else continuing(model)


class FidelityTest:
    """A fixed test of models against one original.

    Each sequence is a prompt and its continuation. Only the continuation is scored, the same positions for every
    model, so that plans which treat the prompt differently stand on equal ground with those that do not. Of images with
    text, the answers are; of these, also what an encoder-decoder writes.

    Args:
        model: the original; of several stacks, the last is tested.
        tokens: test tokens [sequences, time], or images with text.
        prompt: how many tokens of each sequence are prompt; a quarter when left out. Rows of images with text have
            prompts of their own.

    Raises:
        CalibrationError: when no token is left to score.
        ArchitectureError: for a model that does not predict text by itself.
    """

    def __init__(self, model: Model, tokens: Tensor | ImageText, prompt: int | None = None) -> None:
        encodes = isinstance(tokens, ImageText) and tokens.processing.encodes
        self.stack = list(model.stacks.values())[-1] if encodes else judged(model)
        self.tokens = tokens
        self._asked = self._asked_of(tokens, prompt)
        self._base = [self._states(self.stack.model, each)[0] for each in track(self._asked, "fidelity: original")]

    def _asked_of(self, tokens: Tensor | ImageText, prompt: int | None) -> Sequence[Draw | ScoredAnswer]:
        """Rows with answers, or sequences of which what stands behind the prompt is scored."""
        if isinstance(tokens, ImageText):
            return _answers(tokens)
        prompt = tokens.shape[1] // 4 if prompt is None else prompt
        if tokens.shape[0] == 0 or not 0 < prompt < tokens.shape[1]:
            raise CalibrationError(
                f"a test of {list(tokens.shape)} tokens with a prompt of {prompt} has nothing to score"
            )
        self.prompt = prompt
        return draws(self.stack, tokens, front=prompt)

    @torch.no_grad()
    def _states(self, model: Any, asked: Draw | ScoredAnswer) -> tuple[Tensor, Tensor]:
        """The final states that predict what is scored [positions, hidden], and its tokens."""
        if isinstance(asked, ScoredAnswer):
            return scored_states(model, {name: each.to(self.stack.device) for name, each in asked.batch.items()})
        options = phase_options(model, torch.tensor([self.prompt]))
        stack = self._of(model)
        return predicting(stack, stack.hidden(asked.inputs, **options), asked.scored), asked.labels

    def _of(self, model: Any) -> Stack:
        """The same stack of another model."""
        return Stack(model, stack=self.stack.stack if self.stack.prefix else None)

    @torch.no_grad()
    def of(self, view: Any) -> Fidelity:
        """The fidelity of a view (or of any model with the same vocabulary) to the original."""
        changed = self._of(view)
        sequences = 1 + max(asked.sequence for asked in self._asked)
        sums = torch.zeros(5, sequences, dtype=torch.float64)
        scored, weighed = torch.zeros(2, sequences, dtype=torch.float64)
        for asked, original in zip(track(self._asked, "fidelity"), self._base, strict=True):
            index = asked.sequence
            ours_all, labels = self._states(view, asked)
            scored[index] += len(labels)
            weighed[index] += asked.eligible
            chunks = zip(original.split(CHUNK), ours_all.split(CHUNK), labels.split(CHUNK), strict=True)
            for base, ours, label in chunks:
                log_p = self._log_probabilities(self.stack, base, index, self.stack.name)
                log_q = self._log_probabilities(changed, ours, index, "the changed model")
                for row, divergence in zip(sums[:2], divergences(log_p, log_q), strict=True):
                    row[index] += divergence.double().sum()
                sums[2, index] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
                sums[3, index] += nll_loss(log_q, label, reduction="sum").double() * asked.weight
                sums[4, index] += nll_loss(log_p, label, reduction="sum").double() * asked.weight
        kl, jsd, top1 = (Estimate.of(row / scored) for row in sums[:3])
        loss, base_loss = (Estimate.of(row / weighed) for row in sums[3:])
        return Fidelity(kl, jsd, top1, loss.exp(), base_loss.exp(), sequences, int(scored.sum()))

    @staticmethod
    def _log_probabilities(stack: Stack, states: Tensor, sequence: int, name: str) -> Tensor:
        """Log-probabilities in float32 [positions, vocabulary].

        Raises:
            NumericsError: for logits that are not finite.
        """
        logits = stack.logits(states).float()
        if not torch.isfinite(logits.sum()):
            raise NumericsError(
                f"non-finite logits in test sequence {sequence} of {name}: try float32, or check the weights"
            )
        return torch.log_softmax(logits, dim=-1)


@dataclass(frozen=True)
class ScoredAnswer:
    """A row of images with text, whose last answer is scored.

    Attributes:
        batch: the row as a model takes it, alone.
        sequence: its number.
        eligible: tokens of the answer.
        weight: what each of them counts.
    """

    batch: dict[str, Tensor]
    sequence: int
    eligible: int
    weight: float = 1.0


def _answers(rows: ImageText) -> list[ScoredAnswer]:
    """Rows one by one; of conversations, the last answer alone."""
    batches = [last_answers(batch) for batch in rows.batches(1)]
    return [ScoredAnswer(batch, number, count_labels(batch)) for number, batch in enumerate(batches)]
