"""LoRA recycling at small scale: a classifier with known related tasks, and a nano language model with a pool.

The pilot is a three-layer network on a family of eight-class tasks: adapters of 12 unrelated and of 4 related tasks,
and 100 examples of the target task. It checks the paper's findings on real pools: adapters of unrelated tasks help no
more than random weights, neither of them adds anything to the target's own adapter, and only related ones transfer.
Then a character-level Llama answers questions on words, with a pool of adapters for other questions, at 100 and at 10
examples, by the method itself with all of its controls.

    python reproductions/lora_recycling.py            # about half an hour on one core; an interrupted run resumes
    python reproductions/lora_recycling.py --quick    # one seed of each, a smaller Llama and no 10 examples
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from harness import Run, main
from harness.measured import Measured
from harness.nano import LETTERS as CHARACTERS
from harness.nano import digest, encode, from_scratch, llama, scratch, taught_once
from scipy.stats import t
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from lamella.files import Work
from lamella.methods.lora_recycling import (
    FITTING,
    AdapterPool,
    EntryMerge,
    Mixing,
    Target,
    attach,
    average,
    core,
    lora_recycling,
    mixture,
    randomise,
    tsv,
)
from lamella.methods.lora_recycling.choosing import cosine
from lamella.methods.lora_recycling.page import by_arm
from lamella.plan.fingerprint import revision
from lamella.results import Record
from lamella.stack import Stack, share
from lamella.train import Adapter, Sample, Task, TrainConfig, add_lora, fit, merge, pairs, response_loss
from lamella.train.parameters import Choice, choose, only
from lamella.zoo.cache import build_once
from lamella.zoo.nano import nano

SAME, LESS, MORE = 0.03, 0.0, 0.10  # the reference thresholds: random against recycled, T, and related tasks

# 1. Exactness, on a random Llama with adapters of mixed ranks, scales and modules.


def exactness(record: Record) -> None:
    stack = Stack(nano("llama"))
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    adapters = [some(stack, 1, 4, 8), some(stack, 2, 3, 9, ["up_proj"]), some(stack, 3, 2, 1, ["q_proj", "down_proj"])]
    logits = stack.model(ids).logits

    zero = mixture(stack, adapters, Mixing(), 0)
    same = torch.equal(zero.model(ids).logits, logits)
    record.exact("all w = 0", "logits of the model, bitwise", "equal" if same else "differ", same)
    equal = mixture(stack, adapters, Mixing(activation="identity"), 0)
    for each in equal.tensors.values():
        each.data.fill_(1 / len(adapters))
    dense = {name: sum(each.delta(name) for each in adapters if name in each.pairs) / len(adapters)
             for name in equal.modules}  # fmt: skip
    by_hand = share(stack.model)
    for name, update in dense.items():
        module = by_hand.get_submodule(name)
        module.weight = nn.Parameter(module.weight + update, requires_grad=False)
    wanted = by_hand(ids).logits
    for name, said in (
        ("per-module coefficients of 1/N", equal.model(ids).logits),
        ("the same as one plain adapter, merged", merge(stack, equal.adapter()).model(ids).logits),
        ("the average in factors", merge(stack, average(adapters)).model(ids).logits),
        ("the average in core space", merge(stack, core(adapters, [1 / 3] * 3)).model(ids).logits),
    ):
        apart = float((said - wanted).abs().max() / wanted.abs().max())
        record.exact(name, "the dense average, within 1e-5", apart, apart <= 1e-5)
    apart = max(abs(cosine(adapters[0], each, name) - dense_cosine(adapters[0], each, name))
                for each in adapters for name in each.modules)  # fmt: skip
    record.exact("cosine by the trace formula", "the dense one, within 1e-5", apart, apart <= 1e-5)

    name = "model.layers.0.mlp.up_proj"
    one = EntryMerge(adapters[:2], [1.0, 1.0], "ties", 0.2).delta(name)
    scaled = EntryMerge(adapters[:2], [0.3, 0.3], "ties", 0.2).delta(name)
    apart = float((scaled - 0.3 * one).abs().max())
    record.exact("TIES with all weights times 0.3", "0.3 of the update: weights count once", apart, apart <= 1e-6)
    total = sum(each.delta(name) for each in adapters[:2])
    masks = torch.stack(
        [EntryMerge(adapters[:2], [1.0, 1.0], "dare", 0.5, seed=seed).delta(name) for seed in range(2000)]
    )
    errors = (masks.mean(0) - total).abs() / (masks.std(0) / len(masks) ** 0.5)
    share_within = float((errors <= 3).float().mean())
    record.exact(
        "DARE over 2,000 masks", "99 % of the entries within 3 sigma of the sum", share_within, share_within >= 0.99
    )
    found = tsv(adapters, [1.0] * 3, k=2).pairs[name][0]
    apart = float((found @ found.T - torch.eye(len(found))).abs().max())
    record.exact("TSV's vectors", "orthonormal within 1e-5", apart, apart <= 1e-5)
    wide = [Adapter({"m": (torch.randn(64, 256) * 0.3, torch.randn(256, 64) * 2)}, {"m": 0.5}) for _ in range(3)]
    drawn = randomise(wide, keep=[0], seed=1)
    spreads = [
        [float(torch.cat([each.pairs["m"][half] for each in of[1:]]).std()) for half in (0, 1)] for of in (drawn, wide)
    ]
    apart = max(abs(ours / theirs - 1) for ours, theirs in zip(*spreads, strict=True))
    untouched = drawn[0] is wide[0]
    record.exact("random weights", "spread within 2 %, the target's own untouched", apart, apart <= 0.02 and untouched)
    counts = [
        len(mixture(stack, adapters[:1], Mixing(level), 0).tensors)
        for level in ("model", "layer", "sublayer", "module")
    ]
    record.exact("tying levels", "1, L, 2 L and 7 L coefficients", counts, counts == [1, 4, 8, 28])


def some(stack: Stack, seed: int, r: int, alpha: int, targets: list[str] | None = None) -> Adapter:
    """Return an adapter with an effect: its B is random too."""
    found = add_lora(share(stack.model), r, alpha, targets=targets, seed=seed).adapter()
    generator = torch.Generator().manual_seed(seed)
    pairs = {name: (a, 0.1 * torch.randn(b.shape, generator=generator)) for name, (a, b) in found.pairs.items()}
    return replace(found, pairs=pairs)


def dense_cosine(one: Adapter, other: Adapter, name: str) -> float:
    if name not in one.pairs or name not in other.pairs:
        return 0.0
    return float(torch.cosine_similarity(one.delta(name).flatten(), other.delta(name).flatten(), dim=0))


# 2. The pilot: tasks of one family, some of which are related to the target.

Set = tuple[Tensor, Tensor]  # x [count, WIDTH] and classes [count]
WIDTH, HIDDEN, CLASSES = 32, 64, 8
CHANGE, APART = 1.0, 0.35  # distance of a task from the base task, and of a related task from the target
UNRELATED, RELATED, RANK, EXAMPLES = 12, 4, 8, 100
POOLED, POOL_RATE = 600, 3e-3  # steps and rate of a member of the pool


class Family:
    """Eight-class tasks: y = argmax V tanh(U x), with a U of its own for each task."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.base = self.draw(HIDDEN, WIDTH) / WIDTH**0.5
        self.read = self.draw(CLASSES, HIDDEN)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def change(self) -> Tensor:
        """Return the change of U that defines a task."""
        return CHANGE * self.draw(HIDDEN, WIDTH) / WIDTH**0.5

    def samples(self, change: Tensor | float, count: int) -> Set:
        x = self.draw(count, WIDTH)
        return x, (torch.tanh(1.5 * x @ (self.base + change).T) @ self.read.T).argmax(1)


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = (WIDTH, 2 * HIDDEN, 2 * HIDDEN, CLASSES)
        return nn.Sequential(nn.Linear(*sizes[:2]), nn.GELU(), nn.Linear(*sizes[1:3]), nn.GELU(), nn.Linear(*sizes[2:]))


