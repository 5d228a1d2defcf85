"""LoRA recycling at small scale: SmolLM2-135M with adapters of string tasks, and a small network with known relatives.

SmolLM2 answers strings of letters with another string, such as the letters in reverse order. Eight adapters are the
pool, one for each task, trained on 800 strings of three or five letters. Every task is the target once, with 32 strings
of four letters: the adapters of the other seven tasks are unrelated to it, its own is related. (From the paper's 100
strings, the target's own adapter learns such a task nearly as well as from 800.) The paper's findings are that adapters
of unrelated tasks add no more than random weights, that they do not replace an adapter of the target's own, and that
related ones transfer; all differences are paired over test strings and tasks. The learning rates of all arms are tuned
on other strings. The same arms follow for a three-layer network on a family of eight-class tasks, with more related
adapters.

    python reproductions/lora_recycling.py            # about an hour on one core; an interrupted run resumes
    python reproductions/lora_recycling.py --quick    # the small network alone, with one seed
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from harness import Run, main
from harness.design import tuned
from harness.measured import Measured
from harness.nano import digest, scratch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

import lamella
from lamella.files import Work
from lamella.methods.lora_recycling import (
    FITTING,
    AnswerScores,
    Mixing,
    Target,
    TaskSplits,
    Trial,
    attach,
    average,
    randomise,
    target_lora,
    tsv,
)
from lamella.methods.lora_recycling.page import by_arm
from lamella.stack import Stack, share
from lamella.train import Adapter, Sample, merge, pairs
from lamella.train.parameters import Choice, choose, only
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import build_once

SAME, LESS, MORE = 0.03, 0.0, 0.10  # the reference thresholds: random against recycled, T, and related tasks
LEARNT, ROOM = 0.2, 0.8  # the premises: what T gains over the model, and the most it may answer

# 1. SmolLM2 on strings of letters.

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
STRING_TASKS: dict[str, Callable[[str], str]] = {
    "reversed": lambda word: word[::-1],
    "rotated": lambda word: word[1:] + word[:1],
    "ends exchanged": lambda word: word[-1] + word[1:-1] + word[0],
    "first two exchanged": lambda word: word[1] + word[0] + word[2:],
    "outer letters": lambda word: word[0] + word[-1],
    "inner letters": lambda word: word[1:-1],
    "sorted": lambda word: "".join(sorted(word)),
    "largest letter": max,
}
TUNED = "rotated"  # the task on which rates are tuned, with strings of its own
EXAMPLES, TESTED, VALIDATED, POOLED_ON = 32, 100, 60, 800  # strings
STEPS, POOL_STEPS = 60, 100
OTHER_LENGTHS = (3, 5)  # of the strings of the pool; the target has four letters
ADAPTED = Target(target_r=8, target_alpha=16, target_dropout=0.1, target_steps=STEPS)
FIT = replace(FITTING, steps=STEPS, save_every=10_000)
OWN, RELATED, UNRELATED, RANDOM = "target LoRA (T)", "unrelated + related", "unrelated", "random weights"
BOTH, BOTH_RANDOM, ONLY = "T + unrelated", "T + random weights", "T, coefficients only"
FITTED = (ONLY, UNRELATED, RANDOM, BOTH, BOTH_RANDOM, RELATED)


@cache
def smollm2() -> Stack:
    return Stack(lamella.open("smollm2").model, name="smollm2")


def asked(task: str, count: int, seed: int, lengths: Sequence[int] = (4,)) -> list[Sample]:
    """Return random strings as prompts, one token per letter, with the answers of a task."""
    drawn, tokenizer = random.Random(f"{task} {seed}"), open_tokenizer("smollm2")

    def letters(word: str) -> list[int]:
        return [token for each in word for token in tokenizer(f" {each}")["input_ids"]]

    line, end = tokenizer("\n")["input_ids"], [tokenizer.eos_token_id]
    words = ["".join(drawn.choices(ALPHABET, k=drawn.choice(lengths))) for _ in range(count)]
    return pairs([(letters(word) + line, letters(STRING_TASKS[task](word)) + end) for word in words])


def adapted(
    samples: Sequence[Sample], held_out: Sequence[Sample], rate: float, seed: int, steps: int = STEPS
) -> Adapter:
    """Train an adapter of SmolLM2."""
    target, config = replace(ADAPTED, target_lr=rate, target_steps=steps), replace(FIT, seed=seed)
    with tempfile.TemporaryDirectory() as out, torch.enable_grad():
        return target_lora(smollm2(), samples, held_out, target, config, out=Path(out))[0]


def member(task: str, rate: float) -> Adapter:
    """Return the pool's adapter of a task, from the cache if it was trained before."""
    samples = asked(task, POOLED_ON, 1, OTHER_LENGTHS)

    def build(folder: Path) -> dict[str, Any]:
        adapted(samples, (), rate, seed=1, steps=POOL_STEPS).write(folder / "adapter")
        return {"task": task, "rate": rate, "steps": POOL_STEPS}

    name = f"reproduction-recycling-smollm2-{task.replace(' ', '-')}-{rate:g}-{POOL_STEPS}-{digest(samples)}"
    return Adapter.open(build_once(name, build, megabytes=10) / "adapter")


