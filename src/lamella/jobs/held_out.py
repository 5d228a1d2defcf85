"""What a job measures on: a split that nothing is planned or trained on, of text or of images with text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import LongTensor

from lamella.data import ImageText, Reader, load_text, open_processing, windows
from lamella.stack import Model, Stack

SEQUENCES, LENGTH = 8, 256
ROWS = 64  # of images with text
SEED = 0  # of the draw of test windows: they depend on the test alone, so that results of different commands compare


def reader_for(opened: Model, model: Any, seed: int) -> Reader:
    """What reads for a model that is open.

    Args:
        model: what it was opened by, where its tokenizer is if it has no folder.
    """
    processing = open_processing(opened, model)
    return Reader(lambda: processing.tokenizer, seed, processing_opener=lambda: processing)


def held_out(
    reader: Reader, stack: Stack, test: str, beside: str, sequences: int = SEQUENCES, length: int = LENGTH
) -> tuple[LongTensor | ImageText, dict[str, Any]]:
    """What to measure on, and what evidence says of it.

    Args:
        test: the name of a source.
        beside: what is planned or trained on: of images with text other rows measure, where ``test`` is a text.
        sequences, length: windows of a text, and tokens in each.
    """
    if ImageText.fits(stack, beside):
        source = test if ImageText.fits(stack, test) else beside
        rows = ImageText.open(source, replace(reader, split="test", seed=SEED), rows=ROWS)
        return rows, rows.describe()
    return judging_windows(reader.tokenizer, test, stack, sequences, length)


def judging_windows(
    tokenizer: Any, name: str, stack: Stack, sequences: int = SEQUENCES, length: int = LENGTH
) -> tuple[LongTensor, dict[str, Any]]:
    """Windows of the test split of a text, and its provenance.

    They depend on the text and their size alone: no seed of a method, so that what two commands measure compares.

    Args:
        name: of the text; see :func:`lamella.load_text`.
        sequences, length: how many windows, and tokens in each: at most what the model can read.
    """
    text = load_text(name, "test")
    context = int(getattr(stack.config, "max_position_embeddings", None) or length)
    tokens = windows(tokenizer, text, sequences, min(length, context), SEED)
    return tokens, text.provenance(tokens)
