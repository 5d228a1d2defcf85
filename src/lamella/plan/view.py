"""Views: a model with a plan applied, which shares the original's tensors and owns everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, StaticCache

from lamella.errors import CacheError, ExportError, PlanError
from lamella.plan.adapters import with_adapters
from lamella.plan.chain import Chain, Run
from lamella.plan.config import common_sizes, cut_vocabulary_of, reindex, resize
from lamella.plan.entries import ModuleReference
from lamella.plan.modules import insert_modules
from lamella.plan.rewriting import with_rewrite
from lamella.plan.schema import Plan
from lamella.plan.weights import with_edits
from lamella.plan.width import cut_model, cut_vocabulary, reorder
from lamella.stack import (
    Architecture,
    Model,
    PartialLayer,
    Position,
    Stack,
    counts_tokens,
    open_model,
    own_keys,
    replace_forward,
    share,
)

LEAVE_OUT = "omit cache_implementation"
MOVABLE = ("text",)  # stacks of models with several stacks whose layers can be repeated and moved
Networks = Mapping[tuple[Position, ...], ModuleReference]


def claim(cache: Any, stamp: str, slot: int, attn: bool = True) -> None:
    """Mark an empty cache as this plan's, and refuse one that another plan (or the whole model) has filled.

    Args:
        cache: a key-value cache.
        stamp: digest of the plan.
        slot: cache slot of the layer.
        attn: whether the plan runs the attention of that slot.

    Raises:
        CacheError: for a cache that was filled without this plan, or whose type does not work with plans.
    """
    cache = own_keys(cache)
    if not isinstance(cache, DynamicCache | StaticCache):
        kind = type(cache).__name__
        raise CacheError(f"a plan runs with a dynamic or a static cache, not with {kind}: {LEAVE_OUT}")
    if cache.offloading:
        raise CacheError(f"a plan leaves slots of the cache empty, which an offloaded one cannot move: {LEAVE_OUT}")
    if not attn and counts_tokens(cache, slot):
        raise CacheError(
            f"this plan removes the attention of layer {slot}, in which a static cache counts tokens: {LEAVE_OUT}, or "
            "export whole layers and open the result"
        )
    owner = getattr(cache, "lamella_stamp", None)
    if owner is None and cache.get_seq_length(slot) == 0:
        cache.lamella_stamp = stamp  # type: ignore[union-attr]
    elif owner != stamp:
        raise CacheError("this cache was filled without this plan, so its keys do not fit: start from an empty cache")


def refuse_saving(view: Any) -> Any:
    """Make ``save_pretrained`` and ``push_to_hub`` of a view raise.

    They would write the original model, or a config that does not fit the weights.

    Args:
        view: the view, which is changed and returned.

    Raises:
        ExportError: when one of these methods is called later.
    """

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ExportError(
            "this model is a view with a plan, which a plain checkpoint cannot express: export the model that the "
            "plan was applied to, with the plan (lamella.export(stack, view.lamella_plan, folder) in Python)"
        )

    for name in ("save_pretrained", "push_to_hub"):
        setattr(view, name, MethodType(refuse, view))
    return view


@dataclass(frozen=True)
class StampedLayer:
    """The forward of a changed layer, whose cache may be used with this plan only.

    Attributes:
        forward: the layer's new forward.
        stamp: digest of the plan.
        cache: keyword under which the layer receives the cache.
        slot: cache slot of the layer.
        attends: whether the layer's own attention runs.
    """

    forward: Callable[..., Any]
    stamp: str
    cache: str
    slot: int
    attends: bool

    def __call__(self, layer: nn.Module, h: Tensor, call: dict[str, Any]) -> Any:
        """Claim the cache for the plan, and run the layer."""
        cache = call.get(self.cache)
        if cache is not None:
            claim(cache, self.stamp, self.slot, self.attends)
        return self.forward(layer, h, call)


def _leave(layer: nn.Module, architecture: Architecture, run: Run, slot: int, stamp: str) -> None:
    """Let a layer run only some of its sublayers."""
    functions = {each.name: each.run if each.name in run.sublayers else None for each in architecture.sublayers}
    partial = PartialLayer(functions, slot, architecture.cache, architecture.complete_call, architecture.result)
    _stamp(layer, partial, architecture, slot, "attn" in run.sublayers, stamp)


def _stamp(
    layer: nn.Module, forward: Callable[..., Any], architecture: Architecture, slot: int, attends: bool, stamp: str
) -> None:
    replace_forward(layer, StampedLayer(forward, stamp, architecture.cache, slot, attends))


def alter(model: Model, plan: Plan) -> Model:
    """Apply a plan's weights, widths, adapters and rewriting to a model; returns the same model if the plan has none.

    Changed tensors are new, all others are shared. The config gets the new sizes if it can express them; otherwise it
    stays unchanged, and the model has the sizes as ``lamella_counts``.

    Args:
        model: the model, which is not changed.
        plan: a plan for the model.
    """
    return with_rewrite(with_adapters(_narrowed(with_edits(model, plan), plan), model, plan), plan.rewrite)


def _narrowed(model: Model, plan: Plan) -> Model:
    """Return the model with the widths of a plan."""
    if not plan.width:
        return model
    stack = model.stacks[plan.model.default]
    view, widths = share(model.model), plan.widths
    base: Any = view.get_submodule(stack.architecture.base)
    configs = {id(config): config for config in (view.config, base.config)}
    if widths.cuts_layers:
        _narrow_layers(view, base, configs.values(), stack, plan)
    if widths.vocab is not None:
        cut_vocabulary(view, widths.vocab)
        for config in (*configs.values(), getattr(view, "generation_config", None)):
            if config is not None:
                cut_vocabulary_of(config, widths.vocab)
        for module in (view, base):
            if hasattr(module, "vocab_size"):  # some losses read it there
                module.vocab_size = len(widths.vocab)
    return open_model(view, name=model.name)


def _narrow_layers(view: Any, base: Any, configs: Iterable[Any], stack: Stack, plan: Plan) -> None:
    """Cut everything but the vocabulary of a copy of a model, and set the sizes in its configs."""
    architecture, widths = stack.architecture, plan.widths
    cut_model(view, base.get_submodule(architecture.layers), architecture.wiring, widths)
    try:
        sizes = common_sizes(plan)
    except PlanError:
        view.lamella_counts = widths.counts()
    else:
        eps = stack.config.hidden_size / sizes.hidden if widths.rescale else 1.0
        resize(configs, architecture, sizes, eps)


def alter_stack(stack: Stack, plan: Plan) -> Stack:
    """Apply :func:`alter` to the model of a stack, and return that stack of the result.

    Args:
        stack: the stack.
        plan: a plan for its model.
    """
    altered = alter(stack, plan)
    return altered if isinstance(altered, Stack) else altered.stacks[stack.stack]


def apply_static(model: Model, plan: Plan) -> Any:
    """Return a view of the model in which ``plan`` applies to every token.

    The view shares every unchanged tensor with the original and owns its modules and config, so nothing that is done to
    it (or to another view) affects the original. If the plan only removes sublayers, layers keep their indices and
    names, so adapters and output capture work as before; repeats and moves create a new list of layers.

    Args:
        model: the model.
        plan: a static plan for it.

    Raises:
        PlanError: if the plan is for another model, or treats prompt and generated tokens differently.
    """
    plan.check_fits(model)
    if not plan.is_static:
        raise PlanError("this plan treats prompt and generated tokens differently: apply it with lamella.apply")
    return refuse_saving(apply_structure(alter(model, plan), plan, plan.model.stacks))


def apply_structure(model: Model, plan: Plan, stacks: Iterable[str]) -> Any:
    """Return a view in which some stacks run as a plan specifies for every token.

    Args:
        model: the model with the plan's weights and widths applied.
        plan: the plan.
        stacks: names of these stacks.

    Raises:
        PlanError: for a path through a stack whose layers cannot be moved.
    """
    view = share(model.model)
    dropped = {}
    for name in stacks:
        stack, chain, modules = model.stacks[name], plan.chain(name), plan.modules_of(name)
        base = view.get_submodule(stack.architecture.base)
        if chain.in_order:
            _leave_out(base, stack, chain, modules, plan.digest, stamped=bool(plan.adapters))
            dropped[name] = chain.skipped
        elif name not in MOVABLE and len(model.stacks) > 1:
            raise PlanError(f"path.{name}: the layers of this {name} run once and in their order: drop some instead")
        else:
            _lay_out(base, stack, chain.runs("prefill"), plan.digest)
    view.lamella_dropped = dropped
    view.lamella_plan = plan
    return view


def can_stand_alone(stack: Stack, plan: Plan) -> bool:
    """Return whether a plan yields an ordinary model: whole layers, the same for all tokens, in a model with one stack.

    Args:
        stack: the stack.
        plan: a plan for its model.
    """
    if len(stack.architectures) > 1 or not plan.is_static or plan.modules or plan.adapters or plan.rewrite:
        return False
    return all(run.sublayers == stack.architecture.names for run in plan.runs("prefill"))


def materialise(stack: Stack, plan: Plan) -> Stack:
    """Return the model of a static plan with its own modules and config; unchanged tensors are shared.

    Unlike a view it has no trace of what was removed, so it can be trained, planned for and exported like any other
    model.

    Args:
        stack: the stack.
        plan: a static plan that keeps whole layers.

    Raises:
        PlanError: if the plan is for another model, removes single sublayers, or treats tokens differently.
    """
    plan.check_fits(stack)
    runs = plan.runs("prefill")
    if len(stack.architectures) > 1:
        raise PlanError(f"{stack.name} has several stacks: use lamella.apply for a view")
    if not can_stand_alone(stack, plan):
        raise PlanError("a model of its own keeps whole layers, the same for all tokens: use lamella.apply for a view")
    altered = alter_stack(stack, plan)
    model = share(altered.model)
    _lay_out(model.get_submodule(stack.architecture.base), altered, runs)
    order = [run.layer for run in runs]
    if getattr(model, "lamella_counts", None) is not None:
        model.lamella_counts = reorder(model.lamella_counts, order)
    if hasattr(model, "lamella_heads"):
        model.lamella_heads = tuple(model.lamella_heads[layer] for layer in order)
    return Stack(model, name=stack.name)


def _leave_out(
    base: nn.Module, stack: Stack, chain: Chain, modules: Networks, stamp: str, stamped: bool = False
) -> None:
    """Let the layers run what a plan keeps of them and the networks that it inserts.

    Args:
        base: module of the view that holds the layers.
        stack: the original stack.
        chain: the normal form of the plan for this stack.
        modules: networks of the plan.
        stamp: digest of the plan.
        stamped: make the first layer refuse another plan's cache, even if the layer is unchanged.
    """
    layers: Any = base.get_submodule(stack.architecture.layers)
    left = {run.layer: run for run in chain.runs("prefill")}
    for index, layer in enumerate(layers):
        run = left.get(index, Run(index, ()))
        modular = insert_modules(stack, layer, index, run.sublayers, modules)
        if modular is not None:
            _stamp(layer, modular, stack.architecture, index, modular.attends, stamp)
        elif run.sublayers != stack.architecture.names:
            _leave(layer, stack.architecture, run, index, stamp)
        elif stamped and index == 0:
            _stamp(layer, _unchanged, stack.architecture, index, "attn" in run.sublayers, stamp)


def _unchanged(layer: nn.Module, h: Tensor, call: dict[str, Any]) -> Any:
    return type(layer).forward(layer, h, **call)


def _lay_out(base: nn.Module, stack: Stack, runs: tuple[Run, ...], stamp: str | None = None) -> None:
    """Build one module per execution, each with its own cache slot.

    With a stamp, the caches may be used with this plan only.
    """
    config = base.config
    config.__dict__.update(reindex(config, [run.layer for run in runs], stack.architecture).__dict__)
    layers = nn.ModuleList()
    for slot, run in enumerate(runs):
        layer = share(stack.layers[run.layer], keep={id(stack.base.config): config})
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = slot
        # With a stamp, the first layer always gets one, so that it refuses a cache with another order of layers.
        if stamp is not None and (slot == 0 or run.sublayers != stack.architecture.names):
            _leave(layer, stack.architecture, run, slot, stamp)
        layers.append(layer)
    base.set_submodule(stack.architecture.layers, layers)
