"""PASER at small scale: a character-level Llama with four skills, cut in three ways, and SmolLM2 without six sublayers.

Checks that clusters follow the shape of the data, that the damage measured on responses ranks skills like their loss of
accuracy, that the most damaged skill gets more than its proportional part of the budget, and the gain of the selection
over random choices of equal size and equal steps, over no clusters, and over no concepts.

    python reproductions/paser.py            # about 30 minutes on 2 cores; an interrupted run resumes
    python reproductions/paser.py --quick    # less training and fewer seeds, without SmolLM2
"""

from __future__ import annotations

import importlib
import inspect
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import LETTERS, encode, trained
from scipy.stats import spearmanr
from sklearn.cluster import KMeans
from sklearn.datasets import make_moons

import lamella
from lamella.errors import MethodError
from lamella.methods.continual_pretrain import TRAINING, continual_pretrain
from lamella.methods.paser import Graph, InstructionExample, degradation, embed, paser, spectral_clusters
from lamella.plan import ModelReference, Plan
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Sample, collate, mean_loss, pairs, scored_states
from lamella.zoo import open_tokenizer

SKILLS = {
    "copy": lambda word: word,
    "upper": lambda word: word.upper(),
    "reverse": lambda word: word[::-1],
    "next": lambda word: "".join(chr(ord(letter) + 1) for letter in word),
}
TEMPLATES = ("{skill} {word}", "{skill} this: {word}")
CUTS = (["layers.1.attn", "layers.2.mlp"], ["layers.1.mlp", "layers.3.attn"], ["layers.2.attn", "layers.3.mlp"])

ANIMALS = ("cat", "dog", "horse", "bird", "fish", "mouse", "cow", "goat")
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "star", "triangle")
ASKED: dict[str, tuple[Callable[[random.Random], tuple[Any, ...]], tuple[str, ...]]] = {  # variable parts, and wordings
    "sum": (
        lambda drawn: (drawn.randint(2, 99), drawn.randint(2, 99)),
        (
            *("What is {} plus {}?", "Add {} and {}.", "Compute the sum of {} and {}."),
            *("How much do {} and {} make?", "Calculate {} + {}."),
        ),
    ),
    "reversal": (
        lambda drawn: ("".join(drawn.choices("abcdefghij", k=5)),),
        (
            *("Reverse the string {}.", "Write {} backwards.", "Spell {} from its end to its start."),
            *("Give the letters of {} in reverse order.", "What is {} read backwards?"),
        ),
    ),
    "colour": (
        lambda drawn: (drawn.choice(COLOURS), drawn.choice(SHAPES)),
        (
            *("The {0} shape is a {1}. Which shape is {0}?", "There is a {0} {1}. What colour is the {1}?"),
            *("A {1} was painted {0}. Name its colour.", "Everything {0} is a {1}. What is everything {0}?"),
            "My {1} is {0}. Which colour does my {1} have?",
        ),
    ),
    "translation": (
        lambda drawn: (drawn.choice(ANIMALS),),
        (
            *("Translate {} into French.", "What is the French word for {}?", "How does one say {} in French?"),
            *("Give the French translation of {}.", "Put the word {} into French."),
        ),
    ),
}
GRAPHS: tuple[Graph, ...] = ("knn", "dense")
MODULES = (
    *("os", "os.path", "posixpath", "shutil", "math", "random", "statistics", "itertools", "functools", "collections"),
    *("json", "re", "string", "textwrap", "inspect", "ast", "heapq", "bisect", "datetime", "calendar", "time"),
    *("tempfile", "glob", "fnmatch", "subprocess", "socket", "ssl", "logging", "threading", "asyncio", "types"),
    *("typing", "copy", "pickle", "zipfile", "tarfile", "gzip", "bz2", "lzma", "csv", "configparser", "hashlib"),
    *("hmac", "secrets", "base64", "binascii", "struct", "codecs", "unicodedata", "locale", "platform", "pathlib"),
    *("urllib.parse", "urllib.request", "http.client", "email.utils", "xml.dom.minidom", "html", "traceback"),
    *("warnings", "contextlib", "dataclasses", "enum", "fractions", "decimal", "operator", "pprint", "difflib"),
    *("tokenize", "dis"),
)


