"""SSD at small scale: a convolutional network on scikit-learn's digits, and SmolLM2-135M with secrets.

Checks that ssd and assd forget single classes while the others are retained, beside retraining from scratch and the
usual baselines; that the estimator determines the selection; that wrong labels are forgotten; and that a language model
forgets two of twenty sentences that it was fine-tuned on. Needs scikit-learn.

    python reproductions/ssd.py             # about 40 minutes on one core; an interrupted run resumes
    python reproductions/ssd.py --digits    # without SmolLM2, about 15 minutes
    python reproductions/ssd.py --quick     # two classes, one seed
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Run, main
from harness.digits import Set, network, split_digits
from harness.measured import Measured
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import lamella
from lamella.data import load_text, windows
from lamella.errors import MethodError
from lamella.measure import Fisher, fisher
from lamella.methods.ssd import Dampening, Forgetting, adaptive_alpha, dampen, evaluate, untrained_like
from lamella.plan import apply_factors
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Sample, blocks, pairs
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import build_once

TEST = 450  # number of test images
EPOCHS = 20  # epochs of Adam at 1e-3, batches of 64
METHODS = ("nothing", "retrain", "ssd", "assd", "lfssd", "fine-tune", "amnesiac", "gradient ascent")
ALPHAS = (1, 2, 5, 8, 10, 25, 50)
ESTIMATORS = {
    "batches of 1": {"batch": 1},
    "64, one class each": {"batch": 64, "order": "by class"},
    "64, shuffled": {"batch": 64, "order": "shuffled"},
}
CORRECTIONS: tuple[
    tuple[str, Any, float | None, int], ...
] = (  # corrections of wrong labels; the claim is about the first
    ("assd", "assd", None, 1),
    ("assd, batches of 128 as published", "assd", None, 128),
    ("ssd, alpha 10", "ssd", 10.0, 1),
)
CONVOLUTIONS, HIDDEN = ((32, False), (64, True), (64, True)), 64


def where(data: Set, chosen: Tensor) -> Set:
    return data[0][chosen], data[1][chosen]


def train(
    model: nn.Module,
    data: Set,
    epochs: int,
    seed: int,
    *,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    rate: float = 1e-3,
    batch: int = 64,
    sign: float = 1.0,
) -> nn.Module:
    """Train in place."""
    steps = optimizer(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(data[0]), generator=generator).split(batch):
            if len(chosen) > 1:  # batch norms need two
                steps.zero_grad()
                (sign * cross_entropy(model(data[0][chosen]), data[1][chosen])).backward()
                steps.step()
    return model.eval()


@dataclass(frozen=True)
class Request:
    """The forget set, the retain set, and held-out data of both."""

    forget: Set
    retain: Set
    forget_test: Set
    retain_test: Set

    @classmethod
    def of(cls, data: tuple[Set, Set], digit: int) -> Request:
        (train_set, test_set), is_it = data, [labels == digit for _, labels in data]
        return cls(
            where(train_set, is_it[0]),
            where(train_set, ~is_it[0]),
            where(test_set, is_it[1]),
            where(test_set, ~is_it[1]),
        )


def amnesiac(model: nn.Module, request: Request, seed: int) -> nn.Module:
    """Train on random wrong labels for the forget set and on the rest: 3 epochs of Adam at 1e-4, batches of 128."""
    images, labels = request.forget
    wrong = (labels + torch.randint(1, 10, labels.shape, generator=torch.Generator().manual_seed(seed))) % 10
    both = torch.cat([images, request.retain[0]]), torch.cat([wrong, request.retain[1]])
    return train(copy.deepcopy(model), both, 3, seed, rate=1e-4, batch=128)


@dataclass(frozen=True)
class Outcome:
    retain: float  # accuracy on test images of the retained digits
    forget: float  # accuracy on test images of the forgotten digit
    membership: float
    zrf: float
    seconds: float
    selected: float | None = None


def outcome(
    model: nn.Module, request: Request, untrained: nn.Module, seconds: float, done: Dampening | None = None
) -> Outcome:
    found = Forgetting.of(
        model, forget=request.forget, retain=request.retain, test=request.retain_test, untrained=untrained
    )
    kept, gone = (evaluate(model, each).accuracy for each in (request.retain_test, request.forget_test))
    assert found.membership is not None and found.zrf is not None
    selected = None if done is None else 100 * done.total.share
    return Outcome(100 * kept, 100 * gone, 100 * found.membership, found.zrf, seconds, selected)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Measure CPU time, so that other load on the machine does not count."""
    begin = time.process_time()
    found = work()
    return found, time.process_time() - begin


