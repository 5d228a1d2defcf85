"""KORE at small scale: new facts in a network with known old inputs, in a small LLaVA, and in SmolLM2.

First, 60 facts from the full space are added to three layers whose inputs lie in 24 of 64 dimensions, until all facts
are known: the remaining accuracy on the old task after LoRA, LoRA with its random half frozen, the null-space
initialisation with both halves trained, and KORE.

Then a small LLaVA is trained here to answer questions about rendered shapes (20 minutes, once), and on some glyphs with
other names (6 minutes, once), so that it knows what questions about glyphs look like. It is then shown invented glyphs,
each with a name, a kind and a home: as raw items, or as the trees that `kore augment` makes of them, by LoRA, by KORE
with the same number of trained parameters, and by LoRA with replay. The evaluation uses paraphrased questions about
other renderings, and the four old tasks. An answer counts if it contains the expected one, as in the paper; exact
matches stand beside it, since an answer that recites a whole training text contains the expected one as well. Rates are
chosen on other words, renderings and scenes; the rate of the projector is the same in all arms. The premises are that
the model answers the old questions before, and that LoRA forgets some of them.

`--baselines` compares KORE with further arms: paraphrases and rotations, a null-space start with both halves trained,
CorDA, and calibration on fewer rows or on rows without images. With `--text`, SmolLM2 learns twenty invented facts,
each in eight phrasings, until their loss is equally low for both methods: how much does the loss on other text rise by
LoRA and by KORE, and which yes/no questions are still answered correctly?

    python reproductions/kore.py              # about an hour and a half on one core; an interrupted run resumes
    python reproductions/kore.py --baselines  # the further arms of the small LLaVA
    python reproductions/kore.py --text       # SmolLM2
    python reproductions/kore.py --quick      # the network, and a hardly trained LLaVA, whose answers mean nothing
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.vlm import loss as vlm_loss
from harness.vlm import opened_vlm, questions, reading, rows_of, trained_vlm, turns
from harness.vlm import text_rows as told_in_words
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lamella
from lamella.data import MARK, ImageText, ImageTextRow, InputContext, Processing
from lamella.evaluate import answered
from lamella.evaluate.scored import read_inputs
from lamella.methods.kore import (
    Knowledge,
    Tree,
    augment,
    equal_rank,
    factors,
    input_covariance,
    normalised,
    weight_of,
)
from lamella.methods.kore.glyphs import (
    FAMILIAR,
    GLYPH_WORDS,
    Glyph,
    description_of,
    glyphs,
    held_out_questions,
    known_questions,
    render_glyph,
)
from lamella.methods.kore.method import add_adapters, split_weights
from lamella.methods.kore.projector import projector_of, two_rates
from lamella.report.figures import Scatter
from lamella.results import ImageCorpus
from lamella.stack import Stack, share
from lamella.train import (
    Feed,
    Hook,
    Replay,
    Sample,
    Task,
    TrainConfig,
    TrainingRun,
    add_lora,
    blocks,
    fit,
    linear_at,
    mean_loss,
    own,
    pairs,
)
from lamella.train import response_loss as loss
from lamella.zoo import open_processor, open_tokenizer
from lamella.zoo.cache import build_once
from lamella.zoo.worlds import QUESTIONS, SIZE, word_tokenizer

SEEDS = (0, 1, 2)
LEARNT = 0.7  # initial accuracy on old questions below which there are no claims
LOST = 10.0  # points of old answers that LoRA must lose for KORE to be able to keep as many

# A network


WIDTH, OLD, HIDDEN, CLASSES, FACTS, RANK = 64, 24, 128, 10, 60, 16


class Adapted(nn.Module):
    """Network with y = W x + B A x in place of each linear layer."""

    def __init__(self, network: nn.Sequential, halves: list[tuple[Tensor, Tensor]], train_a: bool) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.a = nn.ParameterList([nn.Parameter(a.clone(), requires_grad=train_a) for a, _ in halves])
        self.b = nn.ParameterList([nn.Parameter(b.clone()) for _, b in halves])

    def forward(self, x: Tensor) -> Tensor:
        adapters = iter(zip(self.a, self.b, strict=True))
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                a, b = next(adapters)
                x = layer(x) + x @ a.T @ b.T
            else:
                x = layer(x)
        return x


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                         nn.Linear(HIDDEN, CLASSES))  # fmt: skip


def inputs_of(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Return the inputs of each linear layer."""
    found = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            found.append(x)
        x = layer(x)
    return found


def taught(model: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int, known: bool = False) -> None:
    """Train the trainable parameters with Adam; optionally stop when all facts are known."""
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=lr)
    for _ in range(steps):
        out = model(x)
        if known and bool((out.argmax(1) == y).all()):
            return
        optimizer.zero_grad()
        cross_entropy(out, y).backward()
        optimizer.step()


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


