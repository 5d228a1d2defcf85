"""Fidelity: how close a changed model is to its original, on text that no planner has used.

The objective determines what is compared: next-token distributions of a continuation, or distributions at masked
tokens, with several noise levels per sequence that are the same for every model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from lamella.data import ImageText, Lazy, Prompts, write
from lamella.data.prompts import ANSWER
from lamella.data.samples import count_labels
from lamella.errors import ArchitectureError, CalibrationError, NumericsError
from lamella.evaluate.confidence import CONFIDENCE, Interval
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
        agreements: ``top1`` of each sequence.
        losses: mean loss of the changed model on each sequence, nats per token.
    """

    kl: Estimate
    jsd: Estimate
    top1: Estimate
    perplexity: Estimate
    base_perplexity: Estimate
    sequences: int
    positions: int
    agreements: tuple[float, ...]
    losses: tuple[float, ...]

    @classmethod
    def of(cls, sums: Tensor) -> Fidelity:
        """Return the fidelity from the sums over the positions of each sequence.

        Args:
            sums: KL, JSD, agreements, losses of the changed model and of the original, and numbers of scored and of
                eligible positions [sequences, 7] float64.
        """
        kl, jsd, top1, loss, base_loss, scored, eligible = sums.unbind(dim=1)
        return cls(
            kl=Estimate.of(kl / scored),
            jsd=Estimate.of(jsd / scored),
            top1=Estimate.of(top1 / scored),
            perplexity=Estimate.of(loss / eligible).exp(),
            base_perplexity=Estimate.of(base_loss / eligible).exp(),
            sequences=len(sums),
            positions=int(scored.sum()),
            agreements=tuple((top1 / scored).tolist()),
            losses=tuple((loss / eligible).tolist()),
        )

    def agreement(self, confidence: float = CONFIDENCE) -> Interval:
        """Return bounds of ``top1`` for the traffic that the sequences are drawn from; see :class:`Interval`.

        Args:
            confidence: probability that the bounds hold.
        """
        return Interval.of(self.agreements, confidence)

    def as_dict(self, confidence: float = CONFIDENCE) -> dict[str, Any]:
        """Return the estimates, the counts and the bounds of the agreement as JSON values.

        Args:
            confidence: probability that the bounds hold.
        """
        values = {name: {"mean": e.mean, "error": e.error} for name, e in vars(self).items() if isinstance(e, Estimate)}
        counts = {"sequences": self.sequences, "positions": self.positions}
        return values | counts | {"agreement": vars(self.agreement(confidence))}


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
    model, so that plans with a special treatment of prompts are comparable with others. A prompt without continuation
    is continued by the original. For images with text, the answers are scored, including those of encoder-decoders.

    Args:
        model: the original; of several stacks, the last is tested.
        tokens: test tokens [sequences, time], prompts with what follows them, or images with text.
        prompt: number of prompt tokens in each sequence of ``tokens``; a quarter by default. Rows of the other kinds
            have their own prompts.
        keep: run the original on all sequences first, and keep its final states for all models that are tested.
            Otherwise it runs again for each of them, and memory does not grow with the number of sequences.

    Raises:
        CalibrationError: if no token is left to score, or prompts have no continuation and the original predicts masked
            tokens.
        ArchitectureError: for a model that does not predict text by itself.
    """

    def __init__(
        self, model: Model, tokens: Tensor | Prompts | ImageText, prompt: int | None = None, *, keep: bool = True
    ) -> None:
        encodes = isinstance(tokens, ImageText) and tokens.processing.encodes
        self.stack = list(model.stacks.values())[-1] if encodes else predicting_stack(model)
        self.tokens = tokens
        asked = Lazy(self._questions_of(tokens, prompt), self._asked_of)
        self._asked: Sequence[Asked] = list(track(asked, "fidelity: original")) if keep else asked

    def _questions_of(self, tokens: Tensor | Prompts | ImageText, prompt: int | None) -> Sequence[Questions]:
        """Return what is scored of each sequence: an answer, or everything after the prompt, under each noise."""
        if isinstance(tokens, ImageText):
            return [[each] for each in _answers(tokens)]
        if isinstance(tokens, Prompts):
            return Lazy(range(len(tokens)), partial(self._continued, tokens))
        prompt = tokens.shape[1] // 4 if prompt is None else prompt
        if tokens.shape[0] == 0 or not 0 < prompt < tokens.shape[1]:
            raise CalibrationError(
                f"a test of {list(tokens.shape)} tokens with a prompt of {prompt} has nothing to score"
            )
        return [list(each) for _, each in groupby(draws(self.stack, tokens, front=prompt), key=lambda it: it.sequence)]

    def _continued(self, prompts: Prompts, number: int) -> list[Draw]:
        """Return what is scored after a prompt of the test."""
        tokens, length = prompts[number]
        tokens = self._answered(tokens) if len(tokens) == length else tokens
        return [replace(draw, sequence=number) for draw in draws(self.stack, tokens[None], front=length, seed=number)]

    def _answered(self, prompt: Tensor) -> Tensor:
        """Return a prompt with the greedy answer of the original [time]."""
        if self.stack.architecture.denoises:
            raise CalibrationError(f"{self.stack.name} predicts masked tokens: give an answer with each prompt")
        (answer,) = write(self.stack.model, [prompt], ANSWER)
        if len(answer) < ANSWER:  # it has ended, with a token that is not among the answer
            ends = torch.tensor(self.stack.model.generation_config.eos_token_id).flatten()
            answer = torch.cat([answer, ends[:1]])
        return torch.cat([prompt, answer])

    def _asked_of(self, questions: Questions) -> Asked:
        """Return questions with the original's final states that predict the scored tokens."""
        return questions, [self._states(self.stack.model, each)[0] for each in questions]

    @torch.no_grad()
    def _states(self, model: Any, question: Draw | ScoredAnswer) -> tuple[Tensor, Tensor]:
        """Return the final states that predict the scored tokens [positions, hidden], and these tokens."""
        if isinstance(question, ScoredAnswer):
            return scored_states(model, {name: each.to(self.stack.device) for name, each in question.batch.items()})
        options = phase_options(model, torch.tensor([question.front]))
        stack = self._of(model)
        return predicting(stack, stack.hidden(question.inputs, **options), question.scored), question.labels

    def _of(self, model: Any) -> Stack:
        """Return the same stack of another model."""
        return Stack(model, stack=self.stack.stack if self.stack.prefix else None)

    def of(self, view: Any) -> Fidelity:
        """Return the fidelity of a view (or of any model with the same vocabulary) to the original.

        Raises:
            ArchitectureError: for a model with another number of tokens.
        """
        return Fidelity.of(torch.stack([self._sums(view, each) for each in track(range(len(self._asked)), "fidelity")]))

    def after_each(self, view: Any, seed: int = 0) -> Iterator[Fidelity]:
        """Yield the fidelity after each sequence, in a random order, so that one can stop when enough is known.

        Args:
            view: a view, or any model with the same vocabulary.
            seed: random seed of the order.
        """
        order = torch.randperm(len(self._asked), generator=torch.Generator().manual_seed(seed))
        sums: list[Tensor] = []
        for number in track(order.tolist(), "fidelity"):
            sums.append(self._sums(view, number))
            yield Fidelity.of(torch.stack(sums))

    @torch.no_grad()
    def _sums(self, view: Any, number: int) -> Tensor:
        """Return the sums over the scored positions of a sequence; see :meth:`Fidelity.of` [7]."""
        changed = self._of(view)
        tokens, others = (getattr(each.config, "vocab_size", None) for each in (self.stack, changed))
        if tokens != others:
            raise ArchitectureError(
                f"the changed model has {others} tokens and {self.stack.name} {tokens}, so they cannot be compared "
                "token by token: compare their loss per byte with `lamella eval`"
            )
        sums = torch.zeros(7, dtype=torch.float64)
        for question, original in zip(*self._asked[number], strict=True):
            ours_all, labels = self._states(view, question)
            sums[5] += len(labels)
            sums[6] += question.eligible
            chunks = zip(original.split(CHUNK), ours_all.split(CHUNK), labels.split(CHUNK), strict=True)
            for base, ours, label in chunks:
                log_p = self._log_probabilities(self.stack, base, number, self.stack.name)
                log_q = self._log_probabilities(changed, ours, number, "the changed model")
                losses = (nll_loss(each, label, reduction="none").double() * question.weight for each in (log_q, log_p))
                found = (*divergences(log_p, log_q), log_p.argmax(-1) == log_q.argmax(-1), *losses)
                sums[:5] += torch.stack([each.double().sum() for each in found]).cpu()
        return sums

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


Questions = Sequence[Draw | ScoredAnswer]
Asked = tuple[Questions, list[Tensor]]


def _answers(rows: ImageText) -> list[ScoredAnswer]:
    """Return rows one by one, of conversations only the last answer."""
    batches = [last_answers(batch) for batch in rows.batches(1)]
    return [ScoredAnswer(batch, number, count_labels(batch)) for number, batch in enumerate(batches)]
