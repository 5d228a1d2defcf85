"""KORE's constraint at small scale: new facts in a network whose old inputs are known, and in SmolLM2.

First three layers on inputs that lie in 24 of 64 dimensions, to which 60 facts from anywhere are added until all are
known: what is left of the old task by LoRA, by LoRA whose random half is frozen, from the null space with both halves
trained, and by KORE. Then SmolLM2 learns twenty invented facts, each said in eight ways, until their loss is as low for
both: how much dearer has other text become by LoRA and by KORE of as many trained numbers, each at the best of three
rates? Two more ways of saying them show what was learnt beyond the words.

The paper's other half, its augmentation for images and texts, and its vision-language models are not here.

    python reproductions/kore.py            # about an hour and a half on one core; stopped, it goes on
    python reproductions/kore.py --quick    # the network alone
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from harness import Run, main
from harness.measured import Measured
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lamella
from lamella.methods.kore import factors, input_covariance, normalised
from lamella.methods.kore.covariance import equal_rank
from lamella.methods.kore.method import beside, split_weights, weight_of
from lamella.stack import share
from lamella.train import Hook, Sample, Task, TrainConfig, Training, add_lora, blocks, fit, linear_at, mean_loss, pairs
from lamella.train import response_loss as loss
from lamella.zoo import open_tokenizer

SEEDS = (0, 1, 2)

# A network


WIDTH, OLD, HIDDEN, CLASSES, FACTS, RANK = 64, 24, 128, 10, 60, 16


class Adapted(nn.Module):
    """y = W x + B A x beside each linear map of a network."""

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
    """What each linear map reads."""
    found = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            found.append(x)
        x = layer(x)
    return found


def taught(model: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int, known: bool = False) -> None:
    """Train what can be trained by Adam; where wanted, only until all of it is known."""
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
    """A and B beside each map, before training."""
    maps = [layer for layer in model if isinstance(layer, nn.Linear)]
    if name.startswith("LoRA"):
        bound = [1 / each.in_features**0.5 for each in maps]  # as peft draws them
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
    """Old and new accuracy by each way, and how far the answers to old inputs have moved."""
    torch.manual_seed(seed)
    plane, teacher = torch.randn(OLD, WIDTH) / OLD**0.5, nn.Linear(WIDTH, CLASSES)
    x = torch.randn(6000, OLD) @ plane
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
    run.exact("all facts are known by every way", "1", f"{known:.3f}", known == 1)
    for name, bound, what in (("KORE", 0.95, "at least"), ("LoRA", 0.7, "at most")):
        kept = Measured.over_seeds([each[name]["old"] / each["before"]["old"] for each in found])
        held = kept.at_least(bound) if what == "at least" else kept.at_most(bound)
        run.main(f"share of the old accuracy that {name} keeps", f"{what} {bound}", str(kept), held)
    gain = Measured.over_seeds([each["KORE"]["old"] - each["null space, both halves trained"]["old"] for each in found])
    run.further("old accuracy: A0 frozen over A0 trained", "above 0", str(gain), gain.at_least(0))


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
ASKED = ("Where does {name} live? {name} lives in", "You can visit {name} in")  # ways that nothing was trained on
RATES = {"LoRA": (1e-4, 3e-4, 1e-3), "KORE": (3e-4, 1e-3, 3e-3)}
LOW, GOAL, MOST, EVERY = 8, 1.0, 160, 5  # LoRA's rank; the loss to reach; steps at most, and between looks


class Until(Hook):
    """Ends a run when the loss on what it learns is low enough."""

    def done(self, run: Training) -> bool:
        return bool(run.log.held_out) and run.log.held_out[-1].loss <= GOAL


def facts(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Sentences with where what is new begins, and the questions, each with the place."""
    drawn = torch.Generator().manual_seed(seed)
    home = {name: PLACES[int(torch.randint(len(PLACES), (1,), generator=drawn))] for name in NAMES}
    told = [(name, said.format(name=name, place=place)) for name, place in home.items() for said in SAID]
    asked = [(said.format(name=name), f" {place}.") for name, place in home.items() for said in ASKED]
    return told, asked


