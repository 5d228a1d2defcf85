"""PASER at small scale: character-level Llamas with five skills, of which a cut damages one or two, and SmolLM2.

The main claim is that the selection heals better than a random one of equal size in equal steps, in a pool in which
damaged skills are rare, so that choosing matters: the premise is that training on the whole pool is better than on
random samples, whose choice could not matter otherwise. The learning rate of every arm is tuned. Other arms have the
damaged skills alone, true skills as clusters, other clusters, no concepts, random samples in clusters of the same
budgets, or the whole pool. Further checks are clusters of real instructions, whether damage ranks skills like their
lost accuracy, whether wrong answers are chosen, and a selection for SmolLM2.

    python reproductions/paser.py            # about 90 minutes on one core; an interrupted run resumes
    python reproductions/paser.py --quick    # a barely trained model, which does not meet the premise
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import LETTERS, encode, from_scratch, llama, taught_once
from scipy.stats import spearmanr

import lamella
from lamella.errors import MethodError
from lamella.measure import Embedder
from lamella.methods.continual_pretrain import TRAINING, continual_pretrain
from lamella.methods.paser import Clustering, Graph, InstructionExample, degradation, embed, paser, spectral_clusters
from lamella.plan import ModelReference, Plan
from lamella.report.figures import Bars
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Sample, collate, mean_loss, pairs, scored_states
from lamella.zoo import open_tokenizer

Drawn = tuple[tuple[Any, ...], str]  # the variable parts of an instruction, and its answer
Asked = Mapping[str, tuple[Callable[[random.Random], tuple[Any, ...]], tuple[str, ...]]]  # variable parts, and wordings

FRENCH = dict(
    cat="chat", dog="chien", horse="cheval", bird="oiseau", fish="poisson", mouse="souris", cow="vache", goat="chevre"
)
CAPITALS = dict(
    France="Paris", Italy="Rome", Spain="Madrid", Greece="Athens", Peru="Lima", Japan="Tokyo", Egypt="Cairo",
    Norway="Oslo",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def added(drawn: random.Random) -> Drawn:
    a, b = drawn.randint(2, 15), drawn.randint(2, 15)
    return (a, b), str(a + b)


def lettered(drawn: random.Random) -> tuple[str]:
    return ("".join(drawn.choices("abcdefghij", k=4)),)


def reversed_(drawn: random.Random) -> Drawn:
    (word,) = lettered(drawn)
    return (word,), word[::-1]


def looked_up(table: Mapping[str, str], drawn: random.Random) -> Drawn:
    word = drawn.choice(list(table))
    return (word,), table[word]


def counted(drawn: random.Random) -> Drawn:
    day, days = drawn.randrange(7), drawn.randint(2, 6)
    return (days, DAYS[day]), DAYS[(day + days) % 7]


SKILLS: dict[str, tuple[Callable[[random.Random], Drawn], tuple[str, ...]]] = {  # and their wordings
    "sum": (added, ("What is {} plus {}?", "Add {} and {}.")),
    "reversal": (reversed_, ("Reverse the string {}.", "Spell {} backwards.")),
    "translation": (partial(looked_up, FRENCH), ("Translate {} into French.", "What is {} in French?")),
    "capital": (partial(looked_up, CAPITALS), ("Name the capital of {}.", "What is the capital of {}?")),
    "day": (counted, ("Which day is {} days after {}?", "Count {} days on from {}.")),
}
RARE = 0.15  # of the pool, for damaged skills
BUDGET = 0.1  # of the pool
STEPS, POOL, HEALING = 3000, 2000, 100  # of training the models, samples, and steps of healing
SEEDS = 16  # with the worst skills of nine earlier models at -3.9, deviation 12, 15 decide
AFTER = 18  # seeds start here: smaller ones chose the rates, or are those earlier models
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
GAIN, GAIN_WORST = 2.0, 5.0  # points of accuracy over random samples, on the mean or on the worst skill
ENOUGH = f"at least {GAIN:g} points more on the mean, or {GAIN_WORST:g} on the worst skill"
SUBLAYERS = [f"layers.{layer}.{part}" for layer in range(4) for part in ("attn", "mlp")]


def skills_of(texts: Sequence[str]) -> np.ndarray:
    """Return the true skill of each instruction, as an embedding [n, skills]."""
    patterns = [
        "|".join(re.escape(wording).replace(r"\{\}", r"\w+") for wording in wordings) for _, wordings in SKILLS.values()
    ]
    return np.array([[bool(re.fullmatch(pattern, text)) for pattern in patterns] for text in texts], float)


CLUSTERINGS = {
    "paser": Clustering(),
    "paser, true skills": Clustering(skills_of, clusters=len(SKILLS), graph="dense"),
    "paser, tfidf": Clustering("tfidf", graph="knn"),
}
KNOWN, NO_CONCEPTS = CLUSTERINGS["paser, true skills"], "paser, true skills, no concepts"
BUDGETS = "paser's budgets, random samples"
ARMS = ("random", "damaged skills", *CLUSTERINGS, NO_CONCEPTS, BUDGETS, "whole pool")


ANIMALS = ("cat", "dog", "horse", "bird", "fish", "mouse", "cow", "goat")
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "star", "triangle")
ASKED: Asked = {
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
STRINGS: Asked = {
    "copy": (lettered, ("Copy the word {}.", "Repeat {} as it is.")),
    "upper": (lettered, ("Write {} in capital letters.", "Change {} to upper case.")),
    "reverse": (lettered, ("Reverse the word {}.", "Spell {} backwards.")),
    "next": (lettered, ("Shift each letter of {} by one.", "Replace letters of {} by the next ones.")),
    "sort": (lettered, ("Sort the letters of {}.", "Put {} in alphabetical order.")),
    "double": (lettered, ("Double each letter of {}.", "Write the letters of {} twice.")),
}
EMBEDDERS: tuple[Embedder, ...] = ("hidden-mean", "tfidf", "minilm")
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


def examples(skills: Sequence[str], seed: int) -> list[InstructionExample]:
    """Return an instruction for each of the given skills."""
    drawn = random.Random(seed)
    made = []
    for number, skill in enumerate(skills):
        draw, wordings = SKILLS[skill]
        parts, answer = draw(drawn)
        asked = drawn.choice(wordings).format(*parts)
        made.append(InstructionExample(f"{skill}-{number:05d}", asked, answer + "\n"))
    return made


def balanced(count: int, seed: int) -> list[InstructionExample]:
    """Return instructions with an equal number per skill."""
    return examples(list(itertools.islice(itertools.cycle(SKILLS), count)), seed)


def skill_of(example: InstructionExample) -> str:
    return example.id.split("-")[0]


def samples(chosen: Sequence[InstructionExample]) -> list[Sample]:
    return pairs([(each.prompt, each.response) for each in chosen], Characters())


@torch.no_grad()
def correct(model: Any, held_out: Sequence[InstructionExample]) -> list[float]:
    """Return 100 for each instruction whose answer by greedy decoding is correct, else 0."""
    found: list[float] = []
    for start in range(0, len(held_out), 100):
        states, labels = scored_states(model, batch := collate(samples(held_out[start : start + 100])))
        hits = Stack(model).logits(states).argmax(-1) == labels
        counts = (batch["labels"][:, 1:] != -100).sum(dim=1).tolist()
        found += [100.0 * bool(answer.all()) for answer in hits.split(counts)]
    return found


def by_skill(values: Sequence[float], held_out: Sequence[InstructionExample]) -> dict[str, float]:
    """Return the mean of the values over the instructions of each skill."""
    where = {skill: [k for k, each in enumerate(held_out) if skill_of(each) == skill] for skill in SKILLS}
    return {skill: float(np.mean(np.asarray(values)[of])) for skill, of in where.items()}


def base_of(seed: int, steps: int) -> Stack:
    """Return a model that was trained on all skills with a seed."""
    config = from_scratch(steps, lr=3e-3, batch=32, seed=seed)
    shape = llama(len(LETTERS), 64, 4, context=128)
    return taught_once(f"paser-skills-{steps}-{seed}", shape, lambda: samples(balanced(20_000, 1000 + seed)), config)


def plan_of(stack: Stack, cut: str) -> Plan:
    return Plan(model=ModelReference.of(stack), drop=[cut])


def damaged_by(stack: Stack) -> tuple[str, list[str]]:
    """Return the sublayer without which one or two skills lose far more than any other, and these skills."""
    validation = balanced(250, 3000)
    whole = by_skill(correct(stack.model, validation), validation)
    found = []
    for cut in SUBLAYERS:
        after = by_skill(correct(lamella.apply(stack, plan_of(stack, cut)), validation), validation)
        lost = {skill: whole[skill] - after[skill] for skill in SKILLS}
        order = sorted(lost, key=lambda skill: -lost[skill])
        found += [
            (float(np.mean([lost[skill] for skill in order[:count]])) - lost[order[count]], cut, order[:count])
            for count in (1, 2)
        ]
    _, cut, skills = max(found)
    return cut, skills


def pool_of(seed: int, damaged: Sequence[str], size: int) -> list[InstructionExample]:
    """Return a pool in which the damaged skills are rare; among themselves, and the others, skills are as frequent."""
    rare, others = itertools.cycle(damaged), itertools.cycle(skill for skill in SKILLS if skill not in damaged)
    count = round(RARE * size)
    return examples([*itertools.islice(rare, count), *itertools.islice(others, size - count)], 5000 + seed)


def prepared(seed: int, steps: int) -> dict[str, Any]:
    """Return the cut of a model with the skills that it damages, and the accuracy of each skill before and after."""
    stack, held_out = base_of(seed, steps), balanced(500, 2000)
    cut, damaged = damaged_by(stack)
    before = by_skill(correct(stack.model, held_out), held_out)
    items = correct(lamella.apply(stack, plan_of(stack, cut)), held_out)
    return {"cut": cut, "damaged": damaged, "before": before, "items": items, "after": by_skill(items, held_out)}


def selected(seed: int, steps: int, cut: str, damaged: Sequence[str], size: int) -> dict[str, Any]:
    """Return the indices in the pool that each arm trains on, and the fraction of them with damaged skills."""
    stack, pool = base_of(seed, steps), pool_of(seed, damaged, size)
    index_of = {each.id: index for index, each in enumerate(pool)}
    count = round(BUDGET * size)
    drawn = random.Random(seed)
    chosen = {
        "random": drawn.sample(range(size), count),
        "damaged skills": drawn.sample([k for k, each in enumerate(pool) if skill_of(each) in damaged], count),
        "whole pool": list(range(size)),
    }
    purity, clusters = {}, {}
    for name, clustering, ntem in (*((*each, True) for each in CLUSTERINGS.items()),
                                   (NO_CONCEPTS, KNOWN, False)):  # fmt: skip
        found = paser(
            stack, pool, plan_of(stack, cut), tokenizer=Characters(), budget=BUDGET, clustering=clustering, ntem=ntem,
            batch=100, seed=seed,
        ).findings  # fmt: skip
        chosen[name] = [index_of[each] for each in found["selected"]]
        skills = [list(SKILLS).index(each["id"].split("-")[0]) for each in found["samples"]]
        labels = np.array([each["cluster"] for each in found["samples"]])
        purity[name], clusters[name] = pure(labels, np.array(skills)), len(found["clusters"])
        if name == "paser":
            chosen[BUDGETS] = [
                index_of[found["samples"][k]["id"]]
                for each in found["clusters"]
                for k in drawn.sample(np.flatnonzero(labels == each["cluster"]).tolist(), each["selected"])
            ]
    rare = {name: float(np.mean([skill_of(pool[k]) in damaged for k in each])) for name, each in chosen.items()}
    return {"chosen": chosen, "rare": rare, "purity": purity, "clusters": clusters}


def healed(
    seed: int,
    steps: int,
    cut: str,
    damaged: Sequence[str],
    size: int,
    chosen: Sequence[int],
    healing: int,
    rate: float,
    validation: bool = False,
) -> list[float]:
    """Return which held-out instructions are answered correctly after training on the chosen samples."""
    stack, pool = base_of(seed, steps), pool_of(seed, damaged, size)
    config = replace(TRAINING, steps=healing, lr=rate, batch=16, schedule="cosine", seed=seed)
    plan = plan_of(stack, cut)
    trained = continual_pretrain(stack, samples([pool[k] for k in chosen]), plan, config=config, lora=8).stack
    return correct(lamella.apply(trained, plan), balanced(250, 3000) if validation else balanced(500, 2000))


def pure(labels: np.ndarray, true: np.ndarray) -> float:
    """Return the fraction of instructions in a cluster of mainly their own kind."""
    return sum(np.bincount(true[labels == k]).max() for k in np.unique(labels)) / len(true)


def error(arguments: Sequence[Sequence[Any]], rate: float) -> float:
    """Return the mean error on validation data at a learning rate, in points."""
    return 100 - float(np.mean([healed(*each, rate, validation=True) for each in arguments]))


class Recovery:
    """The models of all seeds, each with its cut, its pool and the arms that heal it."""

    def __init__(self, run: Run, steps: int, size: int, healing: int) -> None:
        self.run, self.steps, self.size, self.healing = run, steps, size, healing
        self.held_out = balanced(500, 2000)
        self.rates: dict[str, float] = {}

    def model(self, seed: int) -> dict[str, Any]:
        return dict(self.run.arm(f"model {seed}", prepared, seed, self.steps))

    def chosen(self, seed: int) -> dict[str, Any]:
        given = (seed, self.steps, *(self.model(seed)[name] for name in ("cut", "damaged")), self.size)
        return dict(self.run.arm(f"selections {seed}", selected, *given))

    def given(self, arm: str, seed: int) -> list[Any]:
        """Return the arguments of :func:`healed` before the rate."""
        model, chosen = self.model(seed), self.chosen(seed)["chosen"][arm]
        return [seed, self.steps, model["cut"], model["damaged"], self.size, chosen, self.healing]

    def tune(self, seeds: Sequence[int], grid: Sequence[float]) -> None:
        """Choose the rate of each arm on validation data."""
        scores = {arm: partial(error, [self.given(arm, seed) for seed in seeds]) for arm in ARMS}
        self.rates = {arm: each.value for arm, each in tuned(self.run, scores, grid).items()}

    def items(self, arm: str, seed: int) -> list[float]:
        """Return the results of the test items."""
        if arm == "none":
            return list(self.model(seed)["items"])
        return list(self.run.arm(f"{arm}, seed {seed}", healed, *self.given(arm, seed), self.rates[arm]))

    def differences(self, arm: str, other: str, seeds: Sequence[int]) -> np.ndarray:
        """Return the paired differences between two arms [seeds, items], in points."""
        return np.array([np.subtract(self.items(arm, seed), self.items(other, seed)) for seed in seeds])

    def gain(self, arm: str, other: str, seeds: Sequence[int]) -> Measured:
        """Return the difference between the mean accuracies of two arms, in points."""
        return Measured.over_seeds_and_items(self.differences(arm, other, seeds))

    def better(self, arm: str, other: str, seeds: Sequence[int]) -> tuple[str, bool | None]:
        """Return both gains over another arm, and whether one of them is large enough."""
        on_mean, on_worst = self.gain(arm, other, seeds), self.gain_of_worst(arm, other, seeds)
        either = {on_mean.at_least(GAIN), on_worst.at_least(GAIN_WORST)}
        return f"{on_mean}, {on_worst}", True if True in either else None if None in either else False

    def worst(self, arm: str, seed: int) -> float:
        return min(by_skill(self.items(arm, seed), self.held_out).values())

    def gain_of_worst(self, arm: str, other: str, seeds: Sequence[int]) -> Measured:
        """Return the difference between the accuracies of each arm's worst skill, in points."""
        return Measured.over_seeds([self.worst(arm, seed) - self.worst(other, seed) for seed in seeds])


