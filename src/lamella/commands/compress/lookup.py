"""Prompt lookup beside each route: lossless decoding that copies from the text, and what it gains on top.

A decoding step reads all weights, for one token or for several. Prompt lookup proposes the tokens that followed the
most recent ones when these occurred before, computes all of them in one pass, and keeps those that greedy decoding
would choose: the output is that of greedy decoding, unless two tokens are tied within the precision of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lamella.commands.compress.forms import Variant
from lamella.evaluate import DraftGain, Ratio
from lamella.evaluate.speed import denoises
from lamella.needs import now
from lamella.progress import track
from lamella.runtime import Draft
from lamella.runtime.drafting import TOKENS

TEXTS = ("humaneval", "gsm8k", "general")
PROMPT = 96  # tokens of a prompt
ANSWER = 32  # generated tokens for each prompt
LOOKUP_SECONDS = 5.0  # time limit for all routes, after the first prompt


def add_lookup(rows: Iterable[dict[str, Any]], variants: Mapping[str, Variant], prompts: Mapping[str, Tensor]) -> None:
    """Add to routes what prompt lookup gains on top of them, as ``lookup``, as far as time permits.

    Dynamic plans are left out, and so is what does not generate token by token from its own text.

    Args:
        rows: routes as in evidence, the most important first; those without a variant are left out.
        variants: what they run, by the names of routes.
        prompts: token ids [1, time] by the name of their text.
    """
    end = now() + LOOKUP_SECONDS
    for row in track([each for each in rows if each["name"] in variants], "prompt lookup"):
        form, stack, plan = variants[row["name"]]
        config = stack.model.config
        generates = not config.is_encoder_decoder and not denoises(stack.model)
        if now() > end or not row["decode_speedup"] or not generates:
            continue
        view = form.view(stack, plan)
        if hasattr(view, "lamella_policy"):
            continue
        found: dict[str, DraftGain] = {}
        for name, prompt in prompts.items():
            if found and now() > end:
                break
            found[name] = DraftGain.of(view, Draft(), prompt.to(view.device), ANSWER)
        if found:
            row["lookup"] = {
                "speedup": vars(Ratio.of([each.measured for each in found.values()])),
                "texts": list(found),
                "candidates": TOKENS,
                "equal": sum(each.equal for each in found.values()),
                "tied": sum(each.tied for each in found.values()),
            }
