"""Which layers to remove from a model that will be healed, and what tells it beforehand.

SmolLM2 loses four, seven and nine layers, which are chosen by one pass (block influence, the angular window), by the
short search of `portfolio`, and by the same with its choice after a refit, as `lamella compress` plans. Every cut is
healed in the same way, from a refit and with one block of text in a step. The question is which measure before healing
puts the cuts into the order that they have afterwards: the divergence of the cut, or that after a refit. Fidelity is
measured on kinds of text that are neither planned nor trained on. All computations use one thread.

    python benchmarks/cuts.py            # an hour and a half of one core; resumes after an interruption
    python benchmarks/cuts.py --quick    # four layers, a few steps
"""

from __future__ import annotations

import argparse
import statistics
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from ways import BATCH, SEQUENCES, Way, distilled, layers_of, timed

import lamella
from lamella.commands.compress.healing import LR, TEXT, TOKENS, UNSEEN
from lamella.commands.heal.training import available
from lamella.data import InputContext, Text
from lamella.evaluate import FidelityTest
from lamella.files import Finished
from lamella.plan import ModelReference, Plan
from lamella.results import Record
from lamella.train.refit import refit
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import cache_folder

SIZES = (4, 7, 9)  # layers removed
STEPS = 70  # of healing: about 107 CPU seconds
FAR = 2.0  # a cut whose divergence is this many times the least one is not healed
OURS = "portfolio, after a refit"
SHORT: dict[str, Any] = {"greedy": False, "minutes": 1.6}  # a fifth of eight minutes of healing
PLANNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "block influence": ("shortgpt", {}),
    "angular window": ("window", {}),
    "portfolio": ("portfolio", SHORT),
    OURS: ("portfolio", SHORT | {"refit": True}),
}
WAY = Way(refits=True, config={"batch": 1, "lr": LR})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four layers, a few steps")
    parser.add_argument("--seeds", type=int, default=2, help="number of random seeds of healing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick, seeds = arguments.quick, range(1 if arguments.quick else arguments.seeds)
    steps, sizes = (2, SIZES[:1]) if quick else (STEPS, SIZES)
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    training = lamella.windows(
        tokenizer, lamella.load_text(TEXT, "calibration"), available(tokenizer, TEXT, TOKENS, BATCH), TOKENS, 0
    )
    calibration = Text.open("pydoc", InputContext(lambda: tokenizer), sequences=16, length=TOKENS)
    suffix = "-quick" if quick else ""
    depends = {"planners": PLANNERS, "steps": steps, "way": str(WAY)}
    finished = Finished(cache_folder() / "benchmarks" / f"cuts{suffix}.jsonl", depends)

    @cache
    def test_on(text: str) -> FidelityTest:
        """Return the test on a text; a run that only collects earlier results needs none."""
        return FidelityTest(stack, lamella.windows(tokenizer, lamella.load_text(text, "test"), 8, TOKENS, 0))

    def reached(model: Any) -> dict[str, float]:
        return {text: test_on(text).of(model).kl.mean for text in UNSEEN}

    def plan_of(drop: list[str]) -> Plan:
        return Plan(model=ModelReference.of(stack), drop=drop)

    def planned(slug: str, options: dict[str, Any], size: int) -> dict[str, Any]:
        """Return the layers that a planner removes, and its CPU time."""
        goal = {} if slug in ("shortgpt", "window") else {"share": size / len(stack)}
        series, spent = timed(partial(lamella.make_plan, slug, stack, calibration, **goal, **options))
        return {"drop": series.removing(2 * size).drop, "seconds": spent}

    def refitted(drop: list[str]) -> float:
        """Return the divergence on calibration text after a refit on other sequences of it, as portfolio judges."""
        fitted = refit(stack, plan_of(drop), calibration.cut(SEQUENCES, TOKENS))
        return FidelityTest(stack, calibration.more(4).tokens).of(fitted.view).kl.mean

    def healed(drop: list[str], seed: int) -> dict[str, float]:
        start = refit(stack, plan_of(drop), training[:SEQUENCES])
        assert isinstance(start.stack, lamella.stack.Stack)
        return reached(distilled(stack, start.stack, plan_of(drop), training, steps, seed, WAY).view)

    record = Record("cuts", f"planned on pydoc, healed on {TEXT}, tested on {' and '.join(UNSEEN)}", seeds[0])
    rows, found = [], {}
    for size in sizes:
        chosen = {
            name: finished.once(f"{size} layers by {name}", partial(planned, slug, options, size))
            for name, (slug, options) in PLANNERS.items()
        }
        by_layers: dict[str, list[str]] = {}
        for name, each in chosen.items():
            by_layers.setdefault(layers_of(each["drop"]), []).append(name)
        cuts = {layers: chosen[names[0]]["drop"] for layers, names in by_layers.items()}
        before = {
            layers: finished.once(
                f"without {layers}", partial(lambda drop: reached(lamella.apply(stack, plan_of(drop))), drop)
            )
            for layers, drop in cuts.items()
        }
        least = min(sum(each.values()) for each in before.values())
        for layers, drop in cuts.items():
            shown = [size, ", ".join(by_layers[layers]), layers, *before[layers].values()]
            if sum(before[layers].values()) > FAR * least:
                rows.append([*shown, "", *("" for _ in UNSEEN)])
                continue
            after = finished.once(f"refitted without {layers}", partial(refitted, drop))
            results = [
                finished.once(f"healed without {layers}, seed {seed}", partial(healed, drop, seed)) for seed in seeds
            ]
            means = [statistics.mean(each[text] for each in results) for text in UNSEEN]
            found[size, layers] = {"before": sum(before[layers].values()), "refit": after, "healed": sum(means)}
            rows.append([*shown, after, *means])
    columns = ["layers removed", "chosen by", "layers", *(f"KL on {text}, cut" for text in UNSEEN), "on pydoc, refit"]
    record.table(
        f"Cuts, and after {steps} steps of healing, nats (mean of {len(seeds)} seeds)",
        [*columns, *(f"KL on {text}, healed" for text in UNSEEN)],
        rows,
    )
    regrets: dict[str, list[float]] = {"before": [], "refit": []}
    for size in sizes:
        of_size = [each for (removed, _), each in found.items() if removed == size]
        for judge, lost in regrets.items():
            lost.append(min(of_size, key=lambda each: each[judge])["healed"] - min(each["healed"] for each in of_size))
    shown = {judge: " / ".join(f"{each:.3f}" for each in lost) for judge, lost in regrets.items()}
    record.check(
        "healed KL of the cut that is closest after a refit, minus the least one; sum over texts, for each size",
        f"less in all than for the cut that is closest before healing ({shown['before']})",
        shown["refit"],
        sum(regrets["refit"]) < sum(regrets["before"]),
    )
    return record.finish(Path(__file__).parent / "results" / f"cuts{suffix}.json")


if __name__ == "__main__":
    raise SystemExit(main())