def splits_of(task: str, seed: int, tested: int) -> TaskSplits:
    """Return the target's examples and its test."""
    return TaskSplits.of(asked(task, EXAMPLES, 10 + seed), asked(task, tested, 1000 + seed), seed)


def own_adapter(splits: TaskSplits, rate: float, seed: int) -> Adapter:
    return adapted(splits.train, splits.held_out, rate, seed)


def merged(arm: str, task: str, own: Adapter, pool_rate: float, seed: int) -> list[Adapter]:
    """Return the adapters whose coefficients an arm fits."""
    if arm == ONLY:
        return [own]
    pool = {each: member(each, pool_rate) for each in STRING_TASKS}
    others = [each for name, each in pool.items() if name != task]
    return {
        UNRELATED: lambda: others,
        RANDOM: lambda: randomise(others, seed=seed),
        BOTH: lambda: [own, *others],
        BOTH_RANDOM: lambda: [own, *randomise(others, seed=seed)],
        RELATED: lambda: [*others, pool[task]],
    }[arm]()


def trial_of(splits: TaskSplits, rate: float, seed: int) -> Trial:
    config = replace(FIT, lr=rate, seed=seed)
    return Trial(smollm2(), splits, "adaptive", Mixing(), ADAPTED, config, Work(scratch("recycling")))


def own_loss(rate: float, seed: int) -> float:
    """Return the loss of T on validation strings of the tuning task, nats per token."""
    splits = splits_of(TUNED, seed, VALIDATED)
    return AnswerScores.of(merge(smollm2(), own_adapter(splits, rate, seed)).model, splits.test).loss


def fitted_loss(rate: float, arm: str, own_rate: float, seed: int, folder: Path) -> float:
    """Return the loss of a merge on validation strings of the tuning task, nats per token."""
    splits, own = splits_of(TUNED, seed, VALIDATED), Adapter.open(folder / f"{TUNED}, {seed}")
    with torch.enable_grad():
        return trial_of(splits, rate, seed).mixed(arm, merged(arm, TUNED, own, own_rate, seed)).test.loss


def own_answers(task: str, rate: float, seed: int, folder: Path) -> dict[str, list[float]]:
    """Train T, keep it in a folder, and return which test strings it and the model answer."""
    splits = splits_of(task, seed, TESTED)
    own = own_adapter(splits, rate, seed)
    own.write(folder / f"{task}, {seed}")
    arms = {"base": smollm2().model, OWN: merge(smollm2(), own).model}
    return {arm: list(AnswerScores.of(model, splits.test).exact) for arm, model in arms.items()}