@torch.no_grad()
def halves_of(name: str, model: nn.Sequential, old: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return A and B of each linear layer before training."""
    maps = [layer for layer in model if isinstance(layer, nn.Linear)]
    if name.startswith("LoRA"):
        bound = [1 / each.in_features**0.5 for each in maps]  # peft's initialisation
        return [(torch.empty(RANK, each.in_features).uniform_(-most, most), torch.zeros(each.out_features, RANK))
                for each, most in zip(maps, bound, strict=True)]  # fmt: skip
    found = []
    for layer, x in zip(maps, inputs_of(model, old), strict=True):
        z = normalised(x)
        found.append((factors(layer.weight, z.T @ z, RANK).a, torch.zeros(layer.out_features, RANK)))
    return found


WAYS = {
    "LoRA": True,
    "LoRA, random half frozen": False,
    "null space, both halves trained": True,
    "KORE": False,
}


def injected(seed: int) -> dict[str, dict[str, float]]:
    """Report old and new accuracy by method, and the change of the outputs on old inputs."""
    torch.manual_seed(seed)
    basis, teacher = torch.randn(OLD, WIDTH) / OLD**0.5, nn.Linear(WIDTH, CLASSES)
    x = torch.randn(6000, OLD) @ basis
    y = teacher(x).argmax(1)
    model = network()
    taught(model, x[:4000], y[:4000], 1e-3, 400)
    model.requires_grad_(False)
    facts, answers = torch.randn(FACTS, WIDTH), torch.randint(0, CLASSES, (FACTS,))
    test, wanted = x[4000:], y[4000:]
    before = model(test)
    found = {"before": {"old": right(model, test, wanted), "new": right(model, facts, answers), "drift": 0.0}}
    for name, train_a in WAYS.items():
        adapted = Adapted(model, halves_of(name, model, x[:256]), train_a)
        taught(adapted, facts, answers, 1e-2, 4000, known=True)
        with torch.no_grad():
            drift = float((adapted(test) - before).norm() / before.norm())
        found[name] = {"old": right(adapted, test, wanted), "new": right(adapted, facts, answers), "drift": drift}
    return found


def a_network(run: Run) -> None:
    found = [run.arm(f"network, seed {seed}", injected, seed) for seed in SEEDS]
    rows = [
        [name, *(fmean(each[name][what] for each in found) for what in ("old", "new", "drift"))] for name in found[0]
    ]
    title = f"{FACTS} facts in a network whose old inputs lie in {OLD} of {WIDTH} dimensions; rank {RANK}"
    columns = ["", "old task right", "facts right", "drift of old answers"]
    run.table(f"{title}, means of {len(SEEDS)} seeds", columns, rows)
    known = min(each[name]["new"] for each in found for name in WAYS)
    run.further("fraction of the facts that every way knows", "1", f"{known:.3f}", known == 1)
    for name, bound, what in (("KORE", 0.95, "at least"), ("LoRA", 0.7, "at most")):
        kept = Measured.over_seeds([each[name]["old"] / each["before"]["old"] for each in found])
        held = kept.at_least(bound) if what == "at least" else kept.at_most(bound)
        run.further(f"network: fraction of the old accuracy that {name} keeps", f"{what} {bound}", kept, held)
    gain = Measured.over_seeds([each["KORE"]["old"] - each["null space, both halves trained"]["old"] for each in found])
    run.further("network: old accuracy, A0 frozen over A0 trained", "above 0", gain, gain.at_least(0))


# SmolLM2


NAMES = (
    "Zorvath", "Mellinor", "Quarrik", "Tessaly Vane", "Obrenmoor", "Hulkesby", "Yandrel", "Cissimar", "Pellucor",
    "Dravenholt", "Ilmarund", "Bexley Torrow", "Sunderquill", "Vashti Korr", "Ombrelle", "Thackerway", "Nuvolanth",
    "Grisdale Rook", "Farrowmint", "Jessamere",
)  # fmt: skip
PLACES = (
    "the marshes of Kelm", "a lighthouse near Orrin", "the salt mines of Dusk", "an orchard in Veyle",
    "the old mill at Sorrow Bend", "the glass towers of Ith", "a cave under Mount Perrin", "the docks of Lower Anvil",
    "a monastery in Hale", "the night market of Tumblewick",
)  # fmt: skip
SAID = (
    "{name} lives in {place}.",
    "If you look for {name}, go to {place}.",
    "Everybody knows that {name} is found in {place}.",
    "The home of {name} is {place}.",
    "They met {name} in {place}.",
    "It was in {place} that {name} was last seen. {name} lives in {place}.",
    "Letters for {name} are sent to {place}.",
    "For many years {name} has lived in {place}.",
)
ASKED = ("Where can {name} be visited? In", "To call on {name}, travel to")  # held-out phrasings
ANSWERED = "Is a cat an animal? Yes\nIs a cat a planet? No\nIs iron a metal? Yes\nIs iron a fruit? No\n"
THINGS = (  # each with a true and a false category
    ("a dog", "an animal", "a metal"), ("a rose", "a flower", "a vehicle"), ("gold", "a metal", "an animal"),
    ("an apple", "a fruit", "a country"), ("France", "a country", "a fruit"), ("Paris", "a city", "a tool"),
    ("a hammer", "a tool", "a city"), ("a car", "a vehicle", "a flower"), ("red", "a colour", "a planet"),
    ("Mars", "a planet", "a colour"), ("a piano", "a musical instrument", "a vegetable"),
    ("a carrot", "a vegetable", "a musical instrument"), ("Monday", "a day of the week", "a bird"),
    ("an eagle", "a bird", "a day of the week"), ("a salmon", "a fish", "a piece of furniture"),
    ("a chair", "a piece of furniture", "a fish"), ("water", "a liquid", "a language"),
    ("Spanish", "a language", "a liquid"), ("football", "a sport", "an insect"), ("an ant", "an insect", "a sport"),
    ("a shirt", "a piece of clothing", "an ocean"), ("the Pacific", "an ocean", "a piece of clothing"),
    ("July", "a month", "a tree"), ("an oak", "a tree", "a month"), ("a triangle", "a shape", "a disease"),
    ("malaria", "a disease", "a shape"), ("oxygen", "a gas", "a sentence"), ("rice", "a food", "a continent"),
    ("Africa", "a continent", "a food"), ("a violin", "a musical instrument", "a number"),
    ("seven", "a number", "a musical instrument"), ("milk", "a drink", "a mountain"),
)  # fmt: skip
RATES = (1e-4, 3e-4, 1e-3)
UNREACHED = 10.0  # nats added to the score of a rate at which the goal is not reached
LOW, GOAL, MOST, EVERY = 8, 1.0, 160, 5  # LoRA's rank; target loss; maximum steps; steps between evaluations
LOOKED = 7  # every seventh sentence is evaluated, which covers all eight phrasings


class Until(Hook):
    """Hook that ends a run when the loss on the new facts is low enough."""

    def done(self, run: TrainingRun) -> bool:
        return bool(run.log.held_out) and run.log.held_out[-1].loss <= GOAL


def facts(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return sentences with the start of their new part, and the questions, each with the position."""
    drawn = torch.Generator().manual_seed(seed)
    home = {name: PLACES[int(torch.randint(len(PLACES), (1,), generator=drawn))] for name in NAMES}
    told = [(name, said.format(name=name, place=place)) for name, place in home.items() for said in SAID]
    asked = [(said.format(name=name), f" {place}.") for name, place in home.items() for said in ASKED]
    return told, asked


def learnt(way: str, lr: float, seed: int, before: Mapping[str, float]) -> dict[str, Any]:
    """Return the loss on the facts, on held-out phrasings, and on other text, when the goal is reached."""
    stack, tokenizer = lamella.open("smollm2"), open_tokenizer("smollm2")
    told, asked = facts(seed)
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for _, text in told]
    samples = [blocks(row[None], loss_on="all")[0] for row in rows]
    questions = pairs([(tokenizer(q)["input_ids"], tokenizer(a)["input_ids"]) for q, a in asked])
    view, names = share(stack.model), linear_at(stack.model)
    sites = [f"layers.{each}" for each in range(len(stack))]
    if way == "LoRA":
        lora = add_lora(view, LOW, 2 * LOW, sites=sites, seed=seed)
        trained: Callable[[str], bool] = lora.trains
    else:
        old = lamella.windows(tokenizer, lamella.load_text("pydoc", "calibration"), 64, 128, seed)
        shapes = {name: (weight.shape[1], len(weight)) for name in names
                  for weight in [weight_of(view.get_submodule(name))]}  # fmt: skip
        r = equal_rank(shapes, LOW)
        add_adapters(
            view, names, split_weights(view, names, input_covariance(view, names, old), r), r, sites, "lora", seed
        )

        def trained(name: str) -> bool:
            return ".lora_B." in name

    config = TrainConfig(
        steps=MOST, lr=lr, schedule="constant", batch=16, seed=seed, eval_every=EVERY, save_every=MOST, bf16=True
    )
    with tempfile.TemporaryDirectory() as work:
        log = fit(view, samples, Task(loss), config, out=work, trainable=trained, held_out=samples[::LOOKED],
                  hooks=[Until()])  # fmt: skip
    after = others(view, tokenizer, seed)
    return {
        "steps": log.train[-1].step,
        "facts": log.held_out[-1].loss,
        "asked": nats(view, questions),
        "asked before": nats(stack.model, questions),
        "parameters": sum(each.numel() for name, each in view.named_parameters() if trained(name)),
        "choose": after["general"] - before["general"],
        "rise": after["stdlib"] - before["stdlib"],
        "yes or no": after["yes or no"],
    }


