"""LayRA at small scale: ciphers of English as languages of an eight-layer Llama, and of SmolLM2-135M.

A language is real text under a fixed permutation of the letters: the same structure with other words. A character-level
Llama first learns English and one cipher ("old"), then a new cipher by LayRA (first 3 layers + last 1) and by its
controls: at one learning rate fixed in advance, and each at the best of three for the first seed. Then it learns two
more in sequence, and all three in reverse order. Model arithmetic transfers a command format that was trained in
English to the model that has learnt a cipher. SmolLM2 learns a cipher with adapters in the first 10 + last 2, in all
30, or in the middle 12 layers.

A cipher has no inner language to be translated into, so these experiments cannot show whether the edges are the right
layers.

    python reproductions/layra.py            # about two hours on one core; an interrupted run resumes
    python reproductions/layra.py --quick    # one new language alone, a smaller model, one seed
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import TEXTS, encode, trained
from torch import Tensor

import lamella
from lamella.data import windows
from lamella.files import Work
from lamella.methods.layra import (
    TRAINING,
    ArmComparison,
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
from lamella.methods.layra.comparison import CHOOSE
from lamella.methods.layra.pivot import pivot
from lamella.results import Record
from lamella.results.record import together
from lamella.search import pareto
from lamella.stack import Stack, share
from lamella.train import (
    NO_LOSS,
    Sample,
    Task,
    TrainConfig,
    blocks,
    collate,
    concatenate,
    fit,
    mean_loss,
    merge,
    own,
    response_loss,
)  # fmt: skip
from lamella.zoo import chat_inputs, open_tokenizer

NATS = 0.6931471805599453  # nats per bit
OLD, NEW = ("English", "old cipher"), ("cipher A", "cipher B", "cipher C")
CONTROLS = ("full", "lora", "layra", "lora, middle", "lora, first", "lora, last")
MARKS = {"plain": " ", "under": "_", "bar": "|"}  # the separators that commands select
WITH_ALL = ("full", "lora", "layra")


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
    chosen: int = 24  # validation samples, by which rates and weights are chosen
    seeds: int = 3
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)  # learning rates of adapters; full training uses half of each
    pilot: float = 2e-3  # the rate of the first table and of all experiments after one language
    smol: tuple[int, ...] = (16, 2, 256)  # steps, batch and tokens of a window


QUICK = Size(layers=4, first=1, hidden=32, base=350, steps=60, test=16, chosen=8, seeds=1, rates=(2e-3,))


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
        """Return all languages, and for those of the first step their validation text as well."""
        found = {name: self.language(name) for name in (*OLD, *NEW)}
        return found | {CHOOSE.format(name): self.language(name, "chosen") for name in (*OLD, NEW[0])}

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

    def config(self, arm: LanguageArm, lr: float) -> TrainConfig:
        rate = lr if arm.r is not None else lr / 2
        return self.at(rate, eval_every=max(self.size.steps // 7, 1))

    def at(self, lr: float, **more: Any) -> TrainConfig:
        return replace(TRAINING, lr=lr, batch=self.size.batch, seed=self.seed, **more)


def known_arms(size: Size) -> dict[str, LanguageArm]:
    known = arms(Edges(size.layers, size.first, size.last), replay=0.25)
    return {name: arm for name, arm in known.items() if size != QUICK or name in CONTROLS}


def course_of(world: World, work: Path, arm: LanguageArm, lr: float, order: Sequence[str]) -> dict[str, Any]:
    """Train one arm at one rate on some languages; the first one is learnt once and shared by longer sequences."""
    new = world.new
    course, _ = follow(
        world.base, arm, {name: new[name] for name in order}, world.watched, world.config(arm, lr),
        work=work / f"{world.seed} {arm.name} {lr:g} {order[0]}",
        curves=[name for name in world.watched if order[0] == NEW[0] and name not in NEW[1:]],
        old=[*world.samples(OLD[0], 100), *world.samples(OLD[1], 100)] if arm.replay else (),
    )  # fmt: skip
    return course.as_dict()


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else f"{values[0]:.3f}"


# One new language


def one_language(run: Run, worlds: Sequence[World]) -> None:
    """Run every arm at the pilot's rate, and at its own rate that is best for the first seed."""
    size, known = worlds[0].size, known_arms(worlds[0].size)
    courses: dict[str, dict[float, list[ArmResult]]] = {name: {lr: [] for lr in size.rates} for name in known}

    def learn(world: World, name: str, lr: float) -> None:
        found = run.arm(f"{world.seed} {name} {lr:g}", course_of, world, run.work, known[name], lr, NEW[:1])
        courses[name][lr].append(ArmResult(**found))

    for world in worlds:
        for name in known:
            learn(world, name, size.pilot)
    pilot(run, courses, size.pilot)
    swept = [name for name, arm in known.items() if not arm.replay]
    for name in swept:
        for lr in size.rates:
            if lr != size.pilot:
                learn(worlds[0], name, lr)
    first = {name: [found[0] for found in courses[name].values()] for name in swept}
    chosen = {
        name: size.rates[first[name].index(best)]
        for name, best in ArmComparison(language=NEW[0], old=OLD, results=first).best().items()
    }
    for world in worlds[1:]:
        for name, lr in chosen.items():
            if lr != size.pilot:
                learn(world, name, lr)
    equal_loss(run, {name: courses[name][lr] for name, lr in chosen.items()}, len(size.rates) > 1)
    fronts(run, courses)


