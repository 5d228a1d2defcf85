"""IRepair at small scale: two language models with corrupted training text, and SmolLM2 with an implanted habit.

Models of 8 layers are trained from scratch on documentation in which insults follow 15 % of the sentences, all of them
questions; the method's page explains why. Each method then repairs them on pairs of continuations that the model itself
generated: one with an insult, one without. In the plain model the gradient of the first layer is the largest, so that
one layer is chosen at every step. The balanced model has token embeddings with a standard deviation of 1 from the
start, and a head of its own, so that no layer stands out; then the gains of its norms and the projections that read
them are scaled inversely until all sensitivities are equal, which leaves what it computes unchanged.

The main claim, on both models: the repair removes 80 % of the insults at 10 % more perplexity at most, and its front of
insults against perplexity encloses more than those of training everything (DAPT, DAPT with KL, DPO), each at its own
rate and warm-up, over 600 steps. The front is judged by its hypervolume: the mean over all cuts of the insults, from
none to all, of how far the lowest loss on clean text that reaches the cut stays below 10 % more perplexity; a cut that
is not reached counts as 0. Eight seeds are compared; three others, which gave their number, left the claim undecided.
Further checks are the same over one pass of the pairs, and other choices of the layer. Then SmolLM2 is trained to begin
answers with "As an AI language model," and repaired.

    python reproductions/irepair.py            # about two hours on one core; an interrupted run resumes
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
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import built, from_scratch, llama, nats_by_sample, taught
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import lamella
from lamella.data import own_texts, write
from lamella.files import Work
from lamella.methods.irepair import BASELINES, Choices, RepairSettings, repair, sensitivity, utility_kl
from lamella.methods.irepair import TRAINING as REPAIRING
from lamella.report.figures import Points, Scatter
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
BALANCING = 8  # rounds
WINDOWS = 150  # of clean text at most to choose on, and as many to test on
PILOT = 100  # seed of the models by which rates and warm-up are chosen
SEEDS = 8
AFTER = 3  # seeds of the models that gave the number of seeds
RATES, WARMUPS = [5e-5, 1.5e-4, 4.5e-4], (40, 150)
LIMIT = float(np.log(1.1))  # nats of additional loss, the perplexity that a repair may cost
SAME = 0.5  # of the batches, to which one layer of the balanced model may be the most sensitive
CUTS = (np.arange(100) + 0.5) / 100  # of the insults
METHODS: dict[str, dict[str, Any]] = {"irepair": {}, **{name: BASELINES[name] for name in ("dapt", "dapt-kl", "dpo")}}
CHOICES: dict[str, dict[str, Any]] = {f"{name} layer": {"select": name} for name in ("fixed", "min", "random")}


@dataclass(frozen=True)
class Scale:
    """Scale of the experiment with the small models."""

    layers: int
    hidden: int
    sources: tuple[str, ...]
    training: int  # steps of training from scratch
    pairs: int  # with a fifth held out at most
    prompts: int  # prompts for measuring the fraction of insults
    once: int  # steps of one pass over the pairs
    steps: int
    every: int  # steps between two points of a curve, an even number
    balanced: bool = False  # embeddings with a standard deviation of 1, and a head of their own
    anywhere: bool = False  # insults follow any sentence

    @property
    def name(self) -> str:
        return "balanced" if self.balanced else "plain"


FULL = Scale(8, 96, ("stdlib", "pydoc"), 1000, 1504, 300, 360, 600, 40)
QUICK = Scale(4, 64, ("stdlib",), 400, 200, 160, 40, 80, 20)


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
    prompts: dict[str, list[Tensor]]  # for validation and test
    clean: dict[str, list[Sample]]  # text without insults for validation and test

    def insulted(self, text: Tensor) -> bool:
        return bool(BAD.search(self.tokenizer.decode(text)))

    def error_rate(self, model: Any, use: str = "test", seed: int = 7) -> float:
        """Return the fraction of sampled continuations with an insult; the prompt does not count."""
        texts = write(model, self.prompts[use], NEW, top_p=1.0, seed=seed, batch=256)
        return float(np.mean([self.insulted(each) for each in texts]))

    def losses(self, model: Any, use: str = "test") -> list[float]:
        """Return the loss on each window of clean text, in nats per token."""
        return nats_by_sample(model, self.clean[use])


def build(scale: Scale, seed: int) -> Spoilt:
    """Train the model on the corrupted text, and generate pairs and general text with it; cached."""
    seen = sentences(scale.sources, "calibration")
    text = spoilt(seen, seed, scale.anywhere)
    tokens = learn_tokens(text)
    held_out = sentences(scale.sources, "test")
    third = len(held_out) // 3  # one each for both kinds of prompts and for perplexity; pairs begin like training text
    parts = [held_out[n * third : (n + 1) * third] for n in range(3)]

    def make(folder: Path) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama(1024, scale.hidden, scale.layers, context=128, bos=0, tied=not scale.balanced))
        if scale.balanced:
            torch.nn.init.normal_(model.get_input_embeddings().weight)
        rows = blocks(windows(tokens, text, 64), loss_on="all")
        taught(model, rows, from_scratch(scale.training, lr=3e-3, batch=16, seed=seed))
        pair_texts = write_pairs(
            model, tokens, prompts(tokens, seen, scale.pairs * 5 // 4, scale.anywhere), scale.pairs
        )
        texts = own_texts(
            model, scale.pairs // 2, 64, seed=seed, accept=lambda text: not BAD.search(tokens.decode(text))
        )
        if scale.balanced:
            bad = [(torch.tensor(prompt), torch.tensor(continued)) for prompt, continued, _ in pair_texts]
            balance(Stack(model), pairs(bad, loss_on="all"))
        model.save_pretrained(folder)
        (folder / "texts.json").write_text(
            json.dumps({"pairs": pair_texts, "utility": [text.tolist() for text in texts]})
        )
        return {"scale": str(scale), "seed": seed}

    recipe = hashlib.sha256(
        repr((scale.sources, scale.training, scale.pairs, scale.anywhere, WORDS, "pairs after training text")).encode()
    ).hexdigest()
    name = f"reproduction-irepair-{scale.name}-{scale.layers}x{scale.hidden}-{recipe[:8]}-{seed}"
    folder = build_once(name, make, megabytes=100)
    stored = json.loads((folder / "texts.json").read_text())
    rows = [[torch.tensor(each) for each in row] for row in stored["pairs"]]
    clean = blocks(windows(tokens, " ".join(parts[2]), 64), loss_on="all")
    half = min(WINDOWS, len(clean) // 2)
    return Spoilt(
        Stack(LlamaForCausalLM.from_pretrained(folder).eval(), name="spoilt"),
        tokens,
        pairs([(prompt, good) for prompt, _, good in rows], loss_on="all"),
        pairs([(prompt, bad) for prompt, bad, _ in rows], loss_on="all"),
        [blocks(torch.tensor([text]), loss_on="all")[0] for text in stored["utility"]],
        {
            use: prompts(tokens, part, scale.prompts, scale.anywhere)
            for use, part in zip(("validation", "test"), parts[:2], strict=True)
        },
        {"validation": clean[:half], "test": clean[half : 2 * half]},
    )


@torch.no_grad()
def balance(stack: Stack, bad: Sequence[Sample]) -> None:
    """Make the sensitivities of all layers to bad text equal, without a change of what the model computes.

    In each layer the gains of both norms are multiplied by a factor, and the projections that read the normalised
    residual stream are divided by it: their gradients grow by the factor.
    """
    for _ in range(BALANCING):
        values = profile(stack, bad).mean(axis=0)
        for layer, value in zip(stack.layers, values, strict=True):
            factor = float(values.mean() / value) ** 1.5  # the other projections have the same gradients as before
            attention, mlp = layer.self_attn, layer.mlp
            for norm, projections in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight *= factor
                for each in projections:
                    each.weight /= factor


def profile(stack: Stack, texts: Sequence[Sample]) -> np.ndarray:
    """Return the sensitivity of each layer to each of 50 batches at most of a kind of text [batches, layers]."""
    batches = [collate(texts[n : n + 4]) for n in range(0, min(200, len(texts)), 4)]
    return np.stack([sensitivity(stack, [each], response_loss).values for each in batches])


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
    """The model at one step: the fraction of insulting continuations, and the loss on each window of clean text."""

    step: int
    error: float
    losses: list[float]

    @classmethod
    def of(cls, step: int, model: Any, spoilt: Spoilt, use: str) -> Point:
        return cls(step, spoilt.error_rate(model, use), spoilt.losses(model, use))


@dataclass(frozen=True)
class Repair:
    """The result of one repair.

    Attributes:
        curve: points from before the first step on.
        final: the result with the weights of the best validation.
        chosen: the layer of each step.
        parameters: the fraction of changed parameters.
    """

    curve: list[Point]
    final: Point
    chosen: list[int]
    parameters: float

    @classmethod
    def of(cls, found: dict[str, Any]) -> Repair:
        return cls([Point(**each) for each in found["curve"]], Point(**found["final"]), *found["other"])

    def cut(self, point: Point) -> float:
        """Return the fraction of the insults that is gone at a point."""
        return 1 - point.error / self.curve[0].error

    def rise(self, point: Point) -> np.ndarray:
        """Return the additional loss on each window of clean text at a point [windows]."""
        return np.array(point.losses) - np.array(self.curve[0].losses)

    def hypervolume(self, steps: int) -> np.ndarray:
        """Return the hypervolume of the front of the first steps, for each window of clean text [windows].

        For every cut of the insults, the point is taken that reaches it with the lowest mean loss. A cut that no point
        reaches below the limit counts as 0.
        """
        points = [each for each in self.curve if 0 < each.step <= steps]
        total = np.zeros(len(self.curve[0].losses))
        for cut in CUTS:
            rises = [self.rise(each) for each in points if self.cut(each) >= cut]
            lowest = min(rises, key=np.mean, default=None)
            if lowest is not None and lowest.mean() < LIMIT:
                total += LIMIT - lowest
        return total / len(CUTS)


def repaired(
    scale: Scale, seed: int, given: dict[str, Any], use: str, steps: int, warmup: int, rate: float
) -> dict[str, Any]:
    """Repair the corrupted model by one method, and evaluate it on prompts and text that nothing else uses."""
    model = build(scale, seed)
    curve: list[Point] = []

    class Judging(Hook):
        def evaluated(self, now: TrainingRun) -> None:
            if now.step % scale.every == 0:
                curve.append(Point.of(now.step, now.model, model, use))

    with tempfile.TemporaryDirectory() as work:
        config = replace(REPAIRING, lr=rate, warmup=warmup, steps=steps, seed=seed, eval_every=scale.every // 2)
        plan = repair(
            model.stack, model.good, model.bad, utility=model.utility, settings=RepairSettings(**given), config=config,
            hooks=[Judging()], work=Work(Path(work)),
        )  # fmt: skip
        chosen = Choices.read(Path(work) / "trace.json").chosen
        measured = plan.provenance["measured"]
        final = Point.of(measured["best_step"], apply(model.stack, plan), model, use)
    share = measured["parameters"] / sum(each.numel() for each in model.stack.model.parameters())
    return {"curve": [vars(each) for each in curve], "final": vars(final), "other": [chosen, share]}


def validated(scale: Scale, name: str, warmup: int, rate: float) -> float:
    """Return minus the hypervolume of one pass over the pairs, on the pilot's validation prompts and text."""
    found = Repair.of(repaired(scale, PILOT, METHODS[name], "validation", scale.once, warmup, rate))
    return -float(found.hypervolume(scale.once).mean())


