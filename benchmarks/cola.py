"""The savings of CoLa from running common prefixes of paths once, on SmolLM2.

The searches of one sample (for the correct answer, for every wrong one, random, only skips, only repeats) run twice:
with one shared tree of hidden states, and each search separately with every path from the first layer on. Both count
the executed layers, and alternate in going first. The results must be the same.

    python benchmarks/cola.py            # about 10 minutes on 2 cores
    python benchmarks/cola.py --quick    # 15 simulations instead of 50
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lamella
from lamella.methods.cola import PathAnswerer, PathSearchResult, PathSettings, Problem, find_paths
from lamella.results import Record
from lamella.stack import Stack
from lamella.zoo import open_tokenizer

SAMPLES = [
    Problem("2 options", "Question: Is ice hot or cold?\nA. hot\nB. cold\nAnswer:", " B", (" A", " B")),
    Problem(
        "4 options",
        "Question: What is the capital of France?\nA. Rome\nB. Berlin\nC. Paris\nD. Madrid\nAnswer:",
        " C",
        (" A", " B", " C", " D"),
    ),
    Problem("open sum", "2 + 3 = 5\n11 + 8 = 19\n17 + 15 = ", "32", wrong=("31", "33", "42")),
]


def all_searches(
    new_answerer: Callable[[], PathAnswerer], sample: Problem, layers: int, settings: PathSettings
) -> list[PathSearchResult]:
    """Run all searches of a study for one sample, each with a given answerer."""

    def search(target: str, **options: Any) -> PathSearchResult:
        return find_paths(new_answerer(), target, layers, settings, **options)

    tree = search(sample.answer)
    return [
        tree,
        search(sample.answer, evaluations=tree.evaluations),
        search(sample.answer, actions=("skip",)),
        search(sample.answer, actions=("repeat",)),
        *(search(target) for target in sample.wrong_targets),
    ]


def measured(
    stack: Stack, tokenizer: Any, sample: Problem, settings: PathSettings, share: bool
) -> tuple[list[PathSearchResult], int, float]:
    """Return the outcomes, the number of executed layers and the seconds of one sample's searches."""
    answerers: list[PathAnswerer] = []

    def new_answerer() -> PathAnswerer:
        if not (share and answerers):
            answerers.append(PathAnswerer(stack, tokenizer, sample, settings.tokens))
        if not share:
            answerers[-1].tree.budget = 0
        return answerers[-1]

    begin = time.perf_counter()
    outcomes = all_searches(new_answerer, sample, len(stack), settings)
    return outcomes, sum(answerer.tree.executed for answerer in answerers), time.perf_counter() - begin


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="15 simulations instead of 50")
    arguments = parser.parse_args()
    settings = PathSettings(simulations=15 if arguments.quick else 50, tokens=3)

    stack = lamella.open("smollm2")
    tokenizer = open_tokenizer("smollm2")
    record = Record("cola", f"3 questions, {settings.simulations} simulations of each search", settings.seed)
    run = partial(measured, stack, tokenizer, settings=settings)
    rows, ratios, counts, same = [], [], [0, 0], True
    for number, sample in enumerate(SAMPLES):
        order = (True, False) if number % 2 else (False, True)
        found = {share: run(sample=sample, share=share) for share in order}
        shared, alone = found[True], found[False]
        same &= shared[0] == alone[0]
        counts = [counts[0] + shared[1], counts[1] + alone[1]]
        ratios.append(shared[2] / alone[2])
        rows.append([sample.id, len(shared[0]), shared[1], alone[1], shared[1] / alone[1], ratios[-1]])
        print(f"{number + 1}/{len(SAMPLES)}", file=sys.stderr, flush=True)
    columns = ["sample", "searches", "layers executed", "without sharing", "share of layers", "share of time"]
    record.table("All searches of a sample", columns, rows)

    rows = []
    for simulations in (15,) if arguments.quick else (50, 100, 200):  # 200: the paper's number
        answerer = PathAnswerer(stack, tokenizer, SAMPLES[1], settings.tokens)
        outcome = find_paths(answerer, SAMPLES[1].answer, len(stack), PathSettings(simulations=simulations))
        executed, unshared = answerer.tree.executed, answerer.tree.unshared
        rows.append([simulations, outcome.evaluations, executed, unshared, executed / unshared])
    columns = ["simulations", "paths", "layers executed", "without sharing", "share of layers"]
    record.table("The tree search for the right answer alone, 4 options", columns, rows)

    record.check("results with and without sharing", "the same", "the same" if same else "differ", same)
    share = counts[0] / counts[1]
    record.check("layers executed with the prefix tree", "at most half", share, share <= 0.5)
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    record.check("time with the prefix tree", "less than without", spread, max(ratios) < 1)
    return record.finish(Path(__file__).parent / "results" / f"cola{'-quick' if arguments.quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
