"""Whether `lamella compress` chooses the route with the least loss: at three speed-ups, beside an exhaustive list.

For each target, `compress` chooses among int8, cuts and both. Then the cuts of three planners at every size, each with
its weights as they are and in int8, are compared with its choice: those that are predicted to reach the target are
measured, as long as their divergence is less than that of the chosen route before healing. Those that reach it are
healed in the same time as the choice, which `compress` makes by what can be corrected, not by the divergence before.

    python benchmarks/routes.py            # 20 minutes on two idle cores
    python benchmarks/routes.py --quick    # a nano model
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lamella
from lamella.commands.compress.forms import STEPS, Form, int8_form, plain_form
from lamella.commands.compress.goal import TOLERANCE
from lamella.evaluate import FidelityTest, bench
from lamella.files import Finished
from lamella.formatting import ratio
from lamella.plan import ModelReference, Plan, PlanSeries, Point
from lamella.results import Record
from lamella.stack import Stack
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import cache_folder

TARGETS = (1.3, 1.8, 2.3)
PLANNERS = ("shortgpt", "window", "portfolio")
MOST = 0.5  # fraction of the layers that the exhaustive list removes at most
NANO = Path(__file__).parents[1] / "tests" / "models" / "nano-llama"


@dataclass
class Listed:
    """A route of the exhaustive list.

    Attributes:
        name: planner, number of removed layers and form.
        form: form of the weights.
        plan: the plan.
        kl: KL divergence from the original, nats.
    """

    name: str
    form: Form
    plan: Plan
    kl: float


def exhaustive(stack: Stack, test: FidelityTest, tokens: Any, seed: int) -> list[Listed]:
    """Return all routes with their divergence, the closest to the original first."""
    forms = [each for each in (plain_form(stack), int8_form(stack)) if each is not None]
    whole = Plan(model=ModelReference.of(stack))
    plans = {"nothing removed": whole}
    for slug in PLANNERS:
        options: dict[str, Any] = {"greedy": False, "refine": 1} if slug == "portfolio" else {}
        series = lamella.make_plan(slug, stack, tokens, share=MOST, **options)
        plans |= {f"{slug}, {len(plan.drop)} layers removed": plan for plan in series if plan.drop}
    found = []
    for name, plan in plans.items():
        for form in forms:
            kl = test.of(form.view(stack, plan)).kl.mean
            found.append(Listed(f"{name}{', int8' if form.name else ''}", form, plan, kl))
    return sorted(found, key=lambda each: each.kl)


def closer(stack: Stack, listed: list[Listed], target: float, kl: float) -> list[Listed]:
    """Return the routes that are measured to reach a target with less divergence, before healing."""
    found = []
    for each in listed:
        if each.kl >= kl:
            break
        if each.form.predicted(each.plan) < TOLERANCE**2 * target:
            continue
        timings = bench({"original": stack.model, "route": each.form.view(stack, each.plan)}, tokens=STEPS)
        if timings["route"][0].decode_speedup.median >= target:
            found.append(each)
    return found


def compressed(model: Any, target: float, minutes: float, seed: int, plan: Plan | None = None) -> dict[str, Any]:
    """Return what `compress` chose, or made of a given plan, and what it measured."""
    given = None if plan is None else PlanSeries(model=plan.model, points=[Point(), Point(drop=plan.drop)])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        evidence = lamella.run(
            "compress",
            model,
            plan=given,
            out=out,
            speedup=target,
            heal_minutes=minutes,
            allow=("quantize", "cut"),
            seed=seed,
        ).evidence.model_dump()
    chosen = evidence["chosen"]
    healed = evidence["healing"] or {"fidelity": chosen["fidelity"]}
    return {
        "route": chosen["route"],
        "layers": len(chosen["drop"]),
        "reached": chosen["reached"],
        "speedup": chosen["timings"][0]["decode_speedup"]["median"],
        "kl": chosen["fidelity"]["kl"]["mean"],
        "healed": healed["fidelity"]["kl"]["mean"],
        "int8": chosen["alternatives"]["int8"]["speedup"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a nano model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, suffix, seed = NANO if arguments.quick else "smollm2", "-quick" if arguments.quick else "", arguments.seed
    minutes, shape = (0.1, (2, 64)) if arguments.quick else (1.0, (8, 256))
    stack, tokenizer = lamella.open(model), open_tokenizer(model)
    tokens = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), 4, shape[1], seed)
    judge = lamella.windows(tokenizer, lamella.load_text("stdlib", "test"), *shape, 0)
    finished = Finished(cache_folder() / "benchmarks" / f"routes{suffix}.jsonl", {"seed": seed, "targets": TARGETS})
    record = Record("routes", f"the test windows of compress ({shape[0]} of {shape[1]} tokens of stdlib)", seed)
    listed = exhaustive(stack, FidelityTest(stack, judge), tokens, seed)
    rows = []
    for target in TARGETS:
        found = finished.once(f"{target}", lambda target=target: compressed(model, target, minutes, seed))
        others = closer(stack, listed, target, found["kl"])
        healed = {
            each.name: finished.once(
                f"{target}, {each.name}", partial(compressed, model, target, minutes, seed, each.plan)
            )["healed"]
            for each in others
        }
        rows.append(
            [
                ratio(target),
                ratio(found["int8"]),
                f"{found['route']}, {found['layers']} layers removed",
                ratio(found["speedup"]),
                f"{found['kl']:.3f}",
                f"{found['healed']:.3f}",
                "; ".join(f"{each.name}: {each.kl:.3f}, healed {healed[each.name]:.3f}" for each in others),
            ]
        )
        least = [name for name, kl in healed.items() if kl < found["healed"]]
        name = f"{target:g}: routes of the list that reach it with a lower divergence, healed too"
        record.check(name, "none", ", ".join(least) or "none", not least)
    columns = ["target", "int8 alone", "chosen", "speed-up", "KL, nats", "KL healed", "closer before healing"]
    record.table(f"Routes that compress chose; {len(listed)} others were listed", columns, rows)
    return record.finish(Path(__file__).parent / "results" / f"routes{suffix}.json")


if __name__ == "__main__":
    raise SystemExit(main())