def loss(model: nn.Module, samples: Set) -> Tensor:
    return cross_entropy(model(samples[0]), samples[1])


@torch.no_grad()
def accuracy(model: nn.Module, samples: Set) -> float:
    return float((model(samples[0]).argmax(1) == samples[1]).float().mean())


def learnt(
    model: nn.Module, samples: Set, trains: Choice, held_out: Set | None = None, *, steps: int, lr: float, seed: int
) -> None:
    """Train with AdamW on a cosine with 10 % warm-up; restore the best point by held-out loss, if measured.

    The loop is separate from the library's, whose overhead would be fifty times the step time of these networks, a
    tenth of a millisecond.
    """
    chosen = choose(model, trains)
    size, generator = 32 if held_out is None else 8, torch.Generator().manual_seed(seed)
    with torch.enable_grad(), only(model, chosen):
        optimizer = torch.optim.AdamW(chosen.values(), lr=lr, weight_decay=0.0)
        rates = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
        least, best = math.inf, []
        for step in range(steps + 1):
            if held_out is not None and step % 10 == 0:
                found = float(loss(model, held_out).detach())
                if found < least:
                    least, best = found, [each.detach().clone() for each in chosen.values()]
            if step == steps:
                break
            picks = torch.randint(len(samples[0]), (size,), generator=generator)
            optimizer.zero_grad()
            loss(model, (samples[0][picks], samples[1][picks])).backward()
            optimizer.step()
            rates.step()
        for each, kept in zip(chosen.values(), best, strict=False):
            each.data.copy_(kept)


