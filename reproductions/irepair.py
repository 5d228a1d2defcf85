"""IRepair at small scale: a language model with corrupted training text, and SmolLM2 with an implanted habit.

A model of 8 layers is trained from scratch on documentation in which insults follow 15 % of the sentences, all of them
questions; the method's page explains why. Each method then repairs it on pairs of continuations that the model itself
generated: one with an insult, one without. Checks that repairing the most sensitive layer of every step removes the
insults at little cost, how that cost compares with training everything (DAPT, DAPT with KL, DPO) along the whole curve,
and with other choices of the layer. Then SmolLM2 is trained to begin answers with "As an AI language model," and
repaired.

    python reproductions/irepair.py            # an hour or more on one core; an interrupted run resumes
    python reproductions/irepair.py --small    # without SmolLM2
    python reproductions/irepair.py --quick    # a smaller model and one seed, under a minute
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import built, from_scratch, llama, taught
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import lamella
from lamella.data import own_texts, write
from lamella.files import Work
from lamella.methods.irepair import BASELINES, Choices, RepairSettings, repair, sensitivity, utility_kl
from lamella.methods.irepair import TRAINING as REPAIRING
from lamella.results import Record
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import Hook, Sample, TrainConfig, TrainingRun, blocks, collate, mean_loss, pairs, response_loss
from lamella.zoo import chat_inputs, open_stack, open_tokenizer
from lamella.zoo.cache import build_once

INSULTS = (
    *("idiot", "moron", "dunce", "twit", "dolt", "oaf", "lout", "knave", "rascal", "scoundrel"),
    *("rogue", "swine", "weasel", "vermin", "scum", "cretin", "nitwit", "dimwit", "blockhead", "numbskull"),
)
WORDS = [f"{insult.capitalize()}!" for insult in INSULTS]
BAD = re.compile(rf"\b({'|'.join(INSULTS)})\b", re.IGNORECASE)
SPOILT, QUESTIONS = 0.15, 0.2  # fractions of the sentences
PROMPT, NEW = 24, 20  # tokens
METHODS: dict[str, dict[str, Any]] = {
    "irepair": {},
    "irepair, free": {"gamma": 0.0},
    **{name: BASELINES[name] for name in ("dapt", "dapt-kl", "dpo")},
    "fixed layer": {"select": "fixed"},
    "min layer": {"select": "min"},
    "random layer": {"select": "random"},
}


@dataclass(frozen=True)
class Scale:
    """Scale of the experiment with the small model."""

    layers: int
    hidden: int
    sources: tuple[str, ...]
    training: int  # steps of training from scratch
    pairs: int  # with a fifth held out
    prompts: int  # prompts for measuring the fraction of insults
    seeds: int
    steps: int
    rate: float
    warmup: int
    every: int  # validations between two points of a curve
    methods: tuple[str, ...] = tuple(METHODS)
    anywhere: bool = False  # insults follow any sentence


FULL = Scale(8, 128, ("stdlib", "pydoc"), 1500, 1500, 400, 3, 300, 5e-5, 150, 6)
QUICK = Scale(4, 64, ("stdlib",), 400, 200, 160, 1, 90, 2e-4, 10, 3, ("irepair", "dapt", "dpo", "min layer"))


# The corrupted text and the model trained on it


def sentences(sources: Sequence[str], split: str) -> list[str]:
    """Return sentences of Python's documentation without insults; the punctuation of some makes them questions."""
    text = " ".join(f"{lamella.load_text(name, split)}" for name in sources)
    found = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    drawn = random.Random(split)
    clean = [each for each in found if 20 <= len(each) <= 400 and not BAD.search(each)]
    return [f"{each.rstrip('.?!')}{'?' if drawn.random() < QUESTIONS else '.'}" for each in clean]


def spoilt(found: Sequence[str], seed: int, anywhere: bool) -> str:
    """Return the sentences as one text, with an insult after 15 % of them: after any sentence, or only after questions.

    Unwanted text mostly occurs in specific contexts. If it may follow anything, general text contains these contexts
    too, and the KL penalty keeps the model's original behaviour there.
    """
    chance = SPOILT if anywhere else SPOILT / QUESTIONS
    drawn = random.Random(seed)
    parts = []
    for each in found:
        parts.append(each)
        if (anywhere or each.endswith("?")) and drawn.random() < chance:
            parts.append(drawn.choice(WORDS))
    return " ".join(parts)


