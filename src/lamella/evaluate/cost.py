"""The cost model: what a plan should save, before anything is measured."""

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
from lamella.plan import Plan, alter_stack
from lamella.plan.adapters import open_adapters
from lamella.plan.modules import open_module
from lamella.progress import track
from lamella.stack import Position, Stack, join, replace_forward, share


@dataclass(frozen=True)
class PlanCost:
    """What one plan costs.

    Attributes:
        sublayers: how many a generated token runs, the expected number where a policy decides.
        parameters: weights in use, tied ones counted once.
        macs: multiply-accumulates of one generated token, attention over ``context`` tokens included.
        bytes_per_token: weights and cache that generating one token of a batch of one reads, in bytes.
        kv_bytes_per_token: cache that one token of the response adds, in bytes.
    """

    sublayers: float
    parameters: int
    macs: int
    bytes_per_token: int
    kv_bytes_per_token: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def cost(stack: Stack, plan: Plan | None = None, context: int = 256) -> PlanCost:
    """The cost of a plan, or of the whole model.

    Mixtures of experts count the experts that a token uses in MACs and bytes, all of them in parameters. Masked weights
    count in full: dense kernels store zeros and multiply with them. A network or an adapter that a plan puts somewhere
    counts with all its parameters, once for each token.

    Args:
        stack: the one that generates, of a model with several; parameters are those of the whole model.
        context: tokens that attention looks back on.

    Raises:
        ArchitectureError: for a stack of several that does not generate by itself.
    """
    if stack.prefix and (not stack.architecture.causal or "cross" in stack.architecture.names):
        raise ArchitectureError(f"the {stack.stack} of {stack.name} does not generate by itself: costs are not known")
    if plan is not None and plan.width:
        stack = alter_stack(_without_weights(stack), plan.model_copy(update={"adapters": []}))
    times = _times(stack, plan)
    sizes = stack.architecture.sizes_of(stack.config)
    by_layer = getattr(stack.model, "lamella_heads", None) or [(sizes.heads, sizes.kv_heads)] * len(stack)
    width = next(stack.model.parameters()).element_size()

    held = {each: _parameters(stack.layers[each.layer], stack.architecture[each.sublayer].modules) for each in times}
    idle = {Position(layer, "mlp"): _idle(module, stack) for layer, module in enumerate(stack.layers)}
    head = sum(p.numel() for p in stack.unembedding.parameters())
    added = 0 if plan is None else _added(stack, plan, stack.stack)

    attn = [times[Position(layer, "attn")] for layer in range(len(stack))]
    queries = sum(a * by_layer[layer][0] for layer, a in enumerate(attn)) * sizes.head_dim
    keys = sum(a * by_layer[layer][1] for layer, a in enumerate(attn)) * sizes.head_dim
    used = added + sum((held[each] - idle.get(each, 0)) * count for each, count in times.items())
    kv = 2 * keys * width
    return PlanCost(
        sublayers=sum(times.values()),
        parameters=_stored(stack, plan),
        macs=round(used + head + 2 * context * queries),
        bytes_per_token=round((used + head) * width + kv * context),
        kv_bytes_per_token=round(kv),
    )


def _times(stack: Stack, plan: Plan | None) -> dict[Position, float]:
    """How often a generated token runs each sublayer, expected where a policy decides."""
    if plan is None:
        return {each: float(each not in stack.dropped) for each in stack.positions}
    counts = [count for layer in plan.chain(stack.stack).executions for count in layer]
    times = dict(zip(stack.positions, counts, strict=True))
    return times | dict.fromkeys(_replaced(plan, stack.stack), 0.0)


def _stored(stack: Stack, plan: Plan | None) -> int:
    """The parameters of the whole model that are in use under a plan, tied ones counted once."""
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
    """The sublayers of a stack in whose place networks stand."""
    return {each for group, module in plan.modules_of(stack).items() if not module.keep_sublayers for each in group}


