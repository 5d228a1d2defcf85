"""Ways to heal a pruned SmolLM2, by the quality reached in the same time.

Nine layers are removed, and the rest is trained with adapters, a frozen vocabulary and bfloat16 as in `lamella
compress`, but from the pruned model and with four blocks in a step: for one, two, four and eight minutes. For four
minutes other ways are compared: the same with all weights; distillation of all weights and the vocabulary in float32;
and plain cross-entropy, all weights. All use the same text. The time of a step is measured beforehand for each,
alternately, and determines the number of steps. Fidelity is measured on kinds of text that are not trained on.

    python benchmarks/heal.py            # about half an hour on two cores; resumes after an interruption
    python benchmarks/heal.py --quick    # a few steps of each
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lamella
from lamella.commands.compress.healing import ADAPTERS, SCHEDULE, TEXT, TOKENS, UNSEEN, WHOLE
from lamella.commands.heal.training import available
from lamella.evaluate import FidelityTest
from lamella.files import Finished
from lamella.plan import ModelReference, Plan, materialise
from lamella.report.figures import Scatter
from lamella.report.plotting import svg
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Sample, Task, TrainConfig, distil, fit, own, response_loss
from lamella.train import blocks as samples_of
from lamella.zoo import computes_well, open_tokenizer
from lamella.zoo.cache import cache_folder

MINUTES = (1, 2, 4, 8)
COMPARED = 4  # minutes, of all ways
GOAL = 0.95  # nats, on kinds of text that are not trained on
OURS = "as compress heals"
BATCH, LR = 4, 2e-3  # blocks in a step
PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "heal.svg"
DROP = [3, 12, 13, 14, 15, 16, 17, 25, 26]  # the nine layers of least block influence (arXiv 2403.03853)
Train = Callable[[Stack, Plan, list[Sample], TrainConfig, Path], Stack]


def by_teacher(
    stack: Stack, plan: Plan, samples: list[Sample], config: TrainConfig, folder: Path, **options: Any
) -> Stack:
    return distil(stack, plan, samples, config=config, out=folder, intermediate=False, **options).stack


def by_text(stack: Stack, plan: Plan, samples: list[Sample], config: TrainConfig, folder: Path) -> Stack:
    student = materialise(stack, plan).model
    own(student)
    fit(student, samples, Task(response_loss), config, out=folder, trainable=lambda name: True)
    return Stack(student, name=f"{stack.name}, trained on text")


def arms(fast: bool) -> dict[str, tuple[Train, TrainConfig]]:
    """Return the compared variants: their training functions and learning rates."""
    config = TrainConfig(batch=BATCH, save_every=10_000, **SCHEDULE)
    return {
        OURS: (partial(by_teacher, **ADAPTERS), replace(config, lr=LR, bf16=fast)),
        "all weights": (partial(by_teacher, vocabulary=False), replace(config, lr=WHOLE["lr"], bf16=fast)),
        "vocabulary too, float32": (by_teacher, replace(config, lr=1e-4)),
        "cross-entropy, float32": (by_text, replace(config, lr=1e-4)),
    }


def timed(train: Train, *given: Any) -> tuple[Stack, float]:
    folder = Path(tempfile.mkdtemp(prefix="lamella-heal-"))
    begin = time.perf_counter()
    try:
        return train(*given, folder), time.perf_counter() - begin
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def curves(before: dict[str, Any], found: dict[tuple[str, float], dict[str, Any]]) -> Scatter:
    """Return KL over minutes on each text, and the other variants at the common training time."""
    points: dict[str, list[tuple[float, float]]] = {}
    for (name, minutes), each in found.items():
        for text in before:
            points.setdefault(f"{text}: {name}", []).append((minutes, each["fidelity"][text]["kl"]["mean"]))
    for text in before:
        points[f"{text}: {OURS}"].append((0, before[text]["kl"]["mean"]))
    return Scatter("minutes of healing", "KL from the whole model, nats", points, joined=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quick, seed = arguments.quick, arguments.seed
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    count = 16 if quick else available(tokenizer, TEXT, TOKENS, BATCH)
    tokens = lamella.windows(tokenizer, lamella.load_text(TEXT, "calibration"), count, TOKENS, seed)
    samples = samples_of(tokens, loss_on="all")
    plan = Plan(model=ModelReference.of(stack), drop=[f"layers.{layer}" for layer in DROP])
    tests = {
        name: FidelityTest(stack, lamella.windows(tokenizer, lamella.load_text(name, "test"), 8, TOKENS, seed))
        for name in UNSEEN[: 1 if quick else None]
    }
    compared = arms(computes_well(torch.bfloat16, stack.device))
    depends = {
        "seed": seed,
        "blocks": count,
        "plan": plan.digest,
        "arms": {name: str(config) for name, (_, config) in compared.items()},
    }
    finished = Finished(cache_folder() / "benchmarks" / f"heal{'-quick' if quick else ''}.jsonl", depends)

    def steps_cost() -> dict[str, float]:
        seconds: dict[str, list[float]] = {name: [] for name in compared}
        for _ in range(1 if quick else 3):
            for name, (train, config) in compared.items():  # alternately, so that all run under the same conditions
                seconds[name].append(timed(train, stack, plan, samples, replace(config, steps=4))[1] / 4)
        return {name: min(each) for name, each in seconds.items()}

    def reached(model: Any) -> dict[str, Any]:
        return {name: test.of(model).as_dict() for name, test in tests.items()}

    def trained(name: str, steps: int) -> dict[str, Any]:
        train, config = compared[name]
        healed, seconds = timed(train, stack, plan, samples, replace(config, steps=steps))
        return {"seconds": seconds, "fidelity": reached(healed.model)}

    cost = finished.once("cost of a step", steps_cost)
    before = finished.once("cut", lambda: reached(lamella.apply(stack, plan)))
    record = Record(
        "heal",
        f"{count} blocks of {TOKENS} tokens of {TEXT}; {len(DROP)} of {len(stack)} layers of SmolLM2 removed; tested "
        f"on {' and '.join(tests)}",
        seed,
    )
    record.table("A step of 4 blocks", ["", "seconds"], [[name, each] for name, each in cost.items()])
    found: dict[tuple[str, float], dict[str, Any]] = {}
    middle = 0.1 if quick else COMPARED
    for minutes in (middle,) if quick else MINUTES:
        for name in compared if minutes == middle else [OURS]:
            steps = max(2, int(60 * minutes / cost[name]))
            one = finished.once(f"{name}, {minutes} minutes", partial(trained, name, steps))
            found[name, minutes] = one | {"steps": steps}
    for text in tests:
        rows = [["cut", 0, 0, before[text]["kl"]["mean"], before[text]["kl"]["error"]]]
        rows += [
            [name, minutes, each["steps"], each["fidelity"][text]["kl"]["mean"], each["fidelity"][text]["kl"]["error"]]
            for (name, minutes), each in found.items()
        ]
        record.table(f"KL from the whole model on {text}, nats", ["", "minutes", "steps", "KL", "±"], rows)
    if not quick:
        PICTURE.write_text(svg(curves(before, found)) + "\n", encoding="utf-8")
    for text in tests:
        kl = {name: found[name, middle]["fidelity"][text]["kl"]["mean"] for name in compared}
        cut = before[text]["kl"]["mean"]
        record.check(f"KL on {text}, {OURS}", "below that of the cut", f"{kl[OURS]:.3f} / {cut:.3f}", kl[OURS] < cut)
        for name in compared:
            if name != OURS and not quick:
                record.check(f"KL on {text} in {middle} minutes, {OURS}", f"below that of {name}",
                             f"{kl[OURS]:.3f} / {kl[name]:.3f}", kl[OURS] < kl[name])  # fmt: skip
        if not quick:
            last = found[OURS, MINUTES[-1]]["fidelity"][text]["kl"]["mean"]
            record.check(
                f"KL on {text} in {MINUTES[-1]} minutes, {OURS}", f"at most {GOAL}", f"{last:.3f}", last <= GOAL
            )
    return record.finish(Path(__file__).parent / "results" / f"heal{'-quick' if quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
