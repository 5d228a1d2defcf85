"""CoLa at small scale: SmolLM2-135M-Instruct on short handwritten questions whose answer is one token or one line.

Checks that paths are executed exactly (identity, skips, loops with a cache), that the search has the specified
properties (deterministic, deep, unique, within bounds), that correctly answered questions need fewer layers, that the
tree search finds shorter paths than a random search, and which layers are removed. Repaired answers are reported beside
flips to *wrong* answers: with a few options, some path leads to almost any of them, so there is no claim on the
fraction of repairs.

    python reproductions/cola.py            # about 15 minutes on 2 cores; an interrupted run resumes
    python reproductions/cola.py --quick    # three questions: too few for the claims on fractions, whose tables it
    shows
"""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import torch
from harness import Run, main
from harness.padded import padded, positions, stepped
from torch import LongTensor

import lamella
from lamella.methods.cola import (
    PathAnswerer,
    PathSettings,
    PathStudy,
    Problem,
    edits,
    find_paths,
    repeat,
    report,
    same,
    skip,
    train_predictor,
    tree_search,
)
from lamella.methods.cola.paths import PathSearchResult, ProblemStudy, study_sample
from lamella.methods.unified_skip import balanced
from lamella.plan import ModelReference, PhasedPath, Plan
from lamella.report.figures import Bars
from lamella.results import Record
from lamella.stack import Stack
from lamella.zoo import open_tokenizer

NAMES = ("tree", "random", "skip", "repeat", "wrong target")

# The correct answer comes first; the order in the prompt is random.
TWO = [
    ("Is ice hot or cold?", "cold", "hot"),
    ("Which is larger, a mouse or an elephant?", "an elephant", "a mouse"),
    ("Which is faster, a snail or a train?", "a train", "a snail"),
    ("Does the sun rise in the east or the west?", "east", "west"),
    ("Which is heavier, a feather or a brick?", "a brick", "a feather"),
    ("Do fish live in water or in trees?", "in water", "in trees"),
    ("Is snow white or black?", "white", "black"),
    ("Is a tomato a plant or an animal?", "a plant", "an animal"),
]
FOUR = [
    ("What is the capital of France?", "Paris", "Rome", "Berlin", "Madrid"),
    ("Which animal barks?", "dog", "cat", "cow", "duck"),
    ("How many legs does a spider have?", "eight", "two", "four", "six"),
    ("Which planet do we live on?", "Earth", "Mars", "Venus", "Jupiter"),
    ("What do bees make?", "honey", "milk", "wool", "silk"),
    ("Which of these is a metal?", "iron", "wood", "glass", "paper"),
    ("What is the color of grass?", "green", "red", "blue", "purple"),
    ("Which month comes after June?", "July", "May", "March", "August"),
    ("What is frozen water called?", "ice", "steam", "sand", "oil"),
    ("Which one is a fruit?", "apple", "carrot", "bread", "cheese"),
]
SUMS = [(3, 4), (6, 2), (8, 7), (9, 5), (14, 3), (21, 6), (17, 15), (38, 24), (46, 37), (58, 29)]


def choice(question: str, answers: tuple[str, ...], seed: int) -> Problem:
    """Return a multiple-choice question whose options are shuffled with the seed."""
    order = random.Random(f"{seed} {question}").sample(answers, len(answers))
    letters = "ABCD"[: len(order)]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, order, strict=True)]
    right = letters[order.index(answers[0])]
    prompt = "\n".join([f"Question: {question}", *lines, "Answer:"])
    return Problem(question, prompt, f" {right}", tuple(f" {letter}" for letter in letters))


def addition(a: int, b: int) -> Problem:
    """Return a sum with an open answer; the wrong answers are near misses."""
    prompt = f"2 + 3 = 5\n11 + 8 = 19\n{a} + {b} = "  # the space: SmolLM2 has no token of a space with a digit
    return Problem(f"{a} + {b}", prompt, f"{a + b}", wrong=tuple(f"{a + b + off}" for off in (-1, 1, 10)))


def view_of(stack: Stack, path: tuple[int, ...]) -> Any:
    phases = PhasedPath(prefill=list(path), decode=list(path))
    return lamella.apply(stack, Plan(model=ModelReference.of(stack), path={"text": phases}))


