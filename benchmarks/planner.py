"""The planner compared with a straightforward loop.

FinerCut on SmolLM2: 15 of 60 sublayers, 4 x 256 calibration tokens, Jensen-Shannon divergence, the first 13 layers
protected. The naive loop runs the whole transformers model for every candidate, with sublayers disabled by hooks on
their output projections, and sums the divergence over all logits; all use the same fast divergence function, so only
the search is compared. All searches alternate step by step, so that changes in the machine's load affect all of them.

    python benchmarks/planner.py            # about 25 minutes on 2 cores
    python benchmarks/planner.py --quick    # 3 removals
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import lamella
from lamella.measure import OutputDistance
from lamella.measure.distances import jensen_shannon
from lamella.measure.output_distance import SLICE
from lamella.results import Record
from lamella.search import Removal, greedy, lazy_greedy
from lamella.stack import Position, Stack
from lamella.zoo import open_tokenizer

PROTECTED = 13


def naive(stack: Stack, tokens: Tensor) -> Iterator[Removal]:
    """Remove sublayers greedily by running the whole model for every candidate."""
    model, architecture = stack.model, stack.architecture
    silent: set[Position] = set()

    def silence(position: Position):
        return lambda module, inputs, output: torch.zeros_like(output) if position in silent else output

    for position in stack.positions:
        written = stack.layers[position.layer].get_submodule(architecture[position.sublayer].out)
        written.register_forward_hook(silence(position))
    reference = [torch.log_softmax(model(input_ids=row[None], use_cache=False).logits[0], -1) for row in tokens]

    def distance(removed: set[Position]) -> float:
        silent.clear()
        silent.update(removed)
        total = 0.0
        for row, log_p in zip(tokens, reference, strict=True):
            logits = model(input_ids=row[None], use_cache=False).logits[0]
            for part in zip(logits.split(SLICE), log_p.split(SLICE), row.split(SLICE), strict=True):
                total += float(jensen_shannon(*part).double().sum())
        silent.clear()
        return total / tokens.numel()

    removed: list[Position] = []
    while True:
        left = [each for each in stack.positions if each.layer >= PROTECTED and each not in removed]
        costs = {each: distance({*removed, each}) for each in left}
        best = min(costs, key=costs.__getitem__)
        removed.append(best)
        yield Removal((best,), costs[best], len(left))


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 removals instead of 15")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    removals = 3 if arguments.quick else 15

    stack = lamella.open("smollm2")
    text = lamella.load_text("pydoc", "calibration")
    tokens = lamella.windows(open_tokenizer("smollm2"), text, 4, 256, arguments.seed)
    candidates = [(each,) for each in stack.positions if each.layer >= PROTECTED]

    late_first = {group: -float(place) for place, group in enumerate(candidates)}  # as finercut does

    # The naive loop hooks into a copy with shared tensors, so the others run on the unchanged model.
    copy = Stack(lamella.apply(stack, lamella.Plan(model=lamella.ModelReference.of(stack))))
    searches = {
        "naive": lambda: naive(copy, tokens),
        "exact": lambda: greedy(candidates, OutputDistance(stack, tokens, first=PROTECTED).cost, guess=late_first),
        "lazy": lambda: lazy_greedy(candidates, OutputDistance(stack, tokens, first=PROTECTED).cost, guess=late_first),
    }
    seconds = dict.fromkeys(searches, 0.0)
    orders: dict[str, list[Removal]] = {name: [] for name in searches}
    running: dict[str, Iterator[Removal]] = {}
    for step in range(removals):
        for name, search in searches.items():
            begin = time.perf_counter()
            if step == 0:
                running[name] = iter(search())  # including setup, since the reference is part of the search
            orders[name].append(next(running[name]))
            seconds[name] += time.perf_counter() - begin
        print(
            f"{step + 1}/{removals}", {name: f"{s:.0f} s" for name, s in seconds.items()}, file=sys.stderr, flush=True
        )

    record = Record("planner", f"{text.provenance(tokens)}", arguments.seed)
    ratio = {name: seconds[name] / seconds["naive"] for name in searches}
    same = [
        [step.candidate for step in orders[name]] == [step.candidate for step in orders["naive"]] for name in searches
    ]
    rows = [
        [
            name,
            sum(step.evaluations for step in orders[name]),
            seconds[name],
            ratio[name],
            1 / ratio[name],
            orders[name][-1].cost,
        ]
        for name in searches
    ]
    columns = ["search", "costs asked for", "seconds", "share of naive", "times faster", "JSD at the end"]
    record.table(f"{removals} of 60 sublayers removed", columns, rows)
    order_rows = [
        [k + 1, *(f"{orders[name][k].candidate[0].site} {orders[name][k].cost:.4f}" for name in searches)]
        for k in range(removals)
    ]
    record.table("Removal order", ["step", *searches], order_rows)
    common = len({s.candidate for s in orders["lazy"]} & {s.candidate for s in orders["naive"]})
    excess = orders["lazy"][-1].cost / orders["naive"][-1].cost - 1
    apart = max(abs(a.cost - b.cost) for a, b in zip(orders["exact"], orders["naive"], strict=True))
    record.table(
        "How the lazy search differs",
        ["sublayers in common", "JSD above exact", "same order"],
        [[f"{common} of {removals}", f"{excess:+.1%}", str(same[2])]],
    )
    record.check("exact chooses the naive loop's list", "the same list", "same" if same[1] else "another", same[1])
    record.check("exact distances", "within 1e-6 of the naive loop's", apart, apart <= 1e-6)
    record.check("time of exact", "at most 0.35 of naive", ratio["exact"], ratio["exact"] <= 0.35)
    record.check("speed of lazy", "at least 8 times naive", 1 / ratio["lazy"], 1 / ratio["lazy"] >= 8)
    name = "planner-quick.json" if arguments.quick else "planner.json"
    return record.finish(Path(__file__).parent / "results" / name)


if __name__ == "__main__":
    raise SystemExit(main())