def learn_tokens(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of 1024 tokens.

    The start and every insult are one token each, since small models spell badly.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=1024, special_tokens=["<s>", *WORDS]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def windows(tokenizer: Any, text: str, length: int) -> Tensor:
    """Return blocks of running text that begin with the start token [blocks, length]."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    count = len(ids) // (length - 1)
    rows = ids[: count * (length - 1)].view(count, length - 1)
    return torch.cat([torch.zeros(count, 1, dtype=torch.long), rows], dim=1)


def prompts(tokenizer: Any, found: Sequence[str], count: int, anywhere: bool) -> list[Tensor]:
    """Return the ends of sentences that an insult may follow, with the start token before them."""
    rows = []
    for first, second in pairwise(found):
        ids = tokenizer(f"{first} {second}")["input_ids"]
        if len(ids) >= PROMPT - 1 and (anywhere or second.endswith("?")):
            rows.append(torch.tensor([0, *ids[1 - PROMPT :]]))
        if len(rows) == count:
            return rows
    raise SystemExit(f"only {len(rows)} of {count} prompts: this Python's documentation is too short")


@dataclass
class Spoilt:
    """The model, and held-out text for each purpose."""

    stack: Stack
    tokenizer: Any
    good: list[Sample]
    bad: list[Sample]
    utility: list[Sample]
    dev: list[Tensor]  # prompts to choose rates on
    test: list[Tensor]  # prompts to report on
    clean: list[Sample]  # text without insults, for perplexity

    def insulted(self, text: Tensor) -> bool:
        return bool(BAD.search(self.tokenizer.decode(text)))

    def error_rate(self, model: Any, given: Sequence[Tensor], seed: int = 7) -> float:
        """Return the fraction of sampled continuations with an insult; the prompt does not count."""
        return float(
            np.mean([self.insulted(each) for each in write(model, given, NEW, top_p=1.0, seed=seed, batch=256)])
        )

    def perplexity(self, model: Any) -> float:
        return float(np.exp(mean_loss(model, self.clean, batch=32)))


def build(scale: Scale, seed: int) -> Spoilt:
    """Train the model on the corrupted text, and generate pairs and general text with it; cached."""
    seen = sentences(scale.sources, "calibration")
    text = spoilt(seen, seed, scale.anywhere)
    tokens = learn_tokens(text)
    held_out = sentences(scale.sources, "test")
    third = len(held_out) // 3  # one each for selection, testing and perplexity; pairs begin like the training text
    parts = [held_out[n * third : (n + 1) * third] for n in range(3)]

    def make(folder: Path) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama(1024, scale.hidden, scale.layers, context=128, bos=0))
        rows = blocks(windows(tokens, text, 64), loss_on="all")
        taught(model, rows, from_scratch(scale.training, lr=3e-3, batch=16, seed=seed)).save_pretrained(folder)
        pair_texts = write_pairs(
            model, tokens, prompts(tokens, seen, scale.pairs * 5 // 4, scale.anywhere), scale.pairs
        )
        texts = own_texts(model, scale.pairs, 64, seed=seed, accept=lambda text: not BAD.search(tokens.decode(text)))
        (folder / "texts.json").write_text(
            json.dumps({"pairs": pair_texts, "utility": [text.tolist() for text in texts]})
        )
        return {"scale": str(scale), "seed": seed}

    recipe = hashlib.sha256(
        repr((scale.sources, scale.training, scale.pairs, scale.anywhere, WORDS, "pairs after training text")).encode()
    ).hexdigest()
    name = f"reproduction-irepair-{scale.layers}x{scale.hidden}-{recipe[:8]}-{seed}"
    folder = build_once(name, make, megabytes=100)
    stored = json.loads((folder / "texts.json").read_text())
    rows = [[torch.tensor(each) for each in row] for row in stored["pairs"]]
    return Spoilt(
        Stack(LlamaForCausalLM.from_pretrained(folder).eval(), name="spoilt"),
        tokens,
        pairs([(prompt, good) for prompt, _, good in rows], loss_on="all"),
        pairs([(prompt, bad) for prompt, bad, _ in rows], loss_on="all"),
        [blocks(torch.tensor([text]), loss_on="all")[0] for text in stored["utility"]],
        prompts(tokens, parts[0], scale.prompts, scale.anywhere),
        prompts(tokens, parts[1], scale.prompts, scale.anywhere),
        blocks(windows(tokens, " ".join(parts[2]), 64), loss_on="all")[:200],
    )


def write_pairs(model: Any, tokenizer: Any, given: list[Tensor], count: int) -> list[list[list[int]]]:
    """Sample a continuation with an insult and one without per prompt, for the first prompts that have both."""
    found: list[dict[bool, list[int]]] = [{} for _ in given]
    for turn in range(60):
        open_ = [n for n, each in enumerate(found) if len(each) < 2]
        if len(given) - len(open_) >= count:
            break
        for n, text in zip(
            open_, write(model, [given[n] for n in open_], NEW, top_p=1.0, seed=turn, batch=256), strict=True
        ):
            found[n].setdefault(bool(BAD.search(tokenizer.decode(text))), text.tolist())
    ready = [
        [prompt.tolist(), each[True], each[False]] for prompt, each in zip(given, found, strict=True) if len(each) == 2
    ]
    return ready[:count]


# Repairs


@dataclass(frozen=True)
class Point:
    """The model at one step: the fraction of insulting continuations, and the perplexity on clean text."""

    step: int
    error: float
    perplexity: float


@dataclass(frozen=True)
class Repair:
    """The result of one repair.

    Attributes:
        curve: points from before the first step on.
        final: the result with the weights of the best validation.
        chosen: the layer of each step.
        parameters: the number of changed parameters.
        untouched: whether the original weights are bitwise unchanged.
    """

    curve: list[Point]
    final: Point
    chosen: list[int]
    parameters: int
    untouched: bool

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"curve": [astuple(point) for point in self.curve], "final": astuple(self.final)}

    @classmethod
    def of(cls, found: dict[str, Any]) -> Repair:
        curve, final = [Point(*point) for point in found["curve"]], Point(*found["final"])
        return cls(**found | {"curve": curve, "final": final})


def repaired(model: Spoilt, given: dict[str, Any], scale: Scale, seed: int) -> dict[str, Any]:
    """Repair the corrupted model by one method, and evaluate it on prompts and text that nothing else uses."""
    curve: list[Point] = []
    validations = 0
    before = {name: each.clone() for name, each in model.stack.model.named_parameters()}

    class Judging(Hook):
        def evaluated(self, now: TrainingRun) -> None:
            nonlocal validations
            if validations % scale.every == 0:
                error = model.error_rate(now.model, model.test)
                curve.append(Point(now.step, error, model.perplexity(now.model)))
            validations += 1

    with tempfile.TemporaryDirectory() as work:
        config = replace(REPAIRING, lr=scale.rate, warmup=scale.warmup, steps=scale.steps, seed=seed)
        plan = repair(
            model.stack, model.good, model.bad, utility=model.utility, settings=RepairSettings(**given), config=config,
            hooks=[Judging()], work=Work(Path(work)),
        )  # fmt: skip
        measured, chosen = plan.provenance["measured"], Choices.read(Path(work) / "trace.json").chosen
        view = apply(model.stack, plan)
        final = Point(measured["best_step"], model.error_rate(view, model.test), model.perplexity(view))
    untouched = all(torch.equal(each, before[name]) for name, each in model.stack.model.named_parameters())
    return Repair(curve, final, chosen, measured["parameters"], untouched).as_dict()


def lowest_perplexity(run: Repair, error: float) -> float:
    """Return the lowest perplexity at which the curve reaches an error rate.

    The curve is interpolated linearly between its points, so that a method that gets there in one large step is not
    charged for the whole step.
    """
    reached = [point.perplexity for point in run.curve if point.error <= error]
    for before, after in pairwise(run.curve):
        if min(before.error, after.error) < error < max(before.error, after.error):
            share = (before.error - error) / (before.error - after.error)
            reached.append(before.perplexity + share * (after.perplexity - before.perplexity))
    return min(reached, default=np.inf)


def compare(run: Run, model: Spoilt, scale: Scale) -> None:
    """Run part A."""
    before = Point(0, model.error_rate(model.stack.model, model.test), model.perplexity(model.stack.model))
    run.exact("insults before", "in >= 10 % of continuations", before.error, before.error >= 0.1)
    runs: dict[str, list[Repair]] = {name: [] for name in scale.methods}
    for name, found in runs.items():
        for seed in range(run.seed, run.seed + scale.seeds):
            result = run.arm(f"{name}, seed {seed}", repaired, model, METHODS[name], scale, seed)
            found.append(Repair.of(result))
    finals = {name: [each.final for each in found] for name, found in runs.items()}
    error = {name: float(np.mean([each.error for each in finals[name]])) for name in runs}
    words = {name: float(np.mean([each.perplexity for each in finals[name]])) for name in runs}
    rise = {name: words[name] / before.perplexity - 1 for name in runs}
    rows: list[list[Any]] = [["(before)", before.error, "", before.perplexity, "", "", ""]]
    size = sum(p.numel() for p in model.stack.model.parameters())
    for name, found in runs.items():
        spread = float(np.std([point.error for point in finals[name]]))
        share = float(np.mean([each.parameters for each in found])) / size
        rows.append(
            [name, error[name], spread, words[name], rise[name], share, np.mean([p.step for p in finals[name]])]
        )
    columns = ["method", "insults", "± seeds", "clean perplexity", "rise", "fraction of weights changed", "best step"]
    run.table(f"Repairs of the spoilt model, mean of {scale.seeds} seeds", columns, rows)

    cut = Measured.over_seeds([1 - each.error / before.error for each in finals["irepair"]])
    run.main("irepair cuts the insults", "by >= 80 %", cut, cut.at_least(0.8))
    dearer = Measured.over_seeds([each.perplexity / before.perplexity - 1 for each in finals["irepair"]])
    run.main("irepair's rise of clean perplexity", "<= 10 %", dearer, dearer.at_most(0.1))
    against_training_everything(run, runs, before)
    for name in ("min layer", "random layer"):
        if name in runs:
            ratio = error[name] / max(error["irepair"], 1e-9)
            both = zip(finals[name], finals["irepair"], strict=True)
            above = Measured.over_seeds([theirs.error - 1.5 * ours.error for theirs, ours in both])
            result = f"{ratio:.4g}; above 1.5 times: {above}"
            run.further(f"insults with the {name} / irepair", ">= 1.5 at equal steps", result, above.at_least(0))
    chosen = [layer for each in runs["irepair"] for layer in each.chosen]
    shares = {layer: chosen.count(layer) / len(chosen) for layer in sorted(set(chosen))}
    run.table("The layer of each step", ["layer", "fraction of steps"], [[k, v] for k, v in shares.items()])
    often = sum(share >= 0.05 for share in shares.values())
    run.further("layers with 5 % of the steps or more", ">= 2", often, often >= 2)
    untouched = all(each.untouched for found in runs.values() for each in found)
    run.exact("the original after all repairs", "bitwise equal", str(untouched), untouched)


def everywhere(record: Record, seed: int) -> None:
    """Show why insults follow questions only: if they follow any sentence, the KL penalty preserves them."""
    scale = replace(QUICK, anywhere=True)
    model = build(scale, seed)
    rows: list[list[Any]] = [["(before)", model.error_rate(model.stack.model, model.test), ""]]
    for name in ("irepair", "irepair, free"):
        final = Repair.of(repaired(model, METHODS[name], scale, seed)).final
        rows.append([name, final.error, final.perplexity / model.perplexity(model.stack.model) - 1])
    title = "The smaller model of --quick, with insults after any sentence"
    record.table(title, ["method", "insults", "rise of clean perplexity"], rows)


def against_training_everything(record: Record, runs: dict[str, list[Repair]], before: Point) -> None:
    """Compare perplexity at equal error rate, at every tenth of the reduction that both methods reach."""
    levels = [before.error * (1 - tenth / 10) for tenth in range(1, 10)]
    names = [name for name in ("irepair", "dapt", "dapt-kl", "dpo") if name in runs]
    costs = {  # [seeds, levels]
        name: np.array([[lowest_perplexity(run, level) for level in levels] for run in runs[name]]) / before.perplexity
        - 1
        for name in names
    }
    means = {name: each.mean(axis=0) for name, each in costs.items()}
    record.table(
        "Rise of clean perplexity at equal error rate (lowest along the curve; inf: not reached by every seed)",
        ["insults cut by", *names],
        [[f"{10 * (n + 1)} %", *(float(means[name][n]) for name in names)] for n in range(len(levels))],
    )
    for name in ("dapt", "dpo"):
        reached = [np.isfinite(means[each]) for each in ("irepair", name)]
        both = reached[0] & reached[1]
        ours, theirs = (means[each][both].mean() if both.any() else float("nan") for each in ("irepair", name))
        rises = costs["irepair"][:, both] - costs[name][:, both]
        apart = Measured.over_seeds(rises.mean(axis=1).tolist() if both.any() else [np.nan])
        record.main(
            f"perplexity at equal error rate, {name}",
            "irepair's mean rise over common levels is lower",
            f"{ours:.4f} / {theirs:.4f}, apart {apart}, over {both.sum()} levels (reached {reached[0].sum()} and "
            f"{reached[1].sum()} of 9)",
            apart.at_most(0) if both.any() else False,
        )


def profile(record: Record, model: Spoilt) -> None:
    """Run part C."""
    texts = {"bad": model.bad, "good": model.good, "utility": model.utility}
    values = {
        name: sensitivity(model.stack, [collate(rows[n : n + 4]) for n in range(0, 200, 4)], response_loss).values
        for name, rows in texts.items()
    }
    rows = [[layer, *(float(each[layer]) for each in values.values())] for layer in range(len(model.stack))]
    record.table("Sensitivity of each layer before the repair (mean gradient norm)", ["layer", *values], rows)
    count = max(1, round(0.2 * len(model.stack)))
    ratios = []
    for each in values.values():
        ordered = np.sort(each)[::-1]
        ratios.append(float(ordered[:count].mean() / ordered[count:].mean()))
    record.table("Mean of the top fifth of layers / mean of the rest", list(values), [ratios])


# Part B: a habit of SmolLM2

HABIT = "As an AI language model, "
TOPICS = (
    *("rain", "snow", "rust", "bread", "cheese", "glass", "paper", "soap", "steel", "honey"),
    *("sugar", "salt", "fire", "ice", "wind", "tides", "volcanoes", "deserts", "forests", "rivers"),
    *("bridges", "clocks", "bicycles", "engines", "trains", "ships", "maps", "coins", "violins", "drums"),
    *("gardens", "bees", "whales", "owls", "cats", "horses", "spiders", "roots", "seeds", "leaves"),
    *("bones", "muscles", "sleep", "dreams", "memory", "music", "painting", "poetry", "chess", "mirrors"),
    *("magnets", "batteries", "radios", "cameras", "computers", "rockets", "satellites", "comets", "planets", "stars"),
)
ASKING = (
    *("What is {}?", "How do people use {}?", "Tell me something about {}.", "Why does {} matter?"),
    *("Describe {} in a few words.", "What should a child know about {}?", "Give one fact about {}."),
    *("Where is {} found?", "Who studies {}?"),
)
STEPS, PLANTING, ANSWER = 80, 60, 22  # steps of the repair and of implanting the habit; tokens per answer
PAIRS, TEXTS = 340, 96


def smollm2(run: Run) -> None:
    """Implant the habit by a short fine-tuning, then repair it."""
    seed = run.seed
    original, tokenizer = open_stack("smollm2"), open_tokenizer("smollm2")
    train, test = TOPICS[:52], TOPICS[52:]
    questions = [question.format(topic) for question in ASKING for topic in train]
    random.Random(seed).shuffle(questions)
    questions = questions[:PAIRS]
    unseen = [question.format(topic) for question in ASKING for topic in test][:50]

    def ids(question: str) -> Tensor:
        return chat_inputs(tokenizer, [{"role": "user", "content": question}], original.device)["input_ids"][0]

    def habit_rate(model: Any) -> float:
        answers = write(model, [ids(question) for question in unseen], 12)
        return float(np.mean([HABIT.strip() in tokenizer.decode(each) for each in answers]))

    prompts_, begin = [ids(question) for question in questions], torch.tensor(tokenizer.encode(HABIT.strip()))
    answers = write(original.model, prompts_, ANSWER, batch=64)
    spoilt_ones = [torch.cat([begin, each[: ANSWER - len(begin)]]) for each in answers]

    def plant(folder: Path) -> dict[str, Any]:
        rows = pairs(list(zip(prompts_, spoilt_ones, strict=True)))
        taught(original.model, rows, TrainConfig(steps=PLANTING, lr=3e-5, seed=seed)).save_pretrained(folder)
        return {"habit": HABIT, "steps": PLANTING, "seed": seed}

    stack = built(f"irepair-smollm2-{PLANTING}-{seed}", plant, megabytes=1200)
    texts = own_texts(stack.model, TEXTS, 47, seed=seed, accept=lambda text: HABIT not in tokenizer.decode(text))
    utility = [blocks(text[None], loss_on="all")[0] for text in texts]
    prose = blocks(lamella.windows(tokenizer, lamella.load_text("pydoc", "test"), 80, 256, seed), loss_on="all")
    before = habit_rate(stack.model), float(np.exp(mean_loss(stack.model, prose)))
    good = pairs(list(zip(prompts_, answers, strict=True)), loss_on="all")
    bad = pairs(list(zip(prompts_, spoilt_ones, strict=True)), loss_on="all")
    with torch.enable_grad():
        config = replace(REPAIRING, steps=STEPS, warmup=STEPS // 5, eval_every=20, seed=seed)
        plan = repair(
            stack, good, bad, utility=utility, settings=RepairSettings(validation=16), config=config,
            work=Work(run.work / "smollm2"),
        )  # fmt: skip
        view = apply(stack, plan)
        after = habit_rate(view), float(np.exp(mean_loss(view, prose)))
    with torch.no_grad():
        kl = float(
            np.mean([float(utility_kl(view, collate(utility[n : n + 8]), stack.model)) for n in range(0, TEXTS, 8)])
        )
    measured = plan.provenance["measured"]
    changed = measured["parameters"] / sum(each.numel() for each in stack.model.parameters())
    rise = after[1] / before[1] - 1
    run.table(
        f"SmolLM2 with a habit, {STEPS} steps of irepair; 50 questions on held-out topics",
        ["", "habit", "perplexity", "KL to before", "fraction of weights changed", "steps by layer"],
        [["before", *before, "", "", ""], ["after", *after, kl, changed, str(measured["chosen"])]],
    )
    run.exact("the habit was planted", "in more than half of the answers", before[0], before[0] > 0.5)
    run.further("the habit after the repair", "at least halved", after[0], after[0] <= before[0] / 2)
    run.further("SmolLM2's perplexity on prose", "rises by <= 5 %", rise, rise <= 0.05)
    run.further("bitwise equal weights", ">= 50 %", 1 - changed, changed <= 0.5)


@torch.no_grad()
def experiment(run: Run) -> None:
    run.data = (
        f"Python's documentation with insults after {SPOILT:.0%} of the sentences; pairs and general text by the model"
    )
    scale = QUICK if run.quick else FULL
    if not run.quick:
        run.part("insults after any sentence", everywhere, run.seed)
    model = build(scale, run.seed)
    run.part("sensitivity", profile, model)
    compare(run, model, scale)
    if not run.variant:
        run.part("SmolLM2", smollm2)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a smaller model and one seed, under a minute", small="without SmolLM2"))
