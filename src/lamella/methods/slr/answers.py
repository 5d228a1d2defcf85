"""What the next token says of a question that many answers are right for: how valid it is, and how diverse.

    validity    q(x) = sum of p(v | x) over v in V_x        the mass on valid answers
    diversity   d(x) = H( p(v | x) / q(x) ) / ln |V_x|      how evenly that mass is spread, from 0 to 1

One forward pass at temperature 1 gives both exactly; nothing is sampled. They are kept apart since the entropy of the
whole distribution would take noise for diversity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamella.errors import CalibrationError, NumericsError
from lamella.stack import Stack

BATCH = 64  # questions in one forward pass
NO_TOKEN = -1


@dataclass(frozen=True)
class Question:
    """A prompt and everything that is a right answer to it.

    Attributes:
        prompt: what is asked.
        answers: the set V_x.
        family: the kind of answer, such as letters or digits; results are told apart by it.
    """

    prompt: str
    answers: tuple[str, ...]
    family: str = ""

    def __post_init__(self) -> None:
        if not self.prompt.strip() or len(set(self.answers)) < 2 or not all(self.answers):
            raise CalibrationError(
                f"question '{self.prompt[:60]}': give a prompt and at least 2 different answers, none of them empty"
            )


class Answers(NamedTuple):
    """Validity and diversity of each question [questions], float64."""

    quality: Tensor
    diversity: Tensor


@dataclass(frozen=True)
class Asked:
    """Questions as a model reads them, padded on the left, and the tokens that are their answers.

    Attributes:
        questions: what was asked.
        input_ids, attention_mask: [questions, time].
        tokens: every way to write each answer as one token [questions, answers, forms]; -1 where there is none.
    """

    questions: tuple[Question, ...]
    input_ids: Tensor
    attention_mask: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, questions: Sequence[Question], prompts: Sequence[Sequence[int]], tokens: Sequence[Any]) -> Asked:
        """From token ids.

        Args:
            prompts: of each question [time].
            tokens: of each question, for each answer the tokens that say it.

        Raises:
            CalibrationError: when there is no question, a prompt is empty, or two answers share a token.
        """
        if not questions:
            raise CalibrationError("no questions: give at least one")
        for question, prompt, sets in zip(questions, prompts, tokens, strict=True):
            named = [token for answer in sets for token in set(answer)]
            if not len(prompt) or len(sets) < 2 or not all(map(len, sets)) or len(set(named)) < len(named):
                raise CalibrationError(
                    f"question '{question.prompt[:60]}': it needs a prompt, and tokens of its own for every answer"
                )
        time = max(map(len, prompts))
        rows = [[0] * (time - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (time - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        shape = (len(tokens), max(map(len, tokens)), max(len(answer) for sets in tokens for answer in sets))
        table = torch.full(shape, NO_TOKEN)
        for x, sets in enumerate(tokens):
            for v, answer in enumerate(sets):
                table[x, v, : len(answer)] = torch.tensor(list(answer))
        return cls(tuple(questions), torch.tensor(rows), torch.tensor(mask), table)

    def __len__(self) -> int:
        return len(self.questions)

    def some(self, chosen: Sequence[int]) -> Asked:
        """Some of the questions, by number."""
        if not chosen:
            raise CalibrationError("no questions are left: ask others")
        rows = torch.tensor(list(chosen))
        parts = {name: getattr(self, name)[rows] for name in ("input_ids", "attention_mask", "tokens")}
        return replace(self, questions=tuple(self.questions[x] for x in chosen), **parts)

    def of_family(self, family: str) -> Asked:
        """The questions of one family."""
        return self.some([x for x, question in enumerate(self.questions) if question.family == family])

    def batches(self) -> Iterator[Asked]:
        """The questions in parts that fit one forward pass, in their order."""
        for start in range(0, len(self), BATCH):
            yield self.some(range(start, min(start + BATCH, len(self))))

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """What the model takes, with positions that do not count padding."""
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": positions}
        return {name: each.to(device) for name, each in given.items()}

    def answers(self, logits: Tensor) -> Answers:
        """Validity and diversity under the logits of the next token [questions, vocabulary].

        The log-softmax is in float32 whatever the logits are, since half precision cannot tell near-equal tokens apart.

        Raises:
            NumericsError: for logits that are not finite.
        """
        if not torch.isfinite(logits).all():
            raise NumericsError("non-finite logits for a question: try float32, or check the weights")
        log_p = torch.log_softmax(logits.float(), dim=-1).double()
        tokens = self.tokens.to(logits.device)
        missing = tokens == NO_TOKEN
        flat = log_p.gather(1, tokens.clamp(min=0).flatten(1)).view(tokens.shape)
        each = flat.masked_fill(missing, -math.inf).logsumexp(-1)  # ln p(v | x) [questions, answers]
        sizes = (~missing.all(-1)).sum(-1)
        quality = each.logsumexp(-1).exp()
        diversity = torch.special.entr(each.softmax(-1)).sum(-1) / sizes.double().log()
        return Answers(quality.clamp(0, 1).cpu(), diversity.clamp(0, 1).cpu())


@torch.no_grad()
def answer(stack: Stack, asked: Asked) -> Answers:
    """What a model answers.

    Args:
        stack: any decoder.
        asked: the questions.
    """
    parts = []
    for batch in asked.batches():
        last = stack.hidden(batch.inputs(stack.device))[:, -1]
        parts.append(batch.answers(stack.logits(last)))
    return Answers(*(torch.cat(each) for each in zip(*parts, strict=True)))
