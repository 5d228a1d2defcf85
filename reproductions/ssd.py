"""SSD at small scale: a convolutional network on scikit-learn's digits, and SmolLM2-135M with secrets.

Checks that ssd with the paper's threshold of 10 forgets single sub-classes while the others are retained, beside
retraining from scratch and the usual baselines, for forget sets of 1 to 5 % of the data, as in the paper; what becomes
of a balanced problem of ten classes, where no such threshold can be met; that the estimator determines the selection;
that wrong labels are forgotten; and that a language model forgets two of twenty sentences that it was fine-tuned on.
Needs scikit-learn.

    python reproductions/ssd.py             # about an hour on one core; an interrupted run resumes
    python reproductions/ssd.py --digits    # without SmolLM2
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
from harness.digits import Set, network, parts_of_digits, split_digits
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
from lamella.report.figures import Scatter
from lamella.results import Record
from lamella.stack import Stack
from lamella.train import Sample, blocks, pairs
from lamella.zoo import open_tokenizer
from lamella.zoo.cache import build_once

TEST = 450  # number of test images
EPOCHS = 20  # epochs of Adam at 1e-3, batches of 64
METHODS = ("nothing", "retrain", "ssd", "ssd, by class", "assd", "lfssd", "fine-tune", "amnesiac", "gradient ascent")
PARTS = 5  # sub-classes of each digit, by k-means
ALPHA = 10.0  # of the paper, for residual networks
PURE: dict[str, Any] = {"batch": 64, "order": "by class"}  # the published batches
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


def amnesiac(model: nn.Module, request: Request, seed: int, classes: int) -> nn.Module:
    """Train on random wrong labels for the forget set and on the rest: 3 epochs of Adam at 1e-4, batches of 128."""
    images, labels = request.forget
    drawn = torch.randint(1, classes, labels.shape, generator=torch.Generator().manual_seed(seed))
    wrong = (labels + drawn) % classes
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


def trained(seed: int, data: tuple[Set, Set], classes: int = 10) -> nn.Module:
    return train(network(seed, CONVOLUTIONS, HIDDEN, classes=classes), data[0], EPOCHS, seed)


def ways(
    base: nn.Module, request: Request, full: Fisher, pure: Fisher, norms: Fisher, seed: int, alpha: float, classes: int
) -> dict[str, Any]:
    """Return the model after each method, with its dampening if it has one; F_D is computed beforehand."""

    def dampened(
        variant: Any, alpha: float | None, reference: Fisher = full, **settings: Any
    ) -> tuple[nn.Module, Dampening | None]:
        try:
            done = dampen(base, fisher(base, request.forget, **settings), reference, variant=variant, alpha=alpha)
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
        "retrain": lambda: (
            train(network(seed, CONVOLUTIONS, HIDDEN, classes=classes), request.retain, EPOCHS, seed),
            None,
        ),
        "ssd": partial(dampened, "ssd", alpha),
        "ssd, by class": partial(dampened, "ssd", alpha, pure, **PURE),
        "assd": partial(dampened, "assd", None),
        "lfssd": label_free,
        "fine-tune": partial(further, request.retain, 5, optimizer=torch.optim.SGD, rate=0.02),
        "amnesiac": lambda: (amnesiac(base, request, seed, classes), None),
        "gradient ascent": partial(further, request.forget, 3, rate=1e-4, batch=128, sign=-1.0),
    }


def problem(seed: int, parts: int) -> tuple[Set, Set]:
    """Return training and test images; with several parts, the labels are sub-classes of the digits."""
    data = split_digits(seed, TEST)
    return data if parts == 1 else parts_of_digits(data, parts)


def known_before(seed: int, parts: int, classes: Sequence[int]) -> dict[str, float]:
    """Return what the network knows of the classes to forget, and the range of their shares in the data, in %."""
    data = problem(seed, parts)
    base = trained(seed, data, 10 * parts)
    (_, labels), (images, truth) = data
    right = (base(images).argmax(1) == truth).double()
    shares = [100 * float((labels == each).double().mean()) for each in classes]
    chosen = torch.isin(truth, torch.tensor(classes))
    return {"accuracy": 100 * float(right[chosen].mean()), "least": min(shares), "most": max(shares)}


def forget_classes(seed: int, parts: int, alpha: float, classes: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """Return the results of each method on each class [methods, classes], and the seconds of F_D."""
    data, count = problem(seed, parts), 10 * parts
    base = trained(seed, data, count)
    untrained = untrained_like(base, seed + 100)
    full, full_pass = timed(lambda: fisher(base, data[0]))
    pure, norms = fisher(base, data[0], **PURE), fisher(base, data[0], kind="label-free")
    outcomes: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for label in classes:
        request = Request.of(data, label)
        known = ways(base, request, full, pure, norms, seed, alpha, count)
        for name in names:
            (model, done), seconds = timed(known[name])
            outcomes[name].append(vars(outcome(model, request, untrained, seconds, done)))
    return {"outcomes": outcomes, "full pass": full_pass}


def sub_classes(run: Run, seeds: Sequence[int], classes: Sequence[int], names: Sequence[str]) -> None:
    """Check point A with forget sets as small as the paper's, for which its threshold can be met."""
    before = [run.arm(f"sub-classes, known before, seed {seed}", known_before, seed, PARTS, classes) for seed in seeds]
    known = Measured.over_seeds([each["accuracy"] for each in before])
    run.premise("accuracy on the sub-classes before, %", "at least 80", known, known.at_least(80))
    least, most = min(each["least"] for each in before), max(each["most"] for each in before)
    run.premise("forget sets, % of the data", "1 to 5", f"{least:.1f} to {most:.1f}", least >= 1 and most <= 5)
    run.freeze(
        "mean over seeds of the number of sub-classes, of ten, that are forgotten while the others are retained",
        seeds,
        alpha=ALPHA,
        classes=list(classes),
        parts=PARTS,
        epochs=EPOCHS,
    )
    found = [run.arm(f"sub-classes, seed {seed}", forget_classes, seed, PARTS, ALPHA, classes, names) for seed in seeds]
    title = f"Forgetting one of {10 * PARTS} sub-classes, alpha {ALPHA:g}"
    report_classes(run, title, found, classes, names, main=("ssd",))


