"""Replacements for parts of transformers' ``generate`` in views: caches that know where prompts end."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode

from lamella.errors import CacheError
from lamella.runtime.cache import PlanCache
from lamella.stack import own_keys


def empty_cache(view: Any, prompt_lengths: int | Tensor | None = None) -> Any:
    """Return an empty cache for a view that decides at run time, for generating without ``generate``.

    If the view is a decoder that reads an encoder, the :class:`PlanCache` is its ``self_attention_cache``, next to the
    keys of the encoder, which plans never reduce.

    Args:
        view: what :func:`apply` returned.
        prompt_lengths: see :class:`PlanCache`.
    """
    cache = PlanCache(view.config, view.lamella_plan, prompt_lengths)
    return EncoderDecoderCache(cache, DynamicCache()) if "cross" in view.lamella_policy.sublayers else cache


def own_cache(cache: Any, view: Any) -> PlanCache:
    """Return the part of a cache that holds the view's own tokens.

    Args:
        cache: a key-value cache.
        view: the view.

    Raises:
        CacheError: for a cache of another kind or of another plan.
    """
    paired = "cross" in view.lamella_policy.sublayers
    if isinstance(cache, EncoderDecoderCache) != paired or not isinstance(own_keys(cache), PlanCache):
        kind = type(cache).__name__
        expected = "a pair of a PlanCache and the encoder's keys" if paired else "a PlanCache"
        raise CacheError(f"this plan runs with {expected}, not with {kind}: omit the cache")
    own: PlanCache = own_keys(cache)
    if own.lamella_stamp != view.lamella_stamp:
        raise CacheError("this cache belongs to another plan: start from an empty one")
    return own


def generate(view: Any, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
    """Run the model's own ``generate`` with a cache that knows where the prompt ends.

    All inputs are the prompt of this call, even with a cache of an earlier call: it is emptied, and the whole
    conversation is encoded again, at the depth of prompts.

    Args:
        view: the view.
        inputs: see transformers.
        generation_config: see transformers.
        kwargs: see transformers.
    """
    config = generation_config or view.generation_config
    cache = _emptied(
        view,
        kwargs.get("cache"),
        kwargs.get("cache_implementation", config.cache_implementation),
        kwargs.get("use_cache", config.use_cache),
    )
    given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    tokens = next((each for each in given if each is not None), None)
    length = 1 if tokens is None else int(tokens.shape[1])  # without inputs, the model starts from its BOS token
    _check_prompts(length, kwargs.get("attention_mask"))
    cache.prompt_lengths = length
    return type(view).generate(view, inputs, generation_config, **{**kwargs, "cache": cache})


def prepare_cache(
    view: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *sizes: int
) -> None:
    """Create the cache inside ``generate``, after the encoder has run and the decoder's prompt is known.

    It is not created earlier because some models generate piece by piece, each with its own prompt (Whisper). The first
    call of the decoder is the prompt.

    Args:
        view: the view.
        generation_config: see transformers.
        model_kwargs: arguments of the model, to which the cache is added.
        generation_mode: see transformers.
        sizes: ignored.
    """
    config = generation_config
    if generation_mode == GenerationMode.ASSISTED_GENERATION or config.prefill_chunk_size is not None:
        raise CacheError(
            "this plan treats the first call of a decoder that reads an encoder as its prompt: omit assistant_model, "
            "prompt_lookup_num_tokens and prefill_chunk_size"
        )
    _check_prompts(1, model_kwargs.get("decoder_attention_mask"))
    model_kwargs["cache"] = _emptied(view, model_kwargs.get("cache"), config.cache_implementation, config.use_cache)


def without_cache(view: Any, seek_outputs: Any, **kwargs: Any) -> Any:
    """Postprocess Whisper's outputs without their cache, which it would split by rows.

    Args:
        view: the view.
        seek_outputs: outputs of a piece.
        kwargs: see transformers.
    """
    if not isinstance(seek_outputs, Tensor):
        seek_outputs = type(seek_outputs)(**{name: each for name, each in seek_outputs.items() if name != "cache"})
    return type(view)._postprocess_outputs(view, seek_outputs, **kwargs)


def _emptied(view: Any, cache: Any, implementation: str | None, use_cache: bool | None) -> Any:
    """Return the cache of one generation: a new one, or the given one of an earlier generation, emptied.

    The whole conversation is the prompt of a turn: the cache has holes at earlier generated tokens, so it is encoded
    again.
    """
    if implementation not in (None, "dynamic"):
        raise CacheError(
            "a plan generates with its own dynamic cache, not with "
            f"cache '{implementation}': omit it (cache_implementation in Python)"
        )
    if use_cache is False:
        raise CacheError(
            "this plan needs the cache to distinguish the prompt from generated tokens: switch it on "
            "(use_cache=True in Python)"
        )
    if cache is None:
        return empty_cache(view)
    own_cache(cache, view)
    cache.reset()
    return cache


def _check_prompts(length: int, mask: Tensor | None) -> None:
    if length == 0 or (mask is not None and not mask.bool().any(dim=-1).all()):
        raise CacheError("a prompt of this batch is empty: give every row at least one token")
