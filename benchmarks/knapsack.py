"""The time of laptop-diff's knapsack for growing networks: 16 to 1,000 blocks, compared with HiGHS and a greedy choice.

Two kinds of blocks: scores that differ by orders of magnitude, as in UNets, and scores nearly proportional to the
sizes, which are the hardest. Half of the parameters are removed. All run alternately in one process.

    python benchmarks/knapsack.py    # about two minutes
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from lamella.methods.laptop_diff import covering, greedy
from lamella.results import Record

COUNTS = (16, 64, 250, 1000)
ROUNDS = 3


def blocks(kind: str, count: int, seed: int) -> tuple[list[float], list[int]]:
    """Return scores and sizes."""
    drawn = np.random.default_rng((count, seed))
    sizes = drawn.integers(10**4, 10**7, count)
    if kind == "apart":
        return (10 ** drawn.uniform(-4, 0, count)).tolist(), sizes.tolist()
    return (sizes * 1e-7 * (1 + 0.1 * drawn.standard_normal(count)).clip(0.1)).tolist(), sizes.tolist()


def solved(values: list[float], sizes: list[int], target: int) -> float:
    """Return the minimum cost found by HiGHS."""
    found = milp(
        values,
        integrality=np.ones(len(values)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint([sizes], target, np.inf),
        options={"mip_rel_gap": 0.0},
    )
    return float(found.fun)


def timed(work: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    found = work(*given)
    return found, time.perf_counter() - begin


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    record = Record("knapsack", "random scores and sizes; half of the parameters are removed", 0)
    rows, apart, proved, longest = [], 0.0, True, 0.0
    for kind in ("apart", "alike"):
        for count in COUNTS:
            times: dict[str, list[float]] = {"ours": [], "HiGHS": [], "greedy": []}
            gaps = []
            for seed in range(ROUNDS):
                values, sizes = blocks(kind, count, seed)
                target = sum(sizes) // 2
                found, ours = timed(covering, values, sizes, target)
                least, theirs = timed(solved, values, sizes, target)
                near, quick = timed(greedy, values, sizes, target)
                for name, seconds in (("ours", ours), ("HiGHS", theirs), ("greedy", quick)):
                    times[name].append(seconds)
                gaps.append(near.cost / found.cost - 1)
                apart = max(apart, abs(found.cost / least - 1))
                proved = proved and found.bound == found.cost
                longest = max(longest, ours)
            medians = [1000 * statistics.median(times[name]) for name in ("ours", "HiGHS", "greedy")]
            rows.append([f"{kind}", count, *medians, medians[1] / medians[0], 100 * statistics.median(gaps)])
    record.table(
        f"Milliseconds, medians of {ROUNDS} random instances",
        ["scores", "blocks", "exact", "HiGHS", "greedy", "HiGHS / exact", "extra cost of greedy, %"],
        rows,
    )
    record.check("cost compared with HiGHS", "equal to 1e-6", apart, apart < 1e-6)
    record.check("solutions proved optimal", "all", proved, proved)
    record.check("longest exact solution, seconds", "at most 5", longest, longest <= 5)
    return record.finish(Path(__file__).parent / "results" / "knapsack.json")


if __name__ == "__main__":
    raise SystemExit(main())
