"""What views put in place of parts of transformers' ``generate``: the caches, which know where prompts end."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode

from lamella.errors import CacheError
from lamella.runtime.cache import PlanCache
from lamella.stack import own_keys


def empty_cache(view: Any, prompt_lengths: int | Tensor | None = None) -> Any:
    """An empty cache for a view that decides while it runs: for a continuation by hand.

    Where the view is a decoder that reads an encoder, the :class:`PlanCache` is its ``self_attention_cache``, beside
    the keys of the encoder, which no plan thins out.

    Args:
        view: what :func:`apply` returned.
        prompt_lengths: see :class:`PlanCache`.
    """
    cache = PlanCache(view.config, view.lamella_plan, prompt_lengths)
    return EncoderDecoderCache(cache, DynamicCache()) if "cross" in view.lamella_policy.sublayers else cache


def own_cache(cache: Any, view: Any) -> PlanCache:
    """What a cache of this view holds of its own tokens.

    Raises:
        CacheError: for a cache of another kind or of another plan.
    """
    paired = "cross" in view.lamella_policy.sublayers
    if isinstance(cache, EncoderDecoderCache) != paired or not isinstance(own_keys(cache), PlanCache):
        kind = type(cache).__name__
        wanted = "a pair of a PlanCache and the encoder's keys" if paired else "a PlanCache"
        raise CacheError(f"this plan runs with {wanted}, not with {kind}: leave the cache out")
    own: PlanCache = own_keys(cache)
    if own.lamella_stamp != view.lamella_stamp:
        raise CacheError("this cache belongs to another plan: start from an empty one")
    return own


def generate(view: Any, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
    """The model's own ``generate`` with a cache that knows where the prompt ends.

    All that is given is the prompt of this call, also when a cache of an earlier one comes with it: that is emptied,
    and the whole conversation encoded anew, at the depth of prompts.
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
    length = 1 if tokens is None else int(tokens.shape[1])  # without inputs, the model starts from its begin token
    _check_prompts(length, kwargs.get("attention_mask"))
    cache.prompt_lengths = length
    return type(view).generate(view, inputs, generation_config, **{**kwargs, "cache": cache})


def prepare_cache(
    view: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *sizes: int
) -> None:
    """In place of what makes a cache inside ``generate``, once the encoder has run and the decoder's prompt is known.

    Here and not before, because some models generate piece by piece, each with a prompt of its own (Whisper). The
    first call of the decoder is the prompt.
    """
    config = generation_config
    if generation_mode == GenerationMode.ASSISTED_GENERATION or config.prefill_chunk_size is not None:
        raise CacheError(
            "this plan takes the first call of a decoder that reads an encoder for its prompt: leave assistant_model, "
            "prompt_lookup_num_tokens and prefill_chunk_size out"
        )
    _check_prompts(1, model_kwargs.get("decoder_attention_mask"))
    model_kwargs["cache"] = _emptied(view, model_kwargs.get("cache"), config.cache_implementation, config.use_cache)


def without_cache(view: Any, seek_outputs: Any, **kwargs: Any) -> Any:
    """What Whisper makes of a piece's output, which it splits by rows: the cache too, if every slot holds all rows."""
    if not isinstance(seek_outputs, Tensor):
        seek_outputs = type(seek_outputs)(**{name: each for name, each in seek_outputs.items() if name != "cache"})
    return type(view)._postprocess_outputs(view, seek_outputs, **kwargs)


def _emptied(view: Any, cache: Any, implementation: str | None, use_cache: bool | None) -> Any:
    """The cache of one generation: a new one, or the given one of an earlier generation, with nothing in it.

    The whole conversation is the prompt of a turn: earlier generated tokens have holes, so it is encoded afresh.
    """
    if implementation not in (None, "dynamic"):
        raise CacheError(
            "a plan generates with its own dynamic cache, not with "
            f"cache '{implementation}': leave it out (cache_implementation in Python)"
        )
    if use_cache is False:
        raise CacheError(
            "this plan needs the cache to tell the prompt from generated tokens: do not leave it off, switch it on "
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