class Characters:
    """A tokenizer of single characters."""

    eos_token_id = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": encode(text).tolist()}


def examples(count: int, seed: int) -> list[InstructionExample]:
    """Return instructions on words of four letters, with an equal number of examples per skill."""
    drawn = random.Random(seed)
    made = []
    for number in range(count):
        skill = list(SKILLS)[number % len(SKILLS)]
        word = "".join(drawn.choices("abcdefghij", k=4))
        ask = drawn.choice(TEMPLATES).format(skill=skill, word=word)
        made.append(InstructionExample(f"{skill}-{number:05d}", ask, SKILLS[skill](word) + "\n"))
    return made


def samples(chosen: Sequence[InstructionExample]) -> list[Sample]:
    return pairs([(each.prompt, each.response) for each in chosen], Characters())


@torch.no_grad()
def accuracy(model: Any, held_out: Sequence[InstructionExample]) -> dict[str, float]:
    """Return the accuracy of greedy decoding for each skill."""
    right: dict[str, list[bool]] = {skill: [] for skill in SKILLS}
    for start in range(0, len(held_out), 100):
        part = held_out[start : start + 100]
        states, labels = scored_states(model, batch := collate(samples(part)))
        hits = Stack(model).logits(states).argmax(-1) == labels
        counts = (batch["labels"][:, 1:] != -100).sum(dim=1).tolist()
        for each, answer in zip(part, hits.split(counts), strict=True):
            right[each.id.split("-")[0]].append(bool(answer.all()))
    return {skill: sum(each) / len(each) for skill, each in right.items()}


def clustering(record: Record) -> None:
    points, true = make_moons(400, noise=0.05, random_state=0)

    def right(labels: np.ndarray) -> float:
        return max(float((labels == true).mean()), float((labels != true).mean()))

    ours = right(spectral_clusters(points, 2).labels)
    centres = right(KMeans(2, n_init=10, random_state=0).fit_predict(points))
    record.further("two moons, diffusion and non-negative factors", "95 %", f"{ours:.1%}", ours >= 0.95)
    record.further("two moons, k-means", "at most 90 %", f"{centres:.1%}", centres <= 0.9)


def purity(record: Record, seed: int) -> None:
    """Return the fraction of instructions in a cluster of mainly their own kind, with four kinds in five wordings."""
    drawn = random.Random(seed)
    asked = [forms[n % 5].format(*differing(drawn)) for differing, forms in ASKED.values() for n in range(250)]
    true = np.repeat(np.arange(len(ASKED)), 250)
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")

    def pure(labels: np.ndarray) -> float:
        return sum(np.bincount(true[labels == k]).max() for k in np.unique(labels)) / len(true)

    rows = []
    for name in ("hidden-mean", "tfidf", "minilm"):
        try:
            points = embed(name, stack, tokenizer, asked)
        except MethodError:
            continue  # minilm's weights are a separate package
        for graph in GRAPHS:
            found = spectral_clusters(points, graph=graph, seed=seed)
            given = spectral_clusters(points, len(ASKED), graph=graph, seed=seed)
            rows.append([name, graph, int(found.labels.max()) + 1, pure(found.labels), pure(given.labels)])
    columns = ["embedder", "graph", "clusters found", "purity", "purity of four"]
    record.table("1000 instructions of four kinds, in five wordings each", columns, rows)
    best = max((row[3] for row in rows if 3 <= row[2] <= 6), default=0.0)
    record.further("purity where 3 to 6 clusters are found, best embedder", ">= 90 %", f"{best:.1%}", best >= 0.9)


