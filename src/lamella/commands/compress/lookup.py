"""Prompt lookup beside each route: lossless decoding that copies from the text, and what it gains on top.

A decoding step reads all weights, for one token or for several. Prompt lookup proposes the tokens that followed the
most recent ones when these occurred before, computes all of them in one pass, and keeps those that greedy decoding
would choose: the output is that of greedy decoding, unless two tokens are tied within the precision of the weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from lamella.commands.compress.forms import Variant
from lamella.evaluate import Ratio
from lamella.evaluate.speed import denoises
from lamella.progress import track

TEXTS = ("humaneval", "gsm8k", "general")
CANDIDATES = 8  # tokens that are proposed at once
PROMPT = 96  # tokens of a prompt
ANSWER = 32  # generated tokens for each prompt
LOOKUP_SECONDS = 5.0  # time limit for all routes, after the first prompt
TIE = 1e-5  # difference of two logits, relative to the larger one, that rounding explains in 32 bits


@torch.no_grad()
def add_lookup(rows: Iterable[dict[str, Any]], variants: Mapping[str, Variant], prompts: Mapping[str, Tensor]) -> None:
    """Add to routes what prompt lookup gains on top of them, as ``lookup``, as far as time permits.

    Dynamic plans are left out, since their caches cannot take tokens back, and so is what does not generate token by
    token from its own text.

    Args:
        rows: routes as in evidence, the most important first; those without a variant are left out.
        variants: what they run, by the names of routes.
        prompts: token ids [1, time] by the name of their text.
    """
    end = time.monotonic() + LOOKUP_SECONDS
    for row in track([each for each in rows if each["name"] in variants], "prompt lookup"):
        form, stack, plan = variants[row["name"]]
        config = stack.model.config
        generates = not config.is_encoder_decoder and not denoises(stack.model)
        if time.monotonic() > end or not row["decode_speedup"] or not generates:
            continue
        view = form.view(stack, plan)
        if hasattr(view, "lamella_policy"):
            continue
        found: dict[str, tuple[float, bool | None]] = {}
        for name, prompt in prompts.items():
            if found and time.monotonic() > end:
                break
            found[name] = _compared(view, prompt.to(view.device))
        if found:
            row["lookup"] = {
                "speedup": vars(Ratio.of([gain for gain, _ in found.values()])),
                "texts": list(found),
                "candidates": CANDIDATES,
                "equal": sum(tied is None for _, tied in found.values()),
                "tied": sum(tied is True for _, tied in found.values()),
            }


def _compared(model: Any, prompt: Tensor) -> tuple[float, bool | None]:
    """Return the speed-up of prompt lookup for a prompt, and whether the first difference is a tie; None if equal."""
    plain, seconds = _generated(model, prompt)
    copied, fewer = _generated(model, prompt, prompt_lookup_num_tokens=CANDIDATES)
    differing = (plain != copied).nonzero()
    return seconds / fewer, None if not len(differing) else _is_tie(model, plain, copied, int(differing[0, 1]))


def _generated(model: Any, prompt: Tensor, **settings: Any) -> tuple[Tensor, float]:
    """Return a prompt with its greedy answer [1, time], and the seconds per token after the first pass."""
    clock = _Clock()
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=ANSWER,
        max_new_tokens=ANSWER,
        do_sample=False,
        pad_token_id=model.generation_config.pad_token_id or 0,
        streamer=clock,
        **settings,
    )
    (_, (_, begin), *later) = clock.seen  # the prompt, and what the pass over it gives
    return ids, (later[-1][1] - begin) / sum(count for count, _ in later)


def _is_tie(model: Any, plain: Tensor, copied: Tensor, index: int) -> bool:
    """Return whether two tokens at one position have the same logit within the precision of the weights."""
    logits = model(plain[:, :index]).logits[0, -1].float()
    first, second = logits[plain[0, index]], logits[copied[0, index]]
    precision = max(4 * torch.finfo(model.dtype).eps, TIE)
    return bool((first - second).abs() <= precision * logits.abs().max())


class _Clock(BaseStreamer):
    """Notes how many tokens every pass gives, and when."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def put(self, value: Tensor) -> None:
        """Note the tokens of a pass."""
        self.seen.append((value.numel(), time.perf_counter()))

    def end(self) -> None:
        """Do nothing at the end of the answer."""