def pilot(record: Record, courses: Mapping[str, Mapping[float, list[ArmResult]]], lr: float) -> None:
    """Report the table of the pilot, at its rates."""
    first = courses["layra"][lr]
    rows = [["base", 0, *(fmean([each.rows[0][name] * NATS for each in first]) for name in (*OLD, NEW[0])), 0.0]]
    forgot, learnt = {}, {}
    for name, by_rate in courses.items():
        ends = [each.rows[-1] for each in by_rate[lr]]
        losses = [fmean([row[language] * NATS for row in ends]) for language in (*OLD, NEW[0])]
        forgot[name] = [forgetting(each) * NATS for each in by_rate[lr]]
        learnt[name] = [row[NEW[0]] * NATS for row in ends]
        rows.append([name, by_rate[lr][0].trainable, *losses, fmean(forgot[name])])
    columns = ["method", "trainable", *OLD, NEW[0], "forgotten"]
    record.table(
        f"One new language at the pilot's rates: nats per character, means of {len(first)} seeds", columns, rows
    )
    for less, more in (("layra", "lora"), ("lora", "full")):
        apart = difference(forgot[less], forgot[more])
        said = f"{fmean(forgot[less]):.3f} against {fmean(forgot[more]):.3f}, apart {apart}"
        record.main(f"forgetting of {less}", f"below that of {more}", said, apart.at_most(0))
    cost = difference(learnt["layra"], learnt["lora"])
    record.main("loss of layra on the new language, above lora's", "at most 0.25 nats", cost, cost.at_most(0.25))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Measured:
    return Measured.over_seeds([a - b for a, b in zip(ours, theirs, strict=True)])


def forgetting(course: ArmResult, step: int = -1) -> float:
    """Return the mean rise over the old languages, in bits per byte."""
    return fmean([course.rows[step][name] - course.rows[0][name] for name in OLD])