def awareness(record: Record, stack: Stack, held_out: Sequence[InstructionExample]) -> None:
    """Compare the damage of each skill under each cut with its loss of accuracy."""
    whole = accuracy(stack.model, held_out)
    rows, damage, drops = [], [], []
    lasting = []
    for cut in CUTS:
        view = lamella.apply(stack, Plan(model=ModelReference.of(stack), drop=cut))
        j, _ = degradation(stack.model, view, samples(held_out), batch=100)
        after = accuracy(view, held_out)
        scores = {
            skill: float(np.mean([j[k] for k, e in enumerate(held_out) if e.id.startswith(skill)])) for skill in SKILLS
        }
        for skill in SKILLS:
            damage.append(scores[skill])
            drops.append(whole[skill] - after[skill])
            rows.append([" ".join(cut), skill, scores[skill], whole[skill], after[skill]])
        lasting.append(max(scores.values()) / sum(scores.values()) * len(SKILLS))
    record.table("Damage and accuracy", ["cut", "skill", "CDS (nats)", "accuracy before", "after"], rows)
    worst = min(whole.values())
    record.exact("accuracy of the whole model", "95 % in every skill", f"{worst:.1%}", worst >= 0.95)
    rank = float(spearmanr(damage, drops).statistic)
    record.further("rank correlation of damage and lost accuracy", "0.8", rank, rank >= 0.8)
    record.further(
        "budget of the most damaged skill",
        "1.5 times its fraction of the pool, for at least one plan",
        ", ".join(f"{each:.2f}" for each in lasting),
        max(lasting) >= 1.5,
    )


