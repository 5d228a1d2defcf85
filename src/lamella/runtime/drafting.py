"""Drafting: several proposed tokens are verified in one pass, which loses nothing.

A step of decoding reads all weights, whether for one token or for several. A draft proposes the next tokens: prompt
lookup copies what followed the most recent tokens when these occurred before, a smaller model with the same tokenizer
generates. The model computes all proposed tokens in one pass and keeps those that it would have chosen itself::

    proposed   the  lighthouse  was  built  in          verified in one pass
    chosen     the  lighthouse  was  old                three proposed tokens are kept, and one follows

Greedy decoding gives the same tokens as without a draft, unless two of them are tied within the precision of the
weights; samples have the same distribution (Leviathan et al. 2023, arXiv 2211.17192). The gain is the number of tokens
of a pass, divided by its cost in plain steps: a pass over more tokens, and drafting. Where the gain that is measured is
below 1, drafting ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from lamella.errors import MethodError
from lamella.formatting import counted
from lamella.needs import now

TOKENS = 8  # proposed at once by prompt lookup; a draft model ends earlier where it is unsure
PROBE, CONTEXT = 8, 64  # steps without a draft, and tokens before them, with which drafting is compared
ENOUGH = 32  # generated tokens after which drafting may end


@dataclass(frozen=True)
class Draft:
    """What proposes tokens.

    Attributes:
        name: ``lookup``, or the name of the model.
        model: a model with the tokens of the one that verifies; None for prompt lookup.
    """

    name: str = "lookup"
    model: Any = None

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of transformers' ``generate``."""
        return {"prompt_lookup_num_tokens": TOKENS} if self.model is None else {"assistant_model": self.model}


@dataclass
class Passes:
    """The passes after the prompt, as far as they are counted.

    Attributes:
        passes: their number.
        tokens: number of tokens that they gave.
        proposed: number of tokens that were proposed.
        verifying: seconds of the model.
        seconds: seconds in all.
    """

    passes: int = 0
    tokens: int = 0
    proposed: int = 0
    verifying: float = 0.0
    seconds: float = 0.0

    @property
    def accepted(self) -> float:
        """The share of proposed tokens that were kept."""
        return (self.tokens - self.passes) / self.proposed if self.proposed else 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


