"""Views that decide at run time, within transformers' unmodified ``generate``.

Each such view has two executions that yield the same logits: *step*, where a :class:`PlanCache` knows which tokens are
prompt, and *parallel*, where the prompts' lengths are passed with whole sequences (teacher-forced, differentiable, no
cache). A view of a model that predicts masked tokens is run by :mod:`lamella.runtime.denoising`, which passes the step
to its policy.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamella.errors import PlanError
from lamella.plan import Plan, alter, apply_static, apply_structure, refuse_saving
from lamella.registry import submodule
from lamella.runtime.cache import Phase, PlanCache
from lamella.runtime.denoising import Denoising
from lamella.runtime.generation import empty_cache, generate, own_cache, prepare_cache, without_cache
from lamella.runtime.layer_call import LayerCall, Pass
from lamella.runtime.paths import PathPolicy
from lamella.runtime.policy import Policy, open_policy, pieces, policies
from lamella.runtime.trace import Trace
from lamella.stack import Architecture, Blocks, Model, Stack, open_model, replace_forward, share

MASKABLE = ("sdpa", "eager")
PHASES: tuple[Literal["prefill", "decode"], ...] = ("decode", "prefill")


def apply(model: Model | Blocks, plan: Plan) -> Any:
    """Return a view of the model with ``plan`` applied.

    The view shares every unchanged tensor with the original, and owns its modules, config and cache. It is a
    transformers model: ``generate`` works with batches, left padding, sampling, beams and streaming. One stack of a
    model may decide at run time, or a decoder and the encoder that it reads.

    Args:
        model: the opened model, or the blocks of a model that is not a chain of layers; it is not changed.
        plan: a plan for it.

    Raises:
        PlanError: if the plan is for another model, or cannot be applied.
    """
    if isinstance(model, Blocks):
        plan.check_fits(model)
        return model.without(plan.drop)
    if plan.is_static:
        return apply_static(model, plan)
    plan.check_fits(model)
    deciding = [name for name in plan.model.stacks if not plan.chain(name).is_static]
    altered = alter(model, plan)
    others = [name for name in plan.model.stacks if name not in deciding]
    if others:
        altered = open_model(apply_structure(altered, plan, others), name=model.name)
    for name in deciding:
        if plan.modules_of(name):
            raise PlanError(f"modules: the {name} decides at run time; put networks into a separate plan")
    return with_policies(altered, plan, {name: _policy_of(altered.stacks[name], plan) for name in deciding})


def _policy_of(stack: Stack, plan: Plan) -> Policy:
    reference = plan.policies.get(stack.stack)
    if reference is None:
        return PathPolicy(stack, plan)
    known = policies(submodule(reference.name, "policy"))
    if len(known) > 1:  # one for the encoder, one for the decoder
        known = [each for each in known if each.encodes == encodes(stack)]
    if len(known) != 1:
        raise PlanError(f"policy: {reference.name} is a method without a policy; `lamella methods` lists all methods")
    return open_policy(known[0], stack, reference)


def encodes(stack: Stack) -> bool:
    """Return whether a stack is an encoder: bidirectional, and without predictions for its tokens."""
    return not stack.architecture.causal and not stack.architecture.denoises


def with_policy(stack: Stack, plan: Plan, policy: Policy) -> Any:
    """Return a view that runs ``policy``, as its module ``lamella_policy``; for training, see :func:`apply`.

    Args:
        stack: the stack.
        plan: the plan.
        policy: the policy.
    """
    return with_policies(stack, plan, {stack.stack: policy})


def with_policies(model: Model, plan: Plan, policies: Mapping[str, Policy]) -> Any:
    """Return a view whose stacks run these policies, by name: those of an encoder and of the decoder that reads it.

    If there are several, the last one is the module ``lamella_policy``, and the others ``lamella_policy_STACK``.

    Args:
        model: the model.
        plan: the plan.
        policies: policies by stack.

    Raises:
        PlanError: if a policy cannot decide for its stack.
    """
    stacks = [model.stacks[name] for name in policies]
    if len(stacks) > 1 and [encodes(each) for each in stacks] != [True, False]:
        raise PlanError(
            f"{' and '.join(policies)} both decide at run time; one stack can, or a decoder and its encoder"
        )
    for stack, policy in zip(stacks, policies.values(), strict=True):
        _check_decides(stack, policy)
    view = share(model.model)
    view.lamella_plan, view.lamella_stamp = (
        plan,
        plan.digest,
    )  # computed once, since it takes longer than a layer of a small model
    for stack, policy in zip(stacks, policies.values(), strict=True):
        setattr(view, "lamella_policy" if stack is stacks[-1] else f"lamella_policy_{stack.stack}", policy)
        _decide(view, stack, policy)
    if all(map(encodes, stacks)):
        pass  # generation is the model's own
    elif "cross" in stacks[-1].architecture.names:
        view._prepare_cache_for_generation = MethodType(prepare_cache, view)
        if hasattr(view, "_postprocess_outputs"):
            view._postprocess_outputs = MethodType(without_cache, view)
    else:
        view.generate = MethodType(generate, view)
    return refuse_saving(view)


def _check_decides(stack: Stack, policy: Policy) -> None:
    """Check that a policy can decide for a stack.

    Raises:
        PlanError: one line with the reason if it cannot.
    """
    kind = getattr(stack.config, "_attn_implementation", "eager")
    reads_encoder = "cross" in stack.architecture.names
    if reads_encoder and not policy.crosses:
        raise PlanError(
            f"the {stack.stack} of {stack.name} reads an encoder, which this policy does not support: use a path"
        )
    if stack.architecture.denoises:
        if not policy.denoises:
            raise PlanError(
                f"{stack.name} predicts masked tokens, whose layers see prompt and answer at once: this plan is "
                "for models that predict the next token"
            )
    elif encodes(stack) and not policy.encodes:
        raise PlanError(
            f"{stack.name} does not generate, so its tokens have no phases; use a plan without path or policy"
        )
    if (policy.sparse or policy.encodes) and kind not in MASKABLE:
        raise PlanError(
            f"this plan needs masks that '{kind}' attention does not support: open the model with sdpa "
            "(attn_implementation='sdpa' in Python)"
        )
    if policy.sparse and stack.architecture.images and _looks_ahead(stack):
        raise PlanError(
            f"{stack.name} lets image tokens see later tokens, but layers that hold some tokens process them in "
            "order: use a plan that runs all tokens in every layer"
        )


def _decide(view: Any, stack: Stack, policy: Policy) -> None:
    """Make the layers of one stack of a view call a policy."""
    plan, base = view.lamella_plan, view.get_submodule(stack.architecture.base)
    chain = plan.chain(stack.stack)
    runs = {layer: stack.architecture.names for layer in range(len(stack))}
    runs |= {run.layer: run.sublayers for phase in PHASES for run in chain.runs(phase)}
    for index, layer in enumerate(base.get_submodule(stack.architecture.layers)):
        replace_forward(layer, _PolicyLayer(policy, stack.architecture, index, runs[index]))
    base.__dict__["lamella_policy"] = policy  # a second name, not a second child
    base.lamella_plan, base.lamella_stamp = plan, view.lamella_stamp
    base.lamella_stack, base.lamella_trace = stack.stack, None
    base.forward = MethodType(_encoded if encodes(stack) else _forward, base)
    if stack.architecture.images:
        hook = _ImagePositions(base, getattr(view.config, stack.architecture.images))
        front = view.get_submodule(stack.architecture.front or "")
        front.register_forward_pre_hook(hook, with_kwargs=True)
        if encodes(stack):  # generate runs the encoder itself, on embedded ids and images
            view._maybe_prepare_encoder_kwargs_for_generation = MethodType(hook.before_generation, view)


def _looks_ahead(stack: Stack) -> bool:
    """Return whether image tokens see all of their image, as in Gemma 3: such models receive the type of each token."""
    front: Any = stack.model.get_submodule(stack.architecture.front or "")
    return "token_type_ids" in inspect.signature(type(front).forward).parameters


def parallel(
    view: Any,
    input_ids: Tensor | Mapping[str, Tensor],
    prompt_lengths: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    """Run a view over whole sequences at once, with the result that generation would have token by token.

    Args:
        view: what :func:`apply` returned, for any plan.
        input_ids: prompts with their continuations [batch, time], or all inputs of the model by name; for a decoder
            that reads an encoder, the sequences are its ``decoder_input_ids``.
        prompt_lengths: number of columns of each row's prompt, including its left padding [batch].
        attention_mask: False at padding [batch, time].
        options: other arguments of the view.
    """
    given: dict[str, Any] = {"input_ids": input_ids} if isinstance(input_ids, Tensor) else dict(input_ids)
    if attention_mask is not None:
        given["attention_mask"] = attention_mask
    return view(**given, **options, **phase_options(view, prompt_lengths), use_cache=False)


def phase_options(view: Any, prompt_lengths: Tensor) -> dict[str, Any]:
    """Return the additional arguments of a forward of ``view`` without cache; empty for a static plan.

    Args:
        view: the view.
        prompt_lengths: number of columns of each row's prompt [batch].
    """
    plan = getattr(view, "lamella_plan", None)
    return {} if plan is None or plan.is_static else {"prompt_lengths": prompt_lengths}


def traced(view: Any, stack: str | None = None) -> Trace:
    """Start recording a view; see :class:`Trace`.

    Args:
        view: what :func:`apply` returned.
        stack: which stack, if several decide; the last one if None.

    Raises:
        PlanError: for a view without run-time decisions.
    """
    base = _deciding(view, stack)
    base.lamella_trace = Trace(base.lamella_policy.layers, base.lamella_policy.sublayers)
    return base.lamella_trace


def untraced(view: Any, stack: str | None = None) -> None:
    """Stop recording a view's run-time decisions.

    Args:
        view: the view.
        stack: name of the stack, for a view with several; if None, that of the view's policy.
    """
    _deciding(view, stack).lamella_trace = None


def _deciding(view: Any, stack: str | None) -> Any:
    """Return the module of a view whose forward calls a policy."""
    found = [module for module in view.modules() if "lamella_trace" in module.__dict__]
    found = [each for each in found if stack in (None, each.lamella_stack)]
    if not found:
        raise PlanError(
            "this plan makes no decisions at run time, so there is nothing to trace: look at the plan itself"
        )
    return next((each for each in found if each.lamella_policy is view.lamella_policy), found[-1])


class _PolicyLayer:
    """The forward of one layer of a view, which calls its policy."""

    def __init__(self, policy: Policy, architecture: Architecture, index: int, runs: tuple[str, ...]) -> None:
        self.policy, self.architecture, self.index, self.runs = policy, architecture, index, runs

    def __call__(self, module: nn.Module, h: Tensor, given: dict[str, Any]) -> Any:
        run: Pass = given.pop("lamella_pass")
        complete_call, result = self.architecture.complete_call, self.architecture.result
        given = given if complete_call is None else complete_call(module, h, given)
        out = self.policy.layer(LayerCall(self.index, module, self.architecture, given, run, self.runs), h, run)
        return out if result is None else result(out, given)


@dataclass(frozen=True)
class _ImagePositions:
    """Passes the image positions of a call to the base model, which does not receive token ids if there are images.

    It is a hook instead of an argument, since other arguments of a model may be passed on to its vision tower.
    """

    base: Any
    token: int

    def __call__(self, front: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.base.__dict__["lamella_images"] = None if ids is None else ids == self.token

    def before_generation(self, view: Any, inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own encoding of the inputs of ``generate``."""
        self.base.__dict__["lamella_images"] = inputs == self.token if inputs.ndim == 2 else None
        return type(view)._maybe_prepare_encoder_kwargs_for_generation(view, inputs, *args, **kwargs)


