"""IRepair at small scale: a language model whose training text was spoilt, and SmolLM2 with a habit that was planted.

A model of 8 layers is trained from scratch on documentation in which insults follow 15 % of the sentences, all of them
questions; the method's page says why. Each method then repairs it on pairs of continuations that the model wrote
itself: one with an insult, one without. Checks that repairing the most sensitive layer of every step takes the insults
away at little cost, how that cost compares with training everything (DAPT, DAPT with KL, DPO) along the whole curve,
and with other choices of the layer. Then SmolLM2 is taught to begin answers with "As an AI language model," and
repaired.

    python reproductions/irepair.py              # an hour or more on one core; models and pairs are kept
    python reproductions/irepair.py --no-smollm2 # without SmolLM2
    python reproductions/irepair.py --quick      # a smaller model and one seed, under a minute
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lamella
from lamella.data import own_texts, write
from lamella.files import Work
from lamella.methods.irepair import BASELINES, Choices, RepairSettings, repair, sensitivity, utility_kl
from lamella.methods.irepair import TRAINING as REPAIRING
from lamella.plan import Plan
from lamella.results import Record
from lamella.runtime import apply
from lamella.stack import Stack
from lamella.train import (
    Hook,
    Sample,
    Task,
    TrainConfig,
    Training,
    blocks,
    collate,
    fit,
    mean_loss,
    pairs,
    response_loss,
)
from lamella.zoo import chat_inputs, open_stack, open_tokenizer
from lamella.zoo.cache import build_once

HERE = Path(__file__).parent
INSULTS = (
    *("idiot", "moron", "dunce", "twit", "dolt", "oaf", "lout", "knave", "rascal", "scoundrel"),
    *("rogue", "swine", "weasel", "vermin", "scum", "cretin", "nitwit", "dimwit", "blockhead", "numbskull"),
)
WORDS = [f"{insult.capitalize()}!" for insult in INSULTS]
BAD = re.compile(rf"\b({'|'.join(INSULTS)})\b", re.IGNORECASE)
SPOILT, QUESTIONS = 0.15, 0.2  # of the sentences
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
    """How much work the experiment with the small model is."""

    layers: int
    hidden: int
    sources: tuple[str, ...]
    training: int  # steps of training from scratch
    pairs: int  # with a fifth held out
    prompts: int  # to measure the share of insults on
    seeds: int
    steps: int
    rate: float
    warmup: int
    every: int  # validations from one point of a curve to the next
    methods: tuple[str, ...] = tuple(METHODS)
    anywhere: bool = False  # insults follow any sentence


FULL = Scale(8, 128, ("stdlib", "pydoc"), 1500, 1500, 400, 3, 300, 5e-5, 150, 6)
QUICK = Scale(4, 64, ("stdlib",), 400, 200, 160, 1, 90, 2e-4, 10, 3, ("irepair", "dapt", "dpo", "min layer"))


# The spoilt text and the model that learns it


def sentences(sources: Sequence[str], split: str) -> list[str]:
    """Sentences of Python's documentation without any insult; the marks of some make them questions."""
    text = " ".join(f"{lamella.load_text(name, split)}" for name in sources)
    found = re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text))
    drawn = random.Random(split)
    clean = [each for each in found if 20 <= len(each) <= 400 and not BAD.search(each)]
    return [f"{each.rstrip('.?!')}{'?' if drawn.random() < QUESTIONS else '.'}" for each in clean]