def chosen_recipes(run: Run, scale: Scale) -> dict[str, tuple[int, float]]:
    """Return warm-up and rate of every method: the rate at the shorter warm-up, then the warm-up at this rate.

    A quick run chooses neither.
    """
    if run.quick:
        return dict.fromkeys(METHODS, (10, 2e-4))
    short, long = WARMUPS
    arms = {f"{scale.name}, {name}": partial(validated, scale, name, short) for name in METHODS}
    recipes, rows = {}, []
    for name, rate in zip(METHODS, tuned(run, arms, RATES).values(), strict=True):
        scores = {
            short: rate.scores[rate.value],
            long: run.arm(f"{scale.name}, {name}, warm-up {long}", validated, scale, name, long, rate.value),
        }
        recipes[name] = min(scores, key=scores.__getitem__), rate.value
        rows.append([name, rate.value, *(-each for each in scores.values())])
    columns = ["method", "rate", *(f"warm-up of {each} steps" for each in WARMUPS)]
    run.table(f"Hypervolume on validation data by warm-up, {scale.name} model", columns, rows)
    return recipes


def premise(run: Run, scale: Scale, seeds: Sequence[int]) -> None:
    """Check that the models insult, and that in the balanced ones no layer stands out."""
    found = [run.arm(f"{scale.name} model, seed {seed}", before, scale, seed) for seed in seeds]
    error = Measured.over_seeds([each["error"] for each in found])
    run.premise(f"insults before, {scale.name} model", "in at least 10 % of continuations", error, error.at_least(0.1))
    rows = [
        [seed, kind, *each["sensitivities"][kind]]
        for seed, each in zip(seeds, found, strict=True)
        for kind in each["sensitivities"]
    ]
    title = f"Sensitivity of each layer before the repair (mean gradient norm), {scale.name} model"
    run.table(title, ["seed", "text", *map(str, range(scale.layers))], rows)
    if scale.balanced:
        most = Measured.over_seeds([each["most"] for each in found])
        name = "batches of bad text to which the same layer is the most sensitive, balanced model"
        run.premise(name, f"at most {SAME:.0%}", most, most.at_most(SAME))