def _encoded(base: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of an encoder, all of whose tokens are prompt."""
    names = ("input_ids", "attention_mask")
    kwargs |= {name: value for name, value in zip(names, args, strict=False) if value is not None}
    kwargs.pop("prompt_lengths", None)  # an argument of the decoder
    kwargs["lamella_images"] = base.__dict__.pop("lamella_images", None)
    ids = kwargs.get("input_ids")
    time = (ids if ids is not None else kwargs["inputs_embeds"]).shape[1]
    return _run(base, Phase.of(0, time, time), None, kwargs)


def _forward(base: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the base model's forward, where the cache or ``prompt_lengths`` determines which tokens are prompt."""
    names = ("input_ids", "attention_mask", "position_ids")
    kwargs |= {name: value for name, value in zip(names, args, strict=False) if value is not None}
    lengths, cache, policy = kwargs.pop("prompt_lengths", None), kwargs.get("cache"), base.lamella_policy
    kwargs["lamella_images"] = base.__dict__.pop("lamella_images", None)
    denoising: Denoising | None = kwargs.pop("denoising", None)
    if denoising is not None:
        return _run(base, denoising.phase, None, kwargs, denoising)
    ids = kwargs.get("input_ids")
    tokens = ids if ids is not None else kwargs["inputs_embeds"]
    if lengths is not None or (cache is None and not _uses_cache(base, kwargs)):
        phase = Phase.of(0, tokens.shape[1], tokens.shape[1] if lengths is None else lengths)
        return _run(base, phase, None, kwargs)
    if cache is None:
        cache = kwargs["cache"] = empty_cache(base)
    cache = own_cache(cache, base)
    if cache.seen == 0:
        cache.batch = tokens.shape[0]
        cache.clocked = policy.takes == "token"
        for slot in policy.sparse:
            cache.make_sparse(slot, tokens.device)
    phase = cache.phase(tokens.shape[1])
    parts = pieces(policy, phase, cache)
    outputs = [_run(base, part, cache, given) for part, given in (_cut(phase, kwargs, each) for each in parts)]
    if len(outputs) > 1:
        outputs[-1].last_hidden_state = torch.cat([out.last_hidden_state for out in outputs], dim=1)
    return outputs[-1]


def _cut(phase: Phase, kwargs: dict[str, Any], part: tuple[int, int]) -> tuple[Phase, dict[str, Any]]:
    """Return the phase and the arguments of a part of a call."""
    begin, end = part
    start = phase.start + begin
    if (begin, end) != (0, phase.end - phase.start):
        kwargs = dict(kwargs)
        for name in ("input_ids", "inputs_embeds", "lamella_images"):
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][:, begin:end]
        if kwargs.get("position_ids") is not None:  # [axes, batch, time] for models with several position axes
            kwargs["position_ids"] = kwargs["position_ids"][..., begin:end]
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = kwargs["attention_mask"][:, : start + end - begin]
    return Phase(start, start + end - begin, phase.lengths, phase.shortest, phase.longest), kwargs


def _run(
    base: Any, phase: Phase, cache: PlanCache | None, kwargs: dict[str, Any], denoising: Denoising | None = None
) -> Any:
    """Run one pass."""
    mask = kwargs.get("attention_mask") if denoising is None else denoising.real
    padding = None if mask is None or mask.ndim != 2 or bool(mask.all()) else ~mask.bool()
    device = next(base.parameters()).device
    images = kwargs.pop("lamella_images")
    ids = kwargs.get("input_ids")
    batch = (ids if ids is not None else kwargs["inputs_embeds"]).shape[0]
    run = Pass(phase, padding, cache, device, batch, trace=base.lamella_trace, images=images, denoising=denoising)
    if run.trace is not None:
        run.trace.begin(batch, phase.end - phase.start, phase.response(device))
    base.lamella_policy.begin(run)
    output = type(base).forward(base, **kwargs, lamella_pass=run)
    base.lamella_policy.end(run)
    if cache is not None:
        cache.seen = phase.end
    return output


def _uses_cache(base: Any, kwargs: dict[str, Any]) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(base.config.use_cache if use_cache is None else use_cache)