def equal_loss(record: Record, courses: Mapping[str, list[ArmResult]], swept: bool) -> None:
    """Compare forgetting at equal loss on the new language, each arm at its own rate.

    There is no claim for a single rate, which would favour one arm.
    """
    by_seed = []
    for found in zip(*courses.values(), strict=True):
        alone = {name: [each] for name, each in zip(courses, found, strict=True)}
        by_seed.append(ArmComparison(language=NEW[0], old=OLD, results=alone).at_equal_loss())
    forgot = {name: [found[name] for _, found in by_seed] for name in courses}
    rows = [
        [name, found[0].trainable, found[0].lr, fmean(forgot[name]), spread(forgot[name]),
         fmean([each.rows[-1][NEW[0]] for each in found])] for name, found in courses.items()
    ]  # fmt: skip
    columns = ["method", "trainable", "rate", "forgotten", "by seed", "new language in the end"]
    goal = fmean([loss for loss, _ in by_seed])
    title = f"Forgetting when the new language costs {goal:.3f} bits per byte, at each method's best rate"
    record.table(title, columns, sorted(rows, key=lambda row: row[3]))
    for other in ("lora", "full") if swept else ():
        apart = difference(forgot["layra"], forgot[other])
        said = f"{fmean(forgot['layra']):.3f} against {fmean(forgot[other]):.3f}, apart {apart}"
        record.main(f"layra's forgetting at equal new loss, against {other}", "less", said, apart.at_most(0))


def fronts(record: Run, courses: Mapping[str, Mapping[float, list[ArmResult]]]) -> None:
    """Report all final losses, and which of them are Pareto-optimal in both."""
    points, seeds = {}, {}
    for name, by_rate in courses.items():
        for found in filter(None, by_rate.values()):
            key = (name, found[0].lr)
            points[key] = (
                fmean([each.rows[-1][NEW[0]] for each in found]),
                fmean([forgetting(each) for each in found]),
            )
            seeds[key] = len(found)
    front = pareto(points)
    rows = [[*key, seeds[key], *point, "yes" if key in front else ""] for key, point in sorted(points.items())]
    columns = ["method", "rate", "seeds", "new language", "forgotten", "on the front"]
    record.table("End points of all arms: bits per byte, means over seeds", columns, rows)
    if len(points) > len(courses):
        draw(record, points)


# Languages in sequence


ORDERS = {"A, B, C": NEW, "C, B, A": NEW[::-1]}


def in_order(run: Run, world: World, name: str, lr: float, order: str) -> ArmResult:
    arm = known_arms(world.size)[name]
    return ArmResult(
        **run.arm(f"{world.seed} {name} {lr:g} {order}", course_of, world, run.work, arm, lr, ORDERS[order])
    )


def sequences(run: Run, worlds: Sequence[World], lr: float) -> None:
    """Train on two more languages, and in reverse order."""
    rows, finals, in_the_end = [], {}, {}
    for title, order in ORDERS.items():
        for name in CONTROLS if order == NEW else WITH_ALL:
            found = [in_order(run, world, name, lr, title) for world in worlds]
            by_seed = [[forgetting(each, step) for each in found] for step in (1, 2, 3)]
            steps = [fmean(each) for each in by_seed]
            ends = [fmean([each.rows[-1][language] for each in found]) for language in (*OLD, *NEW)]
            rows.append([title, name, *steps, *ends])
            finals[title, name] = (steps, ends)
            in_the_end[title, name] = by_seed[-1]
    columns = ["order", "method", "forgotten after 1", "after 2", "after 3", *OLD, *NEW]
    run.table("Three languages in sequence: bits per byte in the end, means over seeds", columns, rows)
    for title in ORDERS:
        grew = all(steps[0] < steps[1] < steps[2] for (order, _), (steps, _) in finals.items() if order == title)
        said = "; ".join(
            f"{name} " + ", ".join(f"{each:.2f}" for each in steps)
            for (order, name), (steps, _) in finals.items() if order == title and name in WITH_ALL
        )  # fmt: skip
        run.further(f"forgetting over languages, {title}", "grows with each, for every method", said, grew)
        ours, lora, full = (in_the_end[title, name] for name in ("layra", "lora", "full"))
        less, more = difference(ours, lora), difference(lora, full)
        run.further(
            f"forgetting after three languages, {title}",
            "layra < lora < full",
            f"{fmean(ours):.3f}, {fmean(lora):.3f}, {fmean(full):.3f}; apart {less}, {more}",
            together([less.at_most(0), more.at_most(0)]),
        )
    ends = {
        name: dict(zip((*OLD, *NEW), losses, strict=True))
        for (order, name), (_, losses) in finals.items()
        if order == "A, B, C"
    }
    ranks = average_ranks(ends)
    ranked = [[name, value] for name, value in sorted(ranks.items(), key=lambda pair: pair[1])]
    run.table("Average rank over the five languages after A, B, C", ["method", "rank"], ranked)