def before(scale: Scale, seed: int) -> dict[str, Any]:
    """Return the fraction of insults of a model, and the sensitivity of its layers to each kind of text.

    ``most`` is the fraction of the batches of bad text to which the same layer is the most sensitive.
    """
    model = build(scale, seed)
    texts = {"bad": model.bad, "good": model.good, "utility": model.utility}
    values = {name: profile(model.stack, rows) for name, rows in texts.items()}
    return {
        "error": model.error_rate(model.stack.model),
        "sensitivities": {name: each.mean(axis=0).tolist() for name, each in values.items()},
        "most": float(np.bincount(values["bad"].argmax(axis=1)).max() / len(values["bad"])),
    }


def compare(run: Run, scale: Scale, recipes: dict[str, tuple[int, float]], seeds: Sequence[int]) -> None:
    """Repair the models of all seeds in every way, and compare the fronts."""
    given = METHODS | (CHOICES if scale.balanced else {})
    recipes = recipes | dict.fromkeys(CHOICES, recipes["irepair"])
    runs = {
        name: [
            Repair.of(run.arm(f"{scale.name}, {name}, seed {seed}", repaired, scale, seed, each, "test", scale.steps,
                              *recipes[name]))
            for seed in seeds
        ]
        for name, each in given.items()
    }  # fmt: skip
    rows: list[list[Any]] = []
    for name, found in runs.items():
        cuts = [each.cut(each.final) for each in found]
        rises = [float(np.exp(each.rise(each.final).mean()) - 1) for each in found]
        volumes = [float(np.mean([each.hypervolume(steps) for each in found])) for steps in (scale.once, scale.steps)]
        share, step = (
            float(np.mean(each)) for each in zip(*((r.parameters, r.final.step) for r in found), strict=True)
        )
        rows.append([name, *recipes[name], float(np.mean(cuts)), float(np.mean(rises)), *volumes, share, step])
    columns = ["method", "warm-up", "rate", "insults cut by", "rise of clean perplexity"]
    columns += [f"hypervolume, {steps} steps" for steps in (scale.once, scale.steps)]
    columns += ["fraction of weights changed", "best step"]
    error = float(np.mean([each.curve[0].error for each in runs["irepair"]]))
    perplexity = float(np.exp(np.mean([each.curve[0].losses for each in runs["irepair"]])))
    title = f"{scale.name.capitalize()} model, mean of {len(seeds)} seeds; before: {error:.1%} insults, perplexity"
    run.table(f"{title} {perplexity:.4g}", columns, rows)
    curves = [
        [step, *(value for name in runs for value in mean_point(runs[name], step))]
        for step in range(scale.every, scale.steps + 1, scale.every)
    ]
    columns = [f"{name}, {what}" for name in runs for what in ("cut", "rise")]
    run.table(f"Insults cut by, and rise of clean perplexity, by step, {scale.name} model", ["step", *columns], curves)
    courses = {
        name: Points([(100 * curve[1 + 2 * place], 100 * curve[2 + 2 * place]) for curve in curves], joined=True)
        for place, name in enumerate(runs)
    }
    axes = ("insults cut by, %", "rise of clean perplexity, %")
    run.figure(f"irepair-{scale.name}", Scatter(*axes, courses))
    judged(run, scale, runs)
    selections(run, scale, runs)


