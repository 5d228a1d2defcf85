"""FiRST at small scale: a Llama trained on two kinds of task for quality, SmolLM2-135M-Instruct for the rest.

Checks that hard gates are exact for any composition of the batch, that the skip penalty controls the number of skipped
layers, that different tasks keep different layers, that this beats one fixed set of the same size, evenly spaced layers
and random layers, that LoRA recovers at least half of the loss, and that decoding is as fast as the kept layers allow.

    python reproductions/first.py            # about 20 minutes on 2 cores; an interrupted run resumes
    python reproductions/first.py --quick    # the same claims on a smaller model
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import TEXTS, nats, prose, puzzles, scratch, trained
from harness.padded import padded, positions, stepped
from torch import Tensor

import lamella
from lamella.evaluate import bench, measure_step
from lamella.files import Work
from lamella.methods.first import ROUTING, PromptRouters, buckets, signatures, thresholds, train_routers, tune
from lamella.methods.unified_skip import balanced
from lamella.plan import ModelReference, PhasedPath, Plan, PolicyReference
from lamella.results import Record
from lamella.runtime import keep_policy, with_policy
from lamella.stack import Stack
from lamella.train import Sample, Task, TrainConfig, add_lora, fit, response_loss
from lamella.zoo import open_tokenizer


def plan_of(stack: Stack, routers: PromptRouters, **params: Any) -> Plan:
    plan = Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="first", params=params)})
    return keep_policy(plan, routers, scratch("first"))


def named(stack: Stack, kept: list[int]) -> Plan:
    """Return a plan that runs prompts at full depth and answers through the given layers."""
    path = PhasedPath(prefill=list(range(len(stack))), decode=kept)
    return Plan(model=ModelReference.of(stack), path={"text": path})


def exactness(record: Record, stack: Stack, tokens: Tensor, quick: bool) -> None:
    """Check point 1 on the real model with random routers.

    The check uses float64, since half-skipped hidden states of untrained routers amplify float32 rounding to a few
    1e-4.
    """
    stack = Stack(copy.deepcopy(stack.model).double())
    ids, prompt = (tokens[:2, :26].clone(), 20) if quick else (tokens[:4, :40].clone(), 28)
    mask = padded(ids, (0, 9, 3, 17))
    where = positions(mask)
    base = stack.model(ids, attention_mask=mask, position_ids=where).logits
    for prefill in ("full", "route"):
        routers = PromptRouters(stack, prefill=prefill)
        routers.bias.fill_(100.0)
        view = with_policy(stack, named(stack, list(range(30))), routers)
        lengths = torch.full((len(ids),), prompt)
        opened = lamella.parallel(view, ids, lengths, mask, position_ids=where).logits
        apart = float((opened - base)[mask.bool()].abs().max())
        record.exact(f"all gates open, prefill={prefill}", "logits within 1e-5 of the model's", apart, apart <= 1e-5)
        routers.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
        routers.bias.fill_(1.0)
        view = with_policy(stack, plan_of(stack, routers, prefill=prefill), routers)
        whole = lamella.parallel(view, ids, lengths, mask, position_ids=where).logits
        kept = routers.last_gates.bool()
        steps, cache = stepped(view, ids, mask, prompt)
        apart = float((steps - whole)[mask.bool()].abs().max())
        record.exact(f"cached steps, mixed signatures, prefill={prefill}", "logits within 1e-4", apart, apart <= 1e-4)
        worst = 0.0
        for row in range(len(ids)):
            layers = kept[row].nonzero().flatten().tolist()
            path = PhasedPath(prefill=list(range(30)) if prefill == "full" else layers, decode=layers)
            alone = lamella.apply(stack, Plan(model=ModelReference.of(stack), path={"text": path}))
            given = ids[row : row + 1], lengths[:1], mask[row : row + 1]
            logits = lamella.parallel(alone, *given, position_ids=where[row : row + 1]).logits
            worst = max(worst, float((logits - whole[row])[0][mask[row].bool()].abs().max()))
        record.exact(
            f"each row and a plan of its kept layers, prefill={prefill}", "logits within 1e-4", worst, worst <= 1e-4
        )
    held = {
        layer: slot.keys.shape[0] for layer, slot in enumerate(cache.layers) if getattr(slot, "keys", None) is not None
    }
    wanted = {layer: int(kept[:, layer].sum()) for layer in range(30) if kept[:, layer].any()}
    record.exact("rows in each layer's cache", "the rows that keep the layer", str(held == wanted), held == wanted)


def rate(run: Run, stack: Stack, train: list[Sample], prompts: list[Tensor], config: TrainConfig) -> None:
    """Check point 2: the effect of the skip penalty."""

    def kept(weight: float) -> float:
        routers = train_routers(stack, train, config=config, skip_weight=weight, out=scratch("first"))
        return float(signatures(stack, routers, prompts).float().sum(1).mean())

    rows = [[weight, run.arm(f"pressure {weight}", kept, weight)] for weight in (0.01, 0.03, 0.1, 0.3, 1.0)]
    run.table("Mean number of kept layers by skip weight alpha", ["alpha", "kept"], rows)
    falls = all(a[1] >= b[1] for a, b in pairwise(rows)) and rows[0][1] > rows[-1][1]
    run.further(
        "number of kept layers over alpha", "decreases over at least four values", str([row[1] for row in rows]), falls
    )


def adaptivity(record: Record, kept: Tensor, task: Tensor) -> None:
    """Check point 3: signatures [prompts, layers] of two tasks [prompts]."""
    apart = (kept[:, None] != kept[None]).float().sum(-1)
    same = task[:, None] == task[None]
    other = ~torch.eye(len(task), dtype=torch.bool)
    within, between = float(apart[same & other].mean()), float(apart[~same].mean())
    record.further(
        "Hamming distance of signatures",
        "larger between tasks than within",
        f"{between:.2f} / {within:.2f}",
        between > within,
    )
    half = torch.arange(len(task)) % 2 == 0
    x = torch.cat([kept.double(), torch.ones(len(task), 1, dtype=torch.double)], dim=1)
    y = task.double() * 2 - 1
    solution = torch.linalg.lstsq(x[half].T @ x[half] + 1e-3 * torch.eye(x.shape[1]), x[half].T @ y[half]).solution
    accuracy = float(((x[~half] @ solution > 0) == (y[~half] > 0)).double().mean())
    record.further("linear probe from signature to task", "well above chance (0.75)", accuracy, accuracy >= 0.75)


def at_three_quarters(stack: Stack, routers: PromptRouters, train: list[Sample]) -> Plan:
    """Return the plan whose threshold keeps about three quarters of the layers that have routers."""
    calibration = [s["input_ids"][: int(s["prompt_lengths"])] for s in train[:64]]
    wanted = round(0.75 * len(stack))
    series = thresholds(stack, routers, calibration)
    plan = min(series, key=lambda p: abs(sum(attn for attn, _ in p.work) - wanted))
    assert plan.policy is not None
    routers.threshold = plan.policy.params["threshold"]
    return plan


def quality(
    run: Run,
    stack: Stack,
    train: list[Sample],
    everything: list[Sample],
    routers: PromptRouters,
    plan: Plan,
    steps: int,
) -> None:
    """Check points 4 and 5: the loss at equal depth, before and after training LoRA of the same size."""
    layers, prompts = len(stack), [s["input_ids"][: int(s["prompt_lengths"])] for s in everything]
    kept = signatures(stack, routers, prompts)
    mean = float(kept.float().sum(1).mean())
    size = round(mean)
    often = torch.tensor([attn for attn, _ in plan.work])
    static = sorted(often.argsort(descending=True, stable=True)[:size].tolist())
    generator = torch.Generator().manual_seed(run.seed)
    draws = [
        sorted({0, layers - 1} | {1 + int(k) for k in torch.randperm(layers - 2, generator=generator)[: size - 2]})
        for _ in range(8)
    ]
    plans = {
        "first": plan_of(stack, routers, threshold=routers.threshold),
        "one set": named(stack, static),
        "evenly spaced": named(stack, balanced(layers, size)),
    }
    base = nats(stack.model, everything)
    before = {name: nats(lamella.apply(stack, each), everything) for name, each in plans.items()}
    chance = sum(nats(lamella.apply(stack, named(stack, draw)), everything) for draw in draws) / len(draws)
    config = TrainConfig(steps=steps, lr=2e-3, batch=16, save_every=steps, seed=run.seed)

    def healed(plan: Plan) -> dict[str, Any]:
        with torch.enable_grad():
            view = _with_lora(stack, plan, train, config)
        found: dict[str, Any] = {"nats": nats(view, everything)}
        if plan.policy is not None:
            changed = view.lamella_policy
            now = signatures(Stack(view), changed, prompts)
            found |= {"kept": float(now.float().sum(1).mean()), "threshold": changed.threshold}
            found["changed"] = float((now != kept).float().sum(1).mean())
        return found

    whole = named(stack, list(range(layers)))
    arms = {name: run.arm(f"{name}, healed", healed, each) for name, each in {**plans, "whole model": whole}.items()}
    after = {name: each["nats"] for name, each in arms.items()}
    full, ours = after["whole model"], arms["first"]
    rows = [["first", mean, before["first"], ours["kept"], after["first"]]]
    rows += [[name, size, before[name], size, after[name]] for name in plans if name != "first"]
    rows += [["random sets", size, chance, "", ""], ["whole model", layers, base, layers, full]]
    run.table(
        "Loss (nats per answer token) at equal depth, before and after LoRA",
        ["layers", "kept", "before", "kept", "after"],
        rows,
    )
    run.table(
        "Effect of LoRA on the decisions",
        ["", "before", "after"],
        [
            ["threshold", routers.threshold, ours["threshold"]],
            ["changed decisions per prompt", "", ours["changed"]],
        ],
    )
    order = before["first"] <= before["one set"] <= before["evenly spaced"] < chance
    measured = " ".join(f"{value:.3f}" for value in (*before.values(), chance))
    run.further("before LoRA", "first <= one set <= evenly spaced < random", measured, order)
    run.main(
        "after LoRA",
        "first <= evenly spaced",
        f"{after['first']:.3f} / {after['evenly spaced']:.3f}",
        after["first"] <= after["evenly spaced"],
    )
    gap = (before["first"] - after["first"]) / (before["first"] - base)
    run.further("LoRA recovers", "at least half of the gap to the whole model", gap, gap >= 0.5)


def _with_lora(stack: Stack, plan: Plan, train: list[Sample], config: TrainConfig) -> Any:
    """Return the view of a plan, healed on answers with LoRA of a fixed rank."""
    if plan.policy is not None:
        healed = tune(stack, plan, train, config=config, work=Work(scratch("first")))
        return lamella.apply(healed.stack, healed.plan)
    view = lamella.apply(stack, plan)
    lora = add_lora(view, 8, 16, 0.05, seed=config.seed)
    fit(view, train, Task(response_loss), config, out=scratch("first"), trainable=lora.trains)
    return view


def speed(record: Record, stack: Stack, tokens: Tensor, quick: bool) -> None:
    """Check point 6: decoding with fixed sets of layers, and the cost of batches with mixed prompts."""
    times = measure_step(stack)
    views = {}
    for keep in (24, 22):
        routers = PromptRouters(stack)
        kept = torch.zeros(30, dtype=torch.bool)
        kept[balanced(30, keep)] = True
        routers.bias.copy_(torch.where(kept, 50.0, -50.0))
        work = [(float(k), float(k)) for k in kept]
        plan = Plan(model=ModelReference.of(stack), policies={stack.stack: PolicyReference(name="first", work=work)})
        views[f"keep {keep}"] = with_policy(stack, plan, routers)
    timings = bench(
        {"whole": stack.model} | views, [1], prompt=64, tokens=12 if quick else 64, rounds=3 if quick else 5
    )
    rows = []
    for name, view in views.items():
        timing, predicted = timings[name][0], times.speedup(view.lamella_plan)
        share = Measured.over_rounds(timing.decode_speedup, predicted)
        rows.append([name, predicted, str(timing.decode_speedup), share.figure])
        record.further(f"decode speed-up / cost model, {name}", "within 15 %", share, share.within(0.85, 1.15))
    record.table("Decoding SmolLM2, batch 1", ["kept of 30", "speed-up of the cost model", "measured", "ratio"], rows)

    routers = PromptRouters(stack)
    routers.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    routers.bias.fill_(0.5)
    kept = signatures(stack, routers, [row[:32] for row in tokens])
    alone = float(kept.float().sum(1).mean())
    size = len(kept) // 4
    mixed = [list(range(k, len(kept), 4)) for k in range(4)]
    together = buckets(kept, size)
    unions = [sum(float(kept[batch].any(0).sum()) for batch in batches) / 4 for batches in (mixed, together)]
    record.table(
        f"Number of layers that a batch of {size} mixed prompts must run (mean of 4 batches)",
        ["single row", "batches in arrival order", "batches of similar signatures"],
        [[alone, *unions]],
    )
    record.further("bucketing", "a smaller union", f"{unions[1]:.1f} / {unions[0]:.1f}", unions[1] < unions[0])


@torch.no_grad()
def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    real = lamella.open("smollm2")
    text = lamella.load_text("pydoc", "test")
    tokens = lamella.windows(open_tokenizer("smollm2"), text, 8 if quick else 32, 64, seed)
    run.data = (
        f"{text.provenance(tokens)}; characters of Python's documentation and library, and strings to copy or reverse"
    )
    run.part("exactness", exactness, real, tokens, quick)
    run.part("speed", speed, real, tokens, quick)

    sizes = {"layers": 6, "hidden": 64, "steps": 300} if quick else {"layers": 8, "hidden": 128, "steps": 2000}
    length, count = (48, 2000) if quick else (64, 30000)
    train = prose("calibration", count // 2, length, seed, TEXTS) + puzzles(count // 2, length, seed)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    train = [train[k] for k in order]
    test = {
        "prose": prose("test", 32 if quick else 128, length, seed + 1, TEXTS),
        "puzzles": puzzles(32 if quick else 128, length, seed + 1),
    }
    stack = trained(train, **sizes, seed=seed, name="texts-and-puzzles")
    steps = 40 if quick else 300
    config = replace(ROUTING, steps=steps, batch=16, seed=seed)
    options = {"target_skip": 0.25, "skip_weight": 3.0}
    routers = train_routers(stack, train, config=config, out=run.work / "routers", **options)
    plan = at_three_quarters(stack, routers, train)
    everything = [sample for samples in test.values() for sample in samples]
    prompts = [s["input_ids"][: int(s["prompt_lengths"])] for s in everything]
    if not quick:
        rate(run, stack, train, prompts, config)
    quality(run, stack, train, everything, routers, plan, steps)
    task = torch.cat([torch.full((len(samples),), k) for k, samples in enumerate(test.values())])
    adaptivity(run, signatures(stack, routers, prompts), task)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a smaller model and fewer steps, under a minute"))
