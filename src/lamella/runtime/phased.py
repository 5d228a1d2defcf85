"""Plans that treat prompt and generated tokens differently, inside an unforked ``generate``.

Each such view has two executions that give the same logits: *step*, where a :class:`PlanCache` knows which tokens are
prompt, and *parallel*, where a mask over whole sequences says so (teacher-forced, differentiable, no cache).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lamella.errors import CacheError, PlanError
from lamella.plan import Plan, Run, apply_static
from lamella.runtime.cache import Phase, PlanCache
from lamella.stack import PartialLayer, Stack, hold, replace_forward, share


def apply(stack: Stack, plan: Plan) -> Any:
    """A view of the model with ``plan`` applied.

    The view shares every tensor with the original and owns its modules, config and cache. It is a transformers model:
    ``generate`` works with batches, left padding, sampling, beams and streaming.

    Args:
        stack: the opened model; it is not changed.
        plan: a plan for it.

    Raises:
        PlanError: when the plan is for another model, or its generated tokens run layers that its prompt does not.
    """
    if plan.is_static:
        return apply_static(stack, plan)
    plan.check_fits(stack)
    prefill, decode = plan.runs("prefill"), plan.runs("decode")
    order = [run.layer for run in decode]
    if not plan.in_order or order != sorted(set(order)) or not set(decode) <= set(prefill):
        raise PlanError(
            "path: generated tokens can only run a part of the prompt's layers, in order; change path.decode"
        )
    view = share(stack.model)
    family = stack.family
    base: Any = view.get_submodule(family.base)
    ran = {run.layer: run for run in prefill}
    for index, layer in enumerate(base.get_submodule(family.layers)):
        run = ran.get(index, Run(index, attn=False, mlp=False))
        partial = PartialLayer(family.attn if run.attn else None, family.mlp if run.mlp else None, index, family.cache)
        replace_forward(layer, PhasedLayer(partial, in_decode=index in order or index not in ran))
    view.lamella_plan = base.lamella_plan = plan
    base.forward = MethodType(_forward, base)
    view.generate = MethodType(_generate, view)
    return view


def parallel(
    view: Any, input_ids: Tensor, prompt_lengths: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> Any:
    """Run a view over whole sequences at once, as generation would have run them token by token.

    Args:
        view: what :func:`apply` returned, for any plan.
        input_ids: prompts with their continuations [batch, time].
        prompt_lengths: columns of each row's prompt, its left padding included [batch].
        attention_mask: False at padding [batch, time].
        options: passed on to the model.

    Returns:
        The model's output; the logits at the last prompt column come from the full-depth prompt.
    """
    options |= phase_options(view, input_ids, prompt_lengths)
    return view(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options)


def phase_options(view: Any, input_ids: Tensor, prompt_lengths: Tensor) -> dict[str, Any]:
    """What a forward of ``view`` without cache must be told of these prompts; nothing where all tokens are alike."""
    plan = getattr(view, "lamella_plan", None)
    if plan is None or plan.is_static:
        return {}
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return {"phase": Phase.of(columns >= prompt_lengths.to(input_ids.device).reshape(-1, 1))}


@dataclass(frozen=True)
class PhasedLayer:
    """The forward of a layer that prompt tokens run through and generated tokens may not.

    Attributes:
        layer: what prompt tokens run.
        in_decode: whether generated tokens run it too.
    """

    layer: PartialLayer
    in_decode: bool

    def __call__(self, module: nn.Module, h: Tensor, call: dict[str, Any]) -> Tensor:
        phase: Phase | None = call.pop("phase", None)
        cache = call.get(self.layer.cache)
        if phase is None or self.in_decode or not phase.any_response:
            out = self.layer(module, h, call)
        elif not phase.any_prompt:
            out = h
            if cache is not None:
                hold(cache, self.layer.slot, tokens=h.shape[1])
        else:
            # Both phases in one call: each token takes its own phase's result. Exact, since causality hides generated
            # tokens from prompt tokens, and no generated token reads this layer's keys.
            assert phase.response is not None
            out = torch.where(phase.response.unsqueeze(-1), h, self.layer(module, h, call))
        if isinstance(cache, PlanCache) and phase is not None and phase.prompt_done and not self.in_decode:
            cache.free(self.layer.slot)
        return out


def _forward(base: Any, *args: Any, **kwargs: Any) -> Any:
    """The base model's forward, told by its cache which tokens are prompt."""
    if kwargs.get("phase") is None:
        cache, use_cache = kwargs.get("cache"), kwargs.get("use_cache")
        if cache is None and (base.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["cache"] = PlanCache(base.config, base.lamella_plan)
        if cache is not None:
            _check(cache, base.lamella_plan)
            kwargs["phase"] = cache.phase(_columns(args, kwargs))
    return type(base).forward(base, *args, **kwargs)


def _generate(view: Any, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
    """The model's own ``generate`` with a cache that knows where the prompt ends."""
    config = generation_config or view.generation_config
    kind = kwargs.get("cache_implementation", config.cache_implementation)
    if kind not in (None, "dynamic"):
        raise CacheError(
            f"a plan generates with its own dynamic cache, not with cache_implementation='{kind}': leave it out"
        )
    if kwargs.get("use_cache", config.use_cache) is False:
        raise CacheError(
            "this plan needs the cache to tell the prompt from generated tokens: leave use_cache=False out"
        )
    cache = kwargs.get("cache")
    if cache is None:
        cache = PlanCache(view.config, view.lamella_plan)
    _check(cache, view.lamella_plan)
    # The whole conversation is the prompt of this turn. Earlier generated tokens have holes, so it is encoded afresh.
    cache.reset()
    cache.prompt_lengths = _columns((inputs,) if inputs is not None else (), kwargs)
    return type(view).generate(view, inputs, generation_config, **{**kwargs, "cache": cache})


def _columns(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tokens = next(t for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
    return int(tokens.shape[1])


def _check(cache: Any, plan: Plan) -> None:
    if not isinstance(cache, PlanCache):
        raise CacheError(f"this plan runs with a PlanCache, not with {type(cache).__name__}: leave the cache out")
    if cache.lamella_stamp != plan.digest:
        raise CacheError("this cache belongs to another plan: start from an empty one")