def lora(base: nn.Module, samples: Set, held_out: Set | None, *, steps: int, lr: float, seed: int) -> Adapter:
    """Train an adapter of all three linear layers on some samples."""
    generator = torch.Generator().manual_seed(seed)
    fresh = {}
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            a = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
            fresh[name] = (a, torch.zeros(module.out_features, RANK))
    adapter = Adapter(fresh, dict.fromkeys(fresh, 1.0))
    found = attach(share(base), [adapter], lambda name: name, activation="identity", init="target")
    factors = ("factor_a", "factor_b")
    learnt(found.model, samples, lambda name: name.endswith(factors), held_out, steps=steps, lr=lr, seed=seed)
    return found.adapter()


def with_adapter(base: nn.Module, adapter: Adapter) -> nn.Module:
    model = share(base)
    for name in adapter.modules:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(module.weight + adapter.delta(name), requires_grad=False)
    return model


def pilot(seed: int) -> dict[str, float]:
    """Return the test accuracy of every arm with one seed."""
    family = Family(1000 + seed)
    base = network(seed)
    learnt(base, family.samples(0.0, 4000), lambda name: True, steps=1500, lr=3e-3, seed=seed)
    goal = family.change()
    train, test = family.samples(goal, EXAMPLES), family.samples(goal, 4000)
    train, held_out = tuple(each[20:] for each in train), tuple(each[:20] for each in train)

    def pooled(changes: Sequence[Tensor]) -> list[Adapter]:
        return [lora(base, family.samples(each, 4000), None, steps=POOLED, lr=POOL_RATE, seed=seed) for each in changes]

    unrelated = pooled([family.change() for _ in range(UNRELATED)])
    related = pooled([goal + APART * family.change() for _ in range(RELATED)])
    target = lora(base, train, held_out, steps=400, lr=1e-3, seed=seed)

    def fitted(adapters: Sequence[Adapter]) -> float:
        found = attach(share(base), adapters, lambda name: name)
        learnt(found.model, train, found.trains, held_out, steps=100, lr=5e-2, seed=seed)
        return accuracy(found.model, test)

    def alone(adapter: Adapter) -> float:
        return accuracy(with_adapter(base, adapter), test)

    best = max(related, key=lambda each: accuracy(with_adapter(base, each), held_out))
    drawn = randomise(unrelated, seed=seed)
    return {
        "base": accuracy(base, test),
        "target LoRA (T)": alone(target),
        "average of the unrelated": alone(average(unrelated)),
        "unrelated": fitted(unrelated),
        "random weights": fitted(drawn),
        "T + unrelated": fitted([target, *unrelated]),
        "T + random weights": fitted([target, *drawn]),
        "T, coefficients only": fitted([target]),
        "unrelated + related": fitted([*unrelated, *related]),
        "best single related": alone(best),
        "TSV of the unrelated": alone(tsv(unrelated, [1 / UNRELATED] * UNRELATED, k=8)),
    }


