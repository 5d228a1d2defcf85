"""Fidelity: how close a changed model stays to its original, on text that no planner has seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lamella.data import ImageText
from lamella.data.samples import NO_LOSS
from lamella.errors import ArchitectureError, CalibrationError, NumericsError
from lamella.evaluate.scored import last_answers, scored_states
from lamella.measure import DISTANCES
from lamella.progress import track
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
        kl: KL(original || changed) of the next-token distributions, nats.
        jsd: their Jensen-Shannon divergence, nats.
        top1: share of positions at which both name the same most likely token.
        perplexity: of the changed model.
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


class FidelityTest:
    """A fixed test of models against one original.

    Each sequence is a prompt and its continuation. Only the continuation is scored, the same positions for every
    model, so that plans which treat the prompt differently stand on equal ground with those that do not. Of images with
    text, the answers are; of these, also what an encoder-decoder writes.

    Args:
        model: the original; of several stacks, the one that continues text is tested.
        tokens: test tokens [sequences, time], or images with text.
        prompt: how many tokens of each sequence are prompt; a quarter when left out. Rows of images with text have
            prompts of their own.

    Raises:
        CalibrationError: when no token is left to score.
        ArchitectureError: for a model that does not continue text by itself.
    """

    def __init__(self, model: Model, tokens: Tensor | ImageText, prompt: int | None = None) -> None:
        encodes = isinstance(tokens, ImageText) and tokens.processing.encodes
        self.stack = list(model.stacks.values())[-1] if encodes else continuing(model)
        self.tokens = tokens
        self._rows = _answers(tokens) if isinstance(tokens, ImageText) else _continuations(tokens, prompt)
        self._base = [self._states(self.stack.model, row)[0] for row in track(self._rows, "fidelity: original")]

    @torch.no_grad()
    def _states(self, model: Any, row: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The final states that predict the continuation [positions, hidden], and its tokens."""
        return scored_states(model, {name: each.to(self.stack.device) for name, each in row.items()})

    def _of(self, model: Any) -> Stack:
        """The same stack of another model."""
        return Stack(model, stack=self.stack.stack if self.stack.prefix else None)

    @torch.no_grad()
    def of(self, view: Any) -> Fidelity:
        """The fidelity of a view (or of any model with the same vocabulary) to the original."""
        changed = self._of(view)
        sums = torch.zeros(5, len(self._rows), dtype=torch.float64)
        for index, row in enumerate(track(self._rows, "fidelity")):
            ours_all, labels = self._states(view, row)
            chunks = zip(self._base[index].split(CHUNK), ours_all.split(CHUNK), labels.split(CHUNK), strict=True)
            for base, ours, label in chunks:
                p, q = self.stack.logits(base).float(), changed.logits(ours).float()
                for name, logits in ((self.stack.name, p), ("the changed model", q)):
                    if not torch.isfinite(logits).all():
                        raise NumericsError(
                            f"non-finite logits in test sequence {index} of {name}: try float32, or check the weights"
                        )
                log_p = torch.log_softmax(p, dim=-1)
                sums[0, index] += DISTANCES["kl"].at_positions(q, log_p, label).sum().double()
                sums[1, index] += DISTANCES["jsd"].at_positions(q, log_p, label).sum().double()
                sums[2, index] += (p.argmax(-1) == q.argmax(-1)).sum()
                sums[3, index] += cross_entropy(q, label, reduction="sum").double()
                sums[4, index] += cross_entropy(p, label, reduction="sum").double()
        scored = torch.tensor([len(states) for states in self._base])
        kl, jsd, top1, loss, base_loss = (Estimate.of(values / scored) for values in sums)
        return Fidelity(kl, jsd, top1, loss.exp(), base_loss.exp(), len(self._rows), int(scored.sum()))


def _continuations(tokens: Tensor, prompt: int | None) -> list[dict[str, Tensor]]:
    """Sequences one by one, whose tokens behind the prompt are labels."""
    prompt = tokens.shape[1] // 4 if prompt is None else prompt
    if tokens.shape[0] == 0 or not 0 < prompt < tokens.shape[1]:
        raise CalibrationError(f"a test of {list(tokens.shape)} tokens with a prompt of {prompt} has nothing to score")
    labels = tokens.clone()
    labels[:, :prompt] = NO_LOSS
    length = torch.tensor([prompt])
    return [
        {"input_ids": row, "labels": wanted, "prompt_lengths": length}
        for row, wanted in zip(tokens.split(1), labels.split(1), strict=True)
    ]


def _answers(rows: ImageText) -> list[dict[str, Tensor]]:
    """Rows one by one; of conversations, the last answer alone."""
    return [last_answers(batch) for batch in rows.batches(1)]