def protocols(run: Run, worlds: Sequence[World], lr: float) -> None:
    """Report the variants of LayRA for two languages."""
    rows = []
    for protocol in ("sequential", "series", "joint", "separate"):
        if protocol == "sequential":
            found = [in_order(run, world, "layra", lr, "A, B, C").rows[:3] for world in worlds]
        else:
            found = [
                run.arm(f"{world.seed} {protocol}", languages_by, world, run.work, protocol, lr) for world in worlds
            ]
        ends = [fmean([each[-1][language] for each in found]) for language in (*OLD, *NEW[:2])]
        forgot = fmean([fmean([each[-1][name] - each[0][name] for name in OLD]) for each in found])
        rows.append([protocol, forgot, *ends])
    columns = ["protocol", "forgotten", *OLD, *NEW[:2]]
    run.table("LayRA's protocols for two languages: bits per byte, means over seeds", columns, rows)


def languages_by(world: World, work: Path, protocol: Any, lr: float) -> list[dict[str, float]]:
    return added(world, work, protocol, lr).matrix.rows


def added(world: World, work: Path, protocol: Any, lr: float) -> Any:
    size, old = world.size, {name: world.language(name) for name in OLD}
    return layra(
        world.base, {name: world.new[name] for name in NEW[:2]}, old, first=size.first, last=size.last,
        protocol=protocol, config=world.at(lr), work=Work(work / f"{world.seed} by {protocol}"),
    )  # fmt: skip


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


def scan(world: World, work: Path, lr: float) -> dict[str, Any]:
    """Evaluate all lambda' on validation and test text in the new language; and both models alone."""
    base, size, name = world.base, world.size, NEW[0]
    delta = added(world, work, "separate", lr).adapters[name]
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


