"""Training samples: a prompt, its response, and which of their tokens carry loss.

A sample is a dictionary of tensors: ``input_ids`` [time], ``labels`` [time] (-100 where a token carries no loss) and
``prompt_lengths``, a scalar: the number of prompt columns. For an encoder-decoder, ``input_ids`` are the tokens of the
encoder and ``labels`` those of the decoder, of different lengths, and nothing is prompt. :func:`collate` batches
samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lamella.data.context import InputContext
from lamella.data.rows import Rows
from lamella.data.sources import PLAIN, check_text, load_text, windows
from lamella.errors import TrainingError
from lamella.measure.labelled import Sample

Scope = Literal["response", "all"]
Text = str | Sequence[int] | Tensor

NO_LOSS = -100


class Samples(Rows[Sample]):
    """Training samples cut from a text: prompts of various lengths, whose continuations carry loss."""

    default: ClassVar[str | None] = "pydoc"
    metavar = "TEXT"
    reads_text = True
    source_help = "pydoc, stdlib, a file or a datasets name"
    example = replace(PLAIN, settings={"sequences": 10, "length": 16})
    loss_on: Scope = "response"

    @staticmethod
    def check(name: str | Path) -> None:
        """Check that the text exists; see :func:`lamella.data.sources.check_text`."""
        check_text(name)

    @classmethod
    def open(cls, name: str, context: InputContext, *, sequences: int = 64, length: int = 256) -> Self:
        """Cut blocks from a text.

        Args:
            name: the text; see :func:`lamella.load_text`.
            context: gives the tokenizer, the split and the random seed.
            sequences: number of blocks.
            length: tokens in each block.
        """
        text = load_text(name, context.split)
        tokens = windows(context.tokenizer, text, sequences, length, context.seed)
        prompts = (length // 8, length // 2)
        made = blocks(tokens, prompts, seed=context.seed, loss_on=cls.loss_on)
        return cls(made, context.tokenizer, text.provenance(tokens))


class Passages(Samples):
    """Training samples cut from a text, in which every token carries loss."""

    loss_on: Scope = "all"


def pairs(
    examples: Iterable[tuple[Text, Text]],
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    loss_on: Scope = "response",
) -> list[Sample]:
    """Make samples from prompts and their responses.

    Args:
        examples: (prompt, response) pairs, each as token ids [time] or as text. Ids are used unchanged; a response
            given as text ends with the end-of-sequence token.
        tokenizer: needed for text.
        max_length: samples are truncated to this many tokens.
        loss_on: the ``response`` tokens, or ``all`` tokens.

    Raises:
        TrainingError: if a sample has no prompt, or no response after truncation.
    """
    samples = []
    for number, (prompt, response) in enumerate(examples):
        head = _ids(prompt, tokenizer, number)
        tail = _ids(response, tokenizer, number, ends=True)
        row = torch.cat([head, tail])[:max_length]
        if len(head) == 0 or len(row) <= len(head):
            raise TrainingError(
                f"sample {number} has {len(head)} prompt and {len(tail)} response tokens, cut to {len(row)}: give both "
                "a prompt and a response, or a larger max_length"
            )
        samples.append(_sample(row, len(head), loss_on))
    return samples


def blocks(
    tokens: Tensor, prompt: int | tuple[int, int] = 0, *, seed: int = 0, loss_on: Scope = "response"
) -> list[Sample]:
    """Make samples from blocks of consecutive text.

    Args:
        tokens: token blocks [n, time].
        prompt: number of prompt tokens in each block, or (lowest, highest) to draw it at random for each block.
        seed: random seed of the draws.
        loss_on: the ``response`` tokens, or ``all`` tokens.

    Raises:
        TrainingError: if a block has no token after its prompt.
    """
    lowest, highest = (prompt, prompt) if isinstance(prompt, int) else prompt
    if tokens.ndim != 2 or not 0 <= lowest <= highest < tokens.shape[1] or tokens.shape[1] < 2:
        raise TrainingError(
            f"blocks of {list(tokens.shape)} with prompts of {lowest} to {highest} tokens: give [n, time >= 2] tokens, "
            "and prompts shorter than time"
        )
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(lowest, highest + 1, (len(tokens),), generator=generator).tolist()
    return [_sample(row, length, loss_on) for row, length in zip(tokens, lengths, strict=True)]


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """One batch of samples, padded on the right.

    Padding stands on the right because training runs whole rows at once: real tokens cannot see what comes after them,
    positions count from column 0, and a prompt is simply the first ``prompt_lengths`` columns. (Generation pads on the
    left, since it writes at the right end.)

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask`` [batch, time], ``prompt_lengths`` [batch], and every further
        tensor of the samples: numbers become [batch], rows [batch, time] are padded with zeros.
    """
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if values[0].ndim == 0:
            batch[name] = torch.stack(values)
        else:
            filler = NO_LOSS if name == "labels" else 0
            batch[name] = pad_sequence(values, batch_first=True, padding_value=filler)
    real = [torch.ones_like(sample["input_ids"]) for sample in samples]
    batch["attention_mask"] = pad_sequence(real, batch_first=True)
    return batch


def count_labels(batch: Mapping[str, Tensor]) -> int:
    """Return the number of labels in a batch that carry loss."""
    return int((batch["labels"] != NO_LOSS).sum())


def _sample(row: Tensor, prompt: int, loss_on: Scope) -> Sample:
    if loss_on not in ("response", "all"):
        raise TrainingError(f"loss_on '{loss_on}': choose 'response' or 'all'")
    labels = row.clone()
    labels[: max(prompt, 1) if loss_on == "response" else 1] = NO_LOSS  # nothing predicts the first token
    return {"input_ids": row, "labels": labels, "prompt_lengths": torch.tensor(prompt)}


def _ids(text: Text, tokenizer: Any, number: int, ends: bool = False) -> Tensor:
    """Return the token ids of a prompt, or of a response, which ``ends`` the sample."""
    if not isinstance(text, str):
        return torch.as_tensor(text, dtype=torch.long)
    if tokenizer is None:
        raise TrainingError(f"sample {number} is text: give its tokenizer")
    ids = tokenizer(text, add_special_tokens=not ends)["input_ids"]
    end = [tokenizer.eos_token_id] if ends and tokenizer.eos_token_id is not None else []
    return torch.tensor([*ids, *end], dtype=torch.long)
