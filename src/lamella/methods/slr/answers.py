"""Validity and diversity of the next-token distribution for a question with many correct answers.

    validity    q(x) = sum of p(v | x) over v in V_x        the mass on valid answers
    diversity   d(x) = H( p(v | x) / q(x) ) / ln |V_x|      how evenly that mass is spread, from 0 to 1

One forward pass at temperature 1 gives both exactly; nothing is sampled. They are measured separately, since the
entropy of the whole distribution would count noise as diversity.
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

BATCH = 64  # questions per forward pass
NO_TOKEN = -1


@dataclass(frozen=True)
class ChoiceQuestion:
    """A prompt and all correct answers to it.

    Attributes:
        prompt: the prompt.
        answers: the set V_x.
        family: the kind of answer, such as letters or digits, by which results can be grouped.
    """

    prompt: str
    answers: tuple[str, ...]
    family: str = ""

    def __post_init__(self) -> None:
        if not self.prompt.strip() or len(set(self.answers)) < 2 or not all(self.answers):
            raise CalibrationError(
                f"question '{self.prompt[:60]}': give a prompt and at least 2 different answers, none of them empty"
            )


class QuestionScores(NamedTuple):
    """Validity and diversity of each question `[questions]`, float64.

    Attributes:
        quality: the validity.
        diversity: the diversity.
    """

    quality: Tensor
    diversity: Tensor


@dataclass(frozen=True)
class EncodedQuestions:
    """Questions as token ids, padded on the left, and the tokens of their answers.

    Attributes:
        questions: the questions.
        input_ids: token ids `[questions, time]`.
        attention_mask: 1 for tokens, 0 for padding `[questions, time]`.
        tokens: all single-token forms of each answer `[questions, answers, forms]`; -1 for none.
    """

    questions: tuple[ChoiceQuestion, ...]
    input_ids: Tensor
    attention_mask: Tensor
    tokens: Tensor

    @classmethod
    def of(
        cls, questions: Sequence[ChoiceQuestion], prompts: Sequence[Sequence[int]], tokens: Sequence[Any]
    ) -> EncodedQuestions:
        """Create the tensors from token ids.

        Args:
            questions: the questions.
            prompts: the token ids of each prompt `[time]`.
            tokens: for each question and each of its answers, the tokens that express it.

        Raises:
            CalibrationError: if there is no question, a prompt is empty, or two answers share a token.
        """
        if not questions:
            raise CalibrationError("no questions: give at least one")
        for question, prompt, sets in zip(questions, prompts, tokens, strict=True):
            used = [token for answer in sets for token in set(answer)]
            if not len(prompt) or len(sets) < 2 or not all(map(len, sets)) or len(set(used)) < len(used):
                raise CalibrationError(
                    f"question '{question.prompt[:60]}': it needs a prompt, and distinct tokens for every answer"
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

    def select(self, indices: Sequence[int]) -> EncodedQuestions:
        """Return a subset of the questions by index.

        Args:
            indices: the indices.
        """
        if not indices:
            raise CalibrationError("no questions remain: give others")
        rows = torch.tensor(list(indices))
        parts = {name: getattr(self, name)[rows] for name in ("input_ids", "attention_mask", "tokens")}
        return replace(self, questions=tuple(self.questions[x] for x in indices), **parts)

    def of_family(self, family: str) -> EncodedQuestions:
        """Return the questions of one family."""
        return self.select([x for x, question in enumerate(self.questions) if question.family == family])

    def batches(self) -> Iterator[EncodedQuestions]:
        """Iterate over parts that fit one forward pass, in order."""
        for start in range(0, len(self), BATCH):
            yield self.select(range(start, min(start + BATCH, len(self))))

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Return the model inputs, with position ids that ignore padding."""
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "position_ids": positions}
        return {name: each.to(device) for name, each in inputs.items()}

    def scores(self, logits: Tensor) -> QuestionScores:
        """Compute validity and diversity from the logits of the next token `[questions, vocabulary]`.

        The log-softmax is computed in float32 in any case, since half precision cannot separate near-equal tokens.

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
        return QuestionScores(quality.clamp(0, 1).cpu(), diversity.clamp(0, 1).cpu())


@torch.no_grad()
def answer(stack: Stack, encoded: EncodedQuestions) -> QuestionScores:
    """Score the answers of a model to all questions.

    Args:
        stack: any decoder.
        encoded: the questions.
    """
    parts = []
    for batch in encoded.batches():
        last = stack.hidden(batch.inputs(stack.device))[:, -1]
        parts.append(batch.scores(stack.logits(last)))
    return QuestionScores(*(torch.cat(each) for each in zip(*parts, strict=True)))