def spoilt(found: Sequence[str], seed: int, anywhere: bool) -> str:
    """The sentences as one text, 15 % of them followed by an insult: any of them, or only questions.

    Unwanted text mostly has its occasions. Where it may follow anything, general text has the occasions too, and the
    leash holds the model to what it did there.
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
    """Byte-level BPE of 1024 tokens; the start and every insult are one token, as small models spell badly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=1024, special_tokens=["<s>", *WORDS]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def windows(tokenizer: Any, text: str, length: int) -> Tensor:
    """Blocks of running text that begin with the start token [blocks, length]."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    count = len(ids) // (length - 1)
    rows = ids[: count * (length - 1)].view(count, length - 1)
    return torch.cat([torch.zeros(count, 1, dtype=torch.long), rows], dim=1)


def prompts(tokenizer: Any, found: Sequence[str], count: int, anywhere: bool) -> list[Tensor]:
    """The ends of sentences that an insult may follow, with the start token before them."""
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
    """The model, and text that it was not trained on, each part for one use."""

    stack: Stack
    tokenizer: Any
    good: list[Sample]
    bad: list[Sample]
    utility: list[Sample]
    dev: list[Tensor]  # prompts to choose rates on
    test: list[Tensor]  # prompts to judge on
    clean: list[Sample]  # text without insults, for perplexity

    def insulted(self, text: Tensor) -> bool:
        return bool(BAD.search(self.tokenizer.decode(text)))

    def error_rate(self, model: Any, given: Sequence[Tensor], seed: int = 7) -> float:
        """The share of sampled continuations with an insult; the prompt does not count."""
        return float(
            np.mean([self.insulted(each) for each in write(model, given, NEW, top_p=1.0, seed=seed, batch=256)])
        )

    def perplexity(self, model: Any) -> float:
        return float(np.exp(mean_loss(model, self.clean, batch=32)))


def build(scale: Scale, seed: int) -> Spoilt:
    """Train the model on spoilt text, and let it write pairs and general text; kept in the cache."""
    seen = sentences(scale.sources, "calibration")
    text = spoilt(seen, seed, scale.anywhere)
    tokens = learn_tokens(text)
    held_out = sentences(scale.sources, "test")
    third = len(held_out) // 3  # one each for choosing, judging and perplexity; pairs begin as the training text did
    parts = [held_out[n * third : (n + 1) * third] for n in range(3)]

    def make(folder: Path) -> dict[str, Any]:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=1024, hidden_size=scale.hidden, intermediate_size=3 * scale.hidden,
            num_hidden_layers=scale.layers, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
            max_position_embeddings=128, bos_token_id=0, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        rows = blocks(windows(tokens, text, 64), loss_on="all")
        with tempfile.TemporaryDirectory() as work, torch.enable_grad():
            settings = TrainConfig(steps=scale.training, lr=3e-3, batch=16, seed=seed, weight_decay=0.1, warmup=0.05,
                                   save_every=scale.training)  # fmt: skip
            fit(model, rows, Task(response_loss), replace(settings, log_every=100), out=work)
        model.eval().save_pretrained(folder)
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
    """To each prompt a sampled continuation with an insult and one without, for the first prompts that have both."""
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
    """The model at one step: the share of insulting continuations, and perplexity on clean text."""

    step: int
    error: float
    perplexity: float


@dataclass
class Repair:
    """One repair: its curve from before the first step, and what came out (the weights of the best validation)."""

    curve: list[Point] = field(default_factory=list)
    final: Point | None = None
    chosen: list[int] = field(default_factory=list)
    plan: Plan | None = None


def repaired(model: Spoilt, given: dict[str, Any], scale: Scale, seed: int) -> Repair:
    """Repair the spoilt model by one method, and judge it on prompts and text that nothing else uses."""
    run = Repair()
    validations = 0

    class Judging(Hook):
        def evaluated(self, now: Training) -> None:
            nonlocal validations
            if validations % scale.every == 0:
                error = model.error_rate(now.model, model.test)
                run.curve.append(Point(now.step, error, model.perplexity(now.model)))
            validations += 1

    with tempfile.TemporaryDirectory() as work:
        config = replace(REPAIRING, lr=scale.rate, warmup=scale.warmup, steps=scale.steps, seed=seed)
        run.plan = repair(
            model.stack, model.good, model.bad, utility=model.utility, settings=RepairSettings(**given), config=config,
            hooks=[Judging()], work=Work(Path(work)),
        )  # fmt: skip
        run.chosen = Choices.read(Path(work) / "trace.json").chosen
        view = apply(model.stack, run.plan)
        step = run.plan.provenance["measured"]["best_step"]
        run.final = Point(step, model.error_rate(view, model.test), model.perplexity(view))
    return run


def lowest_perplexity(runs: Sequence[Repair], error: float) -> float:
    """What an error rate that low costs: the mean over seeds of the lowest perplexity at which a curve has it.

    Between its points a curve is a line, so that a method which is there in one stride is not charged for all of it.
    """
    costs = []
    for run in runs:
        reached = [point.perplexity for point in run.curve if point.error <= error]
        for before, after in pairwise(run.curve):
            if min(before.error, after.error) < error < max(before.error, after.error):
                share = (before.error - error) / (before.error - after.error)
                reached.append(before.perplexity + share * (after.perplexity - before.perplexity))
        costs.append(min(reached, default=np.inf))
    return float(np.mean(costs))


def compare(record: Record, model: Spoilt, scale: Scale, seed: int) -> None:
    """Part A."""
    before = Point(0, model.error_rate(model.stack.model, model.test), model.perplexity(model.stack.model))
    record.check("insults before", "in >= 10 % of continuations", before.error, before.error >= 0.1)
    runs = {
        name: [repaired(model, METHODS[name], scale, seed + n) for n in range(scale.seeds)] for name in scale.methods
    }
    finals = {name: [run.final for run in each if run.final is not None] for name, each in runs.items()}
    error = {name: float(np.mean([each.error for each in finals[name]])) for name in runs}
    words = {name: float(np.mean([each.perplexity for each in finals[name]])) for name in runs}
    rise = {name: words[name] / before.perplexity - 1 for name in runs}
    rows: list[list[Any]] = [["(before)", before.error, "", before.perplexity, "", "", ""]]
    for name, each in runs.items():
        spread = float(np.std([point.error for point in finals[name]]))
        changed = float(
            np.mean([run.plan.provenance["measured"]["parameters"] for run in each if run.plan is not None])
        )
        share = changed / sum(p.numel() for p in model.stack.model.parameters())
        rows.append(
            [name, error[name], spread, words[name], rise[name], share, np.mean([p.step for p in finals[name]])]
        )
    columns = ["method", "insults", "± seeds", "clean perplexity", "rise", "share of weights changed", "best step"]
    record.table(f"Repairs of the spoilt model, mean of {scale.seeds} seeds", columns, rows)

    cut = 1 - error["irepair"] / before.error
    record.check("irepair cuts the insults", "by >= 80 %", cut, cut >= 0.8)
    record.check("irepair's rise of clean perplexity", "<= 10 %", rise["irepair"], rise["irepair"] <= 0.1)
    against_training_everything(record, runs, before)
    for name in ("min layer", "random layer"):
        if name in runs:
            ratio = error[name] / max(error["irepair"], 1e-9)
            record.check(f"insults with the {name} / irepair", ">= 1.5 at equal steps", ratio, ratio >= 1.5)
    chosen = [layer for run in runs["irepair"] for layer in run.chosen]
    shares = {layer: chosen.count(layer) / len(chosen) for layer in sorted(set(chosen))}
    record.table("The layer of each step", ["layer", "share of steps"], [[k, v] for k, v in shares.items()])
    often = sum(share >= 0.05 for share in shares.values())
    record.check("layers with 5 % of the steps or more", ">= 2", often, often >= 2)


def everywhere(record: Record, seed: int) -> None:
    """Why insults follow questions alone: where they follow any sentence, the leash holds the model to them."""
    scale = replace(QUICK, anywhere=True)
    model = build(scale, seed)
    rows: list[list[Any]] = [["(before)", model.error_rate(model.stack.model, model.test), ""]]
    for name in ("irepair", "irepair, free"):
        final = repaired(model, METHODS[name], scale, seed).final
        assert final is not None
        rows.append([name, final.error, final.perplexity / model.perplexity(model.stack.model) - 1])
    title = "The smaller model of --quick, with insults after any sentence"
    record.table(title, ["method", "insults", "rise of clean perplexity"], rows)


def against_training_everything(record: Record, runs: dict[str, list[Repair]], before: Point) -> None:
    """Perplexity at equal error rate, along the whole curve: at every tenth of the cut that both methods reach."""
    levels = [before.error * (1 - tenth / 10) for tenth in range(1, 10)]
    names = [name for name in ("irepair", "dapt", "dapt-kl", "dpo") if name in runs]
    costs = {name: [lowest_perplexity(runs[name], level) / before.perplexity - 1 for level in levels] for name in names}
    record.table(
        "Rise of clean perplexity at equal error rate (lowest along the curve; inf: not reached by every seed)",
        ["insults cut by", *names],
        [[f"{10 * (n + 1)} %", *(costs[name][n] for name in names)] for n in range(len(levels))],
    )
    for name in ("dapt", "dpo"):
        both = [(a, b) for a, b in zip(costs["irepair"], costs[name], strict=True) if np.isfinite(a + b)]
        ours, theirs = (float(np.mean([pair[n] for pair in both])) if both else float("nan") for n in (0, 1))
        reached = [sum(np.isfinite(costs[each])) for each in ("irepair", name)]
        record.check(
            f"perplexity at equal error rate, {name}",
            "irepair's mean rise over common levels is lower",
            f"{ours:.4f} / {theirs:.4f} over {len(both)} levels (reached {reached[0]} and {reached[1]} of 9)",
            bool(both) and ours < theirs,
        )


def profile(record: Record, model: Spoilt) -> None:
    """Part C."""
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
STEPS, PLANTING, ANSWER = 80, 60, 22  # of the repair, of planting the habit; tokens of an answer
PAIRS, TEXTS = 340, 96


def smollm2(record: Record, seed: int) -> None:
    """Plant the habit by a short fine-tune, then repair it."""
    original, tokenizer = open_stack("smollm2"), open_tokenizer("smollm2")
    train, test = TOPICS[:52], TOPICS[52:]
    asked = [question.format(topic) for question in ASKING for topic in train]
    random.Random(seed).shuffle(asked)
    asked = asked[:PAIRS]
    unseen = [question.format(topic) for question in ASKING for topic in test][:50]

    def ids(question: str) -> Tensor:
        return chat_inputs(tokenizer, [{"role": "user", "content": question}], original.device)["input_ids"][0]

    def habit_rate(model: Any) -> float:
        answers = write(model, [ids(question) for question in unseen], 12)
        return float(np.mean([HABIT.strip() in tokenizer.decode(each) for each in answers]))

    prompts_, begin = [ids(question) for question in asked], torch.tensor(tokenizer.encode(HABIT.strip()))
    answers = write(original.model, prompts_, ANSWER, batch=64)
    spoilt_ones = [torch.cat([begin, each[: ANSWER - len(begin)]]) for each in answers]

    def plant(folder: Path) -> dict[str, Any]:
        model = original.model
        rows = pairs(list(zip(prompts_, spoilt_ones, strict=True)))
        with tempfile.TemporaryDirectory() as work, torch.enable_grad():
            settings = TrainConfig(steps=PLANTING, lr=3e-5, seed=seed, save_every=PLANTING)
            fit(model, rows, Task(response_loss), settings, out=work)
        model.save_pretrained(folder)
        return {"habit": HABIT, "steps": PLANTING, "seed": seed}

    folder = build_once(f"reproduction-irepair-smollm2-{PLANTING}-{seed}", plant, megabytes=1200)
    stack = Stack(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), name="SmolLM2 with a habit")
    texts = own_texts(stack.model, TEXTS, 47, seed=seed, accept=lambda text: HABIT not in tokenizer.decode(text))
    utility = [blocks(text[None], loss_on="all")[0] for text in texts]
    prose = blocks(lamella.windows(tokenizer, lamella.load_text("pydoc", "test"), 80, 256, seed), loss_on="all")
    before = habit_rate(stack.model), float(np.exp(mean_loss(stack.model, prose)))
    good = pairs(list(zip(prompts_, answers, strict=True)), loss_on="all")
    bad = pairs(list(zip(prompts_, spoilt_ones, strict=True)), loss_on="all")
    with tempfile.TemporaryDirectory() as work, torch.enable_grad():
        config = replace(REPAIRING, steps=STEPS, warmup=STEPS // 5, eval_every=20, seed=seed)
        plan = repair(
            stack,
            good,
            bad,
            utility=utility,
            settings=RepairSettings(validation=16),
            config=config,
            work=Work(Path(work)),
        )
        view = apply(stack, plan)
        after = habit_rate(view), float(np.exp(mean_loss(view, prose)))
    with torch.no_grad():
        kl = float(
            np.mean([float(utility_kl(view, collate(utility[n : n + 8]), stack.model)) for n in range(0, TEXTS, 8)])
        )
    measured = plan.provenance["measured"]
    changed = measured["parameters"] / sum(each.numel() for each in stack.model.parameters())
    rise = after[1] / before[1] - 1
    record.table(
        f"SmolLM2 with a habit, {STEPS} steps of irepair; 50 questions on topics that nothing was trained on",
        ["", "habit", "perplexity", "KL to before", "share of weights changed", "steps by layer"],
        [["before", *before, "", "", ""], ["after", *after, kl, changed, str(measured["chosen"])]],
    )
    record.check("the habit was planted", "in more than half of the answers", before[0], before[0] > 0.5)
    record.check("the habit after the repair", "at least halved", after[0], after[0] <= before[0] / 2)
    record.check("SmolLM2's perplexity on prose", "rises by <= 5 %", rise, rise <= 0.05)
    record.check("weights equal to the bit", ">= 50 %", 1 - changed, changed <= 0.5)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and one seed, under a minute")
    parser.add_argument("--no-smollm2", action="store_true", help="leave out SmolLM2; writes irepair-small.json")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    record = Record(
        "irepair",
        f"Python's documentation with insults after {SPOILT:.0%} of the sentences; pairs and general text by the model",
        arguments.seed,
    )
    if not arguments.quick:
        everywhere(record, arguments.seed)
    model = build(scale, arguments.seed)
    before = {name: each.clone() for name, each in model.stack.model.named_parameters()}
    profile(record, model)
    compare(record, model, scale, arguments.seed)
    untouched = all(torch.equal(each, before[name]) for name, each in model.stack.model.named_parameters())
    record.check("the original after all repairs", "equal to the bit", str(untouched), untouched)
    if not (arguments.quick or arguments.no_smollm2):
        smollm2(record, arguments.seed)
    part = "-quick" if arguments.quick else "-small" if arguments.no_smollm2 else ""
    return record.finish(HERE / "results" / f"irepair{part}.json")


if __name__ == "__main__":
    raise SystemExit(main())
