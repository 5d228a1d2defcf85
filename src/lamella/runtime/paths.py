"""The policy of plans that list which layers run for prompt and for generated tokens."""

from __future__ import annotations

from torch import Tensor

from lamella.errors import PlanError
from lamella.plan import Plan
from lamella.runtime.layer_call import LayerCall, Pass
from lamella.runtime.policy import Policy
from lamella.stack import Stack


class PathPolicy(Policy):
    """Prompt tokens run some layers, generated tokens others, all in order.

    A layer that only prompts run is freed when the prompt is done. A layer that only generated tokens run either stores
    the prompt's keys and values without running, or sees generated tokens only; see :class:`lamella.plan.PhasedPath`.

    Args:
        stack: the stack.
        plan: a plan with a path for it.

    Raises:
        PlanError: if a phase repeats or moves layers.
    """

    crosses = True

    def __init__(self, stack: Stack, plan: Plan) -> None:
        super().__init__(stack)
        phases = [[run.layer for run in plan.chain(stack.stack).runs(phase)] for phase in ("prefill", "decode")]
        for name, order in zip(("prefill", "decode"), phases, strict=True):
            if order != sorted(set(order)):
                raise PlanError(
                    f"path: where prompt and generated tokens differ, layers run once and in order; change path.{name}"
                )
        self.in_prompt, self.in_response = (frozenset(order) for order in phases)
        local = plan.path[stack.stack].keys == "local"
        self.sparse = self.in_response - self.in_prompt if local else frozenset()

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run the layer for the tokens whose phase includes it."""
        layer, phase = call.index, run.phase
        if layer in self.in_prompt and layer in self.in_response:
            return call(h)
        if layer in self.in_prompt:
            out = self._prompt_only(call, h, run)
            if run.cache is not None and phase.prompt_done:
                run.cache.free(layer)
            return out
        return self._response_only(call, h, run) if layer in self.in_response else h

    def _prompt_only(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        if not run.phase.any_response:
            return call(h)
        if not run.phase.any_prompt:
            return h
        # Both phases in one call: each token takes the result of its own phase. This is exact, since causality hides
        # generated
        # tokens from prompt tokens, and no generated token reads this layer's keys.
        return run.choose(call, run.phase.response(h.device), h, call(h))

    def _response_only(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        sees_prompt = call.index not in self.sparse
        if not run.phase.any_response:
            if sees_prompt:
                call.store_keys(h)
            return h
        if not run.phase.any_prompt:
            return call(h)
        response = run.phase.response(h.device)
        return run.choose(call, ~response, h, call(h, keys=None if sees_prompt else response))
