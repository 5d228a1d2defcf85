"""SLR at small scale: character-level Llamas that were collapsed on purpose, and SmolLM2-135M.

The pairs are made here. *Pre* answers "one of C-M" with any valid character, but often with an invalid one; *post* was
fine-tuned from it to give one favourite answer, in other phrasings than those of the evaluation. The main claim, after
4000 steps of post-training, is that the chosen range of layers is more diverse than post, valid enough, and more
diverse than the soup of both models that is as valid. Whether a soup works depends on how far the models are apart, so
shorter post-trainings are compared too, with the loss along the line between the models. Everything is chosen on one
half of the questions and reported on the other.

    python reproductions/slr.py             # about an hour and a half on one core; an interrupted run resumes
    python reproductions/slr.py --nano      # without SmolLM2
    python reproductions/slr.py --quick     # one smaller pair
"""

from __future__ import annotations

import math
import random
import string
import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import digest, encode, nats, taught, trained
from numpy.typing import NDArray

import lamella
from lamella.methods.slr import (
    Interval,
    MixedModel,
    answer,
    answerable,
    choose,
    diversity,
    fixed_intervals,
    measure,
    measure_restored,
    mix_models,
    open_questions,
    random_intervals,
    search,
    soup,
)
from lamella.methods.slr.answers import ChoiceQuestion, EncodedQuestions
from lamella.methods.slr.questions import SETS, crc, encode_questions
from lamella.plan import apply_tensors, fingerprint, parameters_at
from lamella.report.figures import Scatter
from lamella.results import Record
from lamella.stack import Stack, share
from lamella.train import Sample, TrainConfig, own, pairs
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import build_once

VALID, FAVOURITE = 0.40, 0.93  # the fractions of valid answers in pre's text, and of the favourite in post's
TAUGHT = ("pick {what}: ", "one of {what} = ", "say {what}, ")  # the phrasings of post-training
UNSEEN = ("any {what}> ", "random {what}? ", "choose {what}; ")  # known from pre-training alone
BOUND = 0.9  # the paper's floor
MORE_THAN_POST, MORE_THAN_SOUP = 0.20, 0.05  # required gain of diversity
SOUPS = {"soup": False, "blocks-only soup": True}
SOUP = 21  # mixtures from post to pre, as in the paper
BETWEEN = 20  # interpolated points from one mixture to the next


