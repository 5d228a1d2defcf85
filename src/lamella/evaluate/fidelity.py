"""Fidelity: how close a changed model is to its original, on text that no planner has used.

The objective determines what is compared: next-token distributions of a continuation, or distributions at masked
tokens, with several noise levels per sequence that are the same for every model.
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

CHUNK = 64  # positions whose logits of both models are in memory at once


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error over sequences."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """Return the estimate from one value per sequence [sequences]; a single one has no standard error (NaN)."""
        spread = float(values.std()) if len(values) > 1 else math.nan
        return cls(float(values.mean()), spread / math.sqrt(len(values)))

    def exp(self) -> Estimate:
        """Return the exponential, with the error propagated to first order."""
        return Estimate(math.exp(self.mean), math.exp(self.mean) * self.error)

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Fidelity:
    """The distance of a model from its original.

    Attributes:
        kl: KL(original || changed) of the predicted distributions, nats.
        jsd: their Jensen-Shannon divergence, nats.
        top1: fraction of positions with the same most likely token.
        perplexity: of the changed model; an upper bound for one that predicts masked tokens.
        base_perplexity: of the original, on the same positions.
        sequences, positions: number of scored sequences and positions.
    """

    kl: Estimate
    jsd: Estimate
    top1: Estimate
    perplexity: Estimate
    base_perplexity: Estimate
    sequences: int
    positions: int

    def as_dict(self) -> dict[str, Any]:
        """Return the estimates and counts as JSON values."""
        values = {name: {"mean": e.mean, "error": e.error} for name, e in vars(self).items() if isinstance(e, Estimate)}
        return values | {"sequences": self.sequences, "positions": self.positions}


def causal_stack(model: Model) -> Stack:
    """Return the stack of a model that continues text: its only one, or the last of several.

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


def predicting_stack(model: Model) -> Stack:
    """Return the stack of a model whose predictions are compared: of the next token, or of masked ones.

    Raises:
        ArchitectureError: for a model that predicts no text by itself.
    """
    stack = model if isinstance(model, Stack) else list(model.stacks.values())[-1]
    return stack if stack.architecture.denoises else causal_stack(model)


class FidelityTest:
    """A fixed test of models against one original.

    Each sequence is a prompt and its continuation. Only the continuation is scored, at the same positions for every
    model, so that plans with a special treatment of prompts are comparable with others. For images with text, the
    answers are scored, including those of encoder-decoders.

    Args:
        model: the original; of several stacks, the last is tested.
        tokens: test tokens [sequences, time], or images with text.
        prompt: number of prompt tokens in each sequence; a quarter by default. Rows of images with text have their own
            prompts.

    Raises:
        CalibrationError: if no token is left to score.
        ArchitectureError: for a model that does not predict text by itself.
    """

    def __init__(self, model: Model, tokens: Tensor | ImageText, prompt: int | None = None) -> None:
        encodes = isinstance(tokens, ImageText) and tokens.processing.encodes
        self.stack = list(model.stacks.values())[-1] if encodes else predicting_stack(model)
        self.tokens = tokens
        self._questions = self._questions_of(tokens, prompt)
        self._base = [self._states(self.stack.model, each)[0] for each in track(self._questions, "fidelity: original")]

    def _questions_of(self, tokens: Tensor | ImageText, prompt: int | None) -> Sequence[Draw | ScoredAnswer]:
        """Return rows with answers, or sequences that are scored after their prompt."""
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
    def _states(self, model: Any, question: Draw | ScoredAnswer) -> tuple[Tensor, Tensor]:
        """Return the final states that predict the scored tokens [positions, hidden], and these tokens."""
        if isinstance(question, ScoredAnswer):
            return scored_states(model, {name: each.to(self.stack.device) for name, each in question.batch.items()})
        options = phase_options(model, torch.tensor([self.prompt]))
        stack = self._of(model)
        return predicting(stack, stack.hidden(question.inputs, **options), question.scored), question.labels

    def _of(self, model: Any) -> Stack:
        """Return the same stack of another model."""
        return Stack(model, stack=self.stack.stack if self.stack.prefix else None)

    @torch.no_grad()
    def of(self, view: Any) -> Fidelity:
        """Return the fidelity of a view (or of any model with the same vocabulary) to the original.

        Raises:
            ArchitectureError: for a model with another number of tokens.
        """
        changed = self._of(view)
        tokens, others = (getattr(each.config, "vocab_size", None) for each in (self.stack, changed))
        if tokens != others:
            raise ArchitectureError(
                f"the changed model has {others} tokens and {self.stack.name} {tokens}, so they cannot be compared "
                "token by token: compare their loss per byte with `lamella eval`"
            )
        sequences = 1 + max(question.sequence for question in self._questions)
        sums = torch.zeros(5, sequences, dtype=torch.float64)
        scored, eligible = torch.zeros(2, sequences, dtype=torch.float64)
        for question, original in zip(track(self._questions, "fidelity"), self._base, strict=True):
            index = question.sequence
            ours_all, labels = self._states(view, question)
            scored[index] += len(labels)
            eligible[index] += question.eligible
            chunks = zip(original.split(CHUNK), ours_all.split(CHUNK), labels.split(CHUNK), strict=True)
            for base, ours, label in chunks:
                log_p = self._log_probabilities(self.stack, base, index, self.stack.name)
                log_q = self._log_probabilities(changed, ours, index, "the changed model")
                for row, divergence in zip(sums[:2], divergences(log_p, log_q), strict=True):
                    row[index] += divergence.double().sum()
                sums[2, index] += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
                sums[3, index] += nll_loss(log_q, label, reduction="sum").double() * question.weight
                sums[4, index] += nll_loss(log_p, label, reduction="sum").double() * question.weight
        kl, jsd, top1 = (Estimate.of(row / scored) for row in sums[:3])
        loss, base_loss = (Estimate.of(row / eligible) for row in sums[3:])
        return Fidelity(kl, jsd, top1, loss.exp(), base_loss.exp(), sequences, int(scored.sum()))

    @staticmethod
    def _log_probabilities(stack: Stack, states: Tensor, sequence: int, name: str) -> Tensor:
        """Return log-probabilities in float32 [positions, vocabulary].

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
        batch: the row as a batch of one.
        sequence: its index.
        eligible: number of tokens of the answer.
        weight: of each of them.
    """

    batch: dict[str, Tensor]
    sequence: int
    eligible: int
    weight: float = 1.0


def _answers(rows: ImageText) -> list[ScoredAnswer]:
    """Return rows one by one, of conversations only the last answer."""
    batches = [last_answers(batch) for batch in rows.batches(1)]
    return [ScoredAnswer(batch, number, count_labels(batch)) for number, batch in enumerate(batches)]