def learnt(way: str, lr: float, seed: int) -> dict[str, Any]:
    """Loss on the facts, on ways of asking that nothing was trained on, and on other text, when the goal is reached."""
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
        beside(view, names, split_weights(view, names, input_covariance(view, names, old), r), r, sites, "lora", seed)

        def trained(name: str) -> bool:
            return ".lora_B." in name

    config = TrainConfig(steps=MOST, lr=lr, schedule="constant", batch=16, seed=seed, eval_every=EVERY, save_every=MOST)
    before = others(stack.model, tokenizer, seed)
    with tempfile.TemporaryDirectory() as work:
        log = fit(view, samples, Task(loss), config, out=work, trainable=trained, held_out=samples[::8],
                  hooks=[Until()])  # fmt: skip
    after = others(view, tokenizer, seed)
    return {
        "steps": log.train[-1].step,
        "facts": log.held_out[-1].loss,
        "asked": nats(view, questions),
        "asked before": nats(stack.model, questions),
        "numbers": sum(each.numel() for name, each in view.named_parameters() if trained(name)),
        "choose": after["general"] - before["general"],
        "rise": after["stdlib"] - before["stdlib"],
    }


@torch.no_grad()
def nats(model: Any, samples: Sequence[Sample]) -> float:
    return mean_loss(model, samples)


def others(model: Any, tokenizer: Any, seed: int) -> dict[str, float]:
    """The loss on text to choose a rate by, and on text to report on; neither was calibrated on."""
    texts = {
        name: lamella.windows(tokenizer, lamella.load_text(name, "test"), 8, 128, seed)
        for name in ("general", "stdlib")
    }
    return {name: nats(model, blocks(tokens, loss_on="all")) for name, tokens in texts.items()}


def a_language_model(run: Run) -> None:
    found = {}
    for way, rates in RATES.items():
        for lr in rates:
            arms = [run.arm(f"SmolLM2, {way} at {lr:g}, seed {seed}", learnt, way, lr, seed) for seed in SEEDS]
            found[way, lr] = arms

    def mean(arms: list[dict[str, Any]], what: str) -> float:
        return fmean(each[what] for each in arms)

    def cost(way: str, lr: float) -> tuple[bool, float]:
        """By which a rate is chosen: it reaches the goal, and other text becomes least dear."""
        arms = found[way, lr]
        return any(each["facts"] > GOAL for each in arms), mean(arms, "choose")

    best = {way: min(rates, key=lambda lr: cost(way, lr)) for way, rates in RATES.items()}
    shown = ("numbers", "steps", "facts", "asked before", "asked", "choose", "rise")
    rows = [
        [way, lr, "yes" if lr == best[way] else "", *(mean(arms, what) for what in shown)]
        for (way, lr), arms in found.items()
    ]
    columns = ["", "rate", "chosen", "trained numbers", "steps", "loss on the facts", "asked otherwise, before"]
    columns += ["and after", "rise on general", "rise on stdlib"]
    title = f"{len(NAMES)} facts in {len(SAID)} ways each, until their loss is {GOAL:g}; means of {len(SEEDS)} seeds"
    run.table(f"{title}, nats", columns, rows)
    lora, ours = (found[way, best[way]] for way in ("LoRA", "KORE"))
    reached = max(each["facts"] for each in (*lora, *ours))
    run.exact("loss on the facts, both ways", f"at most {GOAL:g}", f"{reached:.3f}", reached <= GOAL)
    dearer = Measured.over_seeds([b["rise"] - a["rise"] / 3 for a, b in zip(lora, ours, strict=True)])
    run.main("rise on stdlib by KORE, less a third of LoRA's, nats", "at most 0", str(dearer), dearer.at_most(0))
    said = Measured.over_seeds([b["asked"] - a["asked"] for a, b in zip(lora, ours, strict=True)])
    run.further("asked otherwise: KORE's loss less LoRA's, nats", "at most 0.1", str(said), said.at_most(0.1))


def experiment(run: Run) -> None:
    run.data = "a network on drawn inputs" + ("" if run.quick else "; SmolLM2, invented facts, pydoc as old text")
    a_network(run)
    if not run.quick:
        a_language_model(run)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="the language model"))
