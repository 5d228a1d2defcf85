"""What the guarantee of `lamella eval --at-least` is worth on real prompts, and how many of them it needs.

SmolLM2 with 8-bit weights, and SmolLM2 without its three layers of least block influence, are compared with the
original on questions of GSM8K with their solutions, one sequence each. Then these prompts are taken as the traffic: a
thousand users draw prompts from it at random, look after each of them, and stop when they are certain. They are
compared with users who watch a normal interval, the mean plus or minus 1.96 standard errors, in the same way.

    python benchmarks/agreement.py            # a few minutes on two cores
    python benchmarks/agreement.py --quick    # a few prompts
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

import lamella
from lamella.data import InputContext, Prompts
from lamella.data.sources import benchmark_rows
from lamella.evaluate import FidelityTest, Interval
from lamella.evaluate.confidence import CONFIDENCE, log_capital
from lamella.files import Finished
from lamella.plan import ModelReference, Plan
from lamella.report.figures import Lines
from lamella.report.plotting import svg
from lamella.results import Record
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import cache_folder

DROP = ["layers.14", "layers.17", "layers.25"]
SHARES = (0.5, 0.6, 0.7, 0.9, 0.95)
RUNS, LOOKS = 1000, 400  # users, and the number of prompts that each of them draws at most
FIRST = 10  # prompts before the first look at a normal interval
NORMAL = 1.96
FIGURE = Path(__file__).parents[1] / "docs" / "assets" / "agreement.svg"


def agreements(count: int, seed: int, folder: Path) -> dict[str, list[float]]:
    """Return the agreement on each prompt, by model."""
    file = folder / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in benchmark_rows("gsm8k")))
    tokenizer, stack = open_tokenizer("smollm2"), lamella.open("smollm2")
    prompts = Prompts.open(file, InputContext(lambda: tokenizer, seed, "whole"), prompts=count)
    lamella.run("quantize", "smollm2", kind="int8", out=folder / "int8")
    plan = Plan(model=ModelReference.of(stack), drop=DROP)
    models = {"8-bit weights": lamella.load(folder / "int8").model, "three layers removed": lamella.apply(stack, plan)}
    test = FidelityTest(stack, prompts)
    return {name: list(test.of(model).agreements) for name, model in models.items()}


def first(reached: np.ndarray) -> np.ndarray:
    """Return how many prompts each user needs until something is reached; infinitely many if it never is [users]."""
    return np.where(reached.any(axis=1), reached.argmax(axis=1) + 1, np.inf)


def missed_by_normal(values: np.ndarray, mean: float) -> float:
    """Return the fraction of users whose normal interval excludes the mean at some time."""
    counts = np.arange(1, values.shape[1] + 1)
    means = values.cumsum(axis=1) / counts
    variance = (values**2).cumsum(axis=1) / counts - means**2
    width = NORMAL * np.sqrt(variance.clip(min=0) / counts)
    return float((abs(means - mean) > width)[:, FIRST - 1 :].any(axis=1).mean())


def bounds(values: np.ndarray) -> tuple[list[float], ...]:
    """Return lower bounds, means and upper bounds after each prompt of one user."""
    interval, course = Interval(), []
    for count in range(1, len(values) + 1):
        interval = interval.within(Interval.of(values[:count]))
        course.append((interval.lower, float(values[:count].mean()), interval.upper))
    return tuple(map(list, zip(*course, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few prompts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    count, seed, suffix = 12 if arguments.quick else 48, arguments.seed, "-quick" if arguments.quick else ""
    finished = Finished(cache_folder() / "benchmarks" / f"agreement{suffix}.jsonl", {"seed": seed, "prompts": count})
    with tempfile.TemporaryDirectory() as folder:
        found = finished.once("agreements", lambda: agreements(count, seed, Path(folder)))
    data = f"{count} questions of GSM8K with their solutions, {RUNS} users who draw up to {LOOKS} of them"
    record = Record("agreement", data, seed)
    generator, threshold = np.random.default_rng(seed), np.log(2 / (1 - CONFIDENCE))
    coverage, needed, lines = [], [], {}
    for name, measured in found.items():
        traffic = np.array(measured)
        mean, values = float(traffic.mean()), generator.choice(traffic, (RUNS, LOOKS))
        capital = np.maximum(log_capital(values, mean), log_capital(1 - values, 1 - mean))
        missed = float((capital.max(axis=1) >= threshold).mean())
        normal = missed_by_normal(values, mean)
        coverage.append([name, f"{mean:.3f}", f"{traffic.std():.3f}", f"{missed:.1%}", f"{normal:.1%}"])
        record.check(
            f"{name}: users whose bounds ever exclude the mean", "at most 5 %", f"{missed:.1%}", missed <= 0.05
        )
        record.check(f"{name}: users whose normal interval does", "more than 5 %", f"{normal:.1%}", normal > 0.05)
        for share in SHARES:
            yes, no = (
                first(log_capital(values, share) >= threshold),
                first(log_capital(1 - values, 1 - share) >= threshold),
            )
            low, middle, high = np.quantile(np.minimum(yes, no), (0.1, 0.5, 0.9), method="nearest")
            verdict = "holds" if mean >= share else "does not hold"
            needed.append([name, f"{share:.0%}", verdict, *(f"{each:g}" for each in (low, middle, high))])
        least, means, most = bounds(values[0, : 12 if arguments.quick else 200])
        lines |= {f"{name}, at least": least, f"{name}, mean": means, f"{name}, at most": most}
    columns = ["", "mean agreement", "deviation between prompts", "by the guarantee", "by a normal interval"]
    record.table("Users for whom the mean is excluded at some time", columns, coverage)
    columns = ["", "at least", "verdict", "10 % of users", "median", "90 % of users"]
    record.table("Prompts until the decision", columns, needed)
    if not arguments.quick:
        positions = range(1, 1 + max(map(len, lines.values())))
        figure = Lines("evaluated prompts", "same top token, share of positions", lines, positions=positions)
        FIGURE.write_text(svg(figure) + "\n", encoding="utf-8")
    return record.finish(Path(__file__).parent / "results" / f"agreement{suffix}.json")


if __name__ == "__main__":
    raise SystemExit(main())