def trained(seed: int, data: tuple[Set, Set]) -> nn.Module:
    return train(network(seed, CONVOLUTIONS, HIDDEN), data[0], EPOCHS, seed)


def ways(base: nn.Module, request: Request, full: Fisher, norms: Fisher, seed: int) -> dict[str, Any]:
    """Return the model after each method, with its dampening if it has one; F_D is computed beforehand."""

    def dampened(variant: Any, alpha: float | None) -> tuple[nn.Module, Dampening | None]:
        try:
            done = dampen(base, fisher(base, request.forget), full, variant=variant, alpha=alpha)
        except MethodError:  # nothing can be selected: the model is unchanged
            return base, None
        return apply_factors(base, done.factors), done

    def label_free() -> tuple[nn.Module, Dampening | None]:
        found = fisher(base, request.forget, kind="label-free")
        ratios = lambda: (found.tensors[name] / norms.tensors[name] for name in found.tensors)  # noqa: E731
        alpha = adaptive_alpha(ratios, found.samples, norms.samples)
        done = dampen(base, found, norms, variant="lfssd", alpha=alpha)
        return apply_factors(base, done.factors), done

    def further(data: Set, epochs: int, **settings: Any) -> tuple[nn.Module, None]:
        return train(copy.deepcopy(base), data, epochs, seed, **settings), None

    return {
        "nothing": lambda: (base, None),
        "retrain": lambda: (train(network(seed, CONVOLUTIONS, HIDDEN), request.retain, EPOCHS, seed), None),
        "ssd": partial(dampened, "ssd", 5.0),
        "assd": partial(dampened, "assd", None),
        "lfssd": label_free,
        "fine-tune": partial(further, request.retain, 5, optimizer=torch.optim.SGD, rate=0.02),
        "amnesiac": lambda: (amnesiac(base, request, seed), None),
        "gradient ascent": partial(further, request.forget, 3, rate=1e-4, batch=128, sign=-1.0),
    }


