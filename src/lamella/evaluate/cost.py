"""The cost model: the expected savings of a plan, without measurements."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from lamella.errors import ArchitectureError
from lamella.evaluate.speed import clock, denoises, random_tokens
from lamella.needs import extrapolate
from lamella.plan import Plan, alter_stack
from lamella.plan.adapters import open_adapters
from lamella.plan.modules import open_module
from lamella.progress import track
from lamella.stack import Position, Stack, join, replace_forward, share

WARM = 3  # decoding steps before the timed ones


@dataclass(frozen=True)
class PlanCost:
    """The cost of one plan.

    Attributes:
        sublayers: number of sublayers that a generated token runs, in expectation if a policy decides.
        parameters: weights in use, tied ones counted once.
        macs: multiply-accumulates of one generated token, including attention over ``context`` tokens.
        bytes_per_token: bytes of weights and cache that generating one token reads at batch size 1.
        kv_bytes_per_token: bytes of cache that one token of the response adds.
    """

    sublayers: float
    parameters: int
    macs: int
    bytes_per_token: int
    kv_bytes_per_token: int

    def as_dict(self) -> dict[str, float]:
        """Return the cost as JSON values."""
        return asdict(self)


def cost(stack: Stack, plan: Plan | None = None, context: int = 256) -> PlanCost:
    """Return the cost of a plan, or of the whole model.

    For a mixture of experts, MACs and bytes count the experts that a token uses, parameters count all of them. Masked
    weights count in full: dense kernels store zeros and multiply with them. Modules and adapters that a plan inserts
    count with all their parameters, once for each token.

    Args:
        stack: the one that generates, of a model with several; parameters are those of the whole model.
        plan: the plan; None for the whole model.
        context: number of tokens that attention attends to.

    Raises:
        ArchitectureError: for a stack of several that does not generate by itself.
    """
    if stack.prefix and (not stack.architecture.causal or "cross" in stack.architecture.names):
        raise ArchitectureError(f"the {stack.stack} of {stack.name} does not generate by itself: its cost is undefined")
    if plan is not None and plan.width:
        stack = alter_stack(_without_weights(stack), plan.model_copy(update={"adapters": []}))
    times = _times(stack, plan)
    sizes = stack.architecture.sizes_of(stack.config)
    by_layer = getattr(stack.model, "lamella_heads", None) or [(sizes.heads, sizes.kv_heads)] * len(stack)
    width = next(stack.model.parameters()).element_size()

    sizes_by_position = {
        each: _parameters(stack.layers[each.layer], stack.architecture[each.sublayer].modules) for each in times
    }
    idle = {Position(layer, "mlp"): _idle(module, stack) for layer, module in enumerate(stack.layers)}
    head = sum(p.numel() for p in stack.unembedding.parameters())
    added = 0 if plan is None else _added(stack, plan, stack.stack)

    attn = [times[Position(layer, "attn")] for layer in range(len(stack))]
    queries = sum(a * by_layer[layer][0] for layer, a in enumerate(attn)) * sizes.head_dim
    keys = sum(a * by_layer[layer][1] for layer, a in enumerate(attn)) * sizes.head_dim
    used = added + sum((sizes_by_position[each] - idle.get(each, 0)) * count for each, count in times.items())
    kv = 2 * keys * width
    return PlanCost(
        sublayers=sum(times.values()),
        parameters=_stored(stack, plan),
        macs=round(used + head + 2 * context * queries),
        bytes_per_token=round((used + head) * width + kv * context),
        kv_bytes_per_token=round(kv),
    )


def _times(stack: Stack, plan: Plan | None) -> dict[Position, float]:
    """Return how often a generated token runs each sublayer, in expectation if a policy decides."""
    if plan is None:
        return {each: float(each not in stack.dropped) for each in stack.positions}
    counts = [count for layer in plan.chain(stack.stack).executions for count in layer]
    times = dict(zip(stack.positions, counts, strict=True))
    return times | dict.fromkeys(_replaced(plan, stack.stack), 0.0)


def _stored(stack: Stack, plan: Plan | None) -> int:
    """Return the number of parameters of the whole model in use under a plan, tied ones counted once."""
    total = sum(p.numel() for p in stack.model.parameters())
    for name, each in stack.stacks.items():
        kept = set(each.positions) - each.dropped
        if plan is not None:
            kept = {position for run in plan.chain(name).runs("prefill") for position in run.positions}
            kept -= _replaced(plan, name)
            total += _added(each, plan, name)
        gone = set(each.positions) - kept
        total -= sum(_parameters(each.layers[at.layer], each.architecture[at.sublayer].modules) for at in gone)
    return total


def _replaced(plan: Plan, stack: str) -> set[Position]:
    """Return the sublayers of a stack that inserted modules replace."""
    return {each for group, module in plan.modules_of(stack).items() if not module.keep_sublayers for each in group}


def _added(stack: Stack, plan: Plan, name: str) -> int:
    """Return the number of parameters of the modules and adapters that a plan inserts into a stack."""
    networks: list[nn.Module] = [open_module(stack, group, module) for group, module in plan.modules_of(name).items()]
    for reference in plan.adapters:
        opened = open_adapters(stack, plan, reference)
        networks += [each for at, each in opened.items() if at.startswith(stack.architecture.prefix)]
    return sum(p.numel() for network in networks for p in network.parameters())


def _without_weights(stack: Stack) -> Stack:
    """Return the same model on the meta device, where structural changes are free."""
    keep: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in stack.model.buffers()}
    keep |= {id(parameter): nn.Parameter(parameter.to("meta")) for parameter in stack.model.parameters()}
    return Stack(share(stack.model, keep=keep), name=stack.name, stack=stack.stack)


def _parameters(layer: nn.Module, modules: tuple[str, ...]) -> int:
    """Return the number of parameters of some modules of a layer, as far as they exist."""
    modules_by_name = dict(layer.named_modules())
    return sum(p.numel() for name in modules if name in modules_by_name for p in modules_by_name[name].parameters())


def _idle(layer: Any, stack: Stack) -> int:
    """Return the number of parameters of the experts of a layer that a token does not use."""
    experts = stack.experts
    if experts is None or not hasattr(layer, experts.experts.partition(".")[0]):
        return 0
    try:
        held = layer.get_submodule(experts.experts)
    except AttributeError:  # a dense layer among them
        return 0
    size = sum(p.numel() for p in held.parameters())
    count, used = experts.counts(stack.config)
    return size - size * used // count


@dataclass(frozen=True)
class StepTimes:
    """The parts of the time of one decoding step of the whole model, in seconds.

    Attributes:
        attn, mlp: one sublayer of one layer, the mean over layers.
        rest: everything outside the layers: embedding, masks, final norm, head and the loop itself.
    """

    attn: float
    mlp: float
    rest: float

    def step(self, plan: Plan | None, layers: int) -> float:
        """Return the predicted time of one decoding step under a plan, in seconds.

        Args:
            plan: the plan; None for the whole model.
            layers: number of layers of the whole model, used if there is no plan.
        """
        return self.step_of([(1.0, 1.0)] * layers if plan is None else plan.work)

    def step_of(self, work: Sequence[tuple[float, ...]]) -> float:
        """Return the predicted time if each layer's attention and MLP run for these shares of tokens."""
        return self.rest + sum(self.attn * a + self.mlp * m for a, m in work)

    def speedup(self, plan: Plan) -> float:
        """Return the predicted decode speed-up of a plan."""
        return self.step(None, plan.model.layers) / self.step(plan, plan.model.layers)

    def speedup_without(self, removed: Collection[tuple[int, str]], layers: int) -> float:
        """Return the predicted decode speed-up for a set of removed sublayers.

        Args:
            removed: the removed sublayers, by index of the layer and name (``attn`` or ``mlp``).
            layers: number of layers of the whole model.
        """
        whole = self.step(None, layers)
        return whole / (whole - sum(self.attn if name == "attn" else self.mlp for _, name in removed))


