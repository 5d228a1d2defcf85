"""Whether healing a pruned SmolLM2 should start from closed-form corrections.

Nine layers are removed, those of least block influence. For the same CPU time the model is healed by distillation as in
`lamella compress`, or first refitted in closed form, and distilled for what remains of the time. The CPU time of a step
is measured beforehand and determines the number of steps. Random seeds determine the adapters and the order of the
training text, and the two are compared seed by seed, on kinds of text that are not trained on. The refit uses the first
blocks of that text, and is the same for all seeds.

    python benchmarks/refit.py            # about 10 minutes on one core for each seed; resumes after an interruption
    python benchmarks/refit.py --quick    # a few steps of each
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
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
}
SECONDS = 60  # CPU time of healing
SEQUENCES = 8  # of the text that is fitted
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
    parser.add_argument("--seeds", type=int, default=3, help="number of random seeds of the distillation")
    arguments = parser.parse_args()
    quick, seeds = arguments.quick, range(1 if arguments.quick else arguments.seeds)
    seconds = SECONDS / 2 if quick else SECONDS
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    count = available(tokenizer, TEXT, TOKENS, BATCH)
    source = lamella.load_text(TEXT, "calibration")
    text_tokens = lamella.windows(tokenizer, source, count, TOKENS, 0)
    tests = UNSEEN[: 1 if quick else None]

    @cache
    def test_on(text: str) -> FidelityTest:
        """Return the test on a text; a run that only collects earlier results needs none."""
        return FidelityTest(stack, lamella.windows(tokenizer, lamella.load_text(text, "test"), 8, TOKENS, 0))

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
        return {text: test_on(text).of(model).kl.mean for text in tests}

    def cost_of_a_step(plan: Plan) -> float:
        steps = partial(distilled, stack, stack, plan, text_tokens, STEPS_MEASURED, 0)
        return min(timed(steps)[1] for _ in range(2)) / STEPS_MEASURED

    def healed_in(plan: Plan, seed: int, cost: float, seconds: float) -> dict[str, Any]:
        """Distil for some CPU seconds."""
        steps = round(seconds / cost)
        healed, spent = timed(partial(distilled, stack, stack, plan, text_tokens, steps, seed))
        return {"seconds": spent, "steps": steps, "kl": reached(healed.view)}

    def refitted(plan: Plan) -> tuple[Healed, dict[str, Any]]:
        """Refit, and return also what is reached."""
        fitted, spent = timed(partial(refit, stack, plan, text_tokens[:SEQUENCES]))
        sites = fitted.findings["refit"]
        return fitted, {"seconds": spent, "steps": 0, "kl": reached(fitted.view), "sites": sites}

    def refitted_and_healed_in(plan: Plan, seed: int, cost: float, seconds: float) -> list[dict[str, Any]]:
        """Refit, and distil for the rest of some CPU seconds; return what is reached after each."""
        fitted, alone = refitted(plan)
        steps = round((seconds - alone["seconds"]) / cost)
        healed, spent = timed(partial(distilled, stack, fitted.stack, plan, text_tokens, steps, seed))
        return [alone, {"seconds": alone["seconds"] + spent, "steps": steps, "kl": reached(healed.view)}]

    record = Record(
        "refit",
        f"{count} blocks of {TOKENS} tokens of {TEXT}; SmolLM2; tested on {' and '.join(tests)}; random seeds 0 to "
        f"{seeds[-1]}",
        seeds[0],
    )
    measured = ["CPU seconds", *(f"KL on {text}, nats" for text in tests)]
    rows = []
    for name, plan in plans.items():
        before = finished.once(f"{name}, cut", partial(lambda plan: reached(lamella.apply(stack, plan)), plan))
        alone = finished.once(f"{name}, refit", partial(lambda plan: refitted(plan)[1], plan))
        rows += [
            [f"{name} removed", 0, *before.values()],
            [f"{name} removed, refit", alone["seconds"], *alone["kl"].values()],
        ]
        for text in tests:
            kl = before[text], alone["kl"][text]
            result = f"{kl[1]:.3f} / {kl[0]:.3f}"
            record.check(f"KL on {text} without {name}, refit alone", "below that of the cut", result, kl[1] < kl[0])
        errors = [[site["site"], site["ridge"], site["before"], site["after"]] for site in alone["sites"]]
        columns = ["corrected", "ridge", "before", "after"]
        title = "squared relative error of the residual stream on held-out text"
        record.table(f"{name.capitalize()} removed: {title}", columns, errors)
    record.table(f"Refit alone, on {SEQUENCES} x {TOKENS} tokens", ["", *measured], rows)

    name, plan = next(iter(plans.items()))
    cost = finished.once(f"{name}, cost of a step", partial(cost_of_a_step, plan))
    found: dict[str, list[dict[str, Any]]] = {"distillation": [], "refit, then distillation": []}
    for seed in seeds:
        about, given = f"{name}, {seconds} s, seed {seed}", (plan, seed, cost, seconds)
        found["distillation"].append(finished.once(about, partial(healed_in, *given)))
        both = finished.once(f"{about}, refitted first", partial(refitted_and_healed_in, *given))
        found["refit, then distillation"].append(both[1])
    rows = [
        [label, seed, one["steps"], one["seconds"], *one["kl"].values()]
        for label, each in found.items()
        for seed, one in enumerate(each)
    ]
    record.table(
        f"{name.capitalize()} removed, {seconds} CPU seconds of healing", ["", "seed", "steps", *measured], rows
    )
    for text in tests:
        pairs = zip(found["distillation"], found["refit, then distillation"], strict=True)
        gains = [one["kl"][text] - other["kl"][text] for one, other in pairs]
        wins = min(gains) > 0 and (len(gains) == 1 or statistics.mean(gains) > statistics.stdev(gains))
        record.check(
            f"KL on {text} gained by refitting first, in the same CPU time",
            "positive for every seed, mean above its standard deviation",
            spread(gains),
            True if wins else False if max(gains) < 0 else None,
        )
    return record.finish(Path(__file__).parent / "results" / f"refit{'-quick' if quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
