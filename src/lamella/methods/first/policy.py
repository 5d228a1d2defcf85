"""The routers of FiRST: their scores of prompts, the layers that these keep, and batches of similar prompts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamella.errors import CacheError, MethodError, listed
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import LayerCall, Pass, Policy, parallel, with_policy
from lamella.stack import Stack

Gates = Literal["hard", "soft", "straight"]
START = 2.0  # initial bias of the routers: at first every layer is kept with probability 0.88


class PromptRouters(Policy):
    """One router per layer, which reads the prompt and decides whether the answer runs the layer.

    Args:
        stack: the model of L layers and hidden size d.
        threshold: theta: a layer is kept if its score is at least this.
        pool: how p is pooled over the prompt's tokens: the ``mean``, p of the ``last`` token, or the fraction of tokens
            with p > 0.5 (``vote``).
        prefill: ``full`` runs every layer on the prompt and skips during generation; ``route`` skips on the prompt too.
        protect: how many layers at the start and at the end are always kept.
        batch_policy: ``rows`` decides for each row and gathers; ``union`` keeps the layers that any row keeps and
            ``majority`` those that at least half of the rows keep, for the whole batch.
        temperature: tau, the temperature of the sigmoid; the lower it is, the closer are scores to 0 or 1.

    Attributes:
        gates: multipliers of layer outputs in parallel executions: ``hard`` decisions as in serving, or for training
            ``soft`` ones, or ``straight``-through ones: the decisions in the forward pass, with the gradient of the
            soft ones.
        scope: scope of soft gates: ``prompt`` (as in serving) or ``token``, each token's own p.
        last_gates: the gates of the last parallel execution [batch, L].
    """

    takes = "phase"

    def __init__(
        self,
        stack: Stack,
        *,
        threshold: float = 0.5,
        pool: Literal["mean", "last", "vote"] = "mean",
        prefill: Literal["full", "route"] = "full",
        protect: tuple[int, int] = (1, 1),
        batch_policy: Literal["rows", "union", "majority"] = "rows",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(stack)
        layers = len(stack)
        if pool not in ("mean", "last", "vote") or prefill not in ("full", "route"):
            raise MethodError("first: pool must be mean, last or vote, and prefill must be full or route")
        if batch_policy not in ("rows", "union", "majority"):
            raise MethodError(f"first: batch_policy must be rows, union or majority, not {batch_policy}")
        if min(protect) < 0 or sum(protect) >= layers:
            raise MethodError(f"protect {listed(protect)} leaves none of {layers} layers to route: give smaller values")
        self.threshold, self.pool, self.prefill, self.batch_policy = threshold, pool, prefill, batch_policy
        self.temperature = temperature
        self.free = range(protect[0], layers - protect[1])
        d = stack.config.hidden_size
        self.weight = nn.Parameter(torch.zeros(layers, d, device=stack.device))
        self.bias = nn.Parameter(torch.full((layers,), START, device=stack.device))
        self.gates: Gates = "hard"
        self.scope: Literal["prompt", "token"] = "prompt"
        self.last_gates = torch.ones(1, layers)

    def begin(self, run: Pass) -> None:
        """Check that the prompt comes in one call if it is routed, and start to collect gates."""
        routes = run.cache is not None and self.prefill == "route" and run.phase.any_prompt
        if routes and (run.phase.start > 0 or not run.phase.prompt_done):
            raise CacheError("this plan reads the whole prompt before it runs a layer: give the prompt in one call")
        run.memory["gates"] = []

    def end(self, run: Pass) -> None:
        """Keep the gates of a parallel execution."""
        if run.cache is None:
            self.last_gates = torch.stack(run.memory["gates"], dim=1)

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run one layer, or skip it for the rows whose prompt does not keep it.

        Args:
            call: the layer.
            h: hidden states before it `[batch, time, hidden]`.
            run: the pass.
        """
        if run.cache is None:
            return self._parallel(call, h, run)
        if run.phase.any_response:
            return self._answer(call, h, run)
        return self._prompt(call, h, run) if call.index in self.free else call(h)

    def probability(self, layer: int, h: Tensor) -> Tensor:
        """Compute p of one layer's router for every token, in float32 [batch, time].

        Args:
            layer: index of the layer.
            h: hidden states before the layer [batch, time, hidden].
        """
        wide = h.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return torch.sigmoid((normed @ self.weight[layer] + self.bias[layer]) / self.temperature)

    def _pooled(self, p: Tensor, where: Tensor) -> Tensor:
        """Pool p over the tokens ``where`` [batch, time] bool: the mean, the vote, or p of the last one [batch]."""
        if self.pool == "last":
            last = where.shape[1] - 1 - where.flip(1).int().argmax(dim=1)
            return p.gather(1, last[:, None])[:, 0]
        votes = (p > 0.5).float() if self.pool == "vote" else p
        return (votes * where).sum(1) / where.sum(1).clamp(min=1)

    def _decided(self, pooled: Tensor) -> Tensor:
        """Decide which rows keep the layer [batch] bool."""
        keep = pooled >= self.threshold
        if self.batch_policy == "union":
            return keep.any().expand_as(keep)
        if self.batch_policy == "majority":
            return (keep.float().mean() >= 0.5).expand_as(keep)
        return keep

    def _parallel(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        response = run.phase.response(h.device).expand(h.shape[:2])
        gates: list[Tensor] = run.memory["gates"]
        if call.index not in self.free:
            gates.append(h.new_ones(len(h), dtype=torch.float32))
            return call(h)
        p = self.probability(call.index, h)
        of_prompt = ~response if run.real is None else ~response & run.real
        pooled = self._pooled(p, of_prompt)
        keep = self._decided(pooled)
        run.note("score", call.index, pooled[:, None].expand(h.shape[:2]))
        routed = response if self.prefill == "full" else torch.ones_like(response)
        if self.gates == "hard":
            gates.append(keep.float())
            return run.choose(call, routed & ~keep[:, None], h, call(h))
        gate = pooled if self.gates == "soft" else keep.float() + (pooled - pooled.detach())
        gates.append(gate)
        scale = p if self.scope == "token" else gate[:, None]
        scale = torch.where(routed, scale, 1.0).unsqueeze(-1).to(h.dtype)
        out = call(h)
        return out - (1 - scale) * (out - h)  # at a gate of 1 bitwise the output of the layer

    def _prompt(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        cache, layer = run.cache, call.index
        assert cache is not None
        real = run.real if run.real is not None else torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        p = self.probability(layer, h)
        if self.prefill == "route":
            keep = self._decided(self._pooled(p, real))
            self._remember(cache, layer, keep, h)
            cache.keep_rows(layer, keep)
            return self._answer(call, h, run)
        out = call(h)
        self._add(cache.state, layer, p, real)
        if run.phase.prompt_done:
            pooled = cache.state["pooled"][:, layer] / cache.state["tokens"][:, layer].clamp(min=1)
            run.note("score", layer, pooled[:, None].expand(h.shape[:2]))
            keep = self._decided(pooled)
            self._remember(cache, layer, keep, h)
            cache.keep_rows(layer, keep)
        return out

    def _add(self, state: dict[str, Tensor], layer: int, p: Tensor, real: Tensor) -> None:
        """Accumulate the pooled p, since a prompt may come in several parts."""
        for name in ("pooled", "tokens"):
            state.setdefault(name, torch.zeros(len(p), self.layers, device=p.device))
        some = real.any(dim=1)
        if self.pool == "last":
            state["pooled"][:, layer] = torch.where(some, self._pooled(p, real), state["pooled"][:, layer])
            state["tokens"][:, layer] = 1
        else:
            count = real.sum(1)
            state["pooled"][:, layer] += self._pooled(p, real) * count
            state["tokens"][:, layer] += count

    def _remember(self, cache: Any, layer: int, keep: Tensor, h: Tensor) -> None:
        kept = cache.state.setdefault("kept", torch.ones(len(h), self.layers, dtype=torch.bool, device=h.device))
        kept[:, layer] = keep

    def _answer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        """Run a layer for the rows that keep it."""
        assert run.cache is not None
        rows = run.cache.rows_of(call.index)
        if rows is None:
            return call(h)
        if len(rows) == 0:
            return h
        out = h.clone()
        out[rows] = call.rows(rows)(h[rows])
        return out


@torch.no_grad()
def signatures(stack: Stack, routers: PromptRouters, prompts: list[Tensor]) -> Tensor:
    """Return the layers that each prompt would keep [prompts, layers] bool.

    Args:
        stack: the opened model.
        routers: the trained routers.
        prompts: token ids of each prompt [time].
    """
    return _gates_of(stack, routers, prompts) > 0.5


@torch.no_grad()
def scores(stack: Stack, routers: PromptRouters, prompts: list[Tensor]) -> Tensor:
    """Return the routers' scores of prompts, before any threshold [prompts, layers].

    Args:
        stack: the opened model.
        routers: the trained routers.
        prompts: token ids of each prompt [time].
    """
    routers.gates = "soft"
    found = _gates_of(stack, routers, prompts)
    routers.gates = "hard"
    return found


def _gates_of(stack: Stack, routers: PromptRouters, prompts: list[Tensor]) -> Tensor:
    """Return the gates of each prompt, of the kind that the routers are set to [prompts, layers]."""
    view = with_policy(stack, plan_of(stack, routers), routers)
    rows = []
    for prompt in prompts:
        parallel(view, prompt[None].to(stack.device), torch.tensor([len(prompt)]), logits_to_keep=1)
        rows.append(routers.last_gates[0])
    return torch.stack(rows)


def buckets(kept: Tensor, size: int) -> list[list[int]]:
    """Group prompts with similar signatures into batches, so that a batch's union of kept layers stays small.

    Args:
        kept: signatures [prompts, layers] bool.
        size: batch size.

    Returns:
        Indices of the prompts of each batch.
    """
    left = list(range(len(kept)))
    batches = []
    while left:
        union = kept[left[0]].clone()
        batch = [left.pop(0)]
        while left and len(batch) < size:
            nearest = min(left, key=lambda prompt: (int((kept[prompt] & ~union).sum()), prompt))
            left.remove(nearest)
            batch.append(nearest)
            union |= kept[nearest]
        batches.append(batch)
    return batches


def plan_of(stack: Stack, routers: PromptRouters) -> Plan:
    """Return the plan that refers to these routers in memory.

    Args:
        stack: the opened model.
        routers: the routers.
    """
    return Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="first")})