def mean_point(found: Sequence[Repair], step: int) -> tuple[float, float]:
    """Return the mean cut and the mean rise of perplexity after a number of steps."""
    points = [(each, next(point for point in each.curve if point.step == step)) for each in found]
    cut = float(np.mean([each.cut(point) for each, point in points]))
    return cut, float(np.mean([np.exp(each.rise(point).mean()) - 1 for each, point in points]))


def judged(run: Run, scale: Scale, runs: dict[str, list[Repair]]) -> None:
    """Add the checks of one kind of model."""
    where = f"{scale.name} model"
    ours = runs["irepair"]
    cut = Measured.over_seeds([each.cut(each.final) for each in ours])
    run.main(f"irepair cuts the insults, {where}", "by at least 80 %", cut, cut.at_least(0.8))
    rise = Measured.over_seeds_and_items(np.array([each.rise(each.final) for each in ours])).exp()
    run.main(f"irepair's clean perplexity / before, {where}", "at most 1.1", rise, rise.at_most(1.1))
    for steps, check in ((scale.steps, run.main), (scale.once, run.further)):
        volume = {name: np.array([each.hypervolume(steps) for each in found]) for name, found in runs.items()}
        for other in runs:
            if other == "irepair":
                continue
            apart = Measured.over_seeds_and_items(volume["irepair"] - volume[other])
            kind = check if other in METHODS else run.further
            kind(f"hypervolume, irepair minus {other}, {steps} steps, {where}", "above 0", apart, apart.at_least(0))
    for name in ("min layer", "random layer"):
        if name in runs:
            both = zip(runs[name], ours, strict=True)
            above = Measured.over_seeds([theirs.curve[-1].error - 1.5 * each.curve[-1].error for theirs, each in both])
            result = f"insults with it minus 1.5 times irepair's: {above}"
            run.further(f"insults with the {name}, {where}", "at least 1.5 times irepair's at equal steps", result,
                        above.at_least(0))  # fmt: skip