def premises(run: Run, models: Sequence[Mapping[str, Any]]) -> None:
    """Check that the models have all skills, and that each cut damages one or two of them."""
    rows, lost, others = [], [], []
    for seed, each in enumerate(models):
        drops = {skill: each["before"][skill] - each["after"][skill] for skill in SKILLS}
        lost.append(float(np.mean([drops.pop(skill) for skill in each["damaged"]])))
        others.append(float(np.mean(list(drops.values()))))
        rows.append([seed, each["cut"], ", ".join(each["damaged"]), *each["before"].values(), *each["after"].values()])
    columns = ["seed", "cut", "damaged", *(f"{skill} {when}" for when in ("before", "after") for skill in SKILLS)]
    run.table("Models of the pilot: accuracy by skill before and after the cut, %", columns, rows)
    known = min(min(each["before"].values()) for each in models)
    run.premise("accuracy of the whole models, worst skill, %", "at least 95", known, known >= 95)
    apart = Measured.over_seeds([mine - theirs for mine, theirs in zip(lost, others, strict=True)])
    run.premise("accuracy lost, damaged skills - the others, points", "at least 20", apart, apart.at_least(20))


def recovery(run: Run, healing: Recovery, pilot: Sequence[int]) -> None:
    """Compare selections of equal size, trained for equal steps at their best rates."""
    premises(run, [healing.model(seed) for seed in pilot])
    healing.tune(pilot, RATES)
    seeds = [AFTER + k for k in range(SEEDS)]
    run.freeze(
        "mean over seeds and test items of paser - random, and the mean over seeds of the same for the worst skill",
        seeds, steps=healing.steps, pool=healing.size, budget=BUDGET, rare=RARE, healing=healing.healing,
        grid=list(RATES), rates=healing.rates,
    )  # fmt: skip
    more = healing.gain("whole pool", "random", seeds)
    run.premise("training on the whole pool - on random samples, accuracy", "above 0", more, more.at_least(0))
    rows = []
    for arm in ("none", *ARMS):
        items = [healing.items(arm, seed) for seed in seeds]
        worst = [healing.worst(arm, seed) for seed in seeds]
        selections = [healing.chosen(seed) for seed in seeds]
        about = [
            float(np.mean([each[kind][arm] for each in selections])) if arm in selections[0][kind] else ""
            for kind in ("rare", "clusters", "purity")
        ]
        rows.append([arm, float(np.mean(items)), float(np.mean(worst)), *about])
    run.table(
        f"Recovery: {healing.healing} steps on {round(BUDGET * healing.size)} of {healing.size} samples, "
        f"mean of {len(seeds)} seeds",
        ["trained on", "accuracy, %", "worst skill, %", "damaged skills, of the samples", "clusters", "their purity"],
        rows,
    )
    shown = {name: [row[place] for row in rows] for place, name in ((1, "all skills"), (2, "worst skill"))}
    run.figure(
        "paser-recovery", Bars("trained on", "accuracy, %", shown, tuple(row[0] for row in rows), horizontal=True)
    )
    run.main("paser - random, accuracy", ENOUGH, *healing.better("paser", "random", seeds))
    for arm, other in (
        ("damaged skills", "random"), ("paser, true skills", "random"), ("paser", "paser, tfidf"),
        ("paser, true skills", NO_CONCEPTS), (BUDGETS, "random"), ("paser", BUDGETS), ("paser", "whole pool"),
    ):  # fmt: skip
        gain = healing.gain(arm, other, seeds)
        run.further(f"{arm} - {other}, mean accuracy, points", "at least 0", gain, gain.at_least(0))