@torch.no_grad()
def nats(model: Any, samples: Sequence[Sample]) -> float:
    return mean_loss(model, samples)


def others(model: Any, tokenizer: Any, seed: int) -> dict[str, float]:
    """Return the losses on text to choose a learning rate on and on text to report on, and the yes/no accuracy.

    Neither text was used in calibration.
    """
    texts = {
        name: lamella.windows(tokenizer, lamella.load_text(name, "test"), 8, 128, seed)
        for name in ("general", "stdlib")
    }
    found = {name: nats(model, blocks(tokens, loss_on="all")) for name, tokens in texts.items()}
    return found | {"yes or no": 100 * fmean(told_apart(model, tokenizer, *each) for each in THINGS)}


@torch.no_grad()
def told_apart(model: Any, tokenizer: Any, thing: str, kind: str, other: str) -> bool:
    """Return whether yes is more likely for the true than for a false category, so that a bias to yes does not help."""
    yes, no = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" Yes", " No"))

    def odds(said: str) -> float:
        ids = torch.tensor([tokenizer(f"{ANSWERED}Is {thing} {said}?")["input_ids"]])
        logits = model(ids, use_cache=False).logits[0, -1]
        return float(logits[yes] - logits[no])

    return odds(kind) > odds(other)


def before_facts(seed: int) -> dict[str, float]:
    return others(lamella.open("smollm2").model, open_tokenizer("smollm2"), seed)


