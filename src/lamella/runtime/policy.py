"""Policies: what decides, while a model runs, which part of a layer runs for which token.

A policy is given every layer of every forward as a :class:`Block` and says what becomes of the stream. It has two
executions, told apart by :attr:`Pass.cache`: *step*, as in generation, and *parallel*, over whole sequences. Where a
decision depends on the token's own stream alone, one code serves both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lamella.errors import CacheError
from lamella.plan import Plan, PolicyReference
from lamella.plan.parts import defined, opened
from lamella.runtime.cache import Phase, PlanCache
from lamella.runtime.masks import restricted, stored_mask
from lamella.runtime.trace import Trace
from lamella.stack import Architecture, Parallel, Stack, Stream, join


@dataclass
class Pass:
    """One forward of a view.

    Attributes:
        phase: which of its tokens are prompt.
        padding: where the columns up to the end of this call are no tokens [batch, columns] bool; None without padding.
        cache: of a step execution; None in a parallel one.
        device: where the stream lives.
        memory: what the policy keeps from layer to layer of this pass.
        trace: what takes notes, when somebody wants to see.
    """

    phase: Phase
    padding: Tensor | None
    cache: PlanCache | None
    device: torch.device
    memory: dict[str, Any] = field(default_factory=dict)
    trace: Trace | None = None

    @property
    def real(self) -> Tensor | None:
        """Where this call's columns are tokens [batch, time] bool; None without padding."""
        return None if self.padding is None else ~self.padding[:, self.phase.start : self.phase.end]

    def choose(self, block: Block, passing: Tensor, h: Tensor, out: Tensor) -> Tensor:
        """``out`` of a layer, but ``h`` where tokens pass it by [batch or 1, time] bool."""
        if self.trace is not None:
            self.trace.did_not_count(block.index, passing)
        return torch.where(passing.unsqueeze(-1), h, out)

    def note(self, name: str, layer: int, values: Tensor) -> None:
        """Let the trace have a number per token of one layer: the policy's reason [batch, time]."""
        if self.trace is not None:
            self.trace.note(name, layer, values)


@dataclass(slots=True)
class Block:
    """One layer in one pass, as a policy sees it: what it calls runs, what it does not call does not.

    Attributes:
        index: the layer's number, which is also its cache slot.
        layer, architecture, call: the module, its entry in the table, what the model calls it with beside the stream.
        runs: the sublayers that run at all under the plan.
        who: the rows that this block stands for [rows], None for all.
    """

    index: int
    layer: nn.Module
    architecture: Architecture
    call: dict[str, Any]
    run: Pass
    runs: tuple[str, ...]
    who: Tensor | None = None

    def __call__(self, h: Tensor, keys: Tensor | None = None) -> Tensor:
        """The whole layer; see :meth:`attn` for ``keys``."""
        return self.mlp(self.attn(h, keys))

    def attn(self, h: Tensor, keys: Tensor | None = None) -> Stream:
        """The attention; in a step execution its keys go to the cache.

        Args:
            h: the stream [rows, time, hidden].
            keys: in a parallel execution, the columns that a step execution would have stored [rows, time] bool; a
                token always sees itself.
        """
        if "attn" not in self.runs:
            return h
        self._took_note("attn")
        call, cache = self.call, self.run.cache
        if cache is None and keys is not None:
            call = call | {"attention_mask": restricted(call.get("attention_mask"), keys, h.dtype)}
        elif cache is not None and self.index in cache.columns:
            columns = cache.columns_with(self.index, h.shape[1])
            mask = stored_mask(columns, h.shape[1], self.run.padding, cache.window(self.index), h.dtype)
            call = call | {"attention_mask": mask}
        return self.architecture["attn"].run(self.layer, h, call)

    def mlp(self, mid: Stream) -> Tensor:
        """The MLP, after :meth:`attn` or in place of it [rows, time, hidden]."""
        if "mlp" not in self.runs:
            return join(mid)
        self._took_note("mlp")
        return join(self.architecture["mlp"].run(self.layer, mid, self.call))

    def mlp_where(self, mid: Stream, need: Tensor) -> Tensor:
        """The MLP, executed for these tokens only [rows, time] bool; the others pass."""
        if "mlp" not in self.runs or not need.any():
            return join(mid)
        self._took_note("mlp", need)
        if need.all():
            return join(self.architecture["mlp"].run(self.layer, mid, self.call))
        chosen = Parallel(*(part[need][None] for part in mid)) if isinstance(mid, Parallel) else mid[need][None]
        out = join(mid).clone()
        out[need] = join(self.architecture["mlp"].run(self.layer, chosen, self.call))[0]
        return out

    def store_keys(self, h: Tensor) -> None:
        """Compute and store keys and values alone, for a layer that does not run but will be looked back on."""
        cache = self.run.cache
        if cache is None or "attn" not in self.runs:
            return
        try:
            self.architecture["attn"].run(self.layer, h, self.call | {self.architecture.cache: _KeysOnly(cache)})
        except _Stored:
            return

    def rows(self, which: Tensor) -> Block:
        """The same layer for some rows of the batch [rows], in a step execution."""
        assert self.run.cache is not None, "rows are gathered in step executions alone"
        call = {name: _gather(value, which, self.run.cache.batch) for name, value in self.call.items()}
        return replace(self, call=call, who=which)

    def _took_note(self, sublayer: str, tokens: Tensor | None = None) -> None:
        if self.run.trace is not None:
            self.run.trace.note_run(self.index, sublayer, self.who, tokens)