def merged_answers(task: str, rates: Mapping[str, float], seed: int, folder: Path) -> dict[str, list[float]]:
    """Return which test strings each merge answers, and the best adapter of the whole pool."""
    splits, own_rate = splits_of(task, seed, TESTED), rates[OWN]
    own = Adapter.open(folder / f"{task}, {seed}")
    found = {}
    for arm in FITTED:
        with torch.enable_grad():
            done = trial_of(splits, rates[arm], seed).mixed(arm, merged(arm, task, own, own_rate, seed))
        found[arm] = list(done.test.exact)
    pool = [merge(smollm2(), member(each, own_rate)).model for each in STRING_TASKS]
    best = min(pool, key=lambda model: AnswerScores.of(model, splits.held_out).loss)
    plain = merge(smollm2(), average(merged(UNRELATED, task, own, own_rate, seed))).model
    for arm, model in (("best single related", best), ("average of the unrelated", plain)):
        found[arm] = list(AnswerScores.of(model, splits.test).exact)
    return found


def language_model(run: Run) -> None:
    """Decide the claims with SmolLM2, over tasks and test strings."""
    tuning = run.seed + 100
    lora_rate = tuned(run, {OWN: partial(own_loss, seed=tuning)}, [3e-4, 1e-3, 3e-3])[OWN].value
    run.arm("T of the tuning task", own_answers, TUNED, lora_rate, tuning, run.work)
    fits = {arm: partial(fitted_loss, arm=arm, own_rate=lora_rate, seed=tuning, folder=run.work) for arm in FITTED}
    rates = {OWN: lora_rate} | {arm: each.value for arm, each in tuned(run, fits, [1.6e-2, 5e-2, 1.6e-1]).items()}

    answers = {task: run.arm(f"{task}, T", own_answers, task, lora_rate, run.seed, run.work) for task in STRING_TASKS}
    base, own = (by_task(answers, arm) for arm in ("base", OWN))
    gain = float((own - base).mean())
    run.premise("SmolLM2: answers of T - those of the model alone", f"at least {LEARNT}", gain, gain >= LEARNT)
    share = float(own.mean())
    run.premise("SmolLM2: answers of T, which leave room for related ones", f"at most {ROOM}", share, share <= ROOM)
    run.freeze("mean over tasks and test strings of paired differences of exact answers", [run.seed], steps=STEPS,
               examples=EXAMPLES, test=TESTED, tasks=list(STRING_TASKS), rates=rates)  # fmt: skip
    for task in STRING_TASKS:
        answers[task] |= run.arm(f"{task}, merges", merged_answers, task, rates, run.seed, run.work)
    arms = list(answers[TUNED])
    rows = [
        [arm, float(by_task(answers, arm).mean()), *(fmean(answers[task][arm]) for task in answers)] for arm in arms
    ]
    run.table("SmolLM2: fraction of exact answers, by target task", ["arm", "mean", *answers], rows)
    claims(run, "SmolLM2", {arm: by_task(answers, arm) for arm in arms}, run.main)
    draw(run, {arm: by_task(answers, arm) for arm in arms})


def by_task(answers: Mapping[str, Mapping[str, Sequence[float]]], arm: str) -> np.ndarray:
    """Return which test strings an arm answers [tasks, strings]."""
    return np.array([answers[task][arm] for task in answers])


def claims(run: Run, model: str, found: Mapping[str, np.ndarray], add: Callable[..., None]) -> None:
    """Check the paper's findings.

    Args:
        run: the run.
        model: what the arms are of, as text.
        found: accuracies of each arm [tasks or seeds, test items].
        add: adds the paper's main findings.
    """

    def apart(one: str, other: str) -> Measured:
        return Measured.over_seeds((found[one] - found[other]).mean(axis=1).tolist())

    gap = apart(BOTH, BOTH_RANDOM)
    add(f"{model}: {BOTH} against {BOTH_RANDOM}", f"{-SAME} to {SAME}", gap, gap.within(-SAME, SAME))
    gain = apart(UNRELATED, OWN)
    add(f"{model}: {UNRELATED} - T", f"at most {LESS}", gain, gain.at_most(LESS))
    carried = apart(RELATED, OWN)
    add(f"{model}: {RELATED} - T", f"at least {MORE}", carried, carried.at_least(MORE))
    ahead = apart(UNRELATED, RANDOM)
    run.further(f"{model}: {UNRELATED} - {RANDOM}", f"at most {SAME}", ahead, ahead.at_most(SAME))
    alone = apart(BOTH_RANDOM, ONLY)
    run.further(f"{model}: {BOTH_RANDOM} - {ONLY}", f"{-SAME} to {SAME}", alone, alone.within(-SAME, SAME))
    single = apart(RELATED, "best single related")
    run.further(f"{model}: {RELATED} - best single related", "at least 0", single, single.at_least(0.0))


