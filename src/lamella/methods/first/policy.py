"""The routers of FiRST: what they read of a prompt, what they decide, and which prompts decide alike."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamella.errors import CacheError, MethodError, listed
from lamella.plan import ModelReference, Plan, PolicyReference
from lamella.runtime import LayerCall, Pass, Policy, parallel, with_policy
from lamella.stack import Stack

Gates = Literal["hard", "soft", "straight"]
START = 2.0  # of the routers' bias: they begin with keeping everything at 0.88


class PromptRouters(Policy):
    """One router per layer, which reads the prompt and decides for the answer.

    Args:
        stack: the model of L layers and hidden size d.
        threshold: theta: a layer is kept from this mean on.
        pool: over the prompt's tokens: ``mean`` of p, p of the ``last`` token, or the share with p > 0.5 (``vote``).
        prefill: ``full`` runs every layer on the prompt and skips while generating; ``route`` skips on the prompt too.
        protect: how many layers at the start and at the end are always kept.
        batch_policy: ``rows`` decides for each row and gathers; ``union`` keeps what any row keeps and ``majority``
            what at least half of them do, for the whole batch.
        temperature: tau, of the sigmoid.

    Attributes:
        gates: what parallel executions multiply by: ``hard`` decisions as in serving, or for training ``soft`` ones or
            ``straight``-through estimates.
        scope: of soft gates: ``prompt`` (as in serving) or ``token``, each token's own p.
        seen: the gates of the last parallel execution [batch, L].
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
            raise MethodError("first: pool is mean, last or vote, and prefill is full or route")
        if batch_policy not in ("rows", "union", "majority"):
            raise MethodError(f"first: batch is rows, union or majority, not {batch_policy}")
        if min(protect) < 0 or sum(protect) >= layers:
            raise MethodError(
                f"protect {listed(protect)} leaves none of {layers} layers to route: give smaller numbers"
            )
        self.threshold, self.pool, self.prefill, self.batch_policy = threshold, pool, prefill, batch_policy
        self.temperature = temperature
        self.free = range(protect[0], layers - protect[1])
        d = stack.config.hidden_size
        self.weight = nn.Parameter(torch.zeros(layers, d, device=stack.device))
        self.bias = nn.Parameter(torch.full((layers,), START, device=stack.device))
        self.gates: Gates = "hard"
        self.scope: Literal["prompt", "token"] = "prompt"
        self.seen = torch.ones(1, layers)

    def begin(self, run: Pass) -> None:
        routes = run.cache is not None and self.prefill == "route" and run.phase.any_prompt
        if routes and (run.phase.start > 0 or not run.phase.prompt_done):
            raise CacheError("this plan reads the whole prompt before it runs a layer: give the prompt in one call")
        run.memory["gates"] = []

    def end(self, run: Pass) -> None:
        if run.cache is None:
            self.seen = torch.stack(run.memory["gates"], dim=1)

    def layer(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
        if run.cache is None:
            return self._whole(call, h, run)
        if run.phase.any_response:
            return self._answer(call, h, run)
        return self._prompt(call, h, run) if call.index in self.free else call(h)

    def probability(self, layer: int, h: Tensor) -> Tensor:
        """p of one layer's router for every token, in float32 [batch, time]."""
        wide = h.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return torch.sigmoid((normed @ self.weight[layer] + self.bias[layer]) / self.temperature)

    def _pooled(self, p: Tensor, where: Tensor) -> Tensor:
        """The mean (or vote) of p over the tokens ``where`` [batch, time] bool, or p of the last one [batch]."""
        if self.pool == "last":
            last = where.shape[1] - 1 - where.flip(1).int().argmax(dim=1)
            return p.gather(1, last[:, None])[:, 0]
        votes = (p > 0.5).float() if self.pool == "vote" else p
        return (votes * where).sum(1) / where.sum(1).clamp(min=1)

    def _decided(self, pooled: Tensor) -> Tensor:
        """Which rows keep the layer [batch] bool."""
        keep = pooled >= self.threshold
        if self.batch_policy == "union":
            return keep.any().expand_as(keep)
        if self.batch_policy == "majority":
            return (keep.float().mean() >= 0.5).expand_as(keep)
        return keep

    def _whole(self, call: LayerCall, h: Tensor, run: Pass) -> Tensor:
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
        gate = pooled if self.gates == "soft" else keep.float() + pooled - pooled.detach()
        gates.append(gate)
        scale = p if self.scope == "token" else gate[:, None]
        scale = torch.where(routed, scale, 1.0).unsqueeze(-1).to(h.dtype)
        return h + scale * (call(h) - h)

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
        """Pool what may be one of several parts of a prompt."""
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
    """Which layers each prompt would keep [prompts, layers] bool.

    Args:
        prompts: token ids of each [time].
    """
    return _seen(stack, routers, prompts) > 0.5


@torch.no_grad()
def scores(stack: Stack, routers: PromptRouters, prompts: list[Tensor]) -> Tensor:
    """What routers say of prompts, before any threshold [prompts, layers].

    Args:
        prompts: token ids of each [time].
    """
    routers.gates = "soft"
    found = _seen(stack, routers, prompts)
    routers.gates = "hard"
    return found


def _seen(stack: Stack, routers: PromptRouters, prompts: list[Tensor]) -> Tensor:
    """The gates of each prompt, of the kind that the routers are set to [prompts, layers]."""
    view = with_policy(stack, plan_of(stack, routers), routers)
    rows = []
    for prompt in prompts:
        parallel(view, prompt[None].to(stack.device), torch.tensor([len(prompt)]), logits_to_keep=1)
        rows.append(routers.seen[0])
    return torch.stack(rows)


def buckets(kept: Tensor, size: int) -> list[list[int]]:
    """Prompts in batches of similar signatures, so that a batch's union of kept layers stays small.

    Args:
        kept: signatures [prompts, layers] bool.
        size: of a batch.
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
    """The plan of these routers as they are in memory."""
    return Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="first")})
