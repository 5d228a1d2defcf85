"""Policies: what decides, while a model runs, which part of a layer runs for which token.

A policy is given every layer of every forward as a :class:`LayerCall` and says what becomes of the stream. It has two
executions, told apart by :attr:`Pass.cache`: *step*, as in generation, and *parallel*, over whole sequences. Where a
decision depends on the token's own stream alone, one code serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lamella.errors import CacheError
from lamella.plan import Plan, PolicyReference, sidefile
from lamella.plan.parts import open_part, parts_in
from lamella.runtime.cache import Phase, PlanCache
from lamella.runtime.layer_call import LayerCall, Pass
from lamella.stack import Stack


class Policy(nn.Module):
    """How one method decides while the model runs; see :meth:`layer`.

    Its parameters, where it has any, are trained through the parallel execution and lie in the plan's side file.

    Args:
        stack: the model it is for.

    Attributes:
        sparse: layers whose cache slots hold some columns only.
        takes: what one step execution may bring: ``any`` tokens, those of one ``phase``, or a prompt and then one
            ``token`` at a time, at one clock for the batch. A call that brings more is cut up.
        crosses: whether it also decides for the layers of a decoder that reads an encoder.
        denoises: whether it decides in models that predict masked tokens, whose tokens see those behind them too.
        encodes: whether it decides in encoders, whose tokens see each other and are all there at once. Of a method with
            two policies it says which is whose.
        settles: generated tokens until a steady state, and ``period``: tokens after which it repeats; for timing.
    """

    sparse: frozenset[int] = frozenset()
    takes: Literal["any", "phase", "token"] = "any"
    crosses: bool = False
    denoises: bool = False
    encodes: bool = False
    settles: int = 0
    period: int = 1

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.layers, self.sublayers = len(stack), stack.architecture.names

    def begin(self, run: Pass) -> None:
        """Called before the first layer of a pass."""

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """The stream after a layer [batch, time, hidden], given the stream before it."""
        raise NotImplementedError

    def end(self, run: Pass) -> None:
        """Called after the last layer of a pass."""


def keep_policy(plan: Plan, policy: Policy, folder: Path) -> Plan:
    """The plan with this policy's parameters in a side file of ``folder``, named by its contents."""
    [(stack, reference)] = plan.policies.items()
    tensors = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    file, digest = sidefile.named(folder, reference.name, tensors)
    kept = reference.model_copy(update={"file": file, "sha256": digest})
    kept._folder = folder
    return plan.model_copy(update={"policies": {stack: kept}})


def policies(module: Any) -> list[type[Policy]]:
    """The policies that a module of a method defines."""
    return parts_in(module, Policy)


def open_policy(policy: Callable[..., Policy], stack: Stack, reference: PolicyReference) -> Policy:
    """Make the policy that a plan names.

    Raises:
        PlanError: for unknown or missing parameters, or a side file that is missing, damaged or of the wrong shape.
    """
    return open_part(policy, {"stack": stack}, reference, f"policy '{reference.name}'", stack.device)


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