def whole_classes(run: Run, seeds: Sequence[int], classes: Sequence[int], names: Sequence[str]) -> None:
    """Check point A as the sheet has it: a balanced problem of ten classes, in which no ratio exceeds ten."""
    found = [run.arm(f"classes, seed {seed}", forget_classes, seed, 1, 5.0, classes, names) for seed in seeds]
    report_classes(run, "Forgetting one of ten digits, alpha 5", found, classes, names, main=())


def report_classes(
    run: Run,
    title: str,
    found: Sequence[dict[str, Any]],
    classes: Sequence[int],
    names: Sequence[str],
    main: Sequence[str],
) -> None:
    """Add tables and checks of the results of each seed."""
    results = [
        {name: [Outcome(**one) for one in each["outcomes"][name]] for name in names} for each in found
    ]  # by seed and method, one for each class
    rows = []
    for name in names:
        runs = [one for each in results for one in each[name]]
        shares = [each.selected for each in runs if each.selected is not None]
        averages = [
            statistics.mean(getattr(each, key) for each in runs) for key in ("retain", "forget", "membership", "zrf")
        ]
        rows.append(
            [name, averages[0], min(each.retain for each in runs), averages[1], max(each.forget for each in runs),
             *averages[2:], statistics.mean(shares) if shares else "",
             statistics.mean(each.seconds for each in runs)]
        )  # fmt: skip
    rows.append(["(F_D, once for all requests)", *[""] * 7, statistics.mean(each["full pass"] for each in found)])
    run.table(
        f"{title}: mean of {len(classes)} classes and {len(found)} seeds",
        ["method", "retain %", "worst", "forget %", "worst", "membership %", "ZRF", "selected %", "seconds"],
        rows,
    )

    if main:
        points = {name: [(forget, retain)] for name, retain, _, forget, *_ in rows[:-1]}
        run.figure("ssd-classes", Scatter("accuracy on what is to be forgotten, %", "accuracy on the rest, %", points))

    def good(each: dict[str, list[Outcome]], name: str) -> list[bool]:
        """Return whether a class is forgotten while the others are retained, for each class."""
        pairs = zip(each["nothing"], each[name], strict=True)
        return [after.forget <= 5 and before.retain - after.retain <= 2 for before, after in pairs]

    of_class = [
        [label, *(f"{sum(good(each, name)[index] for each in results)} of {len(results)}" for name in names[1:])]
        for index, label in enumerate(classes)
    ]
    run.table(f"{title}: seeds with forget <= 5 % and a retain drop <= 2 points", ["class", *names[1:]], of_class)
    need = 0.8 * len(classes)
    for name in ("ssd", "ssd, by class", "assd"):
        check = run.main if name in main else run.further  # assd is from a later paper
        counts = Measured.over_seeds([sum(good(each, name)) for each in results])
        check(
            f"{title}: {name}, forget <= 5 % and retain drop <= 2 points",
            f"at least {need:g} of {len(classes)} classes, mean over seeds",
            counts,
            counts.at_least(need),
        )
        ratios, gaps = [], []
        for each in results:
            both = list(zip(each[name], each["retrain"], strict=True))
            ratios.append(sum(theirs.seconds for _, theirs in both) / sum(ours.seconds for ours, _ in both))
            gaps.append(statistics.mean(abs(ours.membership - theirs.membership) for ours, theirs in both))
        ratio, gap = Measured.over_seeds(ratios), Measured.over_seeds(gaps)  # all methods had each class in turn
        check(f"{title}: retraining / {name} with stored F_D, seconds", ">= 20", ratio, ratio.at_least(20))
        check(f"{title}: {name}, membership, distance from retrained", "within 10 points", gap, gap.at_most(10))


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
    tenth = range(0, 10 * PARTS, PARTS)  # the largest sub-class of each digit
    sub_classes(run, seeds if quick else range(seed, seed + 5), tenth[3:5] if quick else tenth, names)
    if not quick:
        whole_classes(run, seeds, range(10), names)
    run.part("estimators", estimators, seed, 3, (5, 10) if quick else ALPHAS)
    run.part("wrong labels", wrong_labels, seeds)
    if not run.variant:
        run.data += "; secrets and pydoc for SmolLM2"
        run.part("SmolLM2", language_model, seed)


if __name__ == "__main__":
    raise SystemExit(main(experiment, quick="two classes with one seed, under a minute", digits="without SmolLM2"))