def exactness(record: Record, stack: Stack, ids: LongTensor) -> None:
    """Check point 1: identity, skips, loops, and the arithmetic of the search."""
    layers = len(stack)
    identity = tuple(range(layers))
    base = stack.model(ids).logits
    apart = float((view_of(stack, identity)(ids).logits - base).abs().max())
    record.exact("the identity path", "within 1e-5 of the model", apart, apart <= 1e-5)

    kept = skip(skip(identity, 12, 3), 5, 1)
    config = copy.deepcopy(stack.config)
    config.num_hidden_layers = len(kept)
    rebuilt = type(stack.model)(config).eval()
    weights = stack.model.state_dict()

    def source(name: str) -> str:
        head, inside, rest = name.partition("layers.")
        index, _, tail = rest.partition(".")
        return f"{head}layers.{kept[int(index)]}.{tail}" if inside else name

    rebuilt.load_state_dict({name: weights[source(name)] for name in rebuilt.state_dict()})
    apart = float((view_of(stack, kept)(ids).logits - rebuilt(ids).logits).abs().max())
    record.exact("a path with skips", "within 1e-5 of a model rebuilt from the kept layers", apart, apart <= 1e-5)

    looped = repeat(skip(identity, 20, 2), 8, 3)
    mask = padded(ids, (0, 3, 7))
    prompt = ids.shape[1] - 8
    view = view_of(stack, looped)
    whole = view(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits[:, prompt:]
    apart = float((stepped(view, ids, mask, prompt)[0][:, prompt:] - whole).abs().max())
    record.exact("a looped path, cached, left-padded batch", "within 1e-4 of uncached", apart, apart <= 1e-4)
    shared = view_of(stack, looped)
    for layer, index in zip(shared.model.layers, looped, strict=True):
        layer.self_attn.layer_idx = index  # one slot per layer instead of one per execution
    try:
        apart = float((stepped(shared, ids, mask, prompt)[0][:, prompt:] - whole).abs().max())
        failed, how = apart > 1e-4, f"{apart:.2g} apart"
    except RuntimeError:
        failed, how = True, "refused: the keys do not fit the mask"
    record.exact("the same with one cache slot per layer", "fails that test", how, failed)

    # Simulation 1 draws a child: 1 visit, while the root has none. Simulation 2 selects it, since the other one has no
    # value, and finds no edits: 2 visits, while the root has 1. The root comes last, with 2 visits, both of reward 1.
    tree = tree_search(
        "root",
        lambda state, at_root: ["first", "second"] if at_root else [],
        lambda state: 1.0,
        lambda state: 0.5,
        simulations=2,
        penalty=1.0,
        p_random=0.0,
    )
    ucb = sorted(node.ucb for node in (tree.root, *tree.root.children))
    by_hand = [-math.inf, 1 - 0.5 + math.sqrt(2 * math.log(2) / 2), 1 - 0.5 + math.sqrt(2 * math.log(3) / 2)]
    agree = all(math.isclose(*pair) for pair in zip(ucb, by_hand, strict=True))
    record.exact("UCB on a tree of 3 nodes", "as computed by hand", agree, agree)


def the_search(record: Record, stack: Stack, tokenizer: Any, sample: Problem) -> None:
    """Check points 1 and 2: the search is deterministic, deep, unique and within bounds."""
    layers = len(stack)
    settings = PathSettings(simulations=60)
    answerer = PathAnswerer(stack, tokenizer, sample)
    runs = [find_paths(answerer, sample.answer, layers, settings) for _ in range(2)]
    paths = [*runs[0].valid, *runs[0].invalid]
    record.exact(
        "two searches with one seed", "the same", "same" if runs[0] == runs[1] else "differ", runs[0] == runs[1]
    )
    low, high = settings.bounds(layers)
    unique = len(set(paths)) == len(paths)
    lengths = f"{min(map(len, paths))} to {max(map(len, paths))}"
    within = all(low <= len(path) <= high and max(Counter(path).values()) <= 2 for path in paths)
    record.exact("paths of the tree", "unique", f"{len(paths)}, {len(set(paths))} distinct", unique)
    record.exact("lengths of its paths", f"{low} to {high}, no layer more than twice", lengths, within)
    record.exact("depth at 60 simulations", "above 3", runs[0].depth, runs[0].depth > 3)
    wide = edits(tuple(range(layers)), True, layers=layers, settings=settings)
    print(f"{len(wide)} edits at the root: a search that tried them all first would have stayed at depth 1")


def searched(run: Run, stack: Stack, tokenizer: Any, samples: list[Problem], settings: PathSettings) -> PathStudy:
    """Run all searches, with one arm per question."""

    def outcome(record: dict[str, Any]) -> PathSearchResult:
        return PathSearchResult(**record | {paths: tuple(map(tuple, record[paths])) for paths in ("valid", "invalid")})

    def study(sample: Problem) -> dict[str, Any]:
        return asdict(study_sample(stack, tokenizer, sample, settings))

    studies = []
    for sample in samples:
        record = run.arm(f"searches: {sample.id}", study, sample)
        searches = {name: outcome(each) for name, each in record["searches"].items()}
        wrong = tuple(map(outcome, record["wrong"]))
        studies.append(ProblemStudy(sample, record["base"], searches, wrong, record["executed"], record["unshared"]))
    return PathStudy(ModelReference.of(stack), stack.architecture.stack, settings, tuple(studies))


def found(run: Run, study: PathStudy) -> dict[str, Any]:
    """Report the results of the searches, in total and by kind of question."""
    kinds = {
        "2 options": [s for s in study.samples if len(s.sample.options) == 2],
        "4 options": [s for s in study.samples if len(s.sample.options) == 4],
        "open sums": [s for s in study.samples if not s.sample.options],
    }
    parts = {"all": study} | {
        name: PathStudy(study.model, study.stack, study.settings, tuple(each)) for name, each in kinds.items() if each
    }
    numbers = {name: report(part) for name, part in parts.items()}
    for what, base in (("shorter", "the model answers correctly"), ("repaired", "it does not")):
        rows = [[name, *(each[what][kind] for kind in NAMES)] for name, each in numbers.items()]
        run.table(f"Fraction with a {'shorter ' * (what == 'shorter')}correct path, if {base}", ["", *NAMES], rows)
    run.table(
        "Valid paths per tree search; flips are searches for answers that the model does not give",
        ["", "samples", "right", *numbers["all"]["valid_paths"], "excess ± standard error", "p"],
        [
            [name, each["samples"], each["right"], *each["valid_paths"].values(), _excess(each), each["excess"]["p"]]
            for name, each in numbers.items()
        ],
    )
    everything = numbers["all"]
    run.table(
        "Number of samples by outcome", ["samples", "count"], [list(pair) for pair in everything["categories"].items()]
    )
    skipped, repeated = everything["valid_skip_rate"], everything["valid_repeat_rate"]
    rows = [[layer, *rates] for layer, rates in enumerate(zip(skipped, repeated, strict=True))]
    run.table("Fraction of correct paths that skip and repeat a layer", ["layer", "skipped", "repeated"], rows)
    rates = {"skipped": skipped, "repeated": repeated}
    run.figure("cola-layers", Bars("layer", "fraction of the correct paths", rates))
    return everything


def claims(record: Record, study: PathStudy, numbers: dict[str, Any]) -> None:
    """Check points 3 to 6."""
    share = numbers["shorter"]["tree"]
    record.main("right answers with a shorter path", "at least 75 %", share or 0.0, share is not None and share >= 0.75)
    sums = [s for s in study.samples if not s.sample.options and not s.right]
    choices = [s for s in study.samples if s.sample.options and not s.right]
    repaired = [fmean(bool(s.searches["tree"].valid) for s in group) for group in (sums, choices)]
    measured = f"{repaired[0]:.0%} of {len(sums)} / {repaired[1]:.0%} of {len(choices)}"
    record.further("repaired sums against repaired choices", "a lower fraction", measured, repaired[0] < repaired[1])

    lengths = numbers["best_length"]
    tree, at_random = lengths["tree"] or math.inf, lengths["random"] or 0.0
    record.further(
        "mean shortest path, tree against random", "at most as long", f"{tree:.2f} / {at_random:.2f}", tree <= at_random
    )
    rate = numbers["valid_skip_rate"]
    first, middle, last = fmean(rate[:2]), fmean(rate[2:-2]), fmean(rate[-2:])
    record.further(
        "fraction of correct paths that skip a layer, middle against first two and last two",
        "higher",
        f"{middle:.3f} / {first:.3f}, {last:.3f}",
        middle > max(first, last),
    )


def _excess(numbers: dict[str, Any]) -> str:
    excess = numbers["excess"]
    if excess["standard_error"] is None:
        return "-"
    return f"{excess['mean']:+.2f} ± {excess['standard_error']:.2f} ({excess['samples']})"


def baselines(record: Record, stack: Stack, tokenizer: Any, study: PathStudy, shuffled: dict[str, Problem]) -> None:
    """Report, without claims, fixed paths for all samples, random search at equal budget, and other option orders."""
    layers = len(stack)
    answerers = {s.sample.id: PathAnswerer(stack, tokenizer, s.sample, study.settings.tokens) for s in study.samples}
    best = {s.sample.id: s.searches["tree"].best for s in study.samples if s.searches["tree"].best}

    def right(path: tuple[int, ...]) -> float:
        return fmean(same(answerers[s.sample.id](path), s.sample.answer) for s in study.samples)

    mean = round(fmean(len(path) for path in best.values()))
    shared = max(best.values(), key=lambda path: (right(path), -len(path)))
    rows = [
        ["the model", layers, right(tuple(range(layers)))],
        ["one path per sample, chosen by its answer", fmean(map(len, best.values())), len(best) / len(study.samples)],
        ["the best of these paths, for all samples", len(shared), right(shared)],
        ["evenly spaced layers, of the mean length", mean, right(tuple(balanced(layers, mean)))],
    ]
    record.table("Right answers", ["", "layers", "fraction"], rows)

    tries = study.settings.simulations
    chances, robust = [], []
    for each in study.samples:
        options = each.sample.options
        if not options:
            continue
        answerer = answerers[each.sample.id]
        logits = answerer.tree.logits(tuple(range(layers)))[[token for (token,) in answerer.options]]
        chances.append(1 - (1 - float(logits.softmax(0)[options.index(each.sample.answer)])) ** tries)
        if each.sample.id in best and len(best[each.sample.id]) < layers:
            other = shuffled[each.sample.id]
            robust.append(same(PathAnswerer(stack, tokenizer, other)(best[each.sample.id]), other.answer))
    record.table(
        "Choices",
        ["what", "share"],
        [
            [f"probability that one of {tries} samples at temperature 1 is right", fmean(chances)],
            ["shorter path still right with reordered options", fmean(robust) if robust else None],
        ],
    )


def other_penalty(record: Record, stack: Stack, tokenizer: Any, study: PathStudy) -> None:
    """Report, without a claim, the effect of the length penalty, which outweighs the reward after 6 layers."""
    settings = replace(study.settings, penalty=0.0)
    rows = []
    for right in (True, False):
        samples = [s for s in study.samples if s.right == right]
        without = []
        for s in samples:
            answerer = PathAnswerer(stack, tokenizer, s.sample, settings.tokens)
            without.append(find_paths(answerer, s.sample.answer, len(stack), settings))
        for penalty, found in ((5, [s.searches["tree"] for s in samples]), (0, without)):
            lengths = [len(outcome.best) for outcome in found if outcome.best]
            shorter = sum(length < len(stack) for length in lengths)
            rows.append(
                ["right" if right else "wrong", penalty, len(found), len(lengths), shorter, fmean(lengths or [0])]
            )
    columns = ["the model is", "lambda", "samples", "with a correct path", "with a shorter one", "mean shortest"]
    record.table("The tree search with and without its penalty on length", columns, rows)


def predictor(record: Record, stack: Stack, tokenizer: Any, study: PathStudy) -> None:
    """Report, without a claim on so few samples, the predictor trained on each half and tested on the other."""
    rows = []
    for half in (0, 1):
        train = PathStudy(study.model, study.stack, study.settings, study.samples[half::2])
        unseen = [each.sample for each in study.samples[1 - half :: 2]]
        rows.append([f"half {half + 1}", *train_predictor(stack, train, tokenizer).score(stack, unseen, tokenizer)])
    columns = ["trained on", "held-out samples", "the model", "pass@1", "pass@5 (needs the answer)", "mean length"]
    record.table("Predicted paths", columns, rows)


@torch.no_grad()
def experiment(run: Run) -> None:
    quick, seed = run.quick, run.seed
    stack = lamella.open("smollm2")
    tokenizer = open_tokenizer("smollm2")
    questions = FOUR[:2] if quick else [*TWO, *FOUR]
    samples = [choice(question, answers, seed) for question, *answers in questions]
    shuffled = {question: choice(question, answers, seed + 1) for question, *answers in questions}
    samples += [addition(*pair) for pair in (SUMS[:1] if quick else SUMS)]
    settings = PathSettings(simulations=20 if quick else 50, tokens=3, seed=seed)
    run.data = f"{len(samples)} questions of reproductions/cola.py, {settings.simulations} simulations, lambda 5"
    ids = torch.randint(3, stack.config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(seed))
    run.part("exactness", exactness, stack, ids)
    run.part("one search", the_search, stack, tokenizer, choice(FOUR[0][0], FOUR[0][1:], seed))
    study = searched(run, stack, tokenizer, samples, settings)
    numbers = found(run, study)
    executed, unshared = (sum(getattr(each, name) for each in study.samples) for name in ("executed", "unshared"))
    run.table(
        "Number of executed layers, with shared prefixes", ["executed", "without sharing"], [[executed, unshared]]
    )
    if not quick:
        claims(run, study, numbers)
        run.part("baselines", baselines, stack, tokenizer, study, shuffled)
        run.part("other penalty", other_penalty, stack, tokenizer, study)
        run.part("predictor", predictor, stack, tokenizer, study)


if __name__ == "__main__":
    raise SystemExit(main(experiment, seed=42, quick="fewer questions and simulations, under a minute"))
