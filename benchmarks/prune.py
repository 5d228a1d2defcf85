"""The cost of selecting what to prune: allocating a sparsity given the curves, and scoring a shape by its gradients.

The solver is compared with a straightforward loop over every cell of the table, on instances that are small enough for
the loop; both must find the same distortion. Then the solver alone, for increasing layers, amounts and units: the
published complexity is layers x amounts x units, so doubling either should double the time.

TraceNAS shapes of SmolLM2 are scored with hooks, compared with a copy of the model for each shape, with masked weights
and real adapters; both must find the same Phi.

    python benchmarks/prune.py            # about five minutes
    python benchmarks/prune.py --quick    # smaller instances
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import lamella
from lamella.methods.rd_prune.knapsack import allocate
from lamella.methods.tracenas import GradientTraces, SearchSpace, Traces, phi
from lamella.plan import ModelReference, Plan
from lamella.results import Record
from lamella.stack import Stack
from lamella.zoo import open_tokenizer

Instance = tuple[list[np.ndarray], list[np.ndarray], int]


def instance(layers: int, amounts: int, units: int, seed: int = 0) -> Instance:
    """Return curves that are not always monotone, and a budget of the requested number of units."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 10, layers) * (2 * units / layers / 5)
    grid = np.arange(amounts + 1) / amounts
    curves = [draw.random() * grid**3 * (1 + 0.3 * draw.random(amounts + 1)) for _ in sizes]
    return curves, [np.ceil(size * (1 - grid)).astype(np.int64) for size in sizes], units


def cell_by_cell(curves: list[np.ndarray], costs: list[np.ndarray], budget: int) -> float:
    """Return the minimum distortion, by g_i(j) = min over q of g_(i-1)(j - cost) + distortion, cell by cell."""
    best = [0.0] * (budget + 1)
    for d, c in zip(curves, costs, strict=True):
        options = list(zip(d.tolist(), c.tolist(), strict=True))
        best = [min((best[j - k] + loss for loss, k in options if k <= j), default=math.inf) for j in range(budget + 1)]
    return best[budget]


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time: both programs are single-threaded, so the machine's load does not count."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def against_the_loop(record: Record, sizes: list[tuple[int, int, int]], rounds: int) -> None:
    rows, same, medians = [], True, []
    for layers, amounts, units in sizes:
        curves, costs, budget = instance(layers, amounts, units)
        ratios = []
        found, expected = allocate(curves, costs, budget, unit=1).distortion, cell_by_cell(curves, costs, budget)
        same &= math.isclose(found, expected, rel_tol=1e-9)  # and both are warm now
        for _ in range(rounds):
            loop = seconds(lambda: cell_by_cell(curves, costs, budget))  # noqa: B023
            ratios.append(loop / seconds(lambda: allocate(curves, costs, budget, unit=1)))  # noqa: B023
        medians.append(statistics.median(ratios))
        rows.append([layers, amounts, units, medians[-1], min(ratios), max(ratios)])
    columns = ["layers", "amounts", "units", "speed-up", "least", "most"]
    record.table(f"The solver against the loop over cells, {rounds} interleaved rounds", columns, rows)
    record.check("distortion of solver and loop", "the same", "the same" if same else "differ", same)
    record.check("solver against the loop, every instance", "faster", min(medians), min(medians) > 1)
    record.check("on the largest instance", "at least 10 times faster", medians[-1], medians[-1] >= 10)


def growth(record: Record, base: tuple[int, int, int], rounds: int) -> None:
    names = ("layers", "amounts", "units")
    sizes = {"": base} | {
        f"{factor} x {name}": tuple(n * (factor if other == name else 1) for n, other in zip(base, names, strict=True))
        for name in names
        for factor in (2, 4)
    }
    made = {label: instance(*size) for label, size in sizes.items()}
    times: dict[str, list[float]] = {label: [] for label in sizes}
    for _ in range(rounds):
        for label, (curves, costs, budget) in made.items():
            times[label].append(seconds(lambda: allocate(curves, costs, budget, unit=1)))  # noqa: B023
    rows, worst = [], 0.0
    for label, size in sizes.items():
        ratios = [ours / first for ours, first in zip(times[label], times[""], strict=True)]
        factor = int(label[0]) if label else 1
        cells = math.prod(size)
        rows.append(
            [*size, cells, statistics.median(times[label]), statistics.median(ratios), min(ratios), max(ratios)]
        )
        worst = max(worst, statistics.median(ratios) / factor)
    columns = [*names, "cells", "median seconds", "relative to the first", "least", "most"]
    record.table(f"The solver as an instance grows, {rounds} interleaved rounds", columns, rows)
    record.check("time / cells, against the first row", "at most 1.5: no worse than linear", worst, worst <= 1.5)


