"""LayRA at small scale: ciphers of English as languages of an eight-layer Llama, and of SmolLM2-135M.

A language is real text under a fixed permutation of the letters: the same structure with other words. A character-level
Llama first learns English and one cipher ("old"), then a new cipher by LayRA (first 3 layers + last 1), by LoRA in all
layers, and by training all weights. The main claim has two parts, each over eight seeds; all arms share initial
weights, data order and test samples. At one learning rate, fixed in advance, less is forgotten by LayRA than by LoRA
and by LoRA than by training all weights, and LayRA learns nearly as much. And less is forgotten when the new language
costs the same loss, each arm at its own learning rate, chosen on validation text. The premise is that training all
weights forgets.

Further arms train the same adapters in the middle, first and last layers, and all weights of LayRA's layers; three
languages are learnt in sequence; model arithmetic transfers a command format that was trained in English to the model
that has learnt a cipher; and SmolLM2 learns a cipher of one text, while its English is measured on another one.

A cipher has no inner language to be translated into, so these experiments cannot show whether the edges are the right
layers of a large multilingual model.

    python reproductions/layra.py            # about an hour on one core; an interrupted run resumes
    python reproductions/layra.py --quick    # one new language alone, a smaller model, one seed
"""

from __future__ import annotations

import random
import string
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import TEXTS, encode, nats_by_sample, trained
from torch import Tensor

import lamella
from lamella.data import windows
from lamella.methods.layra import (
    TRAINING,
    AdapterShape,
    ArmResult,
    Edges,
    Language,
    LanguageArm,
    arithmetic,
    arms,
    at_equal_loss,
    average_ranks,
    common_loss,
    follow,
    layra,
    measure,
)
from lamella.methods.layra.arithmetic import SCAN, check_siblings
from lamella.methods.layra.edges import sites_of_layers
from lamella.methods.layra.pivot import pivot
from lamella.methods.layra.recipe import with_adapters
from lamella.results import Record
from lamella.results.record import together
from lamella.search import pareto
from lamella.stack import Stack, share
from lamella.train import (
    NO_LOSS,
    Hook,
    Sample,
    Task,
    TrainConfig,
    TrainingRun,
    blocks,
    collate,
    fit,
    mean_loss,
    own,
    response_loss,
)  # fmt: skip
from lamella.zoo import open_tokenizer

NATS = 0.6931471805599453  # nats per bit
OLD, NEW = ("English", "old cipher"), ("cipher A", "cipher B", "cipher C")
WITH_ALL = ("full", "lora", "layra")
CONTROLS = ("full, same layers", "lora, middle", "lora, first", "lora, last")
MARKS = {"plain": " ", "under": "_", "bar": "|"}  # the separators that commands select
GOAL = 2.25  # nats per character of the new language at which forgetting is compared
UNREACHED = 10.0  # added to the loss on the new language where an arm does not reach the goal
FORGETS = 0.5  # nats per character that training all weights must forget for the claim to say anything


@dataclass(frozen=True)
class Size:
    """Scale of the experiment."""

    layers: int = 8
    first: int = 3
    last: int = 1
    hidden: int = 64
    base: int = 1500  # steps of pre-training
    steps: int = 350  # for each language
    commands: int = 600  # steps of instruction tuning
    batch: int = 16
    time: int = 64  # characters of a sample
    test: int = 48  # held-out samples of each language
    chosen: int = 48  # validation samples, by which rates and weights are chosen
    pilot: float = 2e-3  # the rate of adapters where all arms share one; training of all weights uses half of it


QUICK = Size(layers=4, first=1, hidden=32, base=350, steps=60, test=16, chosen=8)
SEEDS, FEW = 8, 3  # seeds of the main claim, and of further arms
RATES = (5e-4, 1.5e-3, 4.5e-3)


# Languages


@cache
def english(split: str) -> str:
    return "\n".join(str(lamella.load_text(source, split)) for source in TEXTS)  # type: ignore[arg-type]


def cipher(text: str, seed: int) -> str:
    """Return the text with its letters permuted, upper-case letters like lower-case ones."""
    letters = list(string.ascii_lowercase)
    random.Random(f"cipher {seed}").shuffle(letters)
    small = "".join(letters)
    return text.translate(str.maketrans(string.ascii_letters, small + small.upper()))


