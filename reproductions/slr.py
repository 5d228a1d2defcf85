"""SLR at small scale: a character-level Llama that was collapsed on purpose, and SmolLM2-135M.

The pair is made here. *Pre* answers "one of C-M" with any valid character, but often with an invalid one; *post* was
fine-tuned from it to give one favourite answer, in other phrasings than those of the evaluation. Everything is chosen
on one half of the questions and reported on the other.

    python reproductions/slr.py             # about 45 minutes on one core that is free; an interrupted run resumes
    python reproductions/slr.py --nano      # without SmolLM2
    python reproductions/slr.py --quick     # one seed of a smaller nano pair
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

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import digest, encode, taught, trained
from scipy.stats import spearmanr

import lamella
from lamella.methods.slr import (
    Interval,
    MixedModel,
    SearchResult,
    answerable,
    choose,
    diversity,
    fixed_intervals,
    intervals,
    layer_runs,
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
from lamella.results import Record
from lamella.stack import Stack, share
from lamella.train import Lora, Sample, TrainConfig, add_lora, own, pairs
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import build_once

VALID, FAVOURITE = 0.40, 0.93  # the fractions of valid answers in pre's text, and of the favourite in post's
TAUGHT = ("pick {what}: ", "one of {what} = ", "say {what}, ")  # the phrasings of post-training
UNSEEN = ("any {what}> ", "random {what}? ", "choose {what}; ")  # known from pre-training alone
BOUND = 0.9  # the paper's floor


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


def questions(letters: int, seed: int) -> tuple[EncodedQuestions, EncodedQuestions]:
    """Return up to 400 questions in phrasings unseen in post-training: half for selection, half for testing."""
    drawn = random.Random(seed)
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
    """A nano pair: its model, its task, and how both are trained."""

    layers: int
    hidden: int
    letters: int
    batch: int
    steps: int
    lr: float
    further: int  # steps of post-training
    further_lr: float


FULL = Size(8, 64, 26, batch=128, steps=1600, lr=1.5e-3, further=500, further_lr=3e-4)
QUICK = Size(6, 48, 8, batch=32, steps=450, lr=3e-3, further=400, further_lr=3e-4)


def nano_pair(size: Size, seed: int) -> tuple[Stack, Stack]:
    """Return post and pre, from the cache after the first run."""
    diverse = lines(size.letters, TAUGHT + UNSEEN, 50_000, 2 * seed, collapsed=False)
    pre = trained(
        diverse, layers=size.layers, hidden=size.hidden, steps=size.steps, seed=seed, batch=size.batch, lr=size.lr,
        tied=False, name=f"slr-{digest(diverse)}",
    )  # fmt: skip
    collapsed = lines(size.letters, TAUGHT, 20_000, 2 * seed + 1, collapsed=True)
    return continued(pre, collapsed, steps=size.further, lr=size.further_lr, batch=size.batch, seed=seed), pre


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


# A. The nano pair.


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


def compare_models(
    post: Stack, pre: Stack, found: SearchResult, encoded: EncodedQuestions, seed: int
) -> dict[str, MixedModel]:
    """Evaluate every choice on held-out questions."""
    layers, length = len(post), int(found.chosen.size)
    drawn = random_intervals(layers, length, seed=seed)
    others: dict[str, Any] = {"SLR": found.chosen.what} | fixed_intervals(layers, length) | {"all layers": (0, layers)}
    rows = {"post": measure(post, encoded), "pre": measure(pre, encoded)}
    measured = among(post, pre, encoded, {*others.values(), *drawn})
    rows |= {name: measured[what] for name, what in others.items()}
    rows["random, as long"] = mean_point([measured[each] for each in drawn])
    for name, blocks_only in (("soup", False), ("blocks-only soup", True)):
        points = soup(post, pre, found.questions, blocks_only=blocks_only)
        share: Any = choose(points, points[0], BOUND).what
        rows[name] = measure(mix_models(post, pre, share, blocks_only=blocks_only), encoded, share)
    return rows | {f"post, temperature {t:g}": at_temperature(post, encoded, t) for t in (1.2, 1.5)}


def above_the_soup(points: Sequence[MixedModel], curve: Sequence[MixedModel]) -> int:
    """Count the intervals above the soup's curve, interpolated in Q."""
    order = sorted(curve, key=lambda each: each.quality)
    count = 0
    for point in points:
        below = [each for each in order if each.quality <= point.quality]
        beyond = [each for each in order if each.quality > point.quality]
        if not below or not beyond:
            height = (beyond or below[::-1])[0].diversity
        else:
            left, right = below[-1], beyond[0]
            part = (point.quality - left.quality) / (right.quality - left.quality)
            height = left.diversity + part * (right.diversity - left.diversity)
        count += point.diversity > height
    return count