_known: WeakKeyDictionary[Stack, StepTimes] = WeakKeyDictionary()


def step_times(stack: Stack) -> StepTimes:
    """Return the result of :func:`measure_step` at batch size 1, measured once for each opened stack."""
    if stack not in _known:
        _known[stack] = measure_step(stack)
    return _known[stack]


@torch.no_grad()
def measure_step(stack: Stack, batch: int = 1, prompt: int = 64, steps: int = 24) -> StepTimes:
    """Time the sublayers of every layer and the rest of a decoding step on the whole model.

    A step is divided at the ends of its sublayers, and each interval takes its minimum over all steps: interference by
    other processes delays only some intervals of some steps, and is not attributed to others. For a model that predicts
    masked tokens, a step is a forward pass over the whole prompt.

    Args:
        stack: the stack to time.
        batch: rows that decode together.
        prompt: tokens of their random prompt.
        steps: decoding steps to time, after three warm-up steps.
    """
    timed = share(stack.model)
    architecture = stack.architecture
    stamps: list[float] = []  # of one step: its start; start, middle and end of every layer; its end

    def stamp() -> None:
        stamps.append(clock(stack.device))

    def forward(layer: nn.Module, h: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
        stamp()
        mid = architecture["attn"].run(layer, h, call)
        stamp()
        out = architecture["mlp"].run(layer, mid, call)
        stamp()
        return join(out)

    for layer in timed.get_submodule(architecture.base).get_submodule(architecture.layers):
        replace_forward(layer, forward)
    tokens = random_tokens([stack.model], batch, prompt).to(stack.device)
    output, whole = timed(input_ids=tokens, use_cache=True), denoises(timed)
    taken = []
    for _ in track(extrapolate(range(steps + WARM), WARM + 1), "timing a decoding step", steps + WARM):
        stamps.clear()
        stamp()
        following = {"input_ids": tokens} if whole else _following(output)
        output = timed(**following, use_cache=True)
        stamp()
        taken.append(np.diff(stamps))  # alternating: between layers, attention, MLP; then the rest of the step
    shortest = np.min(taken[WARM:], axis=0)
    attn, mlp = (float(shortest[index::3].mean()) for index in (1, 2))
    return StepTimes(attn, mlp, float(shortest[::3].sum()))


def _following(output: Any) -> dict[str, Any]:
    """Return the inputs of the next step: the next token and the cache."""
    return {"input_ids": output.logits[:, -1:].argmax(-1), "cache": output.cache}
