"""A model's predictions on a text, according to its objective, with the same noise for every model.

    next token       x_1 ... x_T unchanged                    every token is scored
    masked tokens    each token a mask with probability p     the masks are scored, with weight 1 / p

Over many draws of p the weighted mean is an upper bound of the negative log-likelihood of the text (LLaDA, arXiv
2502.09992, eq. 3), which the mean in the first case equals. The noise depends on the seed only, so two models differ
because of themselves and not because of their noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lamella.errors import CalibrationError, NumericsError
from lamella.measure.hidden_states import Tokens, sequences
from lamella.stack import Stack

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Draw:
    """One sequence with its noise.

    Attributes:
        inputs: token ids and, if there is padding, their mask, by name [1, time].
        scored: the tokens that are predicted [1, time] bool.
        labels: those tokens [scored].
        ratio: masking probability of a token; 0 for a model that predicts the next token.
        sequence: index of the sequence.
        eligible: number of tokens that could have been scored.
        front: number of tokens at the front that are never scored.
    """

    inputs: dict[str, Tensor]
    scored: Tensor
    labels: Tensor
    ratio: float
    sequence: int
    eligible: int
    front: int

    @property
    def weight(self) -> float:
        """The weight of a scored token."""
        return 1 / self.ratio if self.ratio else 1.0


def masked(eligible: Tensor, ratios: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return the tokens that become masks: each eligible one with its row's probability, and at least one of a row.

    Args:
        eligible: tokens that may become masks [batch, time] bool.
        ratios: probability of each row [batch].
        generator: random generator on the CPU; torch's global one if None.
    """
    drawn = torch.rand(eligible.shape, generator=generator).to(eligible.device)
    drawn = drawn.masked_fill(~eligible, 2.0)
    first = torch.zeros_like(eligible).scatter(1, drawn.argmin(dim=1, keepdim=True), True)
    return eligible & ((drawn < ratios.to(drawn.device)[:, None]) | first)


def masked_by_count(eligible: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return the tokens that become masks, whose number is drawn uniformly from one to all eligible tokens of a row.

    Args:
        eligible: tokens that may become masks [batch, time] bool, at least one in each row.
        generator: random generator on the CPU; torch's global one if None.

    Returns:
        The masked tokens [batch, time] bool, and their fraction of each row's eligible tokens [batch].
    """
    available = eligible.sum(dim=1).cpu()
    count = 1 + (torch.rand(len(available), generator=generator) * available).long()
    drawn = torch.rand(eligible.shape, generator=generator).to(eligible.device).masked_fill(~eligible, 2.0)
    return drawn.argsort(dim=1).argsort(dim=1) < count.to(drawn.device)[:, None], count / available


def draws(
    stack: Stack, tokens: Tokens, ratios: Sequence[float] = RATIOS, *, front: int = 1, seed: int = 0
) -> list[Draw]:
    """Return every sequence once, or, for a model that predicts masked tokens, once for each masking ratio.

    Args:
        stack: the model; the draws suit any other model with its tokenizer.
        tokens: token ids [sequences, time], alone or with an attention mask.
        ratios: masking ratios, each above 0 and at most 1.
        front: number of tokens at the front of each sequence that are never scored, at least one.
        seed: random seed of the masks.

    Raises:
        CalibrationError: for too few tokens, or an invalid ratio.
    """
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise CalibrationError(f"mask ratios {', '.join(map(str, ratios)) or '(none)'}: give some above 0, at most 1")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, row in enumerate(sequences(tokens)):
        given = {name: value.to(stack.device) for name, value in row.items()}
        ids = given["input_ids"]
        real = given.get("attention_mask", torch.ones_like(ids)).bool()
        eligible = real & (real.long().cumsum(dim=1) > max(front, 1))
        count = int(eligible.sum())
        if count == 0:
            raise CalibrationError(f"sequence {index} has no token after its first {max(front, 1)}: give more text")
        if not stack.architecture.denoises:
            found.append(Draw(given, eligible, ids[eligible], 0.0, index, count, front))
            continue
        for ratio in ratios:
            chosen = masked(eligible, torch.tensor([ratio]), generator)
            noisy = ids.masked_fill(chosen, stack.config.mask_token_id)
            found.append(Draw(given | {"input_ids": noisy}, chosen, ids[chosen], ratio, index, count, front))
    return found


def predicting(stack: Stack, states: Tensor, scored: Tensor) -> Tensor:
    """Return the states that predict the scored tokens [scored, ...].

    Args:
        stack: the model.
        states: states of all positions [batch, time, ...].
        scored: scored tokens [batch, time] bool; none at the front for a model that predicts the next token.
    """
    return states[:, :-1][scored[:, 1:]] if stack.architecture.shifted else states[scored]


@torch.no_grad()
def nats_per_token(stack: Stack, samples: Sequence[Draw]) -> Tensor:
    """Return each sequence's negative log-likelihood in nats per token, or its upper bound [sequences] float64.

    Args:
        stack: a model, or a view of one: ``Stack(view)``.
        samples: what :func:`draws` returned.

    Raises:
        NumericsError: for logits that are not finite.
    """
    total: dict[int, float] = {}
    rounds: dict[int, int] = {}
    for draw in samples:
        states = predicting(stack, stack.hidden(draw.inputs), draw.scored)
        logits = stack.logits(states).float()
        if not torch.isfinite(logits).all():
            raise NumericsError(f"non-finite logits in sequence {draw.sequence} of {stack.name}: try float32")
        loss = cross_entropy(logits, draw.labels, reduction="sum").double()
        total[draw.sequence] = total.get(draw.sequence, 0.0) + float(loss) * draw.weight / draw.eligible
        rounds[draw.sequence] = rounds.get(draw.sequence, 0) + 1
    return torch.tensor([total[each] / rounds[each] for each in total], dtype=torch.float64)
