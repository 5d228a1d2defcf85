"""Healing by distillation against healing by text, at equal wall-clock: SmolLM2 with four fifths of its parameters.

Minitron cuts the model. The same cut is trained twice on the same text, half written by the model itself and half
Python's documentation: to say what the whole model would say, and to say the next token. A step of distillation runs
the teacher too, so the second gets as many more steps as fit the same time. Both are measured on text of other kinds,
docstrings and arithmetic problems, so that the gain is not memorisation.

    python benchmarks/heal.py            # about 20 minutes on two cores
    python benchmarks/heal.py --quick    # a few steps of each
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lamella
from lamella.data import own_texts
from lamella.evaluate import FidelityTest
from lamella.plan import Plan, materialise
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Sample, Task, TrainConfig, distil, fit, own, response_loss
from lamella.train import blocks as samples_of
from lamella.zoo import open_tokenizer

LENGTH, BATCH, RATE = 128, 4, 1e-4
TESTS = ("stdlib", "gsm8k")


def texts(stack: Stack, count: int, seed: int) -> list[Sample]:
    """As many samples of the model's own as of documentation, in random order; all tokens count."""
    tokenizer = open_tokenizer("smollm2")
    written = own_texts(stack.model, count // 2, LENGTH - 1, seed=seed)
    read = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), count - count // 2, LENGTH, seed)
    samples = samples_of(read, loss_on="all")
    samples += [sample for text in written for sample in samples_of(text[None], loss_on="all")]
    random.Random(seed).shuffle(samples)
    return samples


def config(steps: int) -> TrainConfig:
    return TrainConfig(steps=steps, lr=RATE, batch=BATCH, warmup=0.1, save_every=steps)


def by_teacher(stack: Stack, plan: Plan, samples: list[Sample], steps: int, folder: Path) -> Stack:
    return distil(stack, plan, samples, config=config(steps), out=folder).stack


def by_text(stack: Stack, plan: Plan, samples: list[Sample], steps: int, folder: Path) -> Stack:
    """The optimizer, schedule and parameters of :func:`distil`, with cross-entropy."""
    student = materialise(stack, plan).model
    own(student)
    fit(student, samples, Task(response_loss), config(steps), out=folder, trainable=lambda name: True)
    return Stack(student, name=f"{stack.name}, trained on text")


def timed(train: Callable[..., Stack], *given: Any) -> tuple[Stack, float]:
    folder = Path(tempfile.mkdtemp(prefix="lamella-heal-"))
    begin = time.perf_counter()
    try:
        return train(*given, folder), time.perf_counter() - begin
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quick, seed = arguments.quick, arguments.seed
    steps, trial = (4, 2) if quick else (60, 4)
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    calibration = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), 8, 256, seed)
    plan = lamella.make_plan("minitron", stack, calibration, params=0.8)[-1]
    samples = texts(stack, 16 if quick else 240, seed)

    # What a step of each costs, in turn, so that both see the same machine.
    seconds: dict[str, list[float]] = {"teacher": [], "text": []}
    for _ in range(1 if quick else 3):
        for name, train in (("teacher", by_teacher), ("text", by_text)):
            seconds[name].append(timed(train, stack, plan, samples, trial)[1] / trial)
    ratio = min(seconds["teacher"]) / min(seconds["text"])
    taught, taught_seconds = timed(by_teacher, stack, plan, samples, steps)
    more = round(steps * ratio)
    read, read_seconds = timed(by_text, stack, plan, samples, more)

    view = lamella.apply(stack, plan)
    arms = {
        "cut": (view, 0, 0.0),
        "distilled": (taught.model, steps, taught_seconds),
        "on text": (read.model, more, read_seconds),
    }
    record = Record(
        "heal",
        f"{len(samples)} texts of up to {LENGTH} tokens, half written by SmolLM2 and half Python's documentation; "
        f"tested on {' and '.join(TESTS)}",
        seed,
    )
    found = {}
    for text in TESTS[: 1 if quick else None]:
        test = FidelityTest(stack, lamella.windows(tokenizer, lamella.load_text(text, "test"), 8, 256, seed))
        found |= {(text, name): test.of(model) for name, (model, _, _) in arms.items()}
        rows = [
            [name, step, taken, each.kl.mean, each.kl.error, each.perplexity.mean, each.perplexity.error]
            for name, (_, step, taken) in arms.items()
            for each in [found[text, name]]
        ]
        columns = ["", "steps", "seconds", "KL, nats", "±", "perplexity", "±"]
        base = found[text, "cut"].base_perplexity
        record.table(f"SmolLM2 at 0.8 of its parameters, on {text} (whole model: {base})", columns, rows)
    for (text, name), each in found.items():
        if name != "cut":
            cut = found[text, "cut"].kl.mean
            record.check(f"KL on {text}, {name}", "below that of the cut", f"{each.kl.mean:.3f} / {cut:.3f}",
                         each.kl.mean < cut)  # fmt: skip
    if not quick:
        for text in TESTS:
            ours, theirs = (found[text, name].kl.mean for name in ("distilled", "on text"))
            record.check(f"KL on {text}, distilled against on text, in the same time", "lower",
                         f"{ours:.3f} / {theirs:.3f}", ours < theirs)  # fmt: skip
    return record.finish(Path(__file__).parent / "results" / f"heal{'-quick' if quick else ''}.json")


if __name__ == "__main__":
    raise SystemExit(main())
