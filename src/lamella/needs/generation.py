"""Generation on tensors without values: a pass over the prompt, and one step in place of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import BaseStreamer

from lamella.needs.tensors import empty

DEFAULT_TOKENS = 20  # of transformers, where nothing says how many


def record_generation(
    recorder: Any, model: Any, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
) -> Tensor:
    """Record what ``generate`` of transformers needs where no row ends early.

    Args:
        recorder: what counts.
        model: the model.
        inputs: see transformers.
        generation_config: see transformers.
        kwargs: see transformers.

    Returns:
        The prompts with their continuations, whose tokens are 0 [batch, time + new]; of an encoder-decoder, the
        continuations alone.
    """
    given: dict[str, Any] = {name: each for name, each in kwargs.items() if isinstance(each, Tensor)}
    if inputs is not None:
        given["input_ids"] = inputs
    embeds = given.get("inputs_embeds")
    shape = (1, 1) if embeds is None else embeds.shape[:2]
    ids = given.get("input_ids", torch.zeros(shape, dtype=torch.long))
    config = generation_config or model.generation_config
    count = kwargs.get("max_new_tokens") or config.max_new_tokens
    longest = kwargs.get("max_length") or config.max_length
    count = count or max(1, longest - ids.shape[1] if longest else DEFAULT_TOKENS)
    encodes = model.config.is_encoder_decoder
    start = torch.zeros(len(ids), 1, dtype=torch.long)
    own = {"cache": kwargs["cache"]} if kwargs.get("cache") is not None else {}
    if encodes:
        given["decoder_input_ids"] = start
    elif model._supports_logits_to_keep():
        given["logits_to_keep"] = 1
    streamer = kwargs.get("streamer") or _Ignored()
    streamer.put(ids)
    out = model(**given, **own, use_cache=True)
    new = torch.zeros(len(ids), count, dtype=torch.long)
    streamer.put(new[:, :1])
    step: dict[str, Any] = {"cache": out.cache, "use_cache": True}
    if encodes:
        step |= {"decoder_input_ids": start, "encoder_outputs": (out.encoder_last_hidden_state,)}
    else:
        mask = given.get("attention_mask", torch.ones_like(ids))
        step |= {"input_ids": start, "attention_mask": torch.cat([mask, mask[:, :1]], dim=1)}
    grown = grow(out.cache, count - 2)
    if count > 1:
        with recorder.times(count - 1):
            model(**step)
    del grown
    streamer.put(new[:, 1:])
    streamer.end()
    return torch.cat([start if encodes else ids[:, :0] if embeds is not None else ids, new], dim=1)


class _Ignored(BaseStreamer):
    """Receives tokens for nobody."""

    def put(self, value: Tensor) -> None:
        pass

    def end(self) -> None:
        pass


def grow(cache: Any, tokens: int) -> list[Tensor]:
    """Return tensors as large as what a cache adds for further tokens.

    Args:
        cache: a cache of transformers.
        tokens: their number.
    """
    own = getattr(cache, "self_attention_cache", cache)
    held = [
        each
        for layer in getattr(own, "layers", [])
        for each in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(each, Tensor) and each.dim() > 2
    ]
    return [empty((*each.shape[:-2], max(0, tokens), each.shape[-1]), each.dtype) for each in held]
