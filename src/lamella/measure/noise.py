"""What a model predicts of a text, by its objective, with the same noise for every model that is asked.

    next token       x_1 ... x_T as it is                  every token is scored
    masked tokens    each token a mask with probability p   the masks are scored, and weigh 1 / p

Over many draws of p the weighted mean bounds the negative log-likelihood of the text from above (LLaDA, arXiv
2502.09992, eq. 3), as the mean of the first is it. What is drawn depends on the seed alone, so that two models differ
by themselves and not by their noise.
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
    """One sequence as a model is given it.

    Attributes:
        inputs: token ids and, where some are padding, their mask, by name [1, time].
        scored: the tokens that are predicted [1, time] bool.
        labels: those tokens [scored].
        ratio: how likely a token was to be masked; 0 of a model that predicts the next one.
        sequence: its number.
        eligible: how many tokens could have been scored.
    """

    inputs: dict[str, Tensor]
    scored: Tensor
    labels: Tensor
    ratio: float
    sequence: int
    eligible: int

    @property
    def weight(self) -> float:
        """What a scored token counts."""
        return 1 / self.ratio if self.ratio else 1.0


def masked(eligible: Tensor, ratios: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Which tokens become masks: each eligible one with its row's probability, and one at least of a row that has any.

    Args:
        eligible: [batch, time] bool.
        ratios: the probability of each row [batch].
        generator: on the CPU, as all that is drawn; torch's own when left out.
    """
    drawn = torch.rand(eligible.shape, generator=generator).to(eligible.device)
    drawn = drawn.masked_fill(~eligible, 2.0)
    first = torch.zeros_like(eligible).scatter(1, drawn.argmin(dim=1, keepdim=True), True)
    return eligible & ((drawn < ratios.to(drawn.device)[:, None]) | first)


def masked_by_count(eligible: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Which tokens become masks: of each row as many as a number says that is drawn evenly, from one to all of them.

    Args:
        eligible: [batch, time] bool, one of each row at least.
        generator: on the CPU; torch's own when left out.

    Returns:
        What becomes masks [batch, time], and the share of each row's eligible tokens that do [batch].
    """
    held = eligible.sum(dim=1).cpu()
    number = 1 + (torch.rand(len(held), generator=generator) * held).long()
    drawn = torch.rand(eligible.shape, generator=generator).to(eligible.device).masked_fill(~eligible, 2.0)
    return drawn.argsort(dim=1).argsort(dim=1) < number.to(drawn.device)[:, None], number / held


def draws(
    stack: Stack, tokens: Tokens, ratios: Sequence[float] = RATIOS, *, front: int = 1, seed: int = 0
) -> list[Draw]:
    """Every sequence once, or, of a model that predicts masked tokens, once with each ratio of masks.

    Args:
        stack: the model that will be asked; any other with its tokenizer may be asked the same.
        tokens: token ids [sequences, time], alone or with an attention mask.
        ratios: of masks, each above 0 and at most 1.
        front: tokens at the front of each sequence that are never scored, one at least.
        seed: of the masks.

    Raises:
        CalibrationError: for too few tokens, or a ratio that is none.
    """
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise CalibrationError(f"mask ratios {', '.join(map(str, ratios)) or '(none)'}: give some above 0, at most 1")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, row in enumerate(sequences(tokens)):
        given = {name: value.to(stack.device) for name, value in row.items()}
        ids = given["input_ids"]
        real = given.get("attention_mask", torch.ones_like(ids)).bool()
        eligible = real & (real.long().cumsum(dim=1) > max(front, 1))
        count = int(eligible.sum())
        if count == 0:
            raise CalibrationError(f"sequence {number} has no token behind its first {max(front, 1)}: give more text")
        if not stack.architecture.denoises:
            found.append(Draw(given, eligible, ids[eligible], 0.0, number, count))
            continue
        for ratio in ratios:
            chosen = masked(eligible, torch.tensor([ratio]), generator)
            noisy = ids.masked_fill(chosen, stack.config.mask_token_id)
            found.append(Draw(given | {"input_ids": noisy}, chosen, ids[chosen], ratio, number, count))
    return found


def predicting(stack: Stack, states: Tensor, scored: Tensor) -> Tensor:
    """Of the states of all positions, those whose logits are of the scored tokens [scored, ...].

    Args:
        states: [batch, time, ...].
        scored: [batch, time] bool; of a model whose logits are the next token's, none at the front.
    """
    return states[:, :-1][scored[:, 1:]] if stack.architecture.shifted else states[scored]


@torch.no_grad()
def nats_per_token(stack: Stack, asked: Sequence[Draw]) -> Tensor:
    """What each sequence costs, in nats per token: its negative log-likelihood, or the bound on it [sequences] float64.

    Args:
        stack: a model, or a view of one: ``Stack(view)``.
        asked: what :func:`draws` returned.

    Raises:
        NumericsError: for logits that are not finite.
    """
    total: dict[int, float] = {}
    rounds: dict[int, int] = {}
    for draw in asked:
        states = predicting(stack, stack.hidden(draw.inputs), draw.scored)
        logits = stack.logits(states).float()
        if not torch.isfinite(logits).all():
            raise NumericsError(f"non-finite logits in sequence {draw.sequence} of {stack.name}: try float32")
        loss = cross_entropy(logits, draw.labels, reduction="sum").double()
        total[draw.sequence] = total.get(draw.sequence, 0.0) + float(loss) * draw.weight / draw.eligible
        rounds[draw.sequence] = rounds.get(draw.sequence, 0) + 1
    return torch.tensor([total[each] / rounds[each] for each in total], dtype=torch.float64)