PILOT_ARMS = ("base", "target LoRA (T)", "average of the unrelated", "unrelated", "random weights", "T + unrelated",
              "T + random weights", "T, coefficients only", "unrelated + related", "best single related",
              "TSV of the unrelated")  # fmt: skip


def judge_pilot(run: Run, found: Sequence[Mapping[str, float]]) -> None:
    columns = {arm: [each[arm] for each in found] for arm in PILOT_ARMS}
    rows = [[arm, fmean(each), stdev(each) if len(each) > 1 else 0.0] for arm, each in columns.items()]
    run.table(f"The pilot: test accuracy, {len(found)} seeds", ["arm", "mean", "standard deviation"], rows)

    def apart(one: str, other: str) -> Measured:
        return Measured.over_seeds([a - b for a, b in zip(columns[one], columns[other], strict=True)])

    gap = apart("T + unrelated", "T + random weights")
    run.main("T + unrelated against T + random weights", f"{-SAME} to {SAME}", gap, gap.within(-SAME, SAME))
    gain = apart("unrelated", "target LoRA (T)")
    run.main("unrelated adapters - T", f"at most {LESS}", gain, gain.at_most(LESS))
    carried = apart("unrelated + related", "target LoRA (T)")
    run.main("unrelated + related - T", f"at least {MORE}", carried, carried.at_least(MORE))
    ahead = apart("unrelated", "random weights")
    run.further("unrelated adapters - random weights", f"at most {SAME}", ahead, ahead.at_most(SAME))
    harm = apart("unrelated", "base")
    run.further(
        "unrelated adapters - base",
        "at most 0: coefficients over an irrelevant pool do not help",
        harm,
        harm.at_most(0.0),
    )
    only = apart("T + random weights", "T, coefficients only")
    run.further("T + random weights - T, coefficients only", f"{-SAME} to {SAME}", only, only.within(-SAME, SAME))
    single = apart("unrelated + related", "best single related")
    run.further("unrelated + related - best single related", "at least 0", single, single.at_least(0.0))


# 3. A language model with a pool: questions on a word that are answered by one letter, each with its own adapter.

LETTERS = "abcdefghijklmnop"
Question = Callable[[str], str]


def later(letter: str, by: int) -> str:
    """Return a letter a fixed number of positions later in the alphabet, with wrap-around."""
    return LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)]


KNOWN: dict[str, Question] = {  # questions that the base model has learnt, each with its own mark
    "f": lambda word: word[0],
    "l": lambda word: word[-1],
    "m": max,
    "n": lambda word: later(word[0], 1),
}


def goal(word: str) -> str:
    """Return the answer to the question of all target examples."""
    return later(word[1], 2)


POOL: dict[str, Question] = {
    "third letter": lambda word: word[2],
    "smallest letter": min,
    "before the last": lambda word: later(word[-1], -1),
    "after the largest": lambda word: later(max(word), 1),
    "five after the first": lambda word: later(word[0], 5),
    "three before the third": lambda word: later(word[2], -3),
}