def awareness(record: Record, seeds: Sequence[int], steps: int) -> None:
    """Compare the damage of each skill with its loss of accuracy, under the cuts of single sublayers."""
    ranks, shares = [], []
    held_out = balanced(250, 4000)
    for seed in seeds:
        stack = base_of(seed, steps)
        whole = by_skill(correct(stack.model, held_out), held_out)
        damage, drops = [], []
        for cut in SUBLAYERS:
            view = lamella.apply(stack, plan_of(stack, cut))
            scores = by_skill(degradation(stack.model, view, samples(held_out), batch=100)[0], held_out)
            after = by_skill(correct(view, held_out), held_out)
            damage += scores.values()
            drops += [whole[skill] - after[skill] for skill in SKILLS]
            shares.append(max(scores.values()) / sum(scores.values()) * len(SKILLS))
        ranks.append(float(spearmanr(damage, drops).statistic))
    rank = Measured.over_seeds(ranks)
    record.further(
        "rank correlation of damage and lost accuracy, 5 skills, 8 cuts", "at least 0.8", rank, rank.at_least(0.8)
    )
    record.further(
        "budget of the most damaged skill, relative to its fraction of a balanced pool",
        "at least 1.5, median over cuts and models", float(np.median(shares)), float(np.median(shares)) >= 1.5,
    )  # fmt: skip


