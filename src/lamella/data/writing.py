"""Text that a model writes itself: continuations of prompts, and texts from nothing but its start token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lamella.errors import CalibrationError
from lamella.progress import tracker

TRIES = 4  # how many times as many texts are written as are wanted, at most, where some are refused


@torch.no_grad()
def write(
    model: Any,
    prompts: Sequence[Tensor],
    tokens: int,
    *,
    top_p: float | None = None,
    seed: int = 0,
    batch: int = 32,
) -> list[Tensor]:
    """Continue prompts; an encoder-decoder reads them, and writes from its start token on.

    Args:
        model: a model or a view.
        prompts: token ids [time], of any lengths.
        tokens: the most new tokens of each.
        top_p: sample, at temperature 1, from the likeliest tokens that make up this share; None: greedily.
        seed: of what is drawn; the global random state stays as it is.
        batch: prompts in one batch.

    Returns:
        The new tokens of each prompt [new], without the end-of-sequence token and what follows it.
    """
    ends = model.generation_config.eos_token_id
    end = {ends} if isinstance(ends, int) else set(ends or ())
    padding = model.generation_config.pad_token_id
    padding = next(iter(end), 0) if padding is None else padding
    sampling = {"do_sample": False} if top_p is None else {"do_sample": True, "top_p": top_p, "top_k": 0}
    reads = bool(getattr(model.config, "is_encoder_decoder", False))
    starting = {"decoder_start_token_id": model.generation_config.decoder_start_token_id} if reads else {}
    config = GenerationConfig(
        max_new_tokens=tokens, eos_token_id=sorted(end) or None, pad_token_id=padding, **sampling, **starting
    )
    written = []
    with tracker("writing", len(prompts)) as count, torch.random.fork_rng():
        torch.manual_seed(seed)
        for begin in range(0, len(prompts), batch):
            rows = list(prompts[begin : begin + batch])
            width = max(map(len, rows))
            ids = torch.full((len(rows), width), padding)
            mask = torch.zeros_like(ids)
            for number, row in enumerate(rows):  # prompts end where the new tokens begin, unless an encoder reads them
                place = slice(len(row)) if reads else slice(width - len(row), width)
                ids[number, place] = row.to(ids)
                mask[number, place] = 1
            out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config)
            written += [_until(row, end) for row in out[:, 1 if reads else width :].cpu()]
            count(len(rows))
    return written


def own_texts(
    model: Any,
    count: int,
    tokens: int,
    *,
    top_p: float = 0.9,
    seed: int = 0,
    accept: Callable[[Tensor], bool] = lambda text: len(text) > 1,
) -> list[Tensor]:
    """Texts that a model samples from its start token alone.

    Args:
        model: a model or a view.
        count: how many.
        tokens: the most tokens of each, after the start token.
        top_p: see :func:`write`.
        seed: of what is drawn.
        accept: which texts count; others are drawn again.

    Returns:
        Texts that begin with the start token [1 + new].

    Raises:
        CalibrationError: for a model without a start token, or when too few texts are accepted.
    """
    config = model.generation_config
    start = next((token for token in (config.bos_token_id, config.eos_token_id) if isinstance(token, int)), None)
    if start is None:
        raise CalibrationError("this model has no start token to write texts from: give a text instead")
    first = torch.tensor([start])
    texts: list[Tensor] = []
    for turn in range(TRIES):
        fresh = write(model, [first] * count, tokens, top_p=top_p, seed=seed + 1000 * turn)
        texts += [text for text in (torch.cat([first, each]) for each in fresh) if accept(text)]
        if len(texts) >= count:
            return texts[:count]
    raise CalibrationError(
        f"of {TRIES * count} texts that the model wrote only {len(texts)} can be used, and {count} are needed: ask for "
        "fewer, or give a text instead"
    )


def _until(row: Tensor, ends: set[int]) -> Tensor:
    """A row up to its first end token."""
    stops = [place for place, token in enumerate(row.tolist()) if token in ends]
    return row[: stops[0]] if stops else row