class _Stored(Exception):
    """Keys and values are in the cache; the rest of the attention is not wanted."""


@dataclass
class _KeysOnly:
    """A cache that ends an attention as soon as its keys and values are stored."""

    cache: PlanCache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.cache.update(*args, **kwargs)
        raise _Stored


def _gather(value: Any, rows: Tensor, batch: int) -> Any:
    """The rows of everything in a call that has one entry per row."""
    if isinstance(value, tuple):
        return tuple(_gather(each, rows, batch) for each in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch > 1:
        return value[rows.to(value.device)]
    return value


class Policy(nn.Module):
    """How one method decides while the model runs; see :meth:`layer`.

    Its parameters, where it has any, are trained through the parallel execution and lie in the plan's side file.

    Args:
        stack: the model it is for.

    Attributes:
        sparse: layers whose cache slots hold some columns only.
        takes: what one step execution may bring: ``any`` tokens, those of one ``phase``, or a prompt and then one
            ``token`` at a time, at one clock for the batch. A call that brings more is cut up.
        settles: generated tokens until a steady state, and ``period``: tokens after which it repeats; for timing.
    """

    sparse: frozenset[int] = frozenset()
    takes: Literal["any", "phase", "token"] = "any"
    settles: int = 0
    period: int = 1

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.layers, self.sublayers = len(stack), stack.architecture.names

    def begin(self, run: Pass) -> None:
        """Called before the first layer of a pass."""

    def layer(self, block: Block, h: Tensor, run: Pass) -> Tensor:
        """The stream after a layer [batch, time, hidden], given the stream before it."""
        raise NotImplementedError

    def end(self, run: Pass) -> None:
        """Called after the last layer of a pass."""


def keep_policy(plan: Plan, policy: Policy, folder: Path) -> Plan:
    """The plan with this policy's parameters in a side file of ``folder``, named by its contents."""
    [(stack, reference)] = plan.policies.items()
    partial = folder / f".{reference.name}.partial"
    save_file({name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}, str(partial))
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    file = partial.replace(folder / f"{reference.name}-{digest[:12]}.safetensors")
    kept = reference.model_copy(update={"file": file.name, "sha256": digest})
    kept._folder = folder
    return plan.model_copy(update={"policies": {stack: kept}})


def policies(module: Any) -> list[type[Policy]]:
    """The policies that a module of a method defines."""
    return defined(module, Policy)


def open_policy(policy: Callable[..., Policy], stack: Stack, reference: PolicyReference) -> Policy:
    """Make the policy that a plan names.

    Raises:
        PlanError: for unknown or missing parameters, or a side file that is missing, damaged or of the wrong shape.
    """
    return opened(policy, {"stack": stack}, reference, f"policy '{reference.name}'", stack.device)


def pieces(policy: Policy, phase: Phase, cache: PlanCache) -> list[tuple[int, int]]:
    """The columns of one call, cut into calls that the policy can take, as [start, end) from the call's first one."""
    whole = phase.end - phase.start
    if policy.takes == "any" or not phase.any_response:
        return [(0, whole)]
    if phase.shortest != phase.longest:
        raise CacheError("this plan keeps one clock for the whole batch: pad prompts on the left, to one length")
    prompt = max(phase.longest - phase.start, 0)
    answer = range(prompt, whole) if policy.takes == "token" else (prompt,)
    return ([(0, prompt)] if prompt else []) + [
        (column, column + 1 if policy.takes == "token" else whole) for column in answer
    ]