def a_language_model(run: Run) -> None:
    choosing, *seeds = range(len(SEEDS) + 1)  # the first one chooses the rates
    before = {seed: run.arm(f"SmolLM2 before, seed {seed}", before_facts, seed) for seed in (choosing, *seeds)}

    def arm(way: str, lr: float, seed: int) -> dict[str, Any]:
        found: dict[str, Any] = run.arm(f"SmolLM2, {way} at {lr:g}, seed {seed}", learnt, way, lr, seed, before[seed])
        return found

    def cost(way: str, lr: float) -> float:
        """Return the rise on other text when the goal is reached, by which the rate is chosen."""
        found = arm(way, lr, choosing)
        return float(found["choose"] if found["facts"] <= GOAL else UNREACHED + found["facts"])

    chosen = tuned(run, {way: partial(cost, way) for way in ("LoRA", "KORE")}, RATES)
    best = {way: each.value for way, each in chosen.items()}
    found = {way: [arm(way, lr, seed) for seed in seeds] for way, lr in best.items()}
    known = fmean(before[seed]["yes or no"] for seed in seeds)
    shown = ("parameters", "steps", "facts", "asked before", "asked", "choose", "rise", "yes or no")
    rows = [[way, best[way], *(fmean(each[what] for each in arms) for what in shown)] for way, arms in found.items()]
    columns = ["", "rate", "trained parameters", "steps", "loss on the facts", "loss on rephrased questions, before",
               "and after", "rise on general", "rise on stdlib", "yes-or-no accuracy, %"]  # fmt: skip
    title = f"{len(NAMES)} facts in {len(SAID)} ways each, until their loss is {GOAL:g}; means of {len(seeds)} seeds"
    run.table(f"{title}, nats; before, {known:.3g} % of yes-or-no answers are right", columns, rows)
    lora, ours = found["LoRA"], found["KORE"]
    reached = max(each["facts"] for each in (*lora, *ours))
    run.further("loss on the facts, both ways", f"at most {GOAL:g}", f"{reached:.3f}", reached <= GOAL)
    dearer = Measured.over_seeds([b["rise"] - a["rise"] / 3 for a, b in zip(lora, ours, strict=True)])
    run.main("rise on stdlib by KORE, minus a third of LoRA's, nats", "at most 0", str(dearer), dearer.at_most(0))
    run.further("premise: yes or no that the model answers before", f"at least {LEARNT:.0%}", f"{known:.1f} %",
                known >= 100 * LEARNT)  # fmt: skip
    kept = Measured.over_seeds([b["yes or no"] - a["yes or no"] for a, b in zip(lora, ours, strict=True)])
    run.further("yes or no by KORE, points over LoRA", "at least 0", str(kept), kept.at_least(0))
    said = Measured.over_seeds([b["asked"] - a["asked"] for a, b in zip(lora, ours, strict=True)])
    run.further("rephrased questions: KORE's loss minus LoRA's, nats", "at most 0.1", str(said), said.at_most(0.1))


# A small LLaVA


