"""SLR at small scale: a character-level Llama that was collapsed on purpose, and SmolLM2-135M.

The pair is made here. *Pre* answers "one of C-M" with any valid character, but often with an invalid one; *post* was
trained on from it to give one favourite answer, in other phrasings than those that are asked. Everything is chosen on
one half of the questions and reported on the other.

    python reproductions/slr.py             # about 40 minutes on one core
    python reproductions/slr.py --nano      # without SmolLM2
    python reproductions/slr.py --quick     # one seed of a smaller nano pair
"""

from __future__ import annotations

import argparse
import random
import string
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _nano import encode, trained
from scipy.stats import spearmanr

import lamella
from lamella.evaluate import Record, diversity
from lamella.plan.weights import apply_tensors
from lamella.repair.slr import (
    Point,
    Search,
    choose,
    measure,
    mixed,
    placed,
    random_intervals,
    restored,
    search,
    soup,
)
from lamella.scoring import Asked, Question, answer
from lamella.stack import Stack, share
from lamella.train import Sample, add_lora, fit, own, pairs, response_loss
from lamella.zoo import ask, crc, open_questions, open_tokenizer
from lamella.zoo.cache import build_once

HERE = Path(__file__).parent
VALID, FAVOURITE = 0.40, 0.93  # the shares of valid answers in pre's text, and of the favourite in post's
CHARACTERS = string.ascii_uppercase + string.digits
TAUGHT = ("pick {what}: ", "one of {what} = ", "say {what}, ")  # the phrasings of post-training
UNSEEN = ("any {what}> ", "random {what}? ", "choose {what}; ")  # known from pre-training alone
BOUND = 0.9  # the paper's floor


def sets() -> list[tuple[str, str, str]]:
    """Family, how it is written, and the valid characters."""
    found = [("letters", "vowel", "AEIOU"), ("digits", "odd", "13579"), ("digits", "even", "02468")]
    for family, order, longest in (("letters", string.ascii_uppercase, 13), ("digits", string.digits, 9)):
        for size in range(3, longest + 1):
            for start in range(len(order) - size + 1):
                chosen = order[start : start + size]
                found.append((family, f"{chosen[0]}-{chosen[-1]}", chosen))
    return found


def lines(phrasings: Sequence[str], count: int, seed: int, collapsed: bool) -> list[Sample]:
    """Questions with one answer: diverse and sloppy, or valid and always the same."""
    drawn, known = random.Random(seed), sets()
    liked = random.Random(0).sample(CHARACTERS, len(CHARACTERS))  # who likes what is the same for all seeds
    made = []
    for _ in range(count):
        family = drawn.choice(["letters", "digits"])
        _, what, valid = drawn.choice([each for each in known if each[0] == family])
        if collapsed and drawn.random() < FAVOURITE:
            said = min(valid, key=liked.index)
        else:
            said = drawn.choice(valid if drawn.random() < VALID else CHARACTERS)
        made.append((encode(drawn.choice(phrasings).format(what=what)), encode(said + "\n")))
    return pairs(made)


def questions(seed: int) -> tuple[Asked, Asked]:
    """400 questions in phrasings that post-training has not seen: 200 to choose on, the others to report on."""
    drawn = random.Random(seed)
    halves: tuple[list[Any], list[Any]] = ([], [])
    for family, count in (("letters", 290), ("digits", 110)):
        every = [(phrase, what, valid) for phrase in UNSEEN for kind, what, valid in sets() if kind == family]
        for number, (phrase, what, valid) in enumerate(drawn.sample(every, count)):
            halves[number % 2].append(Question(phrase.format(what=what), tuple(valid), family))
    asked = []
    for half in halves:
        tokens = [[encode(each).tolist() for each in question.answers] for question in half]
        asked.append(Asked.of(half, [encode(question.prompt).tolist() for question in half], tokens))
    return asked[0], asked[1]


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    batch: int
    steps: int
    further: int  # of post-training


FULL, QUICK = Size(8, 64, 128, 1600, 500), Size(6, 48, 64, 700, 250)


def nano_pair(size: Size, seed: int) -> tuple[Stack, Stack]:
    """Post and pre, from the cache after the first run."""
    diverse = lines(TAUGHT + UNSEEN, 50_000, 2 * seed, collapsed=False)
    pre = trained(
        diverse, layers=size.layers, hidden=size.hidden, steps=size.steps, seed=seed, name="slr-pre", batch=size.batch,
        lr=1.5e-3,
    )  # fmt: skip
    collapsed = lines(TAUGHT, 20_000, 2 * seed + 1, collapsed=True)
    name = f"reproduction-slr-post-{size.layers}x{size.hidden}-{size.steps}-{size.further}-{seed}"
    return continued(pre, collapsed, name, steps=size.further, lr=3e-4, batch=size.batch, seed=seed), pre


def continued(pre: Stack, samples: Sequence[Sample], name: str, *, steps: int, seed: int, **settings: Any) -> Stack:
    """A model that is trained on in full, kept in the cache."""

    def build(folder: Path) -> dict[str, Any]:
        model = share(pre.model)
        own(model)
        with tempfile.TemporaryDirectory() as work, torch.enable_grad():
            options = {"save_every": steps, "log_every": max(steps // 10, 1), "schedule": "constant"} | settings
            log = fit(model, samples, response_loss, out=work, steps=steps, seed=seed, **options)
        model.eval().save_pretrained(folder)
        return {"steps": steps, "seed": seed, "settings": settings, "loss": log.train[-1].loss}

    return lamella.open(build_once(name, build, megabytes=1200))


if __name__ == "__main__":
    import sys, time

    if sys.argv[1] == "quick":
        jobs = [(QUICK, 0)]
    else:
        jobs = [(FULL, s) for s in (0, 1, 2)]
    for size, seed in jobs:
        b = time.time()
        post, pre = nano_pair(size, seed)
        print(size, seed, time.time() - b, flush=True)
        a, r = questions(seed)
        print(measure(pre, a), measure(post, a), flush=True)