def model_arithmetic(run: Run, worlds: Sequence[World], lr: float) -> None:
    found = [run.arm(f"{world.seed} arithmetic", scan, world, run.work, lr) for world in worlds]
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
    said = (
        f"{fmean(both):.3f} (lambda' {', '.join(best)}), language alone {fmean(language):.3f}, instruct alone "
        f"{fmean(alone):.3f}; more by {more[0]}, {more[1]}"
    )
    run.further(
        "commands followed in the new language by both combined",
        "more than by either alone",
        said,
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


# SmolLM2

THINGS = (
    ("cat", "animal", "tool"), ("hammer", "tool", "fruit"), ("apple", "fruit", "city"), ("Paris", "city", "colour"),
    ("red", "colour", "animal"), ("dog", "animal", "metal"), ("iron", "metal", "language"),
    ("French", "language", "vegetable"), ("carrot", "vegetable", "planet"), ("Mars", "planet", "drink"),
    ("tea", "drink", "number"), ("seven", "number", "month"), ("May", "month", "bird"), ("eagle", "bird", "fish"),
    ("salmon", "fish", "tree"), ("oak", "tree", "flower"), ("rose", "flower", "country"), ("Japan", "country", "river"),
    ("Nile", "river", "sport"), ("tennis", "sport", "instrument"), ("piano", "instrument", "vehicle"),
    ("car", "vehicle", "insect"), ("ant", "insect", "building"), ("castle", "building", "day"),
    ("Monday", "day", "animal"),
)  # fmt: skip


@torch.no_grad()
def probe(model: Any, tokenizer: Any) -> float:
    """Return the fraction of 50 yes/no questions whose correct answer is more likely than its opposite."""
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No"))
    right = 0
    for thing, true, false in THINGS:
        for kind, wanted in ((true, True), (false, False)):
            question = f"Is {thing} a kind of {kind}? Answer Yes or No."
            given = chat_inputs(tokenizer, [{"role": "user", "content": question}], torch.device("cpu"))
            logits = model(**given).logits[0, -1]
            right += bool(logits[yes] > logits[no]) == wanted
    return right / (2 * len(THINGS))


def smol_run(seed: int, arm: LanguageArm, size: Size, work: Path) -> dict[str, Any]:
    """Run one arm on SmolLM2: a cipher of Python's documentation."""
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    steps, batch, length = size.smol
    texts = {split: cipher(str(lamella.load_text("pydoc", split)), seed + 1) for split in ("calibration", "test")}
    watched = {
        "English": Language.of(tokenizer, windows(tokenizer, lamella.load_text("pydoc", "test"), 5, length, 0)),
        "cipher": Language.of(tokenizer, windows(tokenizer, texts["test"], 4, length, 0),
                              windows(tokenizer, texts["calibration"], steps * batch, length, seed)),
    }  # fmt: skip
    config = replace(TRAINING, lr=1e-3, batch=batch, eval_every=steps // 4, seed=seed)
    course, after = follow(
        stack, arm, {"cipher": watched["cipher"]}, watched, config,
        work=work / f"smollm2 {seed} {arm.name}", curves=list(watched),
    )  # fmt: skip
    return course.as_dict() | {"probe": [probe(stack.model, tokenizer), probe(after.model, tokenizer)]}


def smollm2(run: Run, size: Size) -> None:
    """Train adapters in the first 10 + last 2, in all 30, and in the middle 12 layers."""
    known = arms(Edges(30, 10, 2))
    names = ("layra", "lora", "lora, middle")
    found = {
        name: [run.arm(f"smollm2 {seed} {name}", smol_run, seed, known[name], size, run.work)
               for seed in range(size.seeds)] for name in names
    }  # fmt: skip
    curves = {name: [each["curve"] for each in runs] for name, runs in found.items()}
    targets = [common_loss({name: [curves[name][seed]["cipher"]] for name in names}) for seed in range(size.seeds)]
    rows, rises = [], {}
    for name, runs in found.items():
        at = [at_equal_loss(each["cipher"], each["English"], target) for each, target in
              zip(curves[name], targets, strict=True)]  # fmt: skip
        rises[name] = [
            loss - each["English"][0] for loss, each in zip(at, curves[name], strict=True) if loss is not None
        ]
        before, after = ([fmean([each["rows"][row][key] for each in runs]) for key in ("English", "cipher")]
                         for row in (0, -1))  # fmt: skip
        probes = [fmean([each["probe"][place] for each in runs]) for place in (0, 1)]
        rows.append([name, runs[0]["trainable"], *before, *after, spread(rises[name]), *probes])
    columns = ["method", "trainable", "English before", "cipher before", "English after", "cipher after",
               "English, rise at equal cipher loss", "probe before", "probe after"]  # fmt: skip
    run.table(f"SmolLM2-135M learns a cipher: bits per byte, means of {size.seeds} seeds", columns, rows)
    apart = difference(rises["layra"], rises["lora"])
    said = f"{fmean(rises['layra']):.3f} against {fmean(rises['lora']):.3f}, apart {apart}"
    run.further("SmolLM2: layra's rise of English at equal cipher loss, against lora", "less", said, apart.at_most(0))


# Exactness


def exactness(record: Record) -> None:
    """Check an untrained Llama of six layers with adapters at the edges."""
    from lamella.zoo.nano import nano

    stack, edges = Stack(nano("llama", num_hidden_layers=6)), Edges(6, 2, 1)
    drawn = torch.Generator().manual_seed(0)
    texts = [blocks(torch.randint(3, 128, (24, 16), generator=drawn), loss_on="all") for _ in range(3)]
    ids = torch.randint(3, 128, (2, 12), generator=drawn)
    new = {name: Language(rows, rows[:4], 60) for name, rows in zip("ab", texts, strict=False)}
    config = replace(TRAINING, lr=1e-2, batch=4)
    before = {name: each.clone() for name, each in stack.model.named_parameters()}
    with torch.no_grad():
        plain = stack.model(ids).logits
    made = layra(stack, new, first=2, last=1, config=config)
    count = {name: len(each.modules) for name, each in made.adapters.items()}
    record.exact("adapted modules", f"|S| x 7 = {7 * 3}", set(count.values()), set(count.values()) == {21})
    widths = [sum(made.stack.model.get_submodule(name).weight.shape) for name in made.adapters["a"].modules]
    record.exact(
        "parameters of an adapter",
        f"r sum(m + n) = {8 * sum(widths)}",
        made.adapters["a"].parameters,
        made.adapters["a"].parameters == 8 * sum(widths),
    )
    inside = tuple(f"model.layers.{layer}." for layer in edges.indices)
    changed = {name for name, each in made.stack.model.named_parameters() if not torch.equal(each, before[name])}
    record.exact(
        "changed parameters outside S",
        "none",
        len([name for name in changed if not name.startswith(inside)]),
        bool(changed) and all(name.startswith(inside) for name in changed),
    )
    with torch.no_grad():
        logits = made.stack.model(ids).logits
        one_by_one = merge(merge(stack, made.adapters["a"]), made.adapters["b"]).model(ids).logits
        at_once = merge(stack, concatenate([made.adapters["a"], _based(made.adapters["b"], made)])).model(ids).logits
        apart = float((one_by_one - at_once).abs().max())
        record.exact("two merges against one of rank 2 r", "at most 1e-5", apart, apart <= 1e-5)
        moved = float((logits - plain).abs().max())
        record.exact("logits moved by training", "yes", moved, moved > 1e-2)
        zero = arithmetic(stack, [(made.adapter, 0.0)], [(made.stack, 0.0)]).model(ids).logits
        record.exact("lambda = lambda' = 0", "base, bitwise", bool(torch.equal(zero, plain)), torch.equal(zero, plain))
        whole = arithmetic(stack, siblings=[(made.stack, 1.0)]).model(ids).logits
        record.exact(
            "lambda = 0, lambda' = 1",
            "instruct, bitwise",
            bool(torch.equal(whole, logits)),
            torch.equal(whole, logits),
        )


def _based(adapter: Any, made: Any) -> Any:
    return replace(adapter, base=made.adapter.base)


def study(record: Record, worlds: Sequence[World], quick: bool) -> None:
    """Compare the edges of the pivot study with the fixed ones."""
    world = worlds[0]
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


def draw(run: Run, points: Mapping[tuple[str, float], tuple[float, float]]) -> None:
    from lamella.methods.layra.page import tradeoff

    picture = tradeoff({name: [point for (arm, _), point in points.items() if arm == name]
                        for name in dict.fromkeys(name for name, _ in points)})  # fmt: skip
    run.figure("layra-tradeoff", picture)


def experiment(run: Run) -> None:
    size = QUICK if run.quick else Size()
    worlds = [World(size, run.seed + number) for number in range(size.seeds)]
    run.data = (
        f"characters of Python's documentation, and letter permutations of it; {size.layers} layers of width "
        f"{size.hidden}, {size.base} steps of pre-training, {size.steps} for each language"
    )
    exactness(run)
    one_language(run, worlds)
    run.part("pivot", study, worlds, run.quick)
    if not run.quick:
        sequences(run, worlds, size.pilot)
        protocols(run, worlds, size.pilot)
        model_arithmetic(run, worlds, size.pilot)
        smollm2(run, size)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="one new language, a smaller model, one seed and rate"))