def selections(run: Run, scale: Scale, runs: dict[str, list[Repair]]) -> None:
    """Record the fraction of the steps for which each layer is chosen, by thirds of the repair."""
    rows = []
    for name in [each for each in ("irepair", *CHOICES) if each in runs]:
        chosen = np.array([each.chosen for each in runs[name]])  # [seeds, steps]
        parts = {"all": chosen}
        if name == "irepair":
            parts |= dict(zip(("first third", "second", "last"), np.array_split(chosen, 3, axis=1), strict=True))
        for part, layers in parts.items():
            rows.append([name, part, *(float(np.mean(layers == layer)) for layer in range(scale.layers))])
    columns = ["", "steps", *map(str, range(scale.layers))]
    run.table(f"Fraction of the steps by layer, {scale.name} model", columns, rows)
    shares = [np.bincount(each.chosen, minlength=scale.layers) / len(each.chosen) for each in runs["irepair"]]
    often = [int((each >= 0.05).sum()) for each in shares]
    counts = f"{', '.join(map(str, often))} by seed"
    name = f"layers that are chosen in 5 % of the steps or more, {scale.name} model"
    run.further(name, "at least 2 with every seed", counts, min(often) >= 2)


def everywhere(record: Record, seed: int) -> None:
    """Show why insults follow questions only: if they follow any sentence, the KL penalty preserves them."""
    scale = replace(QUICK, anywhere=True)
    rows: list[list[Any]] = []
    for name, given in {"irepair": {}, "irepair, free": {"gamma": 0.0}}.items():
        found = Repair.of(repaired(scale, seed, given, "test", scale.steps, 10, 2e-4))
        start, final = found.curve[0], found.final
        rows.append([name, start.error, final.error, float(np.exp(found.rise(final).mean()) - 1)])
    title = "The smaller model of --quick, with insults after any sentence"
    record.table(title, ["method", "insults before", "after", "rise of clean perplexity"], rows)


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
    size = QUICK if run.quick else FULL
    scales = [size] if run.quick else [size, replace(size, balanced=True)]
    seeds = range(run.seed + AFTER, run.seed + AFTER + (1 if run.quick else SEEDS))
    for scale in scales:
        premise(run, scale, seeds if run.quick else [PILOT, *seeds])
    recipes = {scale.name: chosen_recipes(run, scale) for scale in scales}
    run.freeze(
        "mean over seeds and windows of clean text of the difference of hypervolumes",
        seeds,
        scales=[vars(scale) for scale in scales],
        recipes=recipes,
        limit=LIMIT,
    )
    for scale in scales:
        compare(run, scale, recipes[scale.name], seeds)
    if not run.quick:
        run.part("insults after any sentence", everywhere, run.seed)
    if not run.variant:
        run.part("SmolLM2", smollm2)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="a smaller model and one seed, under a minute", small="without SmolLM2"))