def nano_arm(size: Size, seed: int) -> dict[str, Any]:
    """Search one nano pair, and evaluate every choice on held-out questions."""
    post, pre = nano_pair(size, seed)
    to_search, to_report = questions(size.letters, seed)
    found = search(post, pre, to_search)
    feasible = sum(map(found.feasible, found.points))
    points = compare_models(post, pre, found, to_report, seed)
    return {
        "chosen": found.chosen.what,
        "quality": found.chosen.quality,
        "diversity": found.chosen.diversity,
        "feasible": f"{feasible} of {len(found.points)}",
        "above": above_the_soup(found.points, soup(post, pre, found.questions)),
        "rank": float(spearmanr([p.diversity for p in found.points], [p.quality for p in found.points]).statistic),
        "binds": feasible < len(found.points) and not found.feasible(found.points[size.layers - 1]),
        "points": {name: (point.quality, point.diversity) for name, point in points.items()},
        "transfer": across_families(post, pre, to_search, to_report),
    }


def nano(run: Run, size: Size, seeds: int) -> None:
    """Run parts A and C."""
    arms = [run.arm(f"nano pair {seed}", nano_arm, size, seed) for seed in range(seeds)]
    rows = [{name: MixedModel(name, *pair) for name, pair in each["points"].items()} for each in arms]
    transfers = [each["transfer"] for each in arms]
    curves = [
        [seed, "[{}, {})".format(*each["chosen"]),
         *(each[name] for name in ("quality", "diversity", "feasible", "above", "rank"))]
        for seed, each in enumerate(arms)
    ]  # fmt: skip
    columns = [
        "seed",
        "chosen",
        "Q",
        "D",
        "feasible",
        "intervals above the soup's curve",
        "rank correlation of D and Q",
    ]
    run.table(f"The searches: {size.layers} layers, on the questions that they chose on", columns, curves)
    names = list(rows[0])
    means = {name: mean_point([each[name] for each in rows]) for name in names}
    table = [
        [name, means[name].quality, means[name].diversity,
         *(f"{each[name].quality:.3f} / {each[name].diversity:.3f}" for each in rows)]
        for name in names
    ]  # fmt: skip
    run.table(
        "On questions that nothing was chosen on: Q and D",
        ["model", "mean Q", "mean D", *(f"seed {seed}: Q / D" for seed in range(seeds))],
        table,
    )
    ratio = max(each["pre"].quality / each["post"].quality for each in rows)
    run.exact("Q of pre / post", "< 0.7, every seed", ratio, ratio < 0.7)
    kinds = [each["binds"] for each in arms]
    run.exact("the floor binds: [0, L) is not feasible", "every seed", f"{sum(kinds)} of {seeds}", all(kinds))

    def over(other: str) -> Measured:
        """Return the difference between SLR's diversity and that of another choice."""
        return Measured.over_seeds([each["SLR"].diversity - each[other].diversity for each in rows])

    kept = Measured.over_seeds([each["SLR"].quality / each["post"].quality for each in rows])
    run.main("D of SLR - D of post", ">= 0.20", over("post"), over("post").at_least(0.20))
    run.main("Q of SLR / Q of post", ">= 0.9", kept, kept.at_least(BOUND))
    run.main("D of SLR - D of the best soup", ">= 0.05", over("soup"), over("soup").at_least(0.05))
    blocks = over("blocks-only soup")
    run.further("selection: D of SLR - D of the best blocks-only soup", "> 0", blocks, blocks.at_least(0))
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


def across_families(
    post: Stack, pre: Stack, to_search: EncodedQuestions, to_report: EncodedQuestions
) -> dict[str, tuple[float, float]]:
    """Run part C: for each family, the gain of the interval chosen on it, on itself and on the other."""
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


def exactness(record: Record, size: Size) -> None:
    """Compare the sweep with explicitly built hybrids, interval by interval."""
    (post, pre), (encoded, _) = nano_pair(size, 0), questions(size.letters, 0)
    wanted = intervals(len(post))
    begin = time.process_time()
    swept = measure_restored(post, pre, encoded, wanted)
    fast = time.process_time() - begin
    begin, worst = time.process_time(), 0.0
    for point in swept:
        names = parameters_at(post, [f"layers.{layer}" for layer in range(*point.what)])  # type: ignore[misc]
        hybrid = Stack(apply_tensors(post.model, {name: pre.model.get_parameter(name) for name in names}))
        built = measure(hybrid, encoded)
        worst = max(worst, abs(built.quality - point.quality), abs(built.diversity - point.diversity))
    slow = time.process_time() - begin
    layers = len(post)
    record.table(
        "What a search runs",
        ["layers", "intervals", "layer runs, shared prefixes", "layer runs, one by one", "CPU seconds", "one by one"],
        [[layers, len(wanted), layer_runs(layers, wanted), layers * len(wanted), fast, slow],
         [30, 465, layer_runs(30, intervals(30)), 30 * 465, "", ""]],
    )  # fmt: skip
    record.exact("Q and D of the sweep and of models that are built", "within 1e-5", worst, worst <= 1e-5)


