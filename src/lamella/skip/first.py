"""FiRST: the prompt decides, once, which layers its answer will run.

Jain et al., "FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction", arXiv 2410.12513.

    p_l[t] = sigmoid(w_l . rms(h_l[t]) + b_l)         one small router per layer
    s_l    = mean of p_l over the prompt's tokens      keep layer l for the whole answer iff s_l >= theta

The kept set is fixed for an answer, so kept layers' caches are whole and skipped layers' are freed. Routers are trained
first, with the model frozen; then LoRA recovers quality with the routers frozen. The paper's equations were not
available: pooling, losses and defaults are a reconstruction from its abstract and public reviews.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamella.errors import CacheError, MethodError
from lamella.plan import ModelReference, Plan, PlanSeries, Point, PolicyReference
from lamella.registry import method
from lamella.runtime import Block, Pass, Policy, apply, keep_policy, parallel, with_policy
from lamella.scoring import Tokens, describe, sequences
from lamella.stack import Stack
from lamella.train import Healed, Sample, add_lora, blocks, fit, response_loss, with_weights_of

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
            raise MethodError(f"protect={tuple(protect)} leaves none of {layers} layers to route: give smaller numbers")
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

    def layer(self, block: Block, h: Tensor, run: Pass) -> Tensor:
        if run.cache is None:
            return self._whole(block, h, run)
        if run.phase.any_response:
            return self._answer(block, h, run)
        return self._prompt(block, h, run) if block.index in self.free else block(h)

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

    def _whole(self, block: Block, h: Tensor, run: Pass) -> Tensor:
        response = run.phase.response(h.device).expand(h.shape[:2])
        gates: list[Tensor] = run.memory["gates"]
        if block.index not in self.free:
            gates.append(h.new_ones(len(h), dtype=torch.float32))
            return block(h)
        p = self.probability(block.index, h)
        of_prompt = ~response if run.real is None else ~response & run.real
        pooled = self._pooled(p, of_prompt)
        keep = self._decided(pooled)
        run.note("score", block.index, pooled[:, None].expand(h.shape[:2]))
        routed = response if self.prefill == "full" else torch.ones_like(response)
        if self.gates == "hard":
            gates.append(keep.float())
            return run.choose(block, routed & ~keep[:, None], h, block(h))
        gate = pooled if self.gates == "soft" else keep.float() + pooled - pooled.detach()
        gates.append(gate)
        scale = p if self.scope == "token" else gate[:, None]
        scale = torch.where(routed, scale, 1.0).unsqueeze(-1).to(h.dtype)
        return h + scale * (block(h) - h)

    def _prompt(self, block: Block, h: Tensor, run: Pass) -> Tensor:
        cache, layer = run.cache, block.index
        assert cache is not None
        real = run.real if run.real is not None else torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
        p = self.probability(layer, h)
        if self.prefill == "route":
            keep = self._decided(self._pooled(p, real))
            self._remember(cache, layer, keep, h)
            cache.keep_rows(layer, keep)
            return self._answer(block, h, run)
        out = block(h)
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

    def _answer(self, block: Block, h: Tensor, run: Pass) -> Tensor:
        """Run a layer for the rows that keep it."""
        assert run.cache is not None
        rows = run.cache.rows_of(block.index)
        if rows is None:
            return block(h)
        if len(rows) == 0:
            return h
        out = h.clone()
        out[rows] = block.rows(rows)(h[rows])
        return out


@torch.no_grad()
def signatures(stack: Stack, routers: PromptRouters, prompts: list[Tensor]) -> Tensor:
    """Which layers each prompt would keep [prompts, layers] bool.

    Args:
        prompts: token ids of each [time].
    """
    view = with_policy(stack, _plan(stack, routers), routers)
    rows = []
    for prompt in prompts:
        parallel(view, prompt[None].to(stack.device), torch.tensor([len(prompt)]), logits_to_keep=1)
        rows.append(routers.seen[0] > 0.5)
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


def _plan(stack: Stack, routers: PromptRouters) -> Plan:
    return Plan(model=ModelReference.of(stack), policy=PolicyReference(name="first"))


def train_routers(
    stack: Stack,
    samples: Any,
    *,
    out: Path,
    steps: int,
    skip_weight: float = 0.1,
    reg_weight: float = 0.01,
    reg: Literal["binary", "l2"] = "binary",
    target_skip: float | None = None,
    gates: Gates = "soft",
    scope: Literal["prompt", "token"] = "prompt",
    lr: float = 1e-2,
    batch: int = 2,
    seed: int = 0,
    **settings: Any,
) -> PromptRouters:
    """Phase 1: train the routers alone, with the model frozen and gates soft.

    Args:
        stack: the model; it is not changed.
        samples: prompts with their answers, as :func:`lamella.train.blocks` makes them.
        out: a folder for checkpoints; an interrupted run goes on from there.
        steps: optimizer steps.
        skip_weight: alpha: the pressure to skip.
        reg_weight: lambda: of the regulariser.
        reg: ``binary``, mean g (1 - g), which pushes gates to 0 or 1; or ``l2`` of the routers' weights.
        target_skip: aim for this share of skipped layers instead of as many as possible.
        gates, scope: see :class:`PromptRouters`.
        settings: of the routers.
    """
    routers = PromptRouters(stack, **settings)
    routers.gates, routers.scope = gates, scope
    view = with_policy(stack, _plan(stack, routers), routers)

    def loss(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        told = response_loss(model, inputs)
        g = routers.seen[:, list(routers.free)]
        pressure = g.mean() if target_skip is None else (g.mean() - (1 - target_skip)).square()
        regular = (g * (1 - g)).mean() if reg == "binary" else routers.weight.square().sum(-1).mean()
        total = told + skip_weight * pressure + reg_weight * regular
        return total, {"ce": told.detach(), "kept": g.mean().detach(), "unsure": (g * (1 - g)).mean().detach()}

    weights = {"skip": skip_weight, "reg": [reg, reg_weight], "target": target_skip, "gates": [gates, scope]}
    with torch.enable_grad():
        fit(
            view,
            samples,
            loss,
            out=out,
            steps=steps,
            lr=lr,
            batch=batch,
            seed=seed,
            trainable=lambda name: name.startswith("lamella_policy."),
            settings=weights | settings,
        )
    routers.gates = "hard"
    return routers


def tune(
    stack: Stack,
    plan: Plan,
    samples: Sequence[Sample],
    *,
    out: Path,
    steps: int = 200,
    lr: float = 2e-4,
    batch: int = 4,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    gates: Gates = "hard",
    seed: int = 0,
    **settings: Any,
) -> Healed:
    """Phase 2: LoRA recovers quality while the routers stay as they are.

    LoRA changes the streams that routers read, so decisions may drift: compare :func:`signatures` before and after.

    Args:
        stack: the model; it is not changed.
        plan: a plan of this method.
        samples: prompts with their answers; answers alone carry loss.
        out: a folder for checkpoints; an interrupted run goes on from there.
        steps, lr, batch, seed: of the training.
        rank, alpha, dropout: of the adapters on the projections of attention and MLP, merged at the end.
        gates: ``hard`` as in serving, or ``soft``.
        settings: more of :func:`lamella.train.fit`.
    """
    view = apply(stack, plan)
    routers: PromptRouters = view.lamella_policy
    routers.gates = gates
    lora = add_lora(view, rank, alpha, dropout, seed=seed)
    log = fit(
        view,
        samples,
        response_loss,
        out=out,
        steps=steps,
        lr=lr,
        batch=batch,
        seed=seed,
        trainable=lora.trains,
        settings={"plan": plan.digest, "gates": gates, "lora": [rank, alpha, dropout]},
        **settings,
    )
    lora.merge()
    lora.remove()
    return Healed(with_weights_of(stack, view), plan, log)


@method(
    slug="first",
    title="FiRST: Finetuning Router-Selective Transformers for Input-Adaptive Latency Reduction",
    arxiv="2410.12513",
    kind="policy",
    families="decoder",
    needs=("calibration",),
    policy=PromptRouters,
    train=tune,
)
def first(
    stack: Stack,
    calibration: Tokens,
    *,
    steps: int = 40,
    skip_weight: float = 0.1,
    reg_weight: float = 0.01,
    pool: Literal["mean", "last", "vote"] = "mean",
    prefill: Literal["full", "route"] = "full",
    protect: tuple[int, int] = (1, 1),
    batch_policy: Literal["rows", "union", "majority"] = "rows",
    lr: float = 1e-2,
    seed: int = 0,
    out: Path | None = None,
) -> PlanSeries:
    """Train one router per layer on text, then let every prompt decide which layers its answer runs.

    Args:
        stack: the opened model.
        calibration: token ids [sequences, time]; a part of each is taken for the prompt, the rest for its answer.
        steps: optimizer steps of the routers; healing with LoRA comes after.
        skip_weight: alpha of the paper, the pressure to skip while routers train.
        reg_weight: lambda of the paper.
        pool, prefill, protect, batch_policy: see :class:`PromptRouters`.
        lr: learning rate of the routers.
        seed: of the order of samples and of where prompts end.
        out: a folder for the routers and for checkpoints, from which an interrupted run goes on; a temporary one when
            left out.

    Returns:
        The series of plans, from the whole model on: one set of routers, and a threshold that rises from point to
        point, each with the mean number of layers that it keeps on calibration text.
    """
    tokens = torch.cat([row["input_ids"] for row in sequences(calibration)])
    folder = Path(tempfile.mkdtemp(prefix="lamella-first-")) if out is None else Path(out)
    samples = blocks(tokens.cpu(), (tokens.shape[1] // 4, tokens.shape[1] // 2), seed=seed)
    settings: dict[str, Any] = {
        "pool": pool,
        "prefill": prefill,
        "protect": list(protect),
        "batch_policy": batch_policy,
    }
    routers = train_routers(
        stack,
        samples,
        out=folder / "training",
        steps=steps,
        skip_weight=skip_weight,
        reg_weight=reg_weight,
        lr=lr,
        seed=seed,
        **settings,
    )
    prompts = [sample["input_ids"][: int(sample["prompt_lengths"])] for sample in samples]
    series = thresholds(stack, routers, prompts)
    kept = keep_policy(_plan(stack, routers), routers, folder).policy
    for point in series.points[1:]:
        assert kept is not None and point.policy is not None
        params = settings | point.policy.params
        point.policy = kept.model_copy(update={"params": params, "work": point.policy.work})
    options = {"steps": steps, "skip_weight": skip_weight, "reg_weight": reg_weight, "lr": lr, "seed": seed}
    series.provenance |= {"options": options | settings, "calibration": describe(calibration)}
    return series


@torch.no_grad()
def thresholds(stack: Stack, routers: PromptRouters, prompts: list[Tensor]) -> PlanSeries:
    """The series of plans that one set of routers allows: a threshold for each mean number of layers to skip.

    Args:
        prompts: token ids of each [time]; the scores that the thresholds divide come from them.
    """
    view = with_policy(stack, _plan(stack, routers), routers)
    routers.gates = "soft"
    scores = []
    for prompt in prompts:
        parallel(view, prompt[None].to(stack.device), torch.tensor([len(prompt)]), logits_to_keep=1)
        scores.append(routers.seen[0])
    routers.gates = "hard"
    table = torch.stack(scores)
    free = list(routers.free)
    ordered = table[:, free].flatten().sort().values
    places = (round(skipped / len(free) * len(ordered)) for skipped in range(1, len(free) + 1))
    limits = [float(ordered[place]) if place < len(ordered) else float(ordered[-1]) + 1e-3 for place in places]
    points = [Point()]
    for limit in dict.fromkeys(limits):
        kept = table >= limit
        kept[:, [layer for layer in range(len(stack)) if layer not in routers.free]] = True
        often = kept.double().mean(0).tolist()
        policy = PolicyReference(name="first", params={"threshold": limit}, work=[(share, share) for share in often])
        points.append(Point(policy=policy, scores={"kept layers": sum(often), "threshold": limit}))
    return PlanSeries(model=ModelReference.of(stack), points=points, provenance={"method": "first"})