def poison(run: Run, healing: Recovery, seeds: Sequence[int]) -> None:
    """Corrupt a tenth of the pool with wrong answers, which raise the loss but need not indicate damage."""
    given = [healing.given("random", seed)[:5] for seed in seeds]
    found = [run.arm(f"wrong answers, seed {each[0]}", wrong_chosen, *each) for each in given]
    chosen = Measured.over_seeds([with_ for with_, _ in found])
    run.further("wrong answers that are chosen, %", "at most their 10 % of the pool", chosen, chosen.at_most(10))
    more = Measured.over_seeds([with_ - without for with_, without in found])
    run.further("wrong answers with concepts checked - without, points", "at most 0", more, more.at_most(0))


def wrong_chosen(seed: int, steps: int, cut: str, damaged: Sequence[str], size: int) -> list[float]:
    """Return the percentage of wrong answers in a selection, with and without checking concepts."""
    stack, drawn, pool = base_of(seed, steps), random.Random(seed), pool_of(seed, damaged, size)
    for number in range(3, size, 10):
        answers = sorted({each.response for each in pool if skill_of(each) == skill_of(pool[number])})
        wrong = drawn.choice([each for each in answers if each != pool[number].response])
        pool[number] = replace(pool[number], id=f"{pool[number].id}-bad", response=wrong)
    return [
        100 * float(np.mean([each.id.endswith("-bad") for each in paser(
            stack, pool, plan_of(stack, cut), tokenizer=Characters(), budget=BUDGET, clustering=KNOWN, ntem=ntem,
            batch=100,
        ).examples]))
        for ntem in (True, False)
    ]  # fmt: skip