def adapters(record: Record, size: Size, steps: int) -> None:
    """Run part D: post is pre with LoRA, so restoring layers is the same as disabling their adapters."""
    _, pre = nano_pair(size, 0)
    _, encoded = questions(size.letters, 0)
    view = share(pre.model)
    lora = add_lora(view, r=8, seed=0)
    collapsed = lines(size.letters, TAUGHT, 20_000, 1, collapsed=True)
    taught(view, collapsed, TrainConfig(steps=steps, lr=3e-3, batch=size.batch), trainable=lora.trains)
    merged = share(view)
    copied_in = Lora(merged, lora.modules, lora.scale, lora.base)
    copied_in.merge()
    copied_in.remove()
    post, worst, inputs = Stack(merged), 0.0, encoded.inputs(pre.device)
    with torch.no_grad():
        for i, j in intervals(len(pre)):
            names = parameters_at(post, [f"layers.{layer}" for layer in range(i, j)])
            copied = apply_tensors(merged, {name: pre.model.get_parameter(name) for name in names})
            with lora.off([f"{post.architecture.prefix}{layer}." for layer in range(i, j)]):
                ours = view(**inputs).logits[:, -1]
            worst = max(worst, float((copied(**inputs).logits[:, -1] - ours).abs().max()))
    before, after = measure(pre, encoded), measure(post, encoded)
    change = (
        f"from Q {before.quality:.2f} / D {before.diversity:.2f} to Q {after.quality:.2f} / D {after.diversity:.2f}"
    )
    record.exact(
        f"LoRA ({change}): logits with adapters off and with weights copied", "within 1e-5", worst, worst <= 1e-5
    )


# B. SmolLM2, collapsed.

PHRASINGS = (
    "Tell me one {what}, any you like. Only the character, please.",
    "Your task: output a single {what}, selected randomly.",
    "Draw a {what} from a hat. What is it? Print that character and stop.",
)
STEPS = 80  # training steps of the collapse; AdamW 1e-5, batches of 8


def sharpened(stack: Stack, tokenizer: Any, count: int) -> list[Sample]:
    """Return questions in separate phrasings, with the model's most likely valid answer."""
    pairs = [pair for families in SETS.values() for sets in families.values() for pair in sets.items()]
    every = [ChoiceQuestion(phrase.format(what=what), tuple(valid)) for phrase in PHRASINGS for what, valid in pairs]
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
    record.table(
        f"SmolLM2-135M, {STEPS} steps of collapse: {len(encoded)} held-out questions ({len(dropped)} skipped); "
        f"{len(found.points)} intervals on {len(found.questions)} questions in {seconds:.0f} s",
        ["model", "interval", "Q", "D"],
        rows,
    )
    record.exact("SmolLM2: Q of post", ">= 0.8", before.quality, before.quality >= 0.8)
    record.exact("SmolLM2: D of post", "<= 0.3", before.diversity, before.diversity <= 0.3)
    kept = best.quality / before.quality
    record.further("SmolLM2: Q of SLR / Q of post", ">= 0.9", kept, kept >= BOUND)
    lost = after.diversity - before.diversity
    share_back = (best.diversity - before.diversity) / lost if lost else math.nan
    record.further("SmolLM2: fraction of D_pre - D_post restored", ">= 0.3", share_back, share_back >= 0.3)
    transfer(record, post, pre, tokenizer, what, samples, seed)


def transfer(record: Record, post: Stack, pre: Stack, tokenizer: Any, interval: Any, samples: int, seed: int) -> None:
    """Evaluate open questions, which are independent of the search."""
    names = parameters_at(post, [f"layers.{layer}" for layer in range(*interval)])
    hybrid = apply_tensors(post.model, {name: pre.model.get_parameter(name) for name in names})
    results = {
        name: diversity(model, tokenizer, open_questions(), samples=samples, seed=seed)
        for name, model in {"post": post.model, "pre": pre.model, "SLR": hybrid}.items()
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
    size = QUICK if run.quick else FULL
    run.part("exactness", exactness, size)
    nano(run, size, 1 if run.quick else 3)
    run.part("adapters", adapters, size, 60 if run.quick else 200)
    if not run.variant:
        run.data += "; the CRC task and 12 open questions for SmolLM2"
        run.part("SmolLM2", smollm2, 32, run.seed)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="one seed of a smaller nano pair, under a minute", nano="without SmolLM2"))