RELATIVES = ("target, 4 to 6 letters", "target, ten letters alone")


def asked(
    question: Question,
    count: int,
    drawn: random.Random,
    mark: str = "?",
    lengths: Sequence[int] = (5,),
    letters: str = LETTERS,
) -> list[Sample]:
    """Return prompts of words with a question on each, and the answers as responses."""
    words = ["".join(drawn.choices(letters, k=drawn.choice(lengths))) for _ in range(count)]
    return pairs([(encode(f"{mark}{word}\n").tolist(), encode(question(word)).tolist()) for word in words])


@dataclass(frozen=True)
class Sizes:
    """Size of the language model, and the lengths of its training."""

    layers: int
    hidden: int
    steps: int
    pool_steps: int
    target_steps: int


FULL, QUICK = Sizes(2, 64, 800, 300, 150), Sizes(2, 32, 150, 30, 20)
ADAPTED = {"r": 8, "alpha": 16}
TARGET_RATE = 3e-3


def language_model(seed: int, size: Sizes) -> Stack:
    drawn = random.Random(seed)
    samples = [
        each for mark, question in KNOWN.items() for each in asked(question, 4000, drawn, mark, lengths=(4, 5, 6))
    ]
    name = f"recycling-{size.layers}x{size.hidden}-{size.steps}-{seed}-{digest(samples)}"
    model = llama(len(CHARACTERS), size.hidden, size.layers)
    return taught_once(name, model, lambda: samples, from_scratch(size.steps, lr=3e-3, batch=32, seed=seed))


def members(stack: Stack, seed: int, size: Sizes) -> dict[str, Adapter]:
    """Train adapters on plenty of examples, once: of other questions, and of the target's own on other words."""
    drawn = random.Random(100 + seed)
    tasks = {name: asked(question, 2000, drawn) for name, question in POOL.items()}
    tasks[RELATIVES[0]] = asked(goal, 2000, drawn, lengths=(4, 5, 6))
    tasks[RELATIVES[1]] = asked(goal, 2000, drawn, letters=LETTERS[:10])

    def build(folder: Path) -> dict[str, Any]:
        for name, samples in tasks.items():
            view = share(stack.model)
            lora = add_lora(view, **ADAPTED, seed=seed)
            config = TrainConfig(steps=size.pool_steps, lr=3e-3, batch=16, seed=seed, save_every=10_000)
            with tempfile.TemporaryDirectory() as out, torch.enable_grad():
                fit(view, samples, Task(response_loss), config, out=out, trainable=lora.trains)
            lora.adapter().write(folder / name)
        return {"steps": size.pool_steps, "seed": seed}

    content = digest([each for samples in tasks.values() for each in samples])
    name = f"reproduction-recycling-pool-{revision(stack.model)}-{size.pool_steps}-{seed}-{content}"
    folder = build_once(name, build, megabytes=10)
    return {name: Adapter.open(folder / name) for name in tasks}


def grid_cell(seed: int, size: Sizes, related: bool, examples: int, tested: int) -> dict[str, Any]:
    """Run the method with all of its controls, for one pool and one number of examples."""
    stack = language_model(seed, size)
    adapters = members(stack, seed, size)
    pool = AdapterPool.of({name: each for name, each in adapters.items() if related or name not in RELATIVES})
    drawn = random.Random(200 + seed)
    data, test = asked(goal, examples, drawn), asked(goal, tested, drawn)
    target = Target(target_r=ADAPTED["r"], target_alpha=ADAPTED["alpha"], target_lr=TARGET_RATE,
                    target_steps=size.target_steps)  # fmt: skip
    config = replace(FITTING, seed=seed, save_every=10_000)
    with torch.enable_grad():
        found = lora_recycling(stack, pool, data, test, target=target, config=config, work=Work(scratch("recycling")))
    return {"arms": {row["arm"]: [row["accuracy"], row["loss"]] for row in found.findings["arms"]},
            "worth": found.verdict.worth}  # fmt: skip