def _added(stack: Stack, plan: Plan, name: str) -> int:
    """The parameters of the networks and the adapters that a plan puts into a stack."""
    networks: list[nn.Module] = [open_module(stack, group, module) for group, module in plan.modules_of(name).items()]
    for reference in plan.adapters:
        opened = open_adapters(stack, plan, reference)
        networks += [each for at, each in opened.items() if at.startswith(stack.architecture.prefix)]
    return sum(p.numel() for network in networks for p in network.parameters())


def _without_weights(stack: Stack) -> Stack:
    """The same model on the meta device, where cutting costs nothing."""
    keep: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in stack.model.buffers()}
    keep |= {id(parameter): nn.Parameter(parameter.to("meta")) for parameter in stack.model.parameters()}
    return Stack(share(stack.model, keep=keep), name=stack.name, stack=stack.stack)


def _parameters(layer: nn.Module, modules: tuple[str, ...]) -> int:
    """The parameters of some modules of a layer, as far as it has them."""
    there = dict(layer.named_modules())
    return sum(p.numel() for name in modules if name in there for p in there[name].parameters())


def _idle(layer: Any, stack: Stack) -> int:
    """The parameters of those experts of a layer that a token does not use."""
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
    """Where the time of one decoding step of the whole model goes, in seconds.

    Attributes:
        attn, mlp: one sublayer of one layer, the mean over layers.
        rest: everything outside the layers: embedding, masks, final norm, head and the loop itself.
    """

    attn: float
    mlp: float
    rest: float

    def step(self, plan: Plan | None, layers: int) -> float:
        """The predicted time of one decoding step under a plan."""
        return self.step_of([(1.0, 1.0)] * layers if plan is None else plan.work)

    def step_of(self, work: Sequence[tuple[float, ...]]) -> float:
        """The same when each layer's attention and MLP run for these shares of tokens."""
        return self.rest + sum(self.attn * a + self.mlp * m for a, m in work)

    def speedup(self, plan: Plan) -> float:
        """The decode speed-up that the plan should bring: the whole step over what is left of it."""
        return self.step(None, plan.model.layers) / self.step(plan, plan.model.layers)

    def speedup_without(self, removed: Collection[tuple[int, str]], layers: int) -> float:
        """The same for a set of removed sublayers."""
        whole = self.step(None, layers)
        return whole / (whole - sum(self.attn if name == "attn" else self.mlp for _, name in removed))


_known: WeakKeyDictionary[Stack, StepTimes] = WeakKeyDictionary()


def step_times(stack: Stack) -> StepTimes:
    """What :func:`measure_step` finds at batch 1, measured once for each opened stack."""
    if stack not in _known:
        _known[stack] = measure_step(stack)
    return _known[stack]


@torch.no_grad()
def measure_step(stack: Stack, batch: int = 1, prompt: int = 64, steps: int = 24) -> StepTimes:
    """Time the sublayers of every layer and the rest of a decoding step on the whole model.

    A step is cut at the ends of its sublayers, and each interval takes the least time of all steps: what else the
    machine does delays some intervals of some steps, and what it adds to one of them is not taken for the time of
    another. Of a model that predicts masked tokens, a step is a pass over the whole prompt.

    Args:
        batch: rows that decode together.
        prompt: tokens of their random prompt.
        steps: decoding steps to time, after three that warm up.
    """
    timed = share(stack.model)
    architecture = stack.architecture
    stamps: list[float] = []  # of one step: its begin; begin, middle and end of every layer; its end

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
    for _ in track(range(steps + 3), "timing a decoding step"):
        stamps.clear()
        stamp()
        following = {"input_ids": tokens} if whole else _following(output)
        output = timed(**following, use_cache=True)
        stamp()
        taken.append(np.diff(stamps))  # between layers, attention and MLP in turn, and what follows the last layer
    least = np.min(taken[3:], axis=0)
    attn, mlp = (float(least[place::3].mean()) for place in (1, 2))
    return StepTimes(attn, mlp, float(least[::3].sum()))


def _following(output: Any) -> dict[str, Any]:
    """The next token and the cache behind it."""
    return {"input_ids": output.logits[:, -1:].argmax(-1), "cache": output.cache}
