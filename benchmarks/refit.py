"""Whether healing a pruned SmolLM2 should start from closed-form corrections.

Nine layers are removed, those of least block influence, and seven, which `lamella compress` chooses. For the same CPU
time the model is healed by distillation as in `lamella compress`, or first refitted in closed form, and distilled for
what remains of the time. The CPU time of a step is measured beforehand and determines the number of steps. Every random
seed draws its own text for both, and the two are compared seed by seed, on kinds of text that are not trained on.

    python benchmarks/refit.py            # about 20 minutes on one core; resumes after an interruption
    python benchmarks/refit.py --quick    # a few steps of each
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import LongTensor

import lamella
from lamella.commands.compress.healing import ADAPTERS, BATCH, SCHEDULE, TEXT, TOKENS, UNSEEN
from lamella.commands.heal.training import available
from lamella.evaluate import FidelityTest
from lamella.files import Finished
from lamella.plan import ModelReference, Plan
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import TrainConfig, blocks, distil
from lamella.train.refit import refit
from lamella.train.trained import Healed
from lamella.zoo import computes_well, open_tokenizer
from lamella.zoo.cache import cache_folder

CUTS = {
    "nine layers": [3, 12, 13, 14, 15, 16, 17, 25, 26],  # as in heal.py
    "seven layers": [12, 13, 14, 15, 16, 17, 18],  # as in peers.py
}
RUNS = [("nine layers", 60), ("seven layers", 60)]  # and CPU seconds of healing
SEEDS = (0, 1, 2)
SEQUENCES = 8  # of the text that is fitted
MORE = (16, 64)  # for comparison, with the first seed
LR, STEPS_MEASURED = ADAPTERS["lr"], 4


def timed(work: Callable[[], Healed]) -> tuple[Healed, float]:
    """Return a healed model and the CPU seconds that it took, of all threads."""
    begin = time.process_time()
    healed = work()
    return healed, time.process_time() - begin


def distilled(original: Stack, start: Stack, plan: Plan, tokens: LongTensor, steps: int, seed: int) -> Healed:
    """Distil the original into a pruned model for some steps, as `lamella compress` does."""
    fast = computes_well(torch.bfloat16, original.device)
    config = TrainConfig(steps=steps, lr=LR, batch=BATCH, save_every=10_000, bf16=fast, seed=seed, **SCHEDULE)
    adapters = {name: value for name, value in ADAPTERS.items() if name != "lr"}
    folder = Path(tempfile.mkdtemp(prefix="lamella-refit-"))
    torch.manual_seed(seed)
    try:
        samples = blocks(tokens, loss_on="all")
        return distil(
            start, plan, samples, config=config, teacher=original, intermediate=False, out=folder / "run", **adapters
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    quick = parser.parse_args().quick
    seeds, runs = (SEEDS[:1], [("seven layers", 30)]) if quick else (SEEDS, RUNS)
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    count = available(tokenizer, TEXT, TOKENS, BATCH)
    source = lamella.load_text(TEXT, "calibration")
    texts = {seed: lamella.windows(tokenizer, source, count, TOKENS, seed) for seed in seeds}
    tests = {
        name: FidelityTest(stack, lamella.windows(tokenizer, lamella.load_text(name, "test"), 8, TOKENS, 0))
        for name in UNSEEN[: 1 if quick else None]
    }
    plans = {
        name: Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in drop])
        for name, drop in CUTS.items()
    }
    depends = {
        "plans": {name: plan.digest for name, plan in plans.items()},
        "healing": str([ADAPTERS, SCHEDULE, BATCH]),
        "blocks": count,
        "refit": SEQUENCES,
    }
    finished = Finished(cache_folder() / "benchmarks" / f"refit{'-quick' if quick else ''}.jsonl", depends)

    def reached(model: Any) -> dict[str, float]:
        return {name: test.of(model).kl.mean for name, test in tests.items()}

    def cost_of_a_step(plan: Plan) -> float:
        steps = partial(distilled, stack, stack, plan, texts[seeds[0]], STEPS_MEASURED, 0)
        return min(timed(steps)[1] for _ in range(2)) / STEPS_MEASURED

    def healed_in(plan: Plan, seed: int, cost: float, seconds: float) -> dict[str, Any]:
        """Distil for some CPU seconds."""
        steps = round(seconds / cost)
        healed, spent = timed(partial(distilled, stack, stack, plan, texts[seed], steps, seed))
        return {"seconds": spent, "steps": steps, "kl": reached(healed.view)}

    def refitted(plan: Plan, seed: int, sequences: int) -> tuple[Healed, dict[str, Any]]:
        """Refit on some sequences."""
        fitted, spent = timed(partial(refit, stack, plan, texts[seed][:sequences]))
        sites = fitted.findings["refit"]
        return fitted, {"seconds": spent, "steps": 0, "kl": reached(fitted.view), "sites": sites}

    def refitted_and_healed_in(plan: Plan, seed: int, cost: float, seconds: float) -> list[dict[str, Any]]:
        """Refit, and distil for the rest of some CPU seconds; return what is reached after each."""
        fitted, alone = refitted(plan, seed, SEQUENCES)
        steps = round((seconds - alone["seconds"]) / cost)
        healed, spent = timed(partial(distilled, stack, fitted.stack, plan, texts[seed], steps, seed))
        return [alone, {"seconds": alone["seconds"] + spent, "steps": steps, "kl": reached(healed.view)}]

    record = Record(
        "refit",
        f"{count} blocks of {TOKENS} tokens of {TEXT}; SmolLM2; tested on {' and '.join(tests)}; random seeds "
        f"{', '.join(map(str, seeds))}",
        seeds[0],
    )
    for name, seconds in runs:
        plan = plans[name]
        cost = finished.once(f"{name}, cost of a step", partial(cost_of_a_step, plan))
        before = finished.once(f"{name}, cut", partial(lambda plan: reached(lamella.apply(stack, plan)), plan))
        found: dict[str, list[dict[str, Any]]] = {"refit": [], "distillation": [], "refit, then distillation": []}
        for seed in seeds:
            about, given = f"{name}, {seconds} s, seed {seed}", (plan, seed, cost, seconds)
            found["distillation"].append(finished.once(about, partial(healed_in, *given)))
            both = finished.once(f"{about}, refitted first", partial(refitted_and_healed_in, *given))
            found["refit"].append(both[0])
            found["refit, then distillation"].append(both[1])
        rows = [["cut", 0, 0, *before.values()]]
        for label, each in found.items():
            kl = [spread([one["kl"][text] for one in each]) for text in tests]
            steps = "-".join(dict.fromkeys(str(s) for s in sorted({one["steps"] for one in each})))
            rows.append([label, statistics.mean(one["seconds"] for one in each), steps, *kl])
        columns = ["", "CPU seconds", "steps", *(f"KL on {text}, nats" for text in tests)]
        record.table(f"{name.capitalize()} removed, {seconds} CPU seconds; mean ± s. d. over seeds", columns, rows)
        sites: dict[str, list[dict[str, Any]]] = {}
        for one in found["refit"]:
            for site in one["sites"]:
                sites.setdefault(site["site"], []).append(site)
        rows = [
            [
                site,
                ", ".join(str(one["ridge"]) for one in each),
                *(spread([one[when] for one in each]) for when in ("before", "after")),
            ]
            for site, each in sites.items()
        ]
        record.table(
            f"{name.capitalize()} removed: mean squared relative error of the residual stream on held-out text",
            ["corrected", "ridge by seed", "before", "after"],
            rows,
        )
        for text in tests:
            pairs = zip(found["distillation"], found["refit, then distillation"], strict=True)
            gains = [one["kl"][text] - other["kl"][text] for one, other in pairs]
            wins = min(gains) > 0 and (len(gains) == 1 or statistics.mean(gains) > statistics.stdev(gains))
            loses = max(gains) < 0
            record.check(
                f"KL on {text} without {name}, {seconds} CPU seconds: gained by refitting first",
                "positive for every seed, mean above its s. d.",
                spread(gains),
                True if wins else False if loses else None,
            )
            alone = max(one["kl"][text] for one in found["refit"])
            record.check(
                f"KL on {text} without {name}, refit alone",
                "below that of the cut",
                f"{alone:.3f} / {before[text]:.3f}",
                alone < before[text],
            )
    if not quick:
        rows = []
        for sequences in (SEQUENCES, *MORE):
            name = runs[0][0]
            run = partial(lambda *given: refitted(*given)[1], plans[name], seeds[0], sequences)
            one = finished.once(f"{name}, {sequences} sequences", run)
            rows.append([sequences, one["seconds"], *one["kl"].values()])
        columns = ["sequences", "CPU seconds", *(f"KL on {text}, nats" for text in tests)]
        record.table(f"Refit alone, by the amount of text, {runs[0][0]} removed, random seed {seeds[0]}", columns, rows)
    return record.finish(Path(__file__).parent / "results" / f"refit{'-quick' if quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