def language_models(run: Run, size: Sizes, seeds: range, tested: int) -> None:
    cells = {}
    for related in (False, True):
        for examples in (100,) if run.quick else (100, 10):
            name = f"{'with' if related else 'without'} relatives, {examples} examples"
            cells[related, examples] = [
                run.arm(f"{name}, {seed}", grid_cell, seed, size, related, examples, tested) for seed in seeds
            ]
    arms = list(next(iter(cells.values()))[0]["arms"])
    titles = [f"{'related' if related else 'unrelated'}, {examples}" for related, examples in cells]
    for place, what in enumerate(("fraction of exact answers", "nats per token of the answers")):
        rows = [[arm, *(fmean(found["arms"][arm][place] for found in each) for each in cells.values())] for arm in arms]
        run.table(f"A nano Llama, by pool and number of examples: {what}", ["arm", *titles], rows)
    said = {True: "worth it", False: "harm", None: "not shown"}
    rows = [
        [title, ", ".join(said[found["worth"]] for found in each)]
        for title, each in zip(titles, cells.values(), strict=True)
    ]
    run.table("Verdict of the report for each pool, by seed", ["pool, examples", "merging was"], rows)

    def apart(cell: tuple[bool, int], one: str, other: str) -> Measured:
        return Measured.over_seeds([found["arms"][one][0] - found["arms"][other][0] for found in cells[cell]])

    gap = apart((False, 100), "target + pool", "target + random weights")
    run.further(
        "Llama: target + unrelated against target + random weights", f"{-SAME} to {SAME}", gap, gap.within(-SAME, SAME)
    )
    gain = apart((False, 100), "pool", "target LoRA")
    run.further("Llama: unrelated adapters - target LoRA", f"at most {LESS}", gain, gain.at_most(LESS))
    carried = apart((True, 100), "pool", "target LoRA")
    run.further("Llama: unrelated + related - target LoRA", f"at least {MORE}", carried, carried.at_least(MORE))
    if not run.quick:
        draw(run, cells, len(seeds))
        few = apart((False, 10), "target + pool", "target LoRA")
        run.further("Llama, 10 examples: target + pool - target LoRA", "at least 0", few, few.at_least(0.0))
    plain = apart((False, 100), "target LoRA", "target LoRA, answers shuffled")
    run.further("Llama: target LoRA - the same on shuffled answers", "above 0.05", plain, plain.at_least(0.05))


def draw(run: Run, cells: Mapping[tuple[bool, int], Sequence[Mapping[str, Any]]], seeds: int) -> None:
    """Plot the fractions of exact answers at 100 examples, without and with related tasks in the pool."""
    arms = {}
    for related in (False, True):
        for arm in cells[related, 100][0]["arms"]:
            shares = [found["arms"][arm][0] for found in cells[related, 100]]
            half = float(t.ppf(0.975, seeds - 1)) * stdev(shares) / seeds**0.5
            pooled = arm in ("pool", "target + pool", "uniform average", "best single member")
            if related <= pooled or arm == "target LoRA":
                arms[f"{arm}{' with relatives' if related and pooled else ''}"] = (fmean(shares), half, pooled)
    run.figure("lora-recycling-arms", by_arm(arms))


def experiment(run: Run) -> None:
    run.data = (
        "tasks of one family of random networks, and questions on random words; both are made, "
        "sizes were settled on other seeds"
    )
    run.part("exactness", exactness)
    seeds = range(run.seed, run.seed + (1 if run.quick else 4))
    judge_pilot(run, [run.arm(f"pilot, {seed}", pilot, seed) for seed in seeds])
    size = QUICK if run.quick else FULL
    language_models(run, size, range(run.seed, run.seed + (1 if run.quick else 3)), 50 if run.quick else 300)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="one seed of each, a smaller Llama and no 10 examples"))