def draw(run: Run, found: Mapping[str, np.ndarray]) -> None:
    """Plot the fractions of exact answers."""
    shares = {arm: Measured.over_seeds(each.mean(axis=1).tolist()) for arm, each in found.items()}
    pooled = (UNRELATED, BOTH, RELATED, "best single related", "average of the unrelated")
    bars = {arm: (each.figure, (each.high - each.low) / 2, arm in pooled) for arm, each in shares.items()}
    run.figure("lora-recycling-arms", by_arm(bars))


# 2. A small network on tasks of one family, some of which are related to the target.

Set = tuple[Tensor, Tensor]  # x [count, WIDTH] and classes [count]
WIDTH, HIDDEN, CLASSES = 32, 64, 8
CHANGE, APART = 1.0, 0.35  # distance of a task from the base task, and of a related task from the target
OTHERS, RELATIVES, RANK = 12, 4, 8
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


def small_network(seed: int) -> dict[str, float]:
    """Return the test accuracy of every arm with one seed."""
    family = Family(1000 + seed)
    base = network(seed)
    learnt(base, family.samples(0.0, 4000), lambda name: True, steps=1500, lr=3e-3, seed=seed)
    goal = family.change()
    train, test = family.samples(goal, EXAMPLES), family.samples(goal, 4000)
    train, held_out = tuple(each[20:] for each in train), tuple(each[:20] for each in train)

    def pooled(changes: Sequence[Tensor]) -> list[Adapter]:
        return [lora(base, family.samples(each, 4000), None, steps=POOLED, lr=POOL_RATE, seed=seed) for each in changes]

    unrelated = pooled([family.change() for _ in range(OTHERS)])
    related = pooled([goal + APART * family.change() for _ in range(RELATIVES)])
    target = lora(base, train, held_out, steps=400, lr=1e-3, seed=seed)

    def fitted(adapters: Sequence[Adapter]) -> float:
        found = attach(share(base), adapters, lambda name: name)
        learnt(found.model, train, found.trains, held_out, steps=100, lr=5e-2, seed=seed)
        return accuracy(found.model, test)

    def alone(adapter: Adapter) -> float:
        return accuracy(with_adapter(base, adapter), test)

    best = max([*unrelated, *related], key=lambda each: accuracy(with_adapter(base, each), held_out))
    drawn = randomise(unrelated, seed=seed)
    return {
        "base": accuracy(base, test),
        OWN: alone(target),
        "average of the unrelated": alone(average(unrelated)),
        UNRELATED: fitted(unrelated),
        RANDOM: fitted(drawn),
        BOTH: fitted([target, *unrelated]),
        BOTH_RANDOM: fitted([target, *drawn]),
        ONLY: fitted([target]),
        RELATED: fitted([*unrelated, *related]),
        "best single related": alone(best),
        "TSV of the unrelated": alone(tsv(unrelated, [1 / OTHERS] * OTHERS, k=8)),
    }


def networks(run: Run, add: Callable[..., None]) -> None:
    """Check the claims with the small network, over seeds."""
    seeds = range(run.seed, run.seed + (1 if run.quick else 4))
    found = [run.arm(f"small network, {seed}", small_network, seed) for seed in seeds]
    columns = {arm: [each[arm] for each in found] for arm in found[0]}
    rows = [[arm, fmean(each), stdev(each) if len(each) > 1 else 0.0] for arm, each in columns.items()]
    run.table(f"A small network: test accuracy, {len(found)} seeds", ["arm", "mean", "standard deviation"], rows)
    claims(run, "small network", {arm: np.array(each)[:, None] for arm, each in columns.items()}, add)


def experiment(run: Run) -> None:
    if run.quick:
        run.data = "tasks of one family of random networks"
        networks(run, run.main)
        return
    run.data = "random strings of letters for SmolLM2-135M-Instruct; tasks of one family of random networks"
    language_model(run)
    networks(run, run.further)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="the small network alone, with one seed"))