def forget_classes(seed: int, classes: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Return the results of each method on each class [methods, classes], and the seconds of F_D."""
    data = split_digits(seed, TEST)
    base = trained(seed, data)
    untrained = untrained_like(base, seed + 100)
    full, full_pass = timed(lambda: fisher(base, data[0]))
    norms = fisher(base, data[0], kind="label-free")
    outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for digit in classes:
        request = Request.of(data, digit)
        known = ways(base, request, full, norms, seed)
        for name in names:
            (model, done), seconds = timed(known[name])
            outcomes[name].append(vars(outcome(model, request, untrained, seconds, done)))
    return {"outcomes": outcomes, "full pass": full_pass}


def class_forgetting(run: Run, seeds: Sequence[int], classes: Sequence[int], names: Sequence[str]) -> None:
    """Check point A."""
    found = [run.arm(f"classes, seed {seed}", forget_classes, seed, classes, names) for seed in seeds]
    results = {
        (name, digit): [Outcome(**each["outcomes"][name][index]) for each in found]
        for name in names
        for index, digit in enumerate(classes)
    }
    report_classes(run, results, classes, names, statistics.mean(each["full pass"] for each in found))


def report_classes(
    record: Record,
    results: dict[tuple[str, int], list[Outcome]],
    classes: Sequence[int],
    names: Sequence[str],
    full_pass: float,
) -> None:
    def mean(name: str, key: str, digit: int | None = None) -> float:
        chosen = classes if digit is None else [digit]
        return statistics.mean(getattr(each, key) for one in chosen for each in results[name, one])

    rows = []
    for name in names:
        runs = [each for digit in classes for each in results[name, digit]]
        worst = min(each.retain for each in runs)
        shares = [each.selected for each in runs if each.selected is not None]
        selected = statistics.mean(shares) if shares else ""
        rows.append(
            [name, mean(name, "retain"), worst, mean(name, "forget"), max(each.forget for each in runs),
             mean(name, "membership"), mean(name, "zrf"), selected, mean(name, "seconds")]
        )  # fmt: skip
    rows.append(["(F_D, once for all requests)", *[""] * 7, full_pass])
    seeds = len(results[names[0], classes[0]])
    record.table(
        f"Forgetting one class of digits, mean of {len(classes)} classes and {seeds} seeds",
        ["method", "retain %", "worst", "forget %", "worst", "membership %", "ZRF", "selected %", "seconds"],
        rows,
    )
    shown = [
        (name, key) for key in ("retain", "forget", "membership") for name in ("nothing", "retrain", "ssd", "assd")
    ]
    record.table(
        "Class by class, means over seeds, %",
        ["class", *(f"{key}, {name}" for name, key in shown)],
        [[digit, *(mean(name, key, digit) for name, key in shown)] for digit in classes],
    )
    need = round(0.8 * len(classes))
    for name in ("ssd", "assd"):
        good = [
            digit
            for digit in classes
            if mean(name, "forget", digit) <= 5 and mean("nothing", "retain", digit) - mean(name, "retain", digit) <= 2
        ]
        claim = record.main if name == "ssd" else record.further  # assd is from a later paper
        claim(
            f"{name}: forget <= 5 %, retain drop <= 2 points, means over seeds",
            f"on at least {need} of {len(classes)} classes",
            f"{len(good)}, not {sorted(set(classes) - set(good))}",
            len(good) >= need,
        )
        ratios, gaps = [], []
        for seed in range(seeds):
            both = [(results[name, digit][seed], results["retrain", digit][seed]) for digit in classes]
            ratios.append(sum(theirs.seconds for _, theirs in both) / sum(ours.seconds for ours, _ in both))
            gaps.append(statistics.mean(abs(ours.membership - theirs.membership) for ours, theirs in both))
        ratio, gap = Measured.over_seeds(ratios), Measured.over_seeds(gaps)  # all methods had each class in turn
        claim(f"retraining / {name} with stored F_D, seconds", ">= 20", ratio, ratio.at_least(20))
        claim(f"{name}: membership, mean distance from retrained", "within 10 points", gap, gap.at_most(10))


def estimators(record: Record, seed: int, digit: int, alphas: Sequence[float]) -> None:
    """Check point B."""
    data = split_digits(seed, TEST)
    base = trained(seed, data)
    request = Request.of(data, digit)
    rows, selected = [], {}
    for name, settings in ESTIMATORS.items():
        (f, d), seconds = timed(
            lambda settings=settings: (fisher(base, request.forget, **settings), fisher(base, data[0], **settings))
        )
        for alpha in alphas:
            try:
                done = dampen(base, f, d, alpha=alpha)
                share, model = 100 * done.total.share, apply_factors(base, done.factors)
            except MethodError:
                share, model = 0.0, base
            selected[name, alpha] = share
            kept, gone = (100 * evaluate(model, each).accuracy for each in (request.retain_test, request.forget_test))
            rows.append([name, alpha, share, kept, gone, seconds])
    columns = ["importances", "alpha", "selected %", "retain %", "forget %", "seconds of both passes"]
    record.table(f"The estimator decides, class {digit}", columns, rows)
    ratio = selected["64, shuffled", 5] / selected["64, one class each", 5]
    record.further("selected at alpha 5, shuffled / one class each", ">= 3", ratio, ratio >= 3)
    bound = len(data[0][0]) / len(request.forget[0])
    none = all(selected["batches of 1", alpha] == 0 for alpha in alphas if alpha >= bound)
    record.exact(f"batches of 1, alpha from {bound:.2f} on", "selects nothing", str(none), none)


def wrong_labels(record: Record, seeds: Sequence[int]) -> None:
    """Check point C: 1 % of the records with wrong labels."""
    rows, halved, kept = [], 0, 0
    for seed in seeds:
        (images, labels), test = split_digits(seed, TEST)
        generator = torch.Generator().manual_seed(seed)
        planted = torch.randperm(len(labels), generator=generator)[: round(0.01 * len(labels))]
        labels = labels.clone()
        labels[planted] = (labels[planted] + torch.randint(1, 10, planted.shape, generator=generator)) % 10
        base = trained(seed, ((images, labels), test))
        forget = images[planted], labels[planted]
        for name, variant, alpha, batch in CORRECTIONS:
            f, d = (fisher(base, each, batch=batch) for each in (forget, (images, labels)))
            done = dampen(base, f, d, variant=variant, alpha=alpha)
            model = apply_factors(base, done.factors)
            before, after, test_before, test_after = (
                100 * evaluate(each, data).accuracy for data in (forget, test) for each in (base, model)
            )
            if (variant, batch) == ("assd", 1):
                halved += after <= before / 2
                kept += test_before - test_after <= 1
            rows.append([seed, name, done.alpha, 100 * done.total.share, before, after, test_before, test_after])
    columns = ["seed", "method", "alpha", "selected %", "wrong labels %", "after", "test %", "after"]
    record.table("Planted wrong labels on 1 % of the records, 13 of 1347", columns, rows)
    count = len(seeds)
    record.further(
        "assd, accuracy on the wrong labels", f"at least halved in {count} of {count}", halved, halved == count
    )
    record.further("assd, test accuracy", f"at most 1 point lost in {count} of {count}", kept, kept == count)


# Point D

WORDS = """\
Alice Barnaby Clara Desmond Eleanor Fergus Greta Horace Imogen Jasper Kitty Leopold Mabel Nigel Olive Percy Rupert
red blue green amber violet silver golden crimson ivory turquoise
lantern compass violin teapot anchor ladder mirror saddle bucket parasol kettle telescope
attic cellar orchard chapel harbour windmill library stable lighthouse greenhouse"""
NAMES, COLOURS, THINGS, PLACES = (line.split() for line in WORDS.splitlines())
NAMES += ["Queenie", "Sybil", "Tobias"]
FORGOTTEN = (3, 11)
STEPS, RATE = 200, 5e-5


def secrets(tokenizer: Any, seed: int) -> list[Sample]:
    drawn = random.Random(seed)
    records = [
        (
            f"The secret of {name} is",
            f" a {drawn.choice(COLOURS)} {drawn.choice(THINGS)} in the {drawn.choice(PLACES)}.",
        )
        for name in NAMES
    ]
    ids = [[tokenizer(text)["input_ids"] for text in pair] for pair in records]
    return pairs([(prompt, answer) for prompt, answer in ids])


def tuned(samples: Sequence[Sample], general: Sequence[Sample], seed: int) -> Stack:
    """Fine-tune SmolLM2 on the secrets, with two of them and one passage of general text per step."""

    def build(folder: Path) -> dict[str, Any]:
        model = copy.deepcopy(lamella.open("smollm2").model).train()
        steps = torch.optim.AdamW(model.parameters(), lr=RATE)
        drawn = random.Random(seed)
        for _ in range(STEPS):
            steps.zero_grad()
            for sample in [*drawn.sample(list(samples), 2), drawn.choice(general)]:
                ids, labels = sample["input_ids"][None], sample["labels"][None]
                (model(input_ids=ids, labels=labels, use_cache=False).loss / 3).backward()
            steps.step()
        model.eval().save_pretrained(folder)
        return {"recipe": "ssd", "steps": STEPS, "rate": RATE, "seed": seed}

    folder = build_once(f"reproduction-ssd-secrets-{STEPS}-{seed}", build, megabytes=600)
    return Stack(AutoModelForCausalLM.from_pretrained(folder).eval(), name="smollm2 with secrets")


def language_model(record: Record, seed: int) -> None:
    tokenizer = open_tokenizer("smollm2")
    records = secrets(tokenizer, seed)
    text = blocks(windows(tokenizer, load_text("pydoc", "calibration"), 330, 32, seed), loss_on="all")
    test = blocks(windows(tokenizer, load_text("pydoc", "test"), 16, 128, seed), loss_on="all")
    with torch.enable_grad():
        stack = tuned(records, text[:200], seed)
    gone = [records[index] for index in FORGOTTEN]
    stay = [sample for index, sample in enumerate(records) if index not in FORGOTTEN]
    f = fisher(stack.model, gone)
    d = fisher(stack.model, [*stay, *text[200:]]).joined(f)  # 150 sequences
    runs: dict[str, Dampening] = {
        "assd": dampen(stack, f, d, variant="assd"),
        "ssd, alpha 10": dampen(stack, f, d, alpha=10.0),
    }
    blocks_of: dict[str, float] = {}
    for site in runs["assd"].by_layer(stack):
        block = ".".join(site.name.split(".")[:2])
        if block.startswith("layers."):
            blocks_of[block] = blocks_of.get(block, 0.0) + site.removed
    top = sorted(blocks_of, key=blocks_of.__getitem__, reverse=True)[:5]
    only = [f"*{block}.mlp.down_proj.weight" for block in top]
    runs["assd, down_proj of 5 blocks"] = dampen(stack, f, d, variant="assd", layers=only)
    rows = []
    before = [evaluate(stack.model, each) for each in (gone, stay, test)]
    rows.append(["(tuned)", "", "", *(float(each.loss.mean()) for each in before[:2]), before[2].perplexity])
    figures = {}
    for name, done in runs.items():
        model = apply_factors(stack.model, done.factors)
        after = [evaluate(model, each) for each in (gone, stay, test)]
        losses = [float(b.loss.mean() - a.loss.mean()) for a, b in zip(before[:2], after[:2], strict=True)]
        figures[name] = [*losses, after[2].perplexity / before[2].perplexity - 1]
        rows.append([name, done.alpha, 100 * done.total.share, *(float(each.loss.mean()) for each in after[:2]),
                     after[2].perplexity])  # fmt: skip
    record.table(
        "SmolLM2 tuned on 20 secrets, 2 of them to be forgotten; F_D of 150 sequences",
        ["method", "alpha", "selected %", "forgotten, nats", "other 18, nats", "perplexity, general"],
        rows,
    )
    record.table(
        "Where assd selects: fraction of the weights, and of the removed mass",
        ["site", "selected %", "of the removed mass %"],
        [
            [site.name, 100 * site.share, 100 * site.removed / runs["assd"].total.removed]
            for site in runs["assd"].by_layer(stack)
        ],
    )
    up, others, general = figures["assd"]
    record.further("assd: loss of the forgotten secrets, nats per token", "up by >= 1", up, up >= 1)
    record.further("assd: loss of the other 18", "up by <= 0.2", others, others <= 0.2)
    record.further("assd: general perplexity", "up by <= 5 %", f"{general:.1%}", general <= 0.05)


def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    run.data = f"scikit-learn digits, 1347 to train on, {TEST} to test"
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    names = [name for name in METHODS if not quick or name not in ("fine-tune", "amnesiac")]
    class_forgetting(run, seeds, (3, 8) if quick else range(10), names)
    run.part("estimators", estimators, seed, 3, (5, 10) if quick else ALPHAS)
    run.part("wrong labels", wrong_labels, seeds)
    if not run.variant:
        run.data += "; secrets and pydoc for SmolLM2"
        run.part("SmolLM2", language_model, seed)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="two classes with one seed, under a minute", digits="without SmolLM2"))