def purity(record: Record, seed: int) -> None:
    """Cluster instructions of distinct kinds, and of similar ones."""
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    best = 0.0
    for title, kinds, each in (("of four kinds, in five wordings each", ASKED, 250),
                               ("of six operations on strings, in two wordings each", STRINGS, 100)):  # fmt: skip
        drawn = random.Random(seed)
        asked = [forms[n % len(forms)].format(*parts(drawn)) for parts, forms in kinds.values() for n in range(each)]
        true = np.repeat(np.arange(len(kinds)), each)
        rows = []
        for name in EMBEDDERS:
            try:
                points = embed(name, stack, tokenizer, asked)
            except MethodError:
                continue  # minilm's weights are a separate package
            for graph in GRAPHS:
                found = spectral_clusters(points, graph=graph, seed=seed)
                given = spectral_clusters(points, len(kinds), graph=graph, seed=seed)
                count = int(found.labels.max()) + 1
                rows.append([name, graph, count, pure(found.labels, true), pure(given.labels, true)])
                if kinds is ASKED and 3 <= count <= 6:
                    best = max(best, rows[-1][3])
        columns = ["embedder", "graph", "clusters found", "purity", "purity of the true number"]
        record.table(f"{len(asked)} instructions {title}", columns, rows)
    record.further("four kinds: purity where 3 to 6 clusters are found, best embedder", ">= 90 %", f"{best:.1%}",
                   best >= 0.9)  # fmt: skip


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
    quick = run.quick
    run.data = f"instructions of five skills; {len(LETTERS)} characters"
    healing = Recovery(run, 200 if quick else STEPS, 200 if quick else POOL, HEALING)
    pilot = range(1 if quick else 3)
    run.part("awareness", awareness, pilot, healing.steps)
    if not quick:
        run.part("purity", purity, run.seed)
        run.part("SmolLM2", language_model, run.seed)
        poison(run, healing, pilot)
    recovery(run, healing, pilot)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a barely trained model, which does not meet the premise; under a minute"))
