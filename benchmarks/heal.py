"""How far `lamella compress` heals a pruned SmolLM2, by the time that healing takes.

Nine layers are removed, those of least block influence. The result is healed as the command does by default, from a
refit in closed form, for increasing numbers of steps. Fidelity is measured on kinds of text that are not trained on,
and accuracy on questions about definitions (lm-evaluation-harness). Times are CPU time of one thread, which depends
little on the load of the machine; `benchmarks/ways.py` compares other ways to heal.

    python benchmarks/heal.py            # a quarter of an hour of one core; resumes after an interruption
    python benchmarks/heal.py --quick    # a few steps
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import lamella
from lamella.commands.compress.healing import ADAPTERS, FITTED, LR, SCHEDULE, TEXT, TOKENS, UNSEEN, Heal, heal_cut
from lamella.data import InputContext, Text
from lamella.evaluate import FidelityTest
from lamella.evaluate.tasks import score
from lamella.files import Finished, Work
from lamella.formatting import estimate
from lamella.plan import ModelReference, Plan
from lamella.report.figures import Scatter
from lamella.report.plotting import svg
from lamella.results import Record
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import cache_folder

STEPS = (0, 50, 100, 200, 400)  # 0: the refit alone
MOST = 0.95  # nats, after the most steps
TASK = "definitions"
PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "heal.svg"
DROP = [3, 12, 13, 14, 15, 16, 17, 25, 26]  # the nine layers of least block influence (arXiv 2403.03853)


def curves(found: dict[float, dict[str, Any]]) -> Scatter:
    """Return KL over CPU minutes on each text."""
    points: dict[str, list[tuple[float, float]]] = {}
    for minutes, fidelity in found.items():
        for text, each in fidelity.items():
            points.setdefault(text, []).append((minutes, each["kl"]["mean"]))
    return Scatter("CPU minutes of healing", "KL from the whole model, nats", points, joined=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick, seed = arguments.quick, arguments.seed
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    context = InputContext(lambda: tokenizer, seed)
    calibration = Text.open("pydoc", context, sequences=FITTED, length=TOKENS)
    plan = Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in DROP])
    tests = {
        name: FidelityTest(stack, lamella.windows(tokenizer, lamella.load_text(name, "test"), 8, TOKENS, seed))
        for name in UNSEEN[: 1 if quick else None]
    }
    depends = {"seed": seed, "plan": plan.digest, "how": str([ADAPTERS, FITTED, LR, SCHEDULE]), "task": TASK}
    finished = Finished(cache_folder() / "benchmarks" / f"heal{'-quick' if quick else ''}.jsonl", depends)

    def reached(model: Any) -> dict[str, Any]:
        (accuracy,) = score(model, tokenizer, [TASK], 16 if quick else None)
        return {
            "fidelity": {name: test.of(model).as_dict() for name, test in tests.items()},
            TASK: vars(accuracy.value),
        }

    def healed(steps: int) -> dict[str, Any]:
        how = Heal(steps=steps) if steps else Heal(way="refit", train=TEXT)
        begin = time.process_time()
        found, _ = heal_cut(stack, plan, context, how, Work(), calibration)
        assert found is not None
        return {"minutes": (time.process_time() - begin) / 60} | reached(found.view)

    found = {"cut": finished.once("cut", lambda: {"minutes": 0.0} | reached(lamella.apply(stack, plan)))}
    for steps in (0, 4) if quick else STEPS:
        found[str(steps)] = finished.once(f"{steps} steps", partial(healed, steps))

    record = Record(
        "heal",
        f"trained on {TEXT}; {len(DROP)} of {len(stack)} layers of SmolLM2 removed; tested on {' and '.join(tests)}",
        seed,
    )
    rows = [
        [
            {"cut": "cut", "0": "refit"}.get(name, f"{name} steps"),
            each["minutes"],
            *(estimate(each["fidelity"][text]["kl"]) for text in tests),
            estimate(each[TASK]),
        ]
        for name, each in found.items()
    ]
    whole = estimate(finished.once("whole", lambda: reached(stack.model))[TASK])
    columns = ["", "CPU minutes", *(f"KL on {text}, nats" for text in tests), f"{TASK} (whole model: {whole})"]
    record.table("Healing by its time", columns, rows)
    if not quick:
        PICTURE.write_text(svg(curves({each["minutes"]: each["fidelity"] for each in found.values()})) + "\n")
    for text in tests:
        kl = [each["fidelity"][text]["kl"]["mean"] for each in found.values()]
        shown = " / ".join(f"{each:.3f}" for each in kl)
        is_falling = all(after < before for before, after in pairwise(kl))
        record.check(f"KL on {text}", "falls with the time of healing", shown, is_falling)
        if not quick:
            record.check(f"KL on {text} at the end", f"at most {MOST:g}", kl[-1], kl[-1] <= MOST)
    return record.finish(Path(__file__).parent / "results" / f"heal{'-quick' if quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