def recovery(run: Run, stack: Stack, held_out: Sequence[InstructionExample], size: int, steps: int, seeds: int) -> None:
    """Compare selections of equal size, trained for equal steps."""
    plan = Plan(model=ModelReference.of(stack), drop=CUTS[0])

    def healed(name: str, seed: int) -> dict[str, float]:
        pool = examples(size, 50 + seed)
        if name == "random":
            chosen = random.Random(seed).sample(pool, size // 10)
        elif name == "full data":
            chosen = pool
        else:
            options = {"budget": 0.1, "embedder": "tfidf", "ntem": name == "paser", "batch": 100}
            chosen = paser(stack, pool, plan=plan, tokenizer=Characters(), **options).examples
        config = replace(TRAINING, steps=steps, lr=1e-3, batch=16, schedule="cosine", seed=seed)
        return accuracy(
            lamella.apply(continual_pretrain(stack, samples(chosen), plan, config=config, lora=8).stack, plan), held_out
        )

    before = accuracy(lamella.apply(stack, plan), held_out)
    rows, found = [["none", statistics.mean(before.values()), "", min(before.values())]], {}
    for name in ("random", "paser", "without concepts", "full data"):
        scores = [run.arm(f"{name}, seed {seed}", healed, name, seed) for seed in range(seeds)]
        means, worst = ([of(each.values()) for each in scores] for of in (statistics.mean, min))
        found[name] = (means, worst)
        spread = f"{statistics.stdev(means):.3f}" if seeds > 1 else ""
        rows.append([name, statistics.mean(means), spread, statistics.mean(worst)])
    run.table(
        f"Recovery: {steps} steps on a tenth of {size} samples, {seeds} seeds",
        ["data", "mean accuracy", "standard deviation", "worst skill"], rows,
    )  # fmt: skip
    on_mean, on_worst = (
        Measured.over_seeds(
            [100 * (ours - theirs) for ours, theirs in zip(found["paser"][k], found["random"][k], strict=True)]
        )
        for k in (0, 1)
    )
    either = {on_mean.at_least(2), on_worst.at_least(5)}
    passed = True if True in either else None if None in either else False
    run.main(
        "PASER against random",
        "2 points more on the mean, or 5 on the worst skill",
        f"{on_mean}, {on_worst}",
        passed,
    )


def poison(record: Record, stack: Stack, size: int) -> None:
    """Corrupt a tenth of the pool with wrong answers, which raise the loss but need not indicate damage."""
    plan = Plan(model=ModelReference.of(stack), drop=CUTS[0])
    drawn = random.Random(0)
    pool = []
    for number, each in enumerate(examples(size, 90)):
        wrong = "".join(drawn.choices("abcdefghij", k=4)) + "\n"
        pool.append(InstructionExample(f"{each.id}-bad", each.instruction, wrong) if number % 10 == 3 else each)
    shares = {}
    for ntem in (False, True):
        chosen = paser(
            stack, pool, plan=plan, tokenizer=Characters(), budget=0.1, embedder="tfidf", ntem=ntem, batch=100
        )
        shares[ntem] = sum(each.id.endswith("-bad") for each in chosen.examples) / len(chosen.examples)
    record.further(
        "wrong answers that are chosen", "at most their fraction of 10 %", f"{shares[True]:.1%}", shares[True] <= 0.1
    )
    measured = f"{shares[True]:.1%} with, {shares[False]:.1%} without"
    record.further(
        "wrong answers with concepts checked", "no more than without", measured, shares[True] <= shares[False]
    )


def documented(tokenizer: Any) -> list[InstructionExample]:
    """Return short functions of Python's standard library with their documented purpose."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute, value in sorted(vars(module).items()):
            text = (inspect.getdoc(value) or "").split("\n\n")[-1 if inspect.isbuiltin(value) else 0]
            if attribute.startswith("_") or not callable(value) or getattr(value, "__module__", None) != name:
                continue
            answer = " ".join(text.split())
            if len(answer) >= 40 and len(tokenizer(answer)["input_ids"]) <= 80:
                found.setdefault(
                    answer, InstructionExample(f"{name}.{attribute}", f"What does {name}.{attribute} do?", answer)
                )
    return list(found.values())


def language_model(record: Record, seed: int) -> None:
    """Heal SmolLM2 without six sublayers by LoRA, on a selected or a random fifth of the pool, in equal steps."""
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    everyone = documented(tokenizer)
    random.Random(seed).shuffle(everyone)
    held_out, pool = everyone[:80], everyone[80:560]
    tokens = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), 4, 128, seed)
    plan = lamella.make_plan("finercut", stack, tokens, share=0.1)[-1]  # 6 of 60 sublayers
    chosen = paser(stack, pool, plan=plan, tokenizer=tokenizer)
    columns = ["cluster", "samples", "CDS (nats)", "budget", "selected"]
    names = ("cluster", "size", "cds", "budget", "selected")
    record.table(
        f"SmolLM2 without 6 sublayers: clusters of {len(pool)} questions on Python's library",
        columns, [[each[name] for name in names] for each in chosen.findings["clusters"]],
    )  # fmt: skip
    test = pairs([(each.prompt, each.response) for each in held_out], tokenizer)

    def judged(model: Any) -> tuple[float, float]:
        return float(degradation(stack.model, model, test)[0].mean()), math.exp(mean_loss(model, test))

    drawn = random.Random(seed).sample(pool, len(chosen.examples))
    rows, found = [["the whole model", 0.0, math.exp(mean_loss(stack.model, test))]], {}
    for name, training in {"none": None, "random": drawn, "paser": chosen.examples}.items():
        healed = stack
        if training is not None:
            training_rows = pairs([(each.prompt, each.response) for each in training], tokenizer)
            config = replace(TRAINING, steps=80, lr=1e-3, schedule="cosine", seed=seed)
            healed = continual_pretrain(stack, training_rows, plan, config=config, lora=8).stack
        found[name] = judged(lamella.apply(healed, plan))
        rows.append([name, *found[name]])
    record.table(
        f"SmolLM2: 80 steps of LoRA on {len(drawn)} samples, {len(test)} held-out questions",
        ["data", "JSD to the original (nats)", "perplexity of the answers"], rows,
    )  # fmt: skip
    for name in ("random", "paser"):
        better = found[name][1] < found["none"][1]
        record.further(f"SmolLM2: perplexity after training on {name}", "lower than without", found[name][1], better)


def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    run.data = f"words of four letters to copy, raise, reverse or shift; {len(LETTERS)} characters"
    run.part("two moons", clustering)
    if not quick:
        run.part("purity", purity, seed)
    steps = 1200 if quick else 9000  # until every skill is above 95 %
    training = samples(examples(20_000, 1000 + seed))
    stack = trained(training, layers=4, hidden=64, steps=steps, seed=seed, name="skills", batch=32)
    held_out = examples(200 if quick else 1000, 2000 + seed)
    size = 400 if quick else 4000
    run.part("awareness", awareness, stack, held_out)
    recovery(run, stack, held_out, size, 30 if quick else 100, 1 if quick else 3)
    run.part("wrong answers", poison, stack, size)
    if not quick:
        run.part("SmolLM2", language_model, seed)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="less training and fewer seeds, without SmolLM2; under a minute"))