def share_of(text: str, number: int, of: int = 5, piece: int = 2000) -> str:
    """Return every fifth piece of the text from a given one on, so that no two languages share content."""
    pieces = [text[start : start + piece] for start in range(0, len(text), piece)]
    return "".join(pieces[number::of])


@cache
def encoded(text: str) -> Tensor:
    return encode(text)


def crops(text: str, count: int, length: int, seed: int) -> Tensor:
    """Return random excerpts of a text as characters [count, length]."""
    ids, drawn = encoded(text), random.Random(seed)
    starts = [drawn.randrange(len(ids) - length) for _ in range(count)]
    return torch.stack([ids[start : start + length] for start in starts])


class World:
    """The languages of one seed: training text, validation text, and test text."""

    def __init__(self, size: Size, seed: int) -> None:
        self.size, self.seed = size, seed
        self.learnt: dict[str, str] = {}
        self.judged: dict[str, dict[str, str]] = {}
        for number, name in enumerate((*OLD, *NEW)):
            whole, test = (share_of(english(split), number) for split in ("calibration", "test"))
            if number:
                whole, test = (cipher(each, 100 * seed + number) for each in (whole, test))
            cut = len(whole) * 9 // 10
            self.learnt[name] = whole[:cut]
            self.judged[name] = {"test": test, "chosen": whole[cut:]}

    def samples(self, name: str, steps: int) -> list[Sample]:
        size = self.size
        return blocks(crops(self.learnt[name], steps * size.batch, size.time, self.seed), loss_on="all")

    def held_out(self, name: str, split: str) -> list[Sample]:
        count = self.size.test if split == "test" else self.size.chosen
        return blocks(crops(self.judged[name][split], count, self.size.time, 7), loss_on="all")

    def language(self, name: str, split: str = "test", learn: bool = False) -> Language:
        held_out = self.held_out(name, split)
        size = len(held_out) * (self.size.time - 1)  # a character is a byte: `encode` knows no others
        return Language(self.samples(name, self.size.steps) if learn else [], held_out, size)

    @cached_property
    def watched(self) -> dict[str, Language]:
        """Return all languages."""
        return {name: self.language(name) for name in (*OLD, *NEW)}

    @cached_property
    def new(self) -> dict[str, Language]:
        return {name: self.language(name, learn=True) for name in NEW}

    @cached_property
    def base(self) -> Stack:
        size = self.size
        both = [self.samples(name, size.base // 2) for name in OLD]
        return trained(
            [sample for pair in zip(*both, strict=True) for sample in pair], layers=size.layers, hidden=size.hidden,
            steps=size.base, seed=self.seed, name="two-languages", batch=size.batch,
        )  # fmt: skip

    def at(self, lr: float, **more: Any) -> TrainConfig:
        return replace(TRAINING, lr=lr, batch=self.size.batch, seed=self.seed, **more)


# One new language


def known_arms(size: Size) -> dict[str, LanguageArm]:
    return arms(Edges(size.layers, size.first, size.last))


class Watch(Hook):
    """Hook that measures the loss on each held-out sample in regular intervals.

    Args:
        samples: by language.
        every: steps between measurements.
        model: the model before the first step.
    """

    def __init__(self, samples: Mapping[str, Sequence[Sample]], every: int, model: Any) -> None:
        self.samples, self.every = samples, every
        self.losses: dict[str, list[list[float]]] = {name: [] for name in samples}
        self.look(model)

    def look(self, model: Any) -> None:
        training = model.training
        model.eval()
        for name, samples in self.samples.items():
            self.losses[name].append(nats_by_sample(model, samples))
        model.train(training)

    def after_step(self, run: TrainingRun) -> None:
        if run.step % self.every == 0:
            self.look(run.model)


Course = dict[str, list[list[float]]]  # by language and split, the loss of each sample at each measurement


def course(size: Size, name: str, seed: int, lr: float) -> Course:
    """Train one arm at one rate on the first new language, and measure it along its training."""
    world, arm = World(size, seed), known_arms(size)[name]
    if arm.r is not None and arm.layers is not None:
        view, lora = with_adapters(world.base, sites_of_layers(arm.layers), AdapterShape(r=arm.r), seed)
        trains: Callable[[str], bool] = lora.trains
    else:
        view = share(world.base.model)
        inside = tuple(f"model.layers.{layer}." for layer in arm.layers or ())
        trains = (lambda name: name.startswith(inside)) if inside else (lambda name: True)
        own(view, trains)
    held_out = {
        f"{language}, {split}": world.held_out(language, split)
        for language in (*OLD, NEW[0]) for split in ("chosen", "test")
    }  # fmt: skip
    watch = Watch(held_out, max(size.steps // 10, 1), view)
    samples = world.samples(NEW[0], size.steps)
    with tempfile.TemporaryDirectory() as work:
        fit(view, samples, Task(response_loss), world.at(lr), out=work, trainable=trains, hooks=[watch])
    return watch.losses


def curves(found: Course, split: str) -> tuple[list[float], np.ndarray[Any, Any]]:
    """Return the mean loss on the new language, and the rise on each old sample, at each measurement."""
    old = np.concatenate([np.array(found[f"{name}, {split}"]) for name in OLD], axis=1)
    return np.array(found[f"{NEW[0]}, {split}"]).mean(1).tolist(), old - old[0]


def forgotten(found: Course, split: str, goal: float) -> list[float] | None:
    """Return the rise on each old sample when the new language first costs ``goal``; None if it never does."""
    new, rises = curves(found, split)
    at = [at_equal_loss(new, rise.tolist(), goal) for rise in rises.T]
    return None if None in at else at  # type: ignore[return-value]


def one_language(run: Run, size: Size) -> None:
    names = list(WITH_ALL) if run.quick else [*WITH_ALL, *CONTROLS]
    seeds = range(run.seed + 1, run.seed + 1 + (1 if run.quick else SEEDS))
    shared = {name: size.pilot if known_arms(size)[name].r is not None else size.pilot / 2 for name in names}

    def of(name: str, lr: float, seed: int) -> Course:
        found: Course = run.arm(f"{name} at {lr:g}, seed {seed}", course, size, name, seed, lr)
        return found

    loses = float(curves(of("full", shared["full"], run.seed), "chosen")[1][-1].mean())
    run.premise("nats per character that training all weights forgets", f"at least {FORGETS}", f"{loses:.3f}",
                loses >= FORGETS)  # fmt: skip

    def score(name: str, lr: float) -> float:
        found = of(name, lr, run.seed)
        at = forgotten(found, "chosen", GOAL)
        return UNREACHED + curves(found, "chosen")[0][-1] if at is None else fmean(at)

    rates = dict(shared)
    if not run.quick:
        rates = {
            name: each.value for name, each in tuned(run, {name: partial(score, name) for name in names}, RATES).items()
        }
    run.freeze(
        "mean over seeds and old samples of the difference of rises: in the end at one rate, and at equal loss on the "
        "new language at each arm's own rate",
        seeds, steps=size.steps, base=size.base, layers=size.layers, hidden=size.hidden, shared=shared, rates=rates,
        goal=GOAL,
    )  # fmt: skip
    one_rate(run, {name: [of(name, shared[name], seed) for seed in seeds] for name in WITH_ALL}, shared)
    if run.quick:
        return  # a short run does not reach the goal
    used = {name: seeds if name in WITH_ALL else seeds[:FEW] for name in names}
    own_rates = {name: [of(name, rates[name], seed) for seed in used[name]] for name in names}
    equal_loss(run, own_rates, rates)
    fronts(run, own_rates, rates)


def one_rate(run: Run, found: Mapping[str, Sequence[Course]], rates: Mapping[str, float]) -> None:
    """Compare what is forgotten and learnt in the end, at one learning rate fixed in advance."""
    rises = {name: np.array([curves(each, "test")[1][-1] for each in of]) for name, of in found.items()}
    new = {name: np.array([each[f"{NEW[0]}, test"][-1] for each in of]) for name, of in found.items()}
    run.table(
        f"One new language at one rate: nats per character, means of {len(new['layra'])} seeds",
        ["method", "rate", "forgotten", "new language in the end"],
        [[name, rates[name], rises[name].mean(), new[name].mean()] for name in found],
    )
    for less, more in (("layra", "lora"), ("lora", "full")):
        apart = Measured.over_seeds_and_items(rises[less] - rises[more])
        run.main(f"forgetting of {less} less that of {more}, in the end at one rate", "below 0", apart,
                 apart.at_most(0))  # fmt: skip
    cost = Measured.over_seeds_and_items(new["layra"] - new["lora"])
    run.main("loss of layra on the new language, above lora's", "at most 0.25 nats", cost, cost.at_most(0.25))


def equal_loss(run: Run, found: Mapping[str, Sequence[Course]], rates: Mapping[str, float]) -> None:
    """Compare forgetting when the new language costs the same, each method at its own rate.

    The goal is that of the rates' choice, or the lowest loss that all reach on test text, if that is higher.
    """
    lowest = {name: [[min(curves(each, "test")[0])] for each in of] for name, of in found.items()}
    goal = max(GOAL, *(loss for of in lowest.values() for [loss] in of))
    rises = {name: np.array([forgotten(each, "test", goal) for each in of]) for name, of in found.items()}
    rows = [
        [name, rates[name], len(rise), rise.mean(), spread(rise.mean(1).tolist()),
         fmean(curves(each, "test")[0][-1] for each in found[name])] for name, rise in rises.items()
    ]  # fmt: skip
    run.table(
        f"Forgetting when the new language costs {goal:.3f} nats per character, at each method's own rate",
        ["method", "rate", "seeds", "forgotten", "by seed", "new language in the end"],
        sorted(rows, key=lambda row: row[3]),
    )
    for other in (*WITH_ALL[:2], *CONTROLS):
        count = len(rises[other])
        apart = Measured.over_seeds_and_items(rises["layra"][:count] - rises[other])
        check = run.main if other in WITH_ALL else run.further
        check(f"forgetting of layra less that of {other}, at equal loss", "below 0", apart, apart.at_most(0))


def fronts(run: Run, found: Mapping[str, Sequence[Course]], rates: Mapping[str, float]) -> None:
    """Report all final losses, and which of them are Pareto-optimal in both, and draw the courses."""
    ends, courses = {}, {}
    for name, of in found.items():
        both = [curves(each, "test") for each in of]
        new, old = np.mean([new for new, _ in both], 0), np.mean([rise.mean(1) for _, rise in both], 0)
        ends[name] = (float(new[-1]), float(old[-1]))
        courses[name] = list(zip((new / NATS).tolist(), (old / NATS).tolist(), strict=True))
    front = pareto(ends)
    run.table(
        "End points of all arms: nats per character, means over seeds",
        ["method", "rate", "new language", "forgotten", "on the front"],
        [[name, rates[name], *point, "yes" if name in front else ""] for name, point in ends.items()],
    )
    from lamella.methods.layra.page import tradeoff

    run.figure("layra-tradeoff", tradeoff(courses))


# Languages in sequence


def course_of(size: Size, seed: int, work: Path, name: str) -> dict[str, Any]:
    """Train one arm on three languages, one after the other, at the shared rate."""
    world, arm = World(size, seed), known_arms(size)[name]
    lr = size.pilot if arm.r is not None else size.pilot / 2
    found, _ = follow(world.base, arm, world.new, world.watched, world.at(lr), work=work / f"{seed} {name}")
    return found.as_dict()


def forgetting(found: ArmResult, step: int = -1) -> float:
    """Return the mean rise over the old languages, in bits per byte."""
    return fmean([found.rows[step][name] - found.rows[0][name] for name in OLD])


def sequences(run: Run, size: Size, seeds: Sequence[int]) -> None:
    """Train on three languages."""
    rows, steps, in_the_end, ends = [], {}, {}, {}
    for name in WITH_ALL:
        found = [ArmResult(**run.arm(f"{name}, three languages, seed {seed}", course_of, size, seed, run.work, name))
                 for seed in seeds]  # fmt: skip
        by_seed = [[forgetting(each, step) for each in found] for step in (1, 2, 3)]
        steps[name], in_the_end[name] = [fmean(each) for each in by_seed], by_seed[-1]
        ends[name] = {language: fmean([each.rows[-1][language] for each in found]) for language in (*OLD, *NEW)}
        rows.append([name, *steps[name], *ends[name].values()])
    for row, rank in zip(rows, average_ranks(ends).values(), strict=True):
        row.append(rank)
    columns = ["method", "forgotten after 1", "after 2", "after 3", *OLD, *NEW, "average rank"]
    run.table(f"Three languages in sequence: bits per byte in the end, means of {len(seeds)} seeds", columns, rows)
    grew = all(a < b < c for a, b, c in steps.values())
    listed = "; ".join(f"{name} " + ", ".join(f"{each:.2f}" for each in of) for name, of in steps.items())
    run.further("forgetting over languages", "grows with each, for every method", listed, grew)
    for less, more in (("layra", "lora"), ("lora", "full")):
        apart = difference(in_the_end[less], in_the_end[more])
        run.further(f"forgetting of {less} less that of {more}, after three languages", "below 0", apart,
                    apart.at_most(0))  # fmt: skip


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Measured:
    return Measured.over_seeds([a - b for a, b in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else f"{values[0]:.3f}"


# Model arithmetic


def commanded(texts: Tensor, seed: int) -> list[Sample]:
    """Return text after a bracketed command that sets the character between its words; only the text has a loss."""
    drawn, space, found = random.Random(seed), encode(" "), []
    for row in texts:
        name = drawn.choice(list(MARKS))
        head = encode(f"[{name}] ")
        answer = torch.where(row == space, encode(MARKS[name]), row)
        ids = torch.cat([head, answer])
        labels = ids.clone()
        labels[: len(head)] = NO_LOSS
        asked = torch.cat([torch.full((len(head),), False), row == space])
        found.append({"input_ids": ids, "labels": labels, "prompt_lengths": torch.tensor(len(head)), "asked": asked})
    return found


def instructed(world: World, work: Path) -> Stack:
    """Return theta_I: the base trained to follow the commands, in English alone."""
    base, size = world.base, world.size
    texts = crops(world.learnt[OLD[0]], size.commands * size.batch, size.time - 8, world.seed + 50)
    samples = [{name: each for name, each in row.items() if name != "asked"} for row in commanded(texts, world.seed)]
    view = share(base.model)
    own(view)
    config = world.at(1e-3, steps=size.commands)
    fit(view, samples, Task(response_loss), config, out=work / f"{world.seed} instruct", trainable=lambda name: True)
    return Stack(view, name="instruct")


@torch.no_grad()
def obeyed(model: Any, samples: Sequence[Sample]) -> float:
    """Return how often the most likely character between two words is the one that the command specifies."""
    right = total = 0
    for start in range(0, len(samples), 32):
        batch = collate(samples[start : start + 32])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        asked = batch["asked"][:, 1:].bool()
        right += int((logits[:, :-1].argmax(-1) == batch["input_ids"][:, 1:])[asked].sum())
        total += int(asked.sum())
    return right / total


def scan(size: Size, seed: int, work: Path) -> dict[str, Any]:
    """Evaluate all lambda' on validation and test text in the new language; and both models alone."""
    world, name, lr = World(size, seed), NEW[0], size.pilot
    base = world.base
    delta = layra(base, {name: world.new[name]}, first=size.first, last=size.last, config=world.at(lr)).adapter
    instruct = instructed(world, work)
    texts = {
        split: crops(world.judged[name][split], 4 * size.chosen, size.time - 8, 60) for split in ("test", "chosen")
    }
    answers = {split: commanded(each, 61) for split, each in texts.items()}
    in_english = commanded(crops(world.judged[OLD[0]]["test"], 4 * size.chosen, size.time - 8, 60), 61)
    plain = world.language(name)

    def figures(stack: Stack) -> dict[str, float]:
        found = {}
        for split, rows in answers.items():
            bare = [{key: each for key, each in row.items() if key != "asked"} for row in rows]
            found[f"obeyed, {split}"] = obeyed(stack.model, rows)
            found[f"answers, {split}"] = Language([], bare, len(bare) * (size.time - 8)).bits(_nats(stack, bare))
        found["plain"] = measure(stack.model, {"plain": plain}, 32)["plain"]
        found["obeyed, English"] = obeyed(stack.model, in_english)
        return found

    values = {f"{value:g}": figures(arithmetic(base, [(delta, 1.0)], [(instruct, value)])) for value in SCAN}
    return {"scan": values, "instruct": figures(instruct), "distance": check_siblings(base, instruct)}


def _nats(stack: Stack, samples: list[Sample]) -> float:
    return mean_loss(stack.model, samples, batch=32)


def model_arithmetic(run: Run, size: Size, seeds: Sequence[int]) -> None:
    found = [run.arm(f"arithmetic, seed {seed}", scan, size, seed, run.work) for seed in seeds]
    columns = ["obeyed, test", "answers, test", "plain", "obeyed, English"]

    def means(key: Callable[[Any], Any]) -> list[float]:
        return [fmean([key(each)[column] for each in found]) for column in columns]

    rows = [[f"theta_0 + Delta + {value:g} (theta_I - theta_0)", *means(lambda each: each["scan"][f"{value:g}"])]  # noqa: B023
            for value in SCAN]  # fmt: skip
    rows[0][0] = "theta_0 + Delta"
    rows.append(["theta_I alone", *means(lambda each: each["instruct"])])
    run.table(
        "Commands taught in English, followed in cipher A; losses in bits per byte",
        ["model", "followed in the new language", "loss on answers", "loss on plain text", "followed in English"], rows,
    )  # fmt: skip
    best = [max(each["scan"], key=lambda value: each["scan"][value]["obeyed, chosen"]) for each in found]
    both = [each["scan"][value]["obeyed, test"] for each, value in zip(found, best, strict=True)]
    language, alone = (
        [each["obeyed, test"] for each in models]
        for models in ([each["scan"]["0"] for each in found], [each["instruct"] for each in found])
    )
    more = [difference(both, one) for one in (language, alone)]
    measured = (
        f"{fmean(both):.3f} (lambda' {', '.join(best)}), language alone {fmean(language):.3f}, instruct alone "
        f"{fmean(alone):.3f}; more by {more[0]}, {more[1]}"
    )
    run.further(
        "commands followed in the new language by both combined",
        "more than by either alone",
        measured,
        together([each.at_least(0) for each in more]),
    )
    ends = (f"{SCAN[0]:g}", f"{SCAN[-1]:g}")
    for column, name in (("answers, test", "answers"), ("plain", "plain text")):
        lows = [min(each["scan"], key=lambda value: each["scan"][value][column]) for each in found]
        run.further(
            f"lambda' of the lowest loss on {name} in the new language",
            "inside 0 to 1.2",
            ", ".join(lows),
            not set(lows) & set(ends),
        )


# The pivot study


def study(record: Record, size: Size, seed: int, quick: bool) -> None:
    """Compare the edges of the pivot study with the fixed ones."""
    world = World(size, seed)
    opened: list[tuple[str, Stack, dict[str, Language]]] = [
        ("nano", world.base, {name: world.language(name, "chosen") for name in OLD})
    ]
    if not quick:
        tokenizer = open_tokenizer("smollm2")
        text = str(lamella.load_text("pydoc", "calibration"))
        texts = {"English": text, "cipher": cipher(text, 1)}
        found = {name: Language.of(tokenizer, windows(tokenizer, each, 8, 128, 0)) for name, each in texts.items()}
        opened.append(("SmolLM2-135M", lamella.open("smollm2"), found))
    rows = []
    for name, stack, languages in opened:
        result = pivot(stack, languages, english="English")
        fixed = Edges.of(len(stack))
        for curve, cut in result.cuts.items():
            rows.append([name, curve, "none" if cut is None else f"{cut[0]} + {cut[1]}",
                         f"{fixed.first} + {fixed.last}", f"{result.edges.first} + {result.edges.last}"])  # fmt: skip
    columns = ["model", "curve", "cut by the curve", "fixed, by depth", "taken"]
    record.table("The pivot study compared with the fixed edges: first + last layers", columns, rows)


# SmolLM2


SMOL = ("layra", "lora", "lora, middle")
SMOL_STEPS, SMOL_BATCH, SMOL_TIME = 39, 2, 256  # 20,000 tokens
SMOL_RATES = (3e-4, 1e-3, 3e-3)
RISES = 0.01  # nats per token by which English must rise with LoRA for a comparison to say anything


def smol_course(name: str, seed: int, steps: int, looks: int, lr: float) -> Course:
    """Train one arm of SmolLM2 on a cipher of Python's documentation, and measure English of another text.

    Args:
        name: the arm.
        seed: random seed.
        steps: the number of steps.
        looks: how often it is measured after the start.
        lr: learning rate.
    """
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    layers = arms(Edges.of(len(stack)))[name].layers
    assert layers is not None
    view, lora = with_adapters(stack, sites_of_layers(layers), AdapterShape(), seed)

    def cut(text: str, count: int, drawn: int) -> list[Sample]:
        return blocks(windows(tokenizer, text, count, SMOL_TIME, drawn), loss_on="all")

    texts = {split: cipher(str(lamella.load_text("pydoc", split)), seed + 1) for split in ("calibration", "test")}
    held_out = {"English": cut(str(lamella.load_text("general", "test")), 12, 0), "cipher": cut(texts["test"], 12, 0)}
    watch = Watch(held_out, steps // looks, view)
    samples = cut(texts["calibration"], steps * SMOL_BATCH, seed)
    config = replace(TRAINING, lr=lr, batch=SMOL_BATCH, seed=seed)
    with tempfile.TemporaryDirectory() as work:
        fit(view, samples, Task(response_loss), config, out=work, trainable=lora.trains, hooks=[watch])
    return watch.losses


def smol_score(name: str, seed: int, lr: float) -> float:
    """Return the loss on the cipher after a third of the steps."""
    return fmean(smol_course(name, seed, SMOL_STEPS // 3, 1, lr)["cipher"][-1])


def smollm2(run: Run) -> None:
    """Train adapters in the first 10 + last 2, in all 30, and in the middle 12 layers."""
    sweep = {f"SmolLM2, {name}": partial(smol_score, name, run.seed) for name in SMOL}
    rates = dict(zip(SMOL, (each.value for each in tuned(run, sweep, SMOL_RATES).values()), strict=True))
    seed = run.seed + 1
    found = {
        name: {key: np.array(each) for key, each in
               run.arm(f"SmolLM2, {name}, seed {seed}", smol_course, name, seed, SMOL_STEPS, 3, lr).items()}
        for name, lr in rates.items()
    }  # fmt: skip
    cipher_losses = {name: each["cipher"].mean(1).tolist() for name, each in found.items()}
    goal = common_loss({name: [each] for name, each in cipher_losses.items()})
    rises = {
        name: np.array([at_equal_loss(cipher_losses[name], rise.tolist(), goal)
                        for rise in (each["English"] - each["English"][0]).T]) for name, each in found.items()
    }  # fmt: skip
    run.table(
        f"SmolLM2-135M learns a cipher in {SMOL_STEPS * SMOL_BATCH * SMOL_TIME} tokens: nats per token; English is of "
        "another text",
        ["method", "rate", "English before", "cipher before", "English after", "cipher after",
         f"English, rise where the cipher costs {goal:.3f}"],
        [[name, rates[name], *(each[key][at].mean() for at in (0, -1) for key in ("English", "cipher")),
          rises[name].mean()] for name, each in found.items()],
    )  # fmt: skip
    rise = Measured.over_seeds_and_items([rises["lora"]])
    run.further("premise: SmolLM2's rise of English with lora", f"at least {RISES} nats", rise, rise.at_least(RISES))
    apart = Measured.over_seeds_and_items([rises["layra"] - rises["lora"]])
    run.further("SmolLM2: rise of English with layra less that with lora, at equal loss", "below 0", apart,
                apart.at_most(0))  # fmt: skip


def experiment(run: Run) -> None:
    size = QUICK if run.quick else Size()
    run.data = (
        f"characters of Python's documentation, and letter permutations of it; {size.layers} layers of width "
        f"{size.hidden}, {size.base} steps of pre-training, {size.steps} for each language"
    )
    one_language(run, size)
    run.part("pivot", study, size, run.seed + 1, run.quick)
    if not run.quick:
        seeds = range(run.seed + 1, run.seed + 1 + FEW)
        sequences(run, size, seeds)
        model_arithmetic(run, size, seeds)
        smollm2(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="one new language at one rate, a smaller model, one seed"))