class Drafted:
    """A model that generates with a draft as long as this is faster.

    Args:
        model: a model or a view; its cache has to take tokens back.
        draft: what proposes tokens; None generates as usual.

    Attributes:
        is_on: whether drafting goes on.
        counted: all passes with a draft.

    Raises:
        MethodError: for a draft of a model that reads an encoder.
    """

    def __init__(self, model: Any, draft: Draft | None) -> None:
        if draft is not None and model.config.is_encoder_decoder:
            raise MethodError(f"draft: {type(model).__name__} reads an encoder, and drafts continue text: leave it out")
        self.model, self.draft = model, draft
        self.is_on = draft is not None
        self.counted = Passes()
        self._plain = 0.0  # seconds that the same tokens take without a draft
        self._steps: dict[int, float] = {}  # seconds of a plain step, by number of rows

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        found: torch.device = self.model.device
        return found

    @property
    def gain(self) -> float | None:
        """The measured speed-up of decoding; None before anything is measured."""
        return self._plain / self.counted.seconds if self.counted.seconds else None

    def __str__(self) -> str:
        """Say what the draft has gained so far, in one line; empty without a draft."""
        if self.draft is None or self.gain is None:
            return ""
        accepted = f"{self.counted.accepted:.0%} of {counted(self.counted.proposed, 'proposed token')} accepted"
        end = "" if self.is_on else ", so drafting has ended"
        return f"Draft {self.draft.name}: {accepted}, {self.gain:.2f}x the speed of decoding without it{end}."

    def generate(self, input_ids: Any, *, attention_mask: Any = None, streamer: Any = None, **settings: Any) -> Any:
        """Generate as the model does; with a draft, row by row.

        Args:
            input_ids: the prompts [batch, time], left-padded.
            attention_mask: the mask of real tokens [batch, time]; all if None.
            streamer: see transformers.
            settings: see transformers.

        Returns:
            The prompts with their continuations [batch, time + new], padded on the right.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not self.is_on or settings.get("num_beams", 1) > 1:
            return self.model.generate(input_ids=input_ids, attention_mask=mask, streamer=streamer, **settings)
        step = self._plain_step(input_ids, mask, settings)
        continued = [
            self._drafted(ids[real.bool()][None], streamer, settings) for ids, real in zip(input_ids, mask, strict=True)
        ]
        longest = max(len(row) for row in continued)
        self._plain += step * max(longest - 1, 0)
        if self.counted.tokens >= ENOUGH and self._plain < self.counted.seconds:
            self.is_on = False
        new = input_ids.new_full((len(input_ids), longest), settings.get("pad_token_id") or 0)
        for number, row in enumerate(continued):
            new[number, : len(row)] = row
        return torch.cat([input_ids, new], dim=1)

    def _drafted(self, ids: Tensor, streamer: Any, settings: dict[str, Any]) -> Tensor:
        """Continue one prompt [1, time], and count its passes; return the new tokens [new]."""
        assert self.draft is not None
        found, passes = generate_counted(self.model, ids, streamer, **settings, **self.draft.settings)
        self.counted += passes
        return found[0, ids.shape[1] :]

    def _plain_step(self, ids: Tensor, mask: Tensor, settings: dict[str, Any]) -> float:
        """Return the seconds of a step without a draft for this number of rows, measured once."""
        if len(ids) not in self._steps:
            probe: dict[str, Any] = {"min_new_tokens": PROBE, "max_new_tokens": PROBE, "do_sample": False}
            probe["pad_token_id"] = settings.get("pad_token_id")
            clock = Clock()
            self.model.generate(ids[:, -CONTEXT:], attention_mask=mask[:, -CONTEXT:], streamer=clock, **probe)
            self._steps[len(ids)] = clock.seconds / (PROBE - 1)
        return self._steps[len(ids)]


def generate_counted(model: Any, ids: Tensor, streamer: Any = None, **settings: Any) -> tuple[Tensor, Passes]:
    """Continue one prompt with transformers' ``generate``, and count the passes after that over the prompt.

    Args:
        model: a model or a view.
        ids: the prompt [1, time].
        streamer: what else receives the tokens; see transformers.
        settings: see transformers.

    Returns:
        The prompt with its continuation [1, time + new], and its passes.
    """
    clock = Clock(streamer)
    with _widths(model) as seen:
        found = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **settings)
    (_, *later) = seen
    tokens = sum(count for count, _ in clock.given[2:])
    proposed = sum(width - 1 for width, _ in later)
    return found, Passes(len(later), tokens, proposed, sum(seconds for _, seconds in later), clock.seconds)


@dataclass
class Clock(BaseStreamer):
    """Notes how many tokens every pass gives, and when.

    Attributes:
        other: another streamer that receives the tokens.
        given: the number of tokens and the time of each call: the prompt first, then each pass.
    """

    other: Any = None
    given: list[tuple[int, float]] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Note the tokens of a pass."""
        self.given.append((value.numel(), now()))
        if self.other is not None:
            self.other.put(value)

    def end(self) -> None:
        """Pass on the end of the answer."""
        if self.other is not None:
            self.other.end()

    @property
    def seconds(self) -> float:
        """The seconds from the end of the first pass to that of the last one."""
        return self.given[-1][1] - self.given[1][1]


@contextmanager
def _widths(model: Any) -> Iterator[list[tuple[int, float]]]:
    """Collect the number of tokens of each pass of a model, and its seconds."""
    seen: list[tuple[int, float]] = []
    begin = 0.0

    def before(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal begin
        begin = now()

    def after(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.append((ids.shape[1], now() - begin))

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
