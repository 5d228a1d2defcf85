"""The depth study at small scale: SmolLM2, one with disabled layers, one trained to need its depth, and a deeper twin.

A. SmolLM2: the identities of every measurement, and whether its scores predict the loss of removing a layer.
B. A positive control: SmolLM2 whose layers 18 to 28 are scaled from no contribution to their full contribution.
C. A nano model that composes one to four permutations of 16 symbols and writes the result in four bits, so that longer
   chains need more of its depth. Training also supervises the symbol after every function.
D. Linear regressions from a model of 4 layers to one of 12, trained on the same text.

    python reproductions/depth_efficiency.py            # about 25 minutes on one core; an interrupted run resumes
    python reproductions/depth_efficiency.py --quick    # fewer tokens and smaller models, and no C
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import accumulate, pairwise
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.nano import llama, prose, taught_once, trained
from scipy.stats import spearmanr
from torch import Tensor
from transformers import LlamaForCausalLM

import lamella
from lamella.data import windows
from lamella.evaluate import FidelityTest
from lamella.measure import angular_distance, block_influence
from lamella.methods.depth_efficiency import (
    SkipEffect,
    depth_profile,
    depth_score,
    linear_maps,
    refinement,
    skip_effect,
)
from lamella.methods.depth_efficiency.contributions import run_once
from lamella.plan import ModelReference, Plan
from lamella.report.figures import Bars
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Sample, TrainConfig
from lamella.zoo import open_tokenizer

SILENT = range(18, 29)  # the disabled layers of the control; the last layer stays intact
SYMBOLS, FUNCTIONS, HOPS = 16, 8, 4
START, EQUALS, BIT = (SYMBOLS + FUNCTIONS + place for place in range(3))
BITS = 4  # answers of several tokens: later ones can reuse the computation of the first


# A. SmolLM2.


def smollm2(run: Run, quick: bool, seed: int) -> None:
    stack = lamella.open("smollm2")
    tokenizer = open_tokenizer("smollm2")
    count, length = (2, 48) if quick else (4, 96)
    rows = windows(tokenizer, lamella.load_text("pydoc", "calibration"), count, length, seed)
    profile = depth_profile(stack, rows)
    current = skip_effect(stack, rows, scope="current", seed=seed)
    future = skip_effect(stack, rows, splits=1 if quick else 4, seed=seed)
    identities(run, stack, rows, profile, current, future)

    cost = loss_without(stack, rows)
    scores = {
        "output, mean": current.output["mean"].values,
        "output, max": current.output["max"].values,
        "later layers, mean of the future effect": future.importance,
        "block influence": block_influence(stack, rows).values,
        "angular distance": angular_distance(stack, rows).values[:-1, 1],
    }
    ranks = {name: float(spearmanr(values, cost).statistic) for name, values in scores.items()}
    title = "SmolLM2: rank correlation of scores with the loss increase without one layer (nats per token)"
    run.table(title, ["score", "Spearman"], [[name, rank] for name, rank in ranks.items()])
    mean, most = ranks["output, mean"], ranks["output, max"]
    run.further(
        "mean distance of outputs against the loss increase without each layer", "Spearman 0.6", mean, mean >= 0.6
    )
    run.further("mean against maximum distance", "at least as high", f"{mean:.3f} / {most:.3f}", mean >= most)

    halves = [slice(1, 15), slice(15, 29)]
    rows_of = {
        "contribution / input norm": profile["ratio_layer"].values,
        "distance of outputs, mean": scores["output, mean"],
        "future effect": future.importance,
        "loss increase without it (nats)": cost,
    }
    table = [
        [name, *(float(values[half].mean()) for half in halves), float(values[-1])] for name, values in rows_of.items()
    ]
    run.table("SmolLM2: means over its halves", ["", "layers 1-14", "layers 15-28", "layer 29"], table)
    lens = profile["lens_kl"].values
    run.table(
        "SmolLM2: logit lens", ["point", "KL to the output (nats)"], [[p, float(lens[p])] for p in range(0, 31, 3)]
    )
    start = refinement(lens)
    run.main(
        "the KL of the lens decreases monotonically at the end",
        "from a point in the second half on",
        start,
        15 <= start < 29,
    )
    if not quick:
        plans(run, stack, tokenizer, scores, seed)


def identities(
    record: Record, stack: Stack, rows: Tensor, profile: dict[str, Any], current: SkipEffect, future: SkipEffect
) -> None:
    run = run_once(stack, rows[0])
    error = float((run.h[0] + run.c.sum(0) - run.h[-1]).norm() / run.h[-1].norm())
    record.exact("h_0 and all contributions make h_L", "1e-5 relative", error, error <= 1e-5)
    apart = float(((run.attn + run.mlp - run.c)[:, 1:].norm(dim=-1) / run.c[:, 1:].norm(dim=-1)).max())
    record.exact("a + m against the difference of residual streams", "1e-3 relative", apart, apart <= 1e-3)
    own = current.later["max"].values.diagonal()
    record.exact("E[s, s], all tokens", "1", f"{own.min():.6f} to {own.max():.6f}", np.allclose(own, 1, atol=1e-5))
    own = future.later["max"].values.diagonal()
    record.exact("E[s, s], later tokens", "0", float(own.max()), own.max() == 0)
    before = max(np.tril(each.later["max"].values, -1).max() for each in (current, future))
    record.exact("E[s, l] for earlier layers", "0", float(before), before == 0)
    record.exact(
        "the lens at the last point",
        "KL below 1e-6",
        float(profile["lens_kl"].values[-1]),
        profile["lens_kl"].values[-1] < 1e-6,
    )
    layer = len(stack) // 2
    whole = _whole_pass(stack, rows[0], layer)
    h = run.h[layer + 1].clone()
    h[1:] = run.h[layer, 1:]
    reused = stack.run(h[None], layer + 1, len(stack), run.context)[0]
    same = torch.equal(reused, whole)
    record.exact("restart after a skipped layer against the whole pass", "bit-identical", same, same)


def _whole_pass(stack: Stack, ids: Tensor, skipped: int) -> Tensor:
    """Return the final hidden states of the model with a hook that removes one layer for all tokens but the first."""

    def identity(module: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
        return torch.cat([out[:, :1], args[0][:, 1:]], dim=1)

    kept = []
    hooks = [
        stack.layers[skipped].register_forward_hook(identity, with_kwargs=True),
        stack.layers[-1].register_forward_hook(lambda module, args, out: kept.append(out)),
    ]
    try:
        with torch.no_grad():
            stack.base(input_ids=ids[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return kept[0][0]


@torch.no_grad()
def loss_without(stack: Stack, rows: Tensor) -> np.ndarray:
    """Return the loss increase per token in nats without each layer, after the first token [layers]."""
    costs = np.zeros(len(stack))
    for ids in rows:
        run = run_once(stack, ids)
        whole = _loss(stack, run.h[-1], ids)
        for layer in range(len(stack)):
            h = run.h[layer + 1].clone()
            h[1:] = run.h[layer, 1:]
            last = stack.run(h[None], layer + 1, len(stack), run.context)[0]
            costs[layer] += (_loss(stack, last, ids) - whole) / len(rows)
    return costs


def _loss(stack: Stack, h: Tensor, ids: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(stack.head(h[None, :-1])[0].float(), ids[1:]))


def plans(run: Run, stack: Stack, tokenizer: Any, scores: dict[str, np.ndarray], seed: int) -> None:
    """Remove six layers in the order of each score, on text of another kind."""
    test = FidelityTest(stack, windows(tokenizer, lamella.load_text("stdlib", "test"), 8, 256, seed))
    free = [layer for layer in range(len(stack)) if layer not in (0, 1, len(stack) - 1)]

    def divergence(layers: list[int]) -> float:
        plan = Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in sorted(layers)])
        return test.of(lamella.apply(stack, plan)).kl.mean

    found = {name: divergence(sorted(free, key=lambda layer: values[layer])[:6]) for name, values in scores.items()}
    found["deepest first"] = divergence(free[-6:])
    drawn = random.Random(seed)
    found["random, mean of 5"] = fmean(divergence(drawn.sample(free, 6)) for _ in range(5))
    title = "SmolLM2 without 6 layers, the first two and the last protected: KL to the whole model (nats)"
    run.table(title, ["lowest first by", "KL"], [[name, kl] for name, kl in found.items()])
    axes = ("order of removal", "KL to the whole model, nats")
    run.figure("depth-efficiency-removal", Bars(*axes, {"KL": list(found.values())}, list(found), horizontal=True))
    worse = min(found["deepest first"], found["random, mean of 5"])
    for name in ("output, mean", "later layers, mean of the future effect"):
        run.further(
            f"6 layers by {name}",
            "at most random and deepest first",
            f"{found[name]:.3f} / {worse:.3f}",
            found[name] <= worse,
        )


# B. Layers without a contribution.


def control(record: Record, quick: bool, seed: int) -> None:
    tokenizer = open_tokenizer("smollm2")
    rows = windows(tokenizer, lamella.load_text("pydoc", "calibration"), 1 if quick else 2, 24 if quick else 96, seed)
    depths, table = [], []
    for scale in (0.0, 1.0) if quick else (0.0, 0.05, 0.3, 1.0):
        stack = lamella.open("smollm2")
        with torch.no_grad():
            for layer in SILENT:
                stack.layers[layer].self_attn.o_proj.weight *= scale
                stack.layers[layer].mlp.down_proj.weight *= scale
        effect = skip_effect(stack, rows, splits=1 if quick else 4, seed=seed)
        depths.append(effect.effective_depth())
        some = slice(SILENT.start, SILENT.stop)
        later, output = effect.later["max"].values[some], effect.output["max"].values[some]
        table.append([scale, depths[-1], float(later.max()), float(output.max())])
        if scale == 0:
            ratio = depth_profile(stack, rows)["ratio_layer_max"].values[some]
            silent = (float(later.max()), float(output.max()), float(ratio.max()))
            record.exact(
                "silent layers: effect on later ones, on the output, and their ratio",
                "0, 0, 0",
                silent,
                silent == (0, 0, 0),
            )
            record.exact("effective depth with layers 18 to 28 silent", "at most 18", depths[0], depths[0] <= 18)
    title = "SmolLM2 with the projections of layers 18 to 28 scaled"
    record.table(title, ["scale", "effective depth", "their maximum effect on layers", "on the output"], table)
    rises = all(first <= second for first, second in pairwise(depths)) and depths[0] < depths[-1]
    record.further("effective depth as the scale grows", "rises", depths, rises)


# C. Chains of permutations.


def chain(hops: int, tables: list[list[int]], drawn: random.Random) -> list[int]:
    """Return the tokens of a chain: start, symbol, functions ..., equals, the bits of the answer."""
    symbol = drawn.randrange(SYMBOLS)
    functions = [drawn.randrange(FUNCTIONS) for _ in range(hops)]
    answer = symbols(symbol, functions, tables)[-1]
    bits = [BIT + (answer >> place & 1) for place in reversed(range(BITS))]
    return [START, symbol, *(SYMBOLS + function for function in functions), EQUALS, *bits]


def symbols(first: int, functions: Iterable[int], tables: list[list[int]]) -> list[int]:
    """Return the symbol after each function."""
    return list(accumulate(functions, lambda symbol, function: tables[function][symbol], initial=first))[1:]


def permutations(seed: int) -> list[list[int]]:
    drawn = random.Random(seed)
    return [drawn.sample(range(SYMBOLS), SYMBOLS) for _ in range(FUNCTIONS)]


def composer(steps: int, seed: int) -> Stack:
    """Return a Llama that answers chains of up to four functions, from the cache if trained.

    Training also supervises the intermediate symbol after every function; from answers alone, it learns chains of two
    and no longer ones.
    """

    def samples() -> list[Sample]:
        tables, drawn = permutations(seed), random.Random(seed + 1)
        hops = drawn.choices(range(1, HOPS + 1), weights=(1, 1, 1, 3), k=120_000)
        return [_sample(chain(count, tables, drawn), tables) for count in hops]

    config = TrainConfig(steps, lr=1e-3, batch=64, seed=seed, weight_decay=0.05, warmup=0.05)
    return taught_once(f"composer-{steps}-{seed}", llama(BIT + 2, 128, 6, context=16, tied=False), samples, config)


def _sample(ids: list[int], tables: list[list[int]]) -> Sample:
    row = torch.tensor(ids)
    labels = torch.full_like(row, -100)
    labels[-BITS:] = row[-BITS:]
    functions = ids[2 : -BITS - 1]
    labels[3 : 3 + len(functions)] = torch.tensor(symbols(ids[1], (each - SYMBOLS for each in functions), tables))
    return {"input_ids": row, "labels": labels, "prompt_lengths": torch.tensor(len(ids) - BITS)}


@torch.no_grad()
def multi_hop(record: Record, seed: int) -> None:
    stack = composer(4500, seed)
    tables, drawn = permutations(seed), random.Random(seed + 2)
    rows: list[list[Any]] = []
    scores = {}
    for count in range(1, HOPS + 1):
        ids = torch.tensor([chain(count, tables, drawn) for _ in range(400)])
        said = stack.model(ids[:, :-1]).logits[:, -BITS:].argmax(-1)
        accuracy = float((said == ids[:, -BITS:]).all(1).float().mean())
        start = ids.shape[1] - BITS
        found = [depth_score(stack, each, start, points=1) for each in ids[:20]]
        scores[count] = (fmean(each.later for each in found), fmean(each.output for each in found))
        rows.append([count, accuracy, *scores[count]])
    record.table("A nano model that composes permutations", ["hops", "accuracy", "depth score", "by the output"], rows)
    worst = min(row[1] for row in rows)
    record.exact("accuracy on chains of every length", "above 95 %", f"{worst:.1%}", worst > 0.95)
    by_layers, by_output = ([scores[count][way] for count in (1, HOPS)] for way in (0, 1))
    record.further(
        f"depth score of {HOPS} hops against 1",
        "higher",
        f"{by_layers[1]:.2f} / {by_layers[0]:.2f}",
        by_layers[1] > by_layers[0],
    )
    record.further(
        f"depth score by the output, {HOPS} hops against 1",
        "higher",
        f"{by_output[1]:.2f} / {by_output[0]:.2f}",
        by_output[1] > by_output[0],
    )


# D. A deeper twin.


def twins(record: Record, quick: bool, seed: int) -> None:
    steps, hidden = (60, 48) if quick else (600, 128)
    samples = prose("calibration", 200 if quick else 4000, 128, seed)
    shallow, deep = (
        trained(samples, layers=layers, hidden=hidden, steps=steps, seed=seed, name="depth-prose")
        for layers in ((2, 6) if quick else (4, 12))
    )
    config = deep.config
    torch.manual_seed(seed)
    untrained = Stack(LlamaForCausalLM(config).eval(), name="untrained")
    tokens = torch.stack([sample["input_ids"] for sample in prose("test", 40 if quick else 196, 128, seed)])
    maps = {stack.name: linear_maps(shallow, stack, tokens) for stack in (deep, untrained)}
    rows = []
    for name, each in zip(("the trained twin", "an untrained one"), maps.values(), strict=True):
        rows.append([name, each.correlation, each.offset, each.along(), each.along(reverse=True)])
    columns = ["maps to", "Spearman of relative depths", "mean offset", "error on the diagonal", "on the other one"]
    record.table(f"Linear maps from {len(shallow)} to {len(deep)} layers", columns, rows)
    trained_maps = maps[deep.name]
    if not quick:  # models that are hardly trained show hardly any diagonal
        record.main(
            "best source and target points", "Spearman 0.8", trained_maps.correlation, trained_maps.correlation >= 0.8
        )
    straight, across = trained_maps.along(), trained_maps.along(reverse=True)
    record.main(
        "errors on the diagonal", "below the other diagonal's", f"{straight:.3f} / {across:.3f}", straight < across
    )


def experiment(run: Run) -> None:
    run.data = (
        "SmolLM2 on Python's documentation; chains of permutations of 16 symbols; characters of that documentation"
    )
    run.part("SmolLM2", smollm2, run.quick, run.seed)
    run.part("control", control, run.quick, run.seed)
    if not run.quick:
        run.part("chains", multi_hop, run.seed)
    run.part("twins", twins, run.quick, run.seed)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="fewer tokens and smaller models, and no C; under a minute"))