def sets(letters: int) -> list[tuple[str, str, str]]:
    """Return the family, the phrase and the valid characters of each set, of the first letters and of the digits."""
    alphabet = string.ascii_uppercase[:letters]
    vowels = "".join(letter for letter in alphabet if letter in "AEIOU")
    found = [("letters", "vowel", vowels), ("digits", "odd", "13579"), ("digits", "even", "02468")]
    for family, order, longest in (("letters", alphabet, letters // 2), ("digits", string.digits, letters // 2 + 1)):
        for size in range(3, min(longest, len(order) - 1) + 1):
            for start in range(len(order) - size + 1):
                chosen = order[start : start + size]
                found.append((family, f"{chosen[0]}-{chosen[-1]}", chosen))
    return found


def lines(letters: int, phrasings: Sequence[str], count: int, seed: int, collapsed: bool) -> list[Sample]:
    """Return questions with one answer: diverse with some invalid answers, or valid and always the same."""
    drawn, known = random.Random(seed), sets(letters)
    characters = string.ascii_uppercase[:letters] + string.digits
    liked = {what: random.Random(what).choice(valid) for _, what, valid in known}  # each set has a favourite of its own
    made = []
    for _ in range(count):
        family = drawn.choice(["letters", "digits"])
        _, what, valid = drawn.choice([each for each in known if each[0] == family])
        if collapsed and drawn.random() < FAVOURITE:
            said = liked[what]
        else:
            said = drawn.choice(valid if drawn.random() < VALID else characters)
        made.append((encode(drawn.choice(phrasings).format(what=what)), encode(said + "\n")))
    return pairs(made)


def questions(letters: int) -> tuple[EncodedQuestions, EncodedQuestions]:
    """Return up to 400 questions in phrasings unseen in post-training: half for selection, half for testing."""
    drawn = random.Random(0)
    halves: tuple[list[Any], list[Any]] = ([], [])
    for family, count in (("letters", 290), ("digits", 110)):
        every = [(phrase, what, valid) for phrase in UNSEEN for kind, what, valid in sets(letters) if kind == family]
        for number, (phrase, what, valid) in enumerate(drawn.sample(every, min(count, len(every)))):
            halves[number % 2].append(ChoiceQuestion(phrase.format(what=what), tuple(valid), family))
    encoded = []
    for half in halves:
        tokens = [[encode(each).tolist() for each in question.answers] for question in half]
        encoded.append(EncodedQuestions.of(half, [encode(question.prompt).tolist() for question in half], tokens))
    return encoded[0], encoded[1]


@dataclass(frozen=True)
class Size:
    """Nano pairs: their model, their task, and how both are trained."""

    layers: int
    hidden: int
    letters: int
    batch: int
    steps: int
    lr: float
    displacements: tuple[int, ...]  # steps of post-training; the main claim is about the last
    further_batch: int
    further_lr: float


FULL = Size(
    8, 64, 26, batch=64, steps=1600, lr=1.5e-3, displacements=(200, 500, 1000, 2000, 4000), further_batch=16,
    further_lr=3e-4,
)  # fmt: skip
QUICK = Size(
    6, 48, 8, batch=32, steps=400, lr=3e-3, displacements=(100, 300), further_batch=32, further_lr=3e-4
)  # fmt: skip


def nano_pair(size: Size, seed: int, displacement: int) -> tuple[Stack, Stack]:
    """Return post and pre, from the cache after the first run.

    Post-training goes on from one displacement to the next, with a fresh optimizer and new lines.
    """
    diverse = lines(size.letters, TAUGHT + UNSEEN, 50_000, 2 * seed, collapsed=False)
    pre = post = trained(
        diverse, layers=size.layers, hidden=size.hidden, steps=size.steps, seed=seed, batch=size.batch, lr=size.lr,
        tied=False, name=f"slr-{digest(diverse)}",
    )  # fmt: skip
    before = 0
    for steps in size.displacements:
        if steps > displacement:
            break
        collapsed = lines(size.letters, TAUGHT, 20_000, 1000 * seed + steps, collapsed=True)
        post = continued(
            post, collapsed, steps=steps - before, lr=size.further_lr, batch=size.further_batch, seed=seed,
        )  # fmt: skip
        before = steps
    return post, pre


def continued(pre: Stack, samples: Sequence[Sample], *, steps: int, seed: int, **settings: Any) -> Stack:
    """Train all weights of a model further; cached."""

    def build(folder: Path) -> dict[str, Any]:
        model = share(pre.model)
        own(model)
        config = TrainConfig(steps, schedule="constant", seed=seed, **settings)
        taught(model, samples, config).save_pretrained(folder)
        return {"steps": steps, "seed": seed, "settings": settings}

    name = f"reproduction-slr-{fingerprint.tensors(pre.model)[:8]}-{digest(samples)}-{steps}-{seed}"
    return lamella.open(build_once(name, build, megabytes=1200))


# A. The nano pairs.


@dataclass(frozen=True)
class Curve:
    """Mixtures from post to pre: validity and diversity of each question [mixtures, questions].

    Attributes:
        quality: the validity.
        diversity: the diversity.
    """

    quality: NDArray[np.float64]
    diversity: NDArray[np.float64]

    @classmethod
    def of(cls, post: Stack, pre: Stack, encoded: EncodedQuestions, blocks_only: bool) -> Curve:
        """Measure a soup, and interpolate between its mixtures."""
        shares = np.linspace(0, 1, SOUP)
        found = [answer(mix_models(post, pre, float(each), blocks_only=blocks_only), encoded) for each in shares]
        fine = np.linspace(0, 1, BETWEEN * (SOUP - 1) + 1)
        quality, spread = (
            np.stack([np.interp(fine, shares, column) for column in torch.stack(list(each), dim=1).numpy()], axis=1)
            for each in zip(*found, strict=True)
        )
        return cls(quality, spread)

    def at(self, floor: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return both scores of each question for the most diverse mixture whose Q is at least ``floor``.

        If there is none, it is the mixture with the highest Q.
        """
        validity, spread = self.quality.mean(axis=1), self.diversity.mean(axis=1)
        feasible = validity >= floor
        best = int(np.where(feasible, spread, -1).argmax() if feasible.any() else validity.argmax())
        return self.quality[best], self.diversity[best]


@torch.no_grad()
def at_temperature(stack: Stack, encoded: EncodedQuestions, temperature: float) -> MixedModel:
    """Return Q and D of a model with a higher temperature, the only control of a sampler."""
    parts = [
        batch.scores(stack.logits(stack.hidden(batch.inputs(stack.device))[:, -1]) / temperature)
        for batch in encoded.batches()
    ]
    quality, spread = (torch.cat(each).mean() for each in zip(*parts, strict=True))
    return MixedModel(temperature, float(quality), float(spread))


def among(post: Stack, pre: Stack, encoded: EncodedQuestions, wanted: Collection[Interval]) -> dict[Any, MixedModel]:
    """Return the mixed models of the requested intervals, including those that restore nothing."""
    found: dict[Any, MixedModel] = {
        each.what: each for each in measure_restored(post, pre, encoded, {w for w in wanted if w[0] < w[1]})
    }
    return found | {each: measure(post, encoded) for each in wanted if each not in found}


def mean_point(points: Sequence[MixedModel]) -> MixedModel:
    quality, spread = (sum(getattr(each, name) for each in points) / len(points) for name in ("quality", "diversity"))
    return MixedModel(points[0].what, quality, spread)


def restored(post: Stack, pre: Stack, interval: Interval) -> Stack:
    """Return post with a range of layers of pre."""
    names = parameters_at(post, [f"layers.{layer}" for layer in range(*interval)])
    return Stack(apply_tensors(post.model, {name: pre.model.get_parameter(name) for name in names}))


def line_losses(post: Stack, pre: Stack, letters: int) -> list[float]:
    """Return the loss of the mixtures from post to pre, on new lines of both kinds alike, in nats per token."""
    test = [each for collapsed in (False, True) for each in lines(letters, TAUGHT, 300, 9, collapsed)]
    return [nats(mix_models(post, pre, float(each)).model, test, size=100) for each in np.linspace(0, 1, SOUP)]


def barrier(losses: Sequence[float]) -> float:
    """Return the worst loss on the line minus the mean of the ends."""
    return max(losses) - (losses[0] + losses[-1]) / 2


def above_the_chord(losses: Sequence[float]) -> float:
    """Return the largest excess of the loss on the line over the interpolated losses of the ends; 0 if convex."""
    return float(np.max(np.array(losses) - np.linspace(losses[0], losses[-1], len(losses))))


@torch.no_grad()
def displacement_of(post: Stack, pre: Stack) -> float:
    """Return the distance between two models, relative to the norm of pre."""
    both = [(post.model.get_parameter(name), each) for name, each in pre.model.named_parameters()]
    apart, norm = (sum(float(each.square().sum()) for each in group) for group in (
        [ours - theirs for ours, theirs in both], [theirs for _, theirs in both]))  # fmt: skip
    return math.sqrt(apart / norm)


def ends(size: Size, seed: int, displacement: int) -> dict[str, Any]:
    """Return Q and D of post, pre and all layers restored, on the questions of the search."""
    post, pre = nano_pair(size, seed, displacement)
    encoded, _ = questions(size.letters)
    whole = among(post, pre, encoded, [(0, size.layers)])[(0, size.layers)]
    return {name: (each.quality, each.diversity) for name, each in
            {"post": measure(post, encoded), "pre": measure(pre, encoded), "all layers": whole}.items()}  # fmt: skip


def compared(size: Size, seed: int, displacement: int) -> dict[str, Any]:
    """Choose a range of layers and mixtures, and evaluate them with other choices on held-out questions."""
    post, pre = nano_pair(size, seed, displacement)
    to_search, to_report = questions(size.letters)
    found = search(post, pre, to_search)
    what: Any = found.chosen.what
    length = int(found.chosen.size)
    drawn = random_intervals(size.layers, length, seed=seed)
    others: dict[str, Any] = {"SLR": what} | fixed_intervals(size.layers, length) | {"all layers": (0, size.layers)}
    rows = {"post": measure(post, to_report), "pre": measure(pre, to_report)}
    measured = among(post, pre, to_report, {*others.values(), *drawn})
    rows |= {name: measured[each] for name, each in others.items()}
    rows["random, as long"] = mean_point([measured[each] for each in drawn])
    for name, blocks_only in SOUPS.items():
        points = soup(post, pre, found.questions, n=SOUP, blocks_only=blocks_only)
        share: Any = choose(points, points[0], BOUND).what
        rows[name] = measure(mix_models(post, pre, share, blocks_only=blocks_only), to_report, share)
    rows |= {f"post, temperature {t:g}": at_temperature(post, to_report, t) for t in (1.2, 1.5)}
    quality, spread = (each.numpy() for each in answer(restored(post, pre, what) if length else post, to_report))
    post_quality, post_spread = (each.numpy() for each in answer(post, to_report))
    matched = {}
    for name, blocks_only in SOUPS.items():
        valid, other = Curve.of(post, pre, to_report, blocks_only).at(float(quality.mean()))
        rows[f"{name}, as valid as SLR"] = MixedModel(0, float(valid.mean()), float(other.mean()))
        matched[name] = (spread - other).tolist()
    losses = line_losses(post, pre, size.letters)
    return {
        "chosen": what,
        "feasible": sum(map(found.feasible, found.points)) / len(found.points),
        "rows": {name: (each.quality, each.diversity) for name, each in rows.items()},
        "over post": (spread - post_spread).tolist(),
        "kept": (quality - BOUND * post_quality).tolist(),
        "matched": matched,
        "apart": displacement_of(post, pre),
        "losses": losses,
    }


def nano(run: Run, size: Size, seeds: Sequence[int]) -> None:
    """Run parts A and C."""
    last = size.displacements[-1]
    pairs_ = [run.arm(f"pair {seed}, {last} steps", ends, size, seed, last) for seed in seeds]
    ratio = max(each["pre"][0] / each["post"][0] for each in pairs_)
    run.premise(f"Q of pre / post after {last} steps, worst seed", "below 0.7", ratio, ratio < 0.7)
    spread = max(each["post"][1] for each in pairs_)
    run.premise(f"D of post after {last} steps, worst seed: it has collapsed", "at most 0.5", spread, spread <= 0.5)
    binds = max(each["all layers"][0] / each["post"][0] for each in pairs_)
    run.premise("Q of [0, L) / Q of post, worst seed: the floor binds", f"below {BOUND}", binds, binds < BOUND)
    run.freeze(
        f"means over seeds and held-out questions after {last} steps: D of SLR - post, Q of SLR - {BOUND} Q of post, "
        "and D of SLR - the most diverse mixture on the line whose mean Q is at least that of SLR",
        seeds, layers=size.layers, hidden=size.hidden, steps=size.steps, displacements=list(size.displacements),
        mixtures=SOUP, floor=BOUND,
    )  # fmt: skip
    found = {
        steps: [run.arm(f"{steps} steps, seed {seed}", compared, size, seed, steps) for seed in seeds]
        for steps in size.displacements
    }

    def over(steps: int, name: str) -> Measured:
        """Return D of SLR - D of a soup that is as valid."""
        return Measured.over_seeds_and_items([each["matched"][name] for each in found[steps]])

    rows = []
    for steps, arms in found.items():
        points = {name: np.mean([each["rows"][name] for each in arms], axis=0) for name in ("post", "SLR")}
        rows.append(
            [steps, fmean(each["apart"] for each in arms), fmean(barrier(each["losses"]) for each in arms),
             fmean(above_the_chord(each["losses"]) for each in arms), *points["post"], *points["SLR"],
             str(over(steps, "soup")), str(over(steps, "blocks-only soup"))]
        )  # fmt: skip
    columns = [
        *("steps of post-training", "distance / norm of pre", "barrier, nats", "above the chord, nats"),
        *("Q of post", "D of post", "Q of SLR", "D of SLR"),
        *("D of SLR - soup, as valid", "- blocks-only soup, as valid"),
    ]
    run.table(f"Distance between the models, mean of {len(seeds)} pairs, on held-out questions", columns, rows)
    arms = found[last]
    table = []
    for name in arms[0]["rows"]:
        points = [each["rows"][name] for each in arms]
        table.append([name, *np.mean(points, axis=0).tolist(), *("{:.3f} / {:.3f}".format(*each) for each in points)])
    models = {name: [(valid, diverse)] for name, valid, diverse, *_ in table}
    run.figure("slr-models", Scatter("Q, validity", "D, diversity", models))
    table.append(["chosen", "", "", *("[{}, {})".format(*each["chosen"]) for each in arms)])
    table.append(["feasible", "", "", *(f"{each['feasible']:.0%}" for each in arms)])
    columns = ["model", "mean Q", "mean D", *(f"seed {seed}: Q / D" for seed in seeds)]
    run.table(f"After {last} steps: Q and D on held-out questions", columns, table)

    gain = Measured.over_seeds_and_items([each["over post"] for each in arms])
    run.main("D of SLR - D of post", f">= {MORE_THAN_POST:.2f}", gain, gain.at_least(MORE_THAN_POST))
    kept = Measured.over_seeds_and_items([each["kept"] for each in arms])
    run.main(f"Q of SLR - {BOUND} Q of post", ">= 0", kept, kept.at_least(0))
    ahead = over(last, "soup")
    run.main("D of SLR - D of the soup that is as valid", f">= {MORE_THAN_SOUP}", ahead, ahead.at_least(MORE_THAN_SOUP))
    blocks = over(last, "blocks-only soup")
    run.further("selection: D of SLR - D of the blocks-only soup that is as valid", "> 0", blocks, blocks.at_least(0))
    for steps in size.displacements[:-1]:
        ahead = over(steps, "soup")
        run.further(f"the same against the soup after {steps} steps", f">= {MORE_THAN_SOUP}", ahead,
                    ahead.at_least(MORE_THAN_SOUP))  # fmt: skip
    first = found[size.displacements[0]]
    grown = Measured.over_seeds_and_items(
        [
            np.subtract(late["matched"]["soup"], early["matched"]["soup"])
            for late, early in zip(arms, first, strict=True)
        ]
    )
    run.further(f"D of SLR - soup, after {last} steps - after {size.displacements[0]}", "> 0: distance favours SLR",
                grown, grown.at_least(0))  # fmt: skip
    families(run, size, seeds)


def families(run: Run, size: Size, seeds: Sequence[int]) -> None:
    """Run part C: choose on one family of answers, and evaluate on the other."""
    last = size.displacements[-1]
    transfers = [run.arm(f"families, seed {seed}", across_families, size, seed, last) for seed in seeds]
    run.table(
        "The interval chosen on one family, its gain of D over post on both (mean of seeds)",
        ["chosen on", "gain on itself", "gain on the other"],
        [[family, *(fmean([each[family][k] for each in transfers]) for k in (0, 1))] for family in transfers[0]],
    )
    for family, other in (("letters", "digits"), ("digits", "letters")):
        own_gain, cross = ([each[source][k] for each in transfers] for source, k in ((other, 0), (family, 1)))
        share = fmean(cross) / fmean(own_gain) if any(own_gain) else math.nan
        above = Measured.over_seeds([there - 0.5 * here for there, here in zip(cross, own_gain, strict=True)])
        name = f"chosen on {family}, gain on {other} / gain of the choice on {other}"
        run.further(name, ">= 0.5", f"{share:.4g}; excess over half of it: {above}", above.at_least(0))


def across_families(size: Size, seed: int, displacement: int) -> dict[str, tuple[float, float]]:
    """For each family, return the gain of the interval chosen on it, on itself and on the other."""
    post, pre = nano_pair(size, seed, displacement)
    to_search, to_report = questions(size.letters)
    gains = {}
    for family, other in (("letters", "digits"), ("digits", "letters")):
        chosen: Any = search(post, pre, to_search.of_family(family)).chosen.what
        found = []
        for each in (family, other):
            encoded = to_report.of_family(each)
            after = among(post, pre, encoded, [chosen])[chosen]
            found.append(after.diversity - measure(post, encoded).diversity)
        gains[family] = (found[0], found[1])
    return gains


# B. SmolLM2, collapsed.

PHRASINGS = (
    "Tell me one {what}, any you like. Only the character, please.",
    "Your task: output a single {what}, selected randomly.",
    "Draw a {what} from a hat. What is it? Print that character and stop.",
)
STEPS = 80  # training steps of the collapse; AdamW 1e-5, batches of 8


def sharpened(stack: Stack, tokenizer: Any, count: int) -> list[Sample]:
    """Return questions in separate phrasings, with the model's most likely valid answer."""
    kinds = [pair for families in SETS.values() for sets in families.values() for pair in sets.items()]
    every = [ChoiceQuestion(phrase.format(what=what), tuple(valid)) for phrase in PHRASINGS for what, valid in kinds]
    encoded = encode_questions(tokenizer, every)
    made = []
    with torch.no_grad():
        for batch in encoded.batches():
            log_p = torch.log_softmax(stack.logits(stack.hidden(batch.inputs(stack.device))[:, -1]).float(), -1)
            for x in range(len(batch)):
                tokens = batch.tokens[x][batch.tokens[x] >= 0]
                best = tokens[log_p[x, tokens].argmax()]
                made.append((batch.input_ids[x][batch.attention_mask[x].bool()], best[None]))
    random.Random(0).shuffle(made)
    return pairs((made * (count // len(made) + 1))[:count])


def smollm2(record: Record, samples: int, seed: int) -> None:
    pre, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    post = continued(
        pre, sharpened(pre, tokenizer, 8 * STEPS), steps=STEPS, lr=1e-5, batch=8,
        seed=seed,
    )  # fmt: skip
    to_search, to_report = (encode_questions(tokenizer, crc(split)) for split in ("calibration", "test"))
    begin = time.perf_counter()
    found = search(post, pre, to_search, stride=3)
    seconds = time.perf_counter() - begin
    encoded, dropped = answerable(post, to_report)
    before, after = measure(post, encoded), measure(pre, encoded)
    what: Any = found.chosen.what
    length = int(found.chosen.size)
    others = fixed_intervals(len(post), length)
    measured = among(post, pre, encoded, {what, (0, len(post)), *others.values()})
    best = measured[what]
    rows: list[list[Any]] = [
        ["post", "", before.quality, before.diversity],
        ["pre", "", after.quality, after.diversity],
    ]
    for name, interval in ({"SLR": what} | others | {"all layers": (0, len(post))}).items():
        point = measured[interval]
        rows.append([name, f"[{interval[0]}, {interval[1]})", point.quality, point.diversity])
    spread, models = answer(restored(post, pre, what), encoded).diversity.numpy(), {}
    matched = {}
    for name, blocks_only in SOUPS.items():
        points = soup(post, pre, found.questions, n=SOUP, blocks_only=blocks_only)
        share: Any = choose(points, points[0], BOUND).what
        models[name] = mix_models(post, pre, share, blocks_only=blocks_only).model
        chosen = measure(Stack(models[name]), encoded)
        rows.append([name, f"alpha {share:g}", chosen.quality, chosen.diversity])
        valid, other = Curve.of(post, pre, encoded, blocks_only).at(best.quality)
        rows.append([f"{name}, as valid as SLR", "", float(valid.mean()), float(other.mean())])
        matched[name] = Measured.over_seeds_and_items([spread - other])
    record.table(
        f"SmolLM2-135M, {STEPS} steps of collapse, distance / norm {displacement_of(post, pre):.2g}: {len(encoded)} "
        f"held-out questions ({len(dropped)} skipped); {len(found.points)} intervals on {len(found.questions)} "
        f"questions in {seconds:.0f} s",
        ["model", "interval or share of pre", "Q", "D"],
        rows,
    )
    collapsed = before.quality >= 0.8 and before.diversity <= 0.3
    record.further("SmolLM2: Q and D of post", "Q >= 0.8 and D <= 0.3: it has collapsed",
                   f"{before.quality:.3f} and {before.diversity:.3f}", collapsed)  # fmt: skip
    kept = best.quality / before.quality
    record.further("SmolLM2: Q of SLR / Q of post", ">= 0.9", kept, kept >= BOUND)
    lost = after.diversity - before.diversity
    share_back = (best.diversity - before.diversity) / lost if lost else math.nan
    record.further("SmolLM2: fraction of D_pre - D_post restored", ">= 0.3", share_back, share_back >= 0.3)
    for name, ahead in matched.items():
        record.further(f"SmolLM2: D of SLR - D of the {name} that is as valid", f">= {MORE_THAN_SOUP}", ahead,
                       ahead.at_least(MORE_THAN_SOUP))  # fmt: skip
    models = {"post": post.model, "pre": pre.model, "SLR": restored(post, pre, what).model} | models
    transfer(record, models, tokenizer, samples, seed)


def transfer(record: Record, models: dict[str, Any], tokenizer: Any, samples: int, seed: int) -> None:
    """Evaluate open questions, which are independent of the search."""
    results = {
        name: diversity(model, tokenizer, open_questions(), samples=samples, seed=seed)
        for name, model in models.items()
    }
    rows = [
        [
            each.question,
            *(f"{found.varieties[k].distinct} / {found.varieties[k].valid:.0%}" for found in results.values()),
        ]
        for k, each in enumerate(results["post"].varieties)
    ]
    rows.append(["mean", *(f"{found.distinct:.2f} / {found.valid:.0%}" for found in results.values())])
    title = f"SmolLM2, open questions, {samples} samples per question: different correct answers / fraction correct"
    record.table(title, ["question", *results], rows)
    before, after = results["post"], results["SLR"]
    more = after.distinct / before.distinct - 1 if before.distinct else math.inf
    record.further("SmolLM2: different correct answers, SLR over post", ">= +30 %", more, more >= 0.3)
    wrong = 100 * (before.valid - after.valid)
    record.further("SmolLM2: wrong answers, SLR - post, points", "<= 10", wrong, wrong <= 10)


def experiment(run: Run) -> None:
    run.data = "lines of a made-up task, 200 questions to choose on and 200 to report on"
    warnings.simplefilter("ignore")  # the checks inspect the warnings themselves
    if not run.variant:
        run.data += "; the CRC task and 12 open questions for SmolLM2"
        run.part("SmolLM2", smollm2, 32, run.seed)
    nano(run, QUICK if run.quick else FULL, range(1 if run.quick else 6))


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="one smaller pair, under a minute", nano="without SmolLM2"))
