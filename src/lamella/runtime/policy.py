"""Policies: they decide at run time which part of a layer runs for which token.

A policy receives every layer of every forward pass as a :class:`LayerCall` and returns the hidden states after it. It
has two executions, distinguished by :attr:`Pass.cache`: *step*, as in generation, and *parallel*, over whole sequences.
If a decision depends only on the token's own hidden states, one code serves both.
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
    """The run-time decisions of one method; see :meth:`layer`.

    Its parameters, if it has any, are trained through the parallel execution and stored in the plan's side file.

    Args:
        stack: the model it is for.

    Attributes:
        sparse: layers whose cache slots hold some columns only.
        takes: what one step execution may contain: ``any`` tokens, those of one ``phase``, or a prompt and then one
            ``token`` at a time, in the same step for the whole batch. A call with more is split.
        crosses: whether it also decides for the layers of a decoder that reads an encoder.
        denoises: whether it decides in models that predict masked tokens, with bidirectional attention.
        encodes: whether it decides in encoders, all of whose tokens are present at once. For a method with two policies
            it distinguishes them.
        steady_after: number of generated tokens until a steady state, for timing.
        period: number of tokens after which it repeats, for timing.
    """

    sparse: frozenset[int] = frozenset()
    takes: Literal["any", "phase", "token"] = "any"
    crosses: bool = False
    denoises: bool = False
    encodes: bool = False
    steady_after: int = 0
    period: int = 1

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.layers, self.sublayers = len(stack), stack.architecture.names

    def begin(self, run: Pass) -> None:
        """Prepare for a pass; called before its first layer."""

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Return the hidden states after a layer [batch, time, hidden].

        Args:
            call: the layer.
            h: hidden states before it [batch, time, hidden].
            run: the pass.
        """
        raise NotImplementedError

    def end(self, run: Pass) -> None:
        """Finish a pass; called after its last layer."""


def keep_policy(plan: Plan, policy: Policy, folder: Path) -> Plan:
    """Return the plan with this policy's parameters in a side file of ``folder``.

    Args:
        plan: the plan, which is not changed.
        policy: the policy.
        folder: folder of the side file, whose name contains its hash.
    """
    [(stack, reference)] = plan.policies.items()
    tensors = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    file, digest = sidefile.named(folder, reference.name, tensors)
    kept = reference.model_copy(update={"file": file, "sha256": digest})
    kept._folder = folder
    return plan.model_copy(update={"policies": {stack: kept}})


def policies(module: Any) -> list[type[Policy]]:
    """Return the policies that a method's module defines."""
    return parts_in(module, Policy)


def open_policy(policy: Callable[..., Policy], stack: Stack, reference: PolicyReference) -> Policy:
    """Build the policy that a plan names.

    Args:
        policy: class of the policy.
        stack: the stack.
        reference: entry of the plan.

    Raises:
        PlanError: for unknown or missing parameters, or a side file that is missing, damaged or of the wrong shape.
    """
    return open_part(policy, {"stack": stack}, reference, f"policy '{reference.name}'", stack.device)


def pieces(policy: Policy, phase: Phase, cache: PlanCache) -> list[tuple[int, int]]:
    """Return the columns of one call, split into calls that the policy accepts, as [start, end).

    Args:
        policy: the policy.
        phase: phase of the call.
        cache: the cache.

    Raises:
        CacheError: for prompts of different lengths, if the policy counts steps for the whole batch.
    """
    whole = phase.end - phase.start
    if policy.takes == "any" or not phase.any_response:
        return [(0, whole)]
    if phase.shortest != phase.longest:
        raise CacheError("this plan counts steps for the whole batch: pad prompts on the left, to the same length")
    prompt = max(phase.longest - phase.start, 0)
    answer = range(prompt, whole) if policy.takes == "token" else (prompt,)
    return ([(0, prompt)] if prompt else []) + [
        (column, column + 1 if policy.takes == "token" else whole) for column in answer
    ]