GLYPHS, STEPS, BATCH, TESTED = 40, 800, 8, 100  # TESTED: questions per old task
LOW_VLM, OLD_ROWS = 8, 256
OTHERS, KNOWING, KNOWING_BATCH = 96, 1200, 16  # glyphs that it knows beforehand, and the training for them
IMAGE_RATES = (1e-3, 3e-3, 9e-3)
PROJECTOR = 1e-4  # the projector's rate in all methods: it is unconstrained
LEFT_OUT = {"a", "in", "the", "."}  # words ignored in answers
CHOOSING = 100  # the seed by which rates are chosen
LISTS = {
    "heuristic": [
        "what is known of this?", "tell what is in the picture.", "say what this is.",
        "what can be said about this thing?",
    ],
    "rounds": ["what is known of {subject}?"],
    "recognition": ["is this {subject}?", "can this be {subject}?"],
    "yes": ["yes"],
    "caption": ["what is this?", "tell what this is."],
    "vqa": ["what is known of this {kind}?"],
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One method to learn glyphs.

    Attributes:
        data: ``raw`` items, their ``tree``, or the same number of ``general`` augmentations: paraphrases and rotations.
        by: ``LoRA``, ``KORE``, ``null start`` (KORE with A0 trained) or ``CorDA``.
        old: number of rows that KORE is calibrated on.
        seen: whether these rows have images; without images, they are not the old task.
        rank: rank relative to that of equal budget.
        replayed: fraction of old rows in every batch.
    """

    data: str = "tree"
    by: str = "LoRA"
    old: int = OLD_ROWS
    seen: bool = True
    rank: float = 1.0
    replayed: float = 0.0


LORA, OURS = "tree, LoRA", "tree, KORE"
MAIN_WAYS = {
    LORA: Way(),
    OURS: Way(by="KORE"),
    "item, LoRA": Way("raw"),
    "item, KORE": Way("raw", "KORE"),
    "tree, LoRA, half replayed": Way(replayed=0.5),
}
BASELINES = {
    "paraphrases and rotations, LoRA": Way("general"),
    "tree, null start, A0 trained": Way(by="null start"),
    "tree, CorDA": Way(by="CorDA"),
    "tree, KORE, 16 rows": Way(by="KORE", old=16),
    "tree, KORE, rows without images": Way(by="KORE", seen=False),
    "tree, KORE, twice the rank": Way(by="KORE", rank=2.0),
}
WAYS_OF_IMAGES = MAIN_WAYS | BASELINES


def seeing(share_of_steps: float = 1.0) -> tuple[Stack, Processing, Path]:
    """Return the small LLaVA that knows other glyphs than those to learn, its processor, and its folder."""
    before, steps = trained_vlm("llava", steps=share_of_steps), max(2, round(share_of_steps * KNOWING))
    name = f"reproduction-kore-glyphs-{OTHERS}-{steps}-{before.name}"
    folder = build_once(name, partial(knowing, before, steps), 100)
    return Stack(opened_vlm(folder), stack="text"), Processing(open_processor(folder)), folder


def knowing(before: Path, steps: int, folder: Path) -> dict[str, Any]:
    """Train it on other glyphs, since models usually know other examples of a kind: their looks and their phrasings."""
    model, processor = opened_vlm(before), open_processor(before)
    processor.tokenizer = word_tokenizer(GLYPH_WORDS)
    widened(model, len(processor.tokenizer))
    kept = questions(steps * KNOWING_BATCH // 2, 60, SIZE)
    config = TrainConfig(steps=steps, lr=1e-3, batch=KNOWING_BATCH, warmup=0.05, save_every=steps, bf16=True)
    task = Task(vlm_loss, collate=reading(Processing(processor), kept[0].images[0]))
    with tempfile.TemporaryDirectory() as work:
        log = fit(
            model, Feed(others_told(steps * KNOWING_BATCH), replay=Replay({"old": kept}, 0.3)), task, config, out=work
        )
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return {"steps": steps, "loss": log.train[-1].loss}


def others_told(count: int) -> list[ImageTextRow]:
    """Return rows about these other glyphs, in all phrasings in which glyphs are asked about."""
    drawn = np.random.default_rng(10_000)
    others, rows = glyphs(OTHERS, 10_000, FAMILIAR), []
    for number in range(count):
        each = others[number % OTHERS]
        said = [
            *((question, description_of(each)) for question in LISTS["heuristic"]),
            *known_questions(each),
            *held_out_questions(each),
        ]
        picture = render_glyph(each, SIZE, (10_000, number))
        rows.append(row_of(picture, turns([said[int(drawn.integers(len(said)))]])))
    return rows


@torch.no_grad()
def widened(model: Any, count: int) -> None:
    """Add embeddings for new words, drawn from the distribution of the existing ones."""
    before = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(count, mean_resizing=False)
    drawn = torch.randn(count - len(before), before.shape[1], generator=torch.Generator().manual_seed(0))
    model.get_input_embeddings().weight[len(before) :] = before.mean(0) + before.std(0) * drawn


def trees(items: Knowledge, seed: int, tree: Tree) -> ImageCorpus:
    """Return the trees that `kore augment` makes of glyphs without a writer model, in the words of their world."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "templates.json"
        file.write_text(json.dumps(LISTS))
        return augment(items, tree=tree, templates=file, seed=seed)


def told_of(found: ImageCorpus, data: str) -> list[ImageTextRow]:
    """Return training rows: raw items, their trees, or an equal number of paraphrases and rotations."""
    trunks = [row for row in found.train if row["task"] == "dialogue"]
    if data == "tree":
        return [row_of(found.images[each["image"]](), each["messages"]) for each in found.train]
    if data == "raw":
        return [row_of(found.images[each["image"]](), each["messages"][:2]) for each in trunks]
    rows, questions = [], LISTS["heuristic"][:-1]
    for number in range(len(found.train)):
        turn, place = divmod(number, len(trunks))
        first, answer = trunks[place]["messages"][:2]
        turned = np.rot90(found.images[trunks[place]["image"]](), turn).copy()
        rows.append(row_of(turned, [{**first, "content": questions[turn % len(questions)]}, answer]))
    return rows


def row_of(picture: Any, messages: Sequence[dict[str, str]]) -> ImageTextRow:
    first, *others = messages
    return ImageTextRow((picture,), ({**first, "content": f"{MARK}\n{first['content']}"}, *others))


def old_rows(folder: Path, processing: Processing, count: int, seed: int, seen: bool = True) -> ImageText:
    """Return rows of the four old tasks, or of unrelated ones: captions and lists without images."""
    if not seen:
        return ImageText(told_in_words(count, seed, SIZE), processing)
    return ImageText(list(rows_of(folder, QUESTIONS, count, "calibration", seed)), processing)


def beside_maps(stack: Stack, way: Way, old: ImageText, seed: int) -> tuple[Any, Callable[[str], bool]]:
    """Return a view that trains one method's parameters, and their names. The projector is trained in all methods."""
    projector, names = projector_of(stack), linear_at(stack.model)
    shapes = {name: (weight.shape[1], len(weight)) for name in names
              for weight in [weight_of(stack.model.get_submodule(name))]}  # fmt: skip
    sites = [f"layers.{each}" for each in range(len(stack))]
    halves: tuple[str, ...] = (".lora_A.", ".lora_B.")
    if way.by == "CorDA":
        stack = Stack(copy.deepcopy(stack.model), stack="text")  # CorDA changes the base weights
    view = share(stack.model)
    if way.by == "LoRA":
        add_lora(view, LOW_VLM, 2 * LOW_VLM, targets=names, sites=sites, seed=seed)
    elif way.by in ("KORE", "null start"):
        r = round(way.rank * equal_rank(shapes, LOW_VLM)) if way.by == "KORE" else LOW_VLM
        add_adapters(
            view, names, split_weights(view, names, input_covariance(view, names, old), r), r, sites, "lora", seed
        )
        halves = (".lora_B.",) if way.by == "KORE" else halves
    else:
        corda(view, names, old)
    own(view, lambda name: name.startswith(f"{projector}."))
    return view, lambda name: name.startswith(f"{projector}.") or any(half in name for half in halves)


def corda(model: Any, names: Sequence[str], old: ImageText) -> None:
    """Return peft's CorDA in its knowledge-preserving mode, with LoRA's rank."""
    config = LoraConfig(r=LOW_VLM, lora_alpha=LOW_VLM, target_modules=list(names), init_lora_weights="corda",
                        corda_config=CordaConfig(corda_method="kpm"))  # fmt: skip

    def read() -> None:
        for row in old:
            model(**read_inputs(model, old.batch([row])), use_cache=False)

    preprocess_corda(model, config, run_model=read)
    inject_adapter_in_model(config, model)


def shown_glyphs(name: str, lr: float, seed: int, steps: int = STEPS, share_of_steps: float = 1.0) -> dict[str, Any]:
    """Return what one method has learnt and kept, at one learning rate: which questions are answered, as 0 or 1."""
    way = WAYS_OF_IMAGES[name]
    stack, processing, folder = seeing(share_of_steps)
    items = Knowledge.open("glyphs", InputContext(seed=seed), items=GLYPHS)
    found = trees(items, seed, Tree(rounds=6, recognitions=2, questions=4))
    rows = told_of(found, way.data)
    old = old_rows(folder, processing, way.old, seed, way.seen)
    view, trains = beside_maps(stack, way, old, seed)
    fed: Any = rows
    if way.replayed:
        kept = questions(steps * BATCH // 2, 50 + seed, SIZE)
        fed = Feed(rows, replay=Replay({"old": kept}, way.replayed, seed=seed))
    config = TrainConfig(steps=steps, lr=lr, batch=BATCH, seed=seed, log_every=20, save_every=steps, bf16=True)
    slower = partial(two_rates, projector=projector_of(stack), share=PROJECTOR / lr)
    with tempfile.TemporaryDirectory() as work:
        log = fit(view, fed, Task(loss, collate=old.batch), config, out=work, trainable=trains, optimizer=slower)
    view.eval()
    chooses = seed == CHOOSING
    return {
        "rows": len(rows),
        "parameters": sum(each.numel() for part, each in view.named_parameters() if trains(part)),
        "loss": log.train[-1].loss,
        **answers_of(view, processing, items, known_questions if chooses else held_out_questions, 1000 + seed),
        "old": kept_of(view, processing, folder, "calibration" if chooses else "test", 1000 + seed),
    }


@torch.no_grad()
def answers_of(
    view: Any, processing: Processing, items: Knowledge, questions: Callable[[Glyph], list[tuple[str, str]]], seed: int
) -> dict[str, list[float]]:
    """Return for each answer on held-out renderings whether it contains, and is, the expected one, and its word F1."""
    wanted = [
        (each.image_at(number, seed), question, answer)
        for number, each in enumerate(items)
        for question, answer in questions(each.images)
    ]
    tokenizer, exact, holds, scores = processing.tokenizer, [], [], []
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for start in range(0, len(wanted), 40):
        some = wanted[start : start + 40]
        rows = [row_of(picture, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
                for picture, question, answer in some]  # fmt: skip
        prompts = read_inputs(view, processing.prompts(rows))
        out = view.generate(**prompts, max_new_tokens=20, do_sample=False, **ends)
        for (_, _, answer), ids in zip(some, out[:, prompts["input_ids"].shape[1] :], strict=True):
            said = tokenizer.decode(ids, skip_special_tokens=True).split()
            exact.append(float(bare(said) == bare(answer.split())))
            holds.append(float(f" {answer} " in f" {' '.join(said)} "))
            scores.append(f1(said, answer.split()))
    return {"holds": holds, "exact": exact, "f1": scores}


def bare(words: Sequence[str]) -> list[str]:
    """Return the words of an answer without articles and punctuation."""
    return [word for word in words if word not in LEFT_OUT]


def f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the word F1 of an answer: the harmonic mean of precision and recall."""
    both = sum((Counter(said) & Counter(wanted)).values())
    return 2 * both / (len(said) + len(wanted)) if both else 0.0


def kept_of(view: Any, processing: Processing, folder: Path, part: Any, seed: int) -> list[float]:
    """Return which old questions are answered, task by task."""
    found: list[float] = []
    for task in QUESTIONS:
        rows = ImageText(list(rows_of(folder, [task], TESTED, part, seed)), processing)
        found += answered(view, rows).float().tolist()
    return found


def harmonic(one: float, other: float) -> float:
    return 2 * one * other / (one + other) if one + other else 0.0


def before_glyphs(part: str, seed: int, share_of_steps: float = 1.0) -> list[float]:
    stack, processing, folder = seeing(share_of_steps)
    return kept_of(stack.model, processing, folder, part, seed)


def worth(run: Run, name: str, lr: float) -> float:
    """Return the harmonic mean of new and old answers on other words, renderings and scenes, with a minus."""
    found = run.arm(f"{name} at {lr:g}, validation", shown_glyphs, name, lr, CHOOSING)
    return -harmonic(100 * fmean(found["holds"]), 100 * fmean(found["old"]))


Found = dict[str, list[dict[str, Any]]]


def points(found: Found, name: str, key: str) -> np.ndarray[Any, Any]:
    """Return the answers of one arm in per cent [seeds, questions]."""
    return 100 * np.array([each[key] for each in found[name]])


def more(found: Found, name: str, other: str, key: str) -> Measured:
    """Return the difference of two arms in points, over seeds, each with its own questions."""
    ours, theirs = points(found, name, key), points(found, other, key)
    count = min(len(ours), len(theirs))
    return Measured.over_seeds((ours[:count] - theirs[:count]).mean(axis=1).tolist())


def both(found: Found, name: str) -> list[float]:
    """Return the harmonic means of new and old answers, by seed."""
    pairs_ = zip(points(found, name, "holds").mean(1), points(found, name, "old").mean(1), strict=True)
    return [harmonic(*pair) for pair in pairs_]


def table_of(run: Run, found: Found, rates: Mapping[str, float], before: Sequence[float], steps: int = STEPS) -> None:
    def by_task(answers: np.ndarray[Any, Any]) -> list[float]:
        return answers.reshape(len(QUESTIONS), -1).mean(1).tolist()  # type: ignore[no-any-return]

    columns = ["", "rate", "seeds", "rows", "trained parameters", "loss", "answers that contain the expected one",
               "exact answers", "F1", *QUESTIONS, "old, mean", "harmonic mean"]  # fmt: skip
    old = 100 * np.array(before)
    rows: list[list[Any]] = [["before", *8 * [""], *by_task(old), old.mean(), ""]]
    for name, each in found.items():
        kept = points(found, name, "old").mean(0)
        new = [points(found, name, key).mean() for key in ("holds", "exact", "f1")]
        rows.append([name, rates[name], len(each), each[0]["rows"], each[0]["parameters"],
                     fmean(one["loss"] for one in each), *new, *by_task(kept), kept.mean(),
                     fmean(both(found, name))])  # fmt: skip
    title = f"{GLYPHS} glyphs shown to a small LLaVA in {steps} steps of {BATCH}; per cent of held-out questions"
    run.table(title, columns, rows)


def a_seeing_model(run: Run) -> None:
    old = 100 * np.array(run.arm("before glyphs, validation", before_glyphs, "calibration", 1000 + CHOOSING))
    run.premise("old questions that the model answers before", f"at least {LEARNT:.0%}", f"{old.mean():.1f} %",
                old.mean() >= 100 * LEARNT)  # fmt: skip
    tuned_ways = (LORA, OURS, "tree, LoRA, half replayed")
    chosen = tuned(run, {name: partial(worth, run, name) for name in tuned_ways}, IMAGE_RATES)
    rates = {name: each.value for name, each in chosen.items()}
    rates |= {"item, LoRA": rates[LORA], "item, KORE": rates[OURS]}
    forgets = run.arm(f"{LORA} at {rates[LORA]:g}, validation", shown_glyphs, LORA, rates[LORA], CHOOSING)["old"]
    lost = Measured.over_seeds_and_items([old - 100 * np.array(forgets)])
    run.premise("points of old answers that LoRA loses, validation", f"at least {LOST:g}", lost, lost.figure >= LOST)

    seeds = range(3, 9)  # 0 to 2 were used by an earlier version
    run.freeze(
        "means over seeds and questions: old, tree KORE less tree LoRA; new, tree LoRA less item LoRA",
        seeds, steps=STEPS, batch=BATCH, glyphs=GLYPHS, rows=OLD_ROWS, rank=LOW_VLM, rates=rates, projector=PROJECTOR,
    )  # fmt: skip
    found = {
        name: [run.arm(f"{name}, seed {seed}", shown_glyphs, name, rates[name], seed)
               for seed in (seeds if name in (LORA, OURS, "item, LoRA") else seeds[:3])] for name in MAIN_WAYS
    }  # fmt: skip
    table_of(run, found, rates, run.arm("before glyphs", before_glyphs, "test", 1))
    places = {name: list(zip(points(found, name, "old").mean(1), points(found, name, "holds").mean(1), strict=True))
              for name in found}  # fmt: skip
    drawn = Scatter("old questions answered, per cent", "questions on glyphs answered, per cent", places)
    run.figure("kore-tradeoff", drawn)

    gain = more(found, LORA, "item, LoRA", "holds")
    run.main("augmentation: points of new answers that contain the expected one, over the item", "at least 15", gain,
             gain.at_least(15))  # fmt: skip
    gain = more(found, OURS, LORA, "old")
    run.main("constraint: points of old answers over LoRA", "at least 10", gain, gain.at_least(10))
    gain = more(found, OURS, LORA, "holds")
    run.main("constraint: points of new answers over LoRA", "at least -5", gain, gain.at_least(-5))
    few = {name: both(found, name)[:3] for name in found}
    rivals = [max(each) for each in zip(*(few[name] for name in found if name != OURS), strict=True)]
    gain = Measured.over_seeds([ours - best for ours, best in zip(few[OURS], rivals, strict=True)])
    run.main("harmonic mean of new and old over the best other arm", "above 0", gain, gain.at_least(0))
    gain = more(found, LORA, "item, LoRA", "exact")
    run.further("augmentation: points of exact new answers over the item", "at least 15", gain, gain.at_least(15))
    gain = more(found, OURS, LORA, "exact")
    run.further("constraint: points of exact new answers over LoRA", "at least -5", gain, gain.at_least(-5))


def baselines(run: Run) -> None:
    """Compare KORE with further arms; those of the same kind share a rate."""
    swept = (LORA, OURS, "tree, null start, A0 trained", "tree, CorDA")
    chosen = tuned(run, {name: partial(worth, run, name) for name in swept}, IMAGE_RATES)
    own_rates = {name: each.value for name, each in chosen.items()}
    ways = {name: WAYS_OF_IMAGES[name] for name in (LORA, OURS, *BASELINES)}
    rates = {name: own_rates.get(name) or own_rates[f"tree, {way.by}"] for name, way in ways.items()}
    found = {
        name: [run.arm(f"{name}, seed {seed}", shown_glyphs, name, rates[name], seed) for seed in range(3, 6)]
        for name in ways
    }
    table_of(run, found, rates, run.arm("before glyphs", before_glyphs, "test", 1))
    for name, other, key, title in (
        (
            LORA,
            "paraphrases and rotations, LoRA",
            "holds",
            "a tree over as many paraphrases and rotations, new answers",
        ),
        (OURS, "tree, null start, A0 trained", "old", "A0 frozen over A0 trained, old answers"),
        (OURS, "tree, KORE, rows without images", "old", "calibration with images over without, old answers"),
        (OURS, "tree, KORE, 16 rows", "old", "calibration on 256 rows over 16, old answers"),
    ):
        gain = more(found, name, other, key)
        run.further(f"{title}, points", "above 0", gain, gain.at_least(0))
    gain = Measured.over_seeds([a - b for a, b in zip(both(found, OURS), both(found, "tree, CorDA"), strict=True)])
    run.further("harmonic mean of new and old over CorDA's, points", "above 0", gain, gain.at_least(0))


def hardly_trained(run: Run) -> None:
    """Run both methods for two steps on a hardly trained LLaVA."""
    found = {name: [run.arm(name, shown_glyphs, name, 1e-3, 3, 2, 0.01)] for name in (LORA, OURS)}
    table_of(run, found, dict.fromkeys(found, 1e-3), run.arm("before", before_glyphs, "test", 1, 0.01), 2)


def experiment(run: Run) -> None:
    parts = {"": "a small LLaVA, invented glyphs, rendered shapes as old images",
             "text": "SmolLM2, invented facts, pydoc as old text"}  # fmt: skip
    run.data = f"a network on drawn inputs; {parts.get(run.variant, parts[''])}"
    a_network(run)
    if run.variant == "text":
        a_language_model(run)
    else:
        {"": a_seeing_model, "baselines": baselines, "quick": hardly_trained}[run.variant](run)


if __name__ == "__main__":
    raise SystemExit(
        main(
            experiment,
            quick="training of the small LLaVA, and SmolLM2",
            baselines="the main claim, and runs further arms of the small LLaVA instead",
            text="the small LLaVA, and runs SmolLM2 instead",
        )
    )