def by_copying(stack: Stack, plan: Plan, traces: GradientTraces, ids: Tensor) -> Traces:
    """Return the traces of a pruned Llama, from a copy of the model with masked weights and attached adapters."""
    model = copy.deepcopy(stack.model).eval()
    size = model.config.head_dim
    for layer, heads in plan.widths.heads.items():
        attention = model.model.layers[layer].self_attn
        gone = sorted(set(range(model.config.num_attention_heads)) - set(heads.keep))
        entries = [head * size + place for head in gone for place in range(size)]
        attention.q_proj.weight.data[entries] = 0
        attention.o_proj.weight.data[:, entries] = 0
    for layer, channels in plan.widths.channels.items():
        mlp = model.model.layers[layer].mlp
        gone = sorted(set(range(model.config.intermediate_size)) - set(channels))
        mlp.gate_proj.weight.data[gone] = mlp.up_proj.weight.data[gone] = 0
        mlp.down_proj.weight.data[:, gone] = 0
    every = [projection for projections in traces.projections.values() for projection in projections]
    rank = every[0].a.shape[0]
    names = sorted({projection.part.path.split(".")[-1] for projection in every})
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=names))
    kept = [layer for layer in range(len(stack)) if (layer, "attn") not in plan.skipped]
    modules = {}
    for position, projections in traces.projections.items():
        layer = adapted.base_model.model.model.layers[position.layer]
        modules[position] = [layer.get_submodule(projection.part.path) for projection in projections]
        for module, projection in zip(modules[position], projections, strict=True):
            module.lora_A["default"].weight.data.copy_(projection.a)
    base = adapted.base_model.model.model
    base.layers = torch.nn.ModuleList([base.layers[layer] for layer in kept])
    base.config.num_hidden_layers = len(kept)
    loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    sublayers = {
        position: torch.cat([module.lora_B["default"].weight.grad.flatten() for module in held])
        for position, held in modules.items()
        if position.layer in kept
    }
    return Traces(sublayers, float(loss.detach()))


def against_copies(record: Record, candidates: int, length: int) -> None:
    stack = lamella.open("smollm2")
    ids = lamella.windows(open_tokenizer("smollm2"), lamella.load_text("pydoc", "calibration"), 4, length, 0)
    space = SearchSpace.of(stack, params=0.75, min_layers=24)
    traces = GradientTraces(stack, ids, rank=8)
    rng, base = np.random.default_rng(0), traces.base
    model, times, apart = ModelReference.of(stack), [], 0.0
    for number in range(candidates + 1):
        cut = space.cut(space.sample(rng, traces.saliency.sublayers))
        point = space.point(cut, traces.saliency)
        plan = Plan(model=model, drop=point.drop, width=point.width)
        begin = time.perf_counter()
        ours = traces.of(plan)
        middle = time.perf_counter()
        theirs = by_copying(stack, plan, traces, ids)
        end = time.perf_counter()
        found = [phi(base, each, space.shares(cut)) for each in (ours, theirs)]
        apart = max(apart, abs(found[0] - found[1]))
        if number:  # both are warm now
            times.append((middle - begin, end - middle))
    ratios = [theirs / ours for ours, theirs in times]
    rows = [
        ["by hooks", candidates / sum(ours for ours, _ in times), 1.0, 1.0, 1.0],
        ["a copy each", candidates / sum(theirs for _, theirs in times),
         1 / statistics.median(ratios), 1 / max(ratios), 1 / min(ratios)],
    ]  # fmt: skip
    columns = ["TraceNAS, SmolLM2", "shapes per second", "relative to hooks", "least", "most"]
    record.table(f"{candidates} shapes, 4 x {length} tokens, interleaved", columns, rows)
    record.check("Phi by hooks and by copies", "within 1e-3", apart, apart <= 1e-3)
    faster = statistics.median(ratios)
    record.check("scoring by hooks against copies", "faster", f"{faster:.2f} times", faster > 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller instances")
    quick = parser.parse_args().quick
    record = Record("prune", "random curves that are neither convex nor monotone; Python's documentation", 0)
    loop_sizes = [(20, 20, 1000), (20, 20, 2000)] + ([] if quick else [(50, 50, 2000), (100, 20, 4000)])
    against_the_loop(record, loop_sizes, 3 if quick else 5)
    growth(record, (20, 25, 2000) if quick else (50, 50, 10_000), 3 if quick else 5)
    against_copies(record, 2 if quick else 6, 32 if quick else 128)
    return record.finish(Path(__file__).parent / "results" / f"prune{'-quick' if quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
